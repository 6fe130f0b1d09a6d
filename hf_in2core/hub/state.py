"""What a repository on the Hub holds, and when a failed request is worth repeating. Reads only.

A repository's state is always read by commit, never by branch alone: a branch may move between two requests, and a
client whose first request fails may answer from an old cache without saying so.
"""

import fnmatch
import hashlib
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_url
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    HfHubHTTPError,
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    httpx,
    parse_ratelimit_headers,
)

from hf_in2core.hub import silence


logger = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 12
_MOST_SILENCES = 4  # a Hub that does not answer is not asked as often: each time takes minutes
CONFLICTS = (409, 412)  # another commit is in progress, or was made since the head was read
_FIRST_WAIT, _LONGEST_WAIT, _LONGEST_RETRY_AFTER = 0.5, 30.0, 600.0
# Pickles run code when they are loaded, and `training_args.bin` holds `hub_token` in plain text.
_NEVER_UPLOADED = ("*.bin", "*.pkl", "*.pickle", "*.joblib", "*.pt", "*.pth", "*.ckpt")
_LONGEST_TEXT = 50_000_000  # bytes of a card or a results.json that is read into memory


class PublicationError(RuntimeError):
    """The Hub holds something else than what was sent, or gives something else than what it lists."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it: `sha256` for a large file (LFS), git's `blob_id` for a regular one."""

    size: int
    blob_id: str
    sha256: str | None


@dataclass(frozen=True)
class Head:
    """A repository at one commit: its files, and `read(path)`, which gives a small file's bytes or `None`."""

    repo_id: str
    oid: str
    private: bool
    files: dict[str, RemoteFile]
    read: Callable[[str], bytes | None]


@dataclass
class LocalFile:
    """Bytes to publish, hashed once both ways: which one the Hub compares is known only after it is asked."""

    source: str | bytes
    size: int
    sha256: bytes
    blob_id: str

    @classmethod
    def read(cls, source: str | Path | bytes) -> "LocalFile":
        size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
        sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
        if isinstance(source, bytes):
            sha256.update(source)
            sha1.update(source)
            return cls(source, size, sha256.digest(), sha1.hexdigest())
        with open(source, "rb") as file:
            while chunk := file.read(1 << 20):
                sha256.update(chunk)
                sha1.update(chunk)
        return cls(str(source), size, sha256.digest(), sha1.hexdigest())

    def equals(self, remote: RemoteFile | None) -> bool:
        if remote is None or remote.size != self.size:
            return False
        return remote.sha256 == self.sha256.hex() if remote.sha256 else remote.blob_id == self.blob_id

    def to_operation(self, path_in_repo: str) -> CommitOperationAdd:
        operation = CommitOperationAdd(path_in_repo=path_in_repo, path_or_fileobj=self.source)
        # Operations are made afresh for every attempt (they remember the head they were compared with); large files
        # are not hashed again for it.
        operation.upload_info.sha256 = self.sha256
        return operation


def call_with_retries(call: Callable[[], T]) -> T:
    """
    Call the Hub, and again while it fails in passing (rate limits, server errors, lost connections).

    Only for calls that may be repeated without harm: reads, and "create unless it exists".

    Args:
        call (`Callable`):
            The request, without arguments.

    Returns:
        What `call` returns. The last error is raised when it keeps failing, and at once when it is not of that kind.

    Raises:
        TimeoutError: the Hub takes requests and does not answer them; see [`silence`].
    """
    for attempt in range(ATTEMPTS):
        try:
            with silence.limited_silence():
                return call()
        except Exception as error:
            sleep_before_retry(error, attempt)
    raise AssertionError("unreachable: the last attempt raises")


def list_folder(folder: str | Path, path_in_repo: str = "") -> dict[str, Path]:
    """
    Path in the repository → file, for everything in `folder` that may be published: no hidden files, no pickles, no
    `training_args.bin`.

    Raises:
        ValueError: a link in it leads to a file elsewhere, which nobody may have meant to publish.
    """
    root, files = Path(folder), {}
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        hidden = any(part.startswith(".") for part in inside.parts)
        if path.is_file() and not hidden and not any(fnmatch.fnmatch(path.name, name) for name in _NEVER_UPLOADED):
            check_inside(path, root)
            files["/".join(filter(None, [path_in_repo.strip("/"), inside.as_posix()]))] = path
    return files


def check_inside(path: Path, folder: Path) -> None:
    """Raise `ValueError` when a file is a link to somewhere outside of `folder` and of the Hub's cache, all links."""
    target = path.resolve()
    if not any(target.is_relative_to(Path(root).resolve()) for root in (folder, constants.HF_HUB_CACHE)):
        raise ValueError(
            f"{path} is a link to {target}, outside of the folder that is published. Put a copy in its place if it is "
            "meant to be public."
        )


