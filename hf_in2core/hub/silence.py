"""A Hub that takes a request and never answers: the clients would wait for ever, so a limit is set while we ask.

`huggingface_hub` shares one HTTP client in a process and gives most of its requests no time limit. While a call of
ours is under way, requests without a limit get one. The limit is on silence (no byte sent or received), not on how
long an upload takes. The client of Xet uploads is another one, with limits of its own.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.utils import get_session, httpx


# Longer than gateways wait for the Hub itself (a large commit may take a minute); HF_HUB_DOWNLOAD_TIMEOUT raises it.
LONGEST_SILENCE = max(120.0, float(constants.HF_HUB_DOWNLOAD_TIMEOUT))
_lock = threading.Lock()


@contextmanager
def limited_silence() -> Iterator[None]:
    """
    Let requests fail with `httpx.TimeoutException` when the other side is silent for `LONGEST_SILENCE` seconds.

    Holds for every request of the shared client in the meantime that has no limit of its own. When a connection is
    refused in the middle of an upload, `huggingface_hub` makes a new client, which has none until the next call.
    """
    hooks = get_session().event_hooks["request"]
    with _lock:
        hooks.append(_limit)
    try:
        yield
    finally:
        with _lock:
            hooks.remove(_limit)


def _limit(request: httpx.Request) -> None:
    limits = request.extensions.get("timeout") or {}
    if all(seconds is None for seconds in limits.values()):
        request.extensions = {**request.extensions, "timeout": httpx.Timeout(LONGEST_SILENCE).as_dict()}