def read_head(repo_id: str, *, repo_type: str, revision: str | None = None, token: str | None = None) -> Head:
    """
    Read what a branch of a repository holds now.

    Args:
        repo_id (`str`):
            Repository, `"user/name"`.
        repo_type (`str`):
            `"dataset"` or `"model"`.
        revision (`str`, *optional*):
            Branch, tag or commit; the default branch when `None`.
        token (`str`, *optional*):
            Access token.

    Returns:
        [`Head`]: its commit, visibility and files.
    """
    api = HfApi(token=token, library_name="hf_in2core")
    info = call_with_retries(lambda: api.repo_info(repo_id, repo_type=repo_type, revision=revision))
    oid = info.sha
    if oid is None:
        raise PublicationError(f"The Hub gives no commit for {repo_id}. Try again later.")

    def list_files() -> dict[str, RemoteFile]:
        tree = api.list_repo_tree(repo_id, recursive=True, revision=oid, repo_type=repo_type)
        return {entry.path: _to_remote(entry) for entry in tree if isinstance(entry, RepoFile)}

    files = call_with_retries(list_files)

    def read(path: str) -> bytes | None:
        if path not in files:
            return None
        if files[path].size > _LONGEST_TEXT:
            raise PublicationError(
                f"{path} of {repo_id} has {files[path].size:,} bytes, too many for what it should be."
            )
        # Not through the cache: a failing first request would be answered from there without a word.
        url = hf_hub_url(repo_id, path, repo_type=repo_type, revision=oid)
        data = call_with_retries(lambda: _get(url, token))
        if not LocalFile.read(data).equals(files[path]):
            raise PublicationError(
                f"The Hub gives {path} of {repo_id} with another hash than it lists. Try again later."
            )
        return data

    return Head(repo_id, oid, bool(info.private), files, read)


def _get(url: str, token: str | None) -> bytes:
    response = get_session().get(url, headers=build_hf_headers(token=token, library_name="hf_in2core"))
    hf_raise_for_status(response)
    return response.content


def find_differences(
    api: HfApi, repo_id: str, repo_type: str, oid: str, expected: Mapping[str, LocalFile]
) -> list[str]:
    """Paths that the commit `oid` does not hold with the expected content, by the hashes that the Hub reports."""
    found: dict[str, RemoteFile] = {}
    for paths in (list(expected)[start : start + 500] for start in range(0, len(expected), 500)):
        ask = partial(api.get_paths_info, repo_id, paths, repo_type=repo_type, revision=oid)
        found |= {info.path: _to_remote(info) for info in call_with_retries(ask) if isinstance(info, RepoFile)}
    return [path for path, file in expected.items() if not file.equals(found.get(path))]


def _to_remote(entry: RepoFile) -> RemoteFile:
    return RemoteFile(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)


def get_status(error: BaseException) -> int | None:
    """HTTP status that an error of the client stands for; `None` for any other error."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def sleep_before_retry(error: Exception, attempt: int, attempts: int = ATTEMPTS) -> None:
    """
    Wait as long as the Hub asks, or a little longer each time; raise `error` when a retry cannot help.

    Raises:
        TimeoutError: in place of `error` when the Hub was silent again and again.
    """
    wrapped = error.__cause__ if isinstance(error, RuntimeError) else None  # as uploads do with what went wrong
    cause: BaseException = wrapped or error
    status, expired = get_status(cause), False
    if wrapped is not None and isinstance(cause, HfHubHTTPError):
        # The signed address of an upload expires; the next attempt gets a new one.
        expired = status == 403 and not str(cause.response.url).startswith(constants.ENDPOINT)
    # A gateway's HTML page where the client expects JSON ends in a JSONDecodeError.
    passing = isinstance(
        cause, httpx.TimeoutException | httpx.NetworkError | httpx.RemoteProtocolError | json.JSONDecodeError
    ) or (status is not None and (status in (408, 429, *CONFLICTS) or status >= 500 or expired))
    if isinstance(cause, httpx.TimeoutException) and (wrapped is not None or attempt + 1 >= _MOST_SILENCES):
        # An upload has been repeated by the client itself.
        raise TimeoutError(
            f"The Hub at {constants.ENDPOINT} takes requests but did not answer for "
            f"{silence.LONGEST_SILENCE:.0f} s, several times in a row. Nothing is published by halves, and what "
            "arrived is not sent again: repeat it when the Hub answers. HF_HUB_DOWNLOAD_TIMEOUT=600 waits longer."
        ) from error
    if not passing or attempt + 1 >= attempts:
        raise error
    # A server in trouble is given time; others who publish are only to be met at another moment.
    is_conflict = status in CONFLICTS
    wait = _FIRST_WAIT * min(1 + attempt, 8) if is_conflict else min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT)
    wait *= (0.5 if is_conflict else 1) + random.random()
    if isinstance(cause, HfHubHTTPError):
        asked = _parse_retry_after(cause)
        if asked is not None and asked > _LONGEST_RETRY_AFTER:
            raise error
        wait = max(wait, asked or 0.0)
    logger.warning("%s; trying again in %.1f s.", str(error).strip().partition("\n")[0], wait)
    time.sleep(wait)


def _parse_retry_after(error: HfHubHTTPError) -> float | None:
    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    value = headers.get("Retry-After", "").strip()
    if not value:
        return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None
    if re.fullmatch("[0-9]+", value):
        return float(value)
    try:
        return (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return None
