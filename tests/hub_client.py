"""A client process of the loopback Hub: the real libraries, imported after their environment is set.

One process answers many requests, since importing the libraries takes seconds. What it prints is kept in `output`.
"""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers import ROOT
from loopback_http import Fault
from loopback_hub import LoopbackHub, Repo


_LOOP = """
import json, sys, traceback
answers = open(int(sys.argv[1]), "w")
shared = {}
for line in sys.stdin:
    request = json.loads(line)
    scope = dict(shared, **request["values"])
    try:
        exec(compile(request["code"], "<snippet>", "exec"), scope)
        if request["shared"]:
            shared.update(scope)
        answer = {"result": scope.get("result")}
    except BaseException as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        answer = {"error": kinds, "message": str(error), "traceback": traceback.format_exc()}
    print(json.dumps(answer, default=str), file=answers, flush=True)
"""


QUIET = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
# Defines `try_push(case)`, which gives the publication or the error as a dict, and `push_all(cases)`, many at once.
PUBLISHER = """
import logging
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from datasets import Dataset, load_dataset
from hf_in2core.cards.publish import push_influence_dataset as push

logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)

def make_pool(rows=40, seed=0):
    scores = np.random.default_rng(seed).normal(size=rows)
    return Dataset.from_dict({"prompt": [f"p{i}" for i in range(rows)], "influence": scores.tolist()})

def try_push(case):
    pool = make_pool(case.get("rows", 40), case.get("seed", 0))
    coresets = {name: pool.select(range(10)) for name in case.get("coresets", ["coreset_25"])}
    try:
        return vars(push(case["repo_id"], pool, coresets=coresets, token=case["token"], **case.get("options", {})))
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}

def push_all(cases):
    with ThreadPoolExecutor(min(len(cases), 40)) as threads:
        return list(threads.map(try_push, cases))
"""
# Rows to publish, and how, for the client of tests/shared_fixtures.py.
POOL = """
import numpy as np
from datasets import Dataset

def make_pool(rows=60, seed=0, word="row"):
    generator = np.random.default_rng(seed)
    influence = generator.normal(size=rows)
    return Dataset.from_dict({
        "prompt": [f"{word} {i} " + "x" * int(generator.integers(80)) for i in range(rows)],
        "completion": [f" answer {i}" for i in range(rows)],
        "influence": [None if i % 20 == 7 else float(v) for i, v in enumerate(influence)],
        "num_loss_tokens": [0 if i % 20 == 7 else int(i % 9) + 1 for i in range(rows)],
    })

def make_core(pool, share):
    from hf_in2core import select_coreset
    return select_coreset(pool, fraction=share)
"""
PUSH = """
pool = make_pool()
publication = push(repo_id, pool, coresets={"coreset_50": make_core(pool, 0.5)})
result = vars(publication)
"""
# Of the user ada.
TOKEN = "hf_" + "A" * 34
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")


def make_env(hub: LoopbackHub, home: Path, token: str | None, **extra: str) -> dict[str, str]:
    """Environment of a client process: this Hub, an HF_HOME of its own, nothing inherited about the real Hub."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    # The clients' own limit is 10 s, which a busy machine may need for one answer.
    own |= {"HF_HUB_ETAG_TIMEOUT": "120", "HF_HUB_DOWNLOAD_TIMEOUT": "120"}
    own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    own |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return kept | own | ({"HF_TOKEN": token} if token else {}) | extra


class ClientError(Exception):
    """An exception in the client process: the names of its classes, and its message."""

    def __init__(self, kinds: list[str], message: str, traceback: str):
        super().__init__(traceback)
        self.kinds, self.message = kinds, message


class HubClient:
    """A Python process with this Hub as its Hub, an HF_HOME of its own and one token."""

    def __init__(self, hub: LoopbackHub, home: Path, token: str | None, **env: str):
        home.mkdir(parents=True, exist_ok=True)
        self.output_path = home / "output.txt"
        read, write = os.pipe()
        with open(self.output_path, "a") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-c", _LOOP, str(write)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[write],
                env=make_env(hub, home, token, **env),
                cwd=home,
                text=True,
                start_new_session=True,
            )
        os.close(write)
        self.answers = os.fdopen(read)

    def __enter__(self) -> "HubClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def output(self) -> str:
        return self.output_path.read_text()

    def start(self, code: str, shared: bool = False, **values: Any) -> None:
        """Send a snippet and do not wait for it. `values` are its variables; `shared` keeps what it defines."""
        assert self.process.stdin is not None
        request = {"code": textwrap.dedent(code), "values": values, "shared": shared}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def wait(self) -> Any:
        """What the snippet left in `result`; raises [`ClientError`] with its exception."""
        line = self.answers.readline()
        assert line, f"the client process died: {self.output[-3000:]}"
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(answer["error"], answer["message"], answer["traceback"])
        return answer["result"]

    def run(self, code: str, shared: bool = False, **values: Any) -> Any:
        self.start(code, shared=shared, **values)
        return self.wait()

    def kill(self) -> None:
        """kill -9, the whole group."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.answers):
            if stream is not None and not stream.closed:
                stream.close()


def get_repo(hub: LoopbackHub, repo_id: str, repo_type: str = "dataset") -> Repo:
    return hub.repos[(repo_type, repo_id)]


def check_that_tokens_stayed_secret(hub: LoopbackHub, client: HubClient | None = None) -> None:
    """No request for a large file carried a token, no published file holds one, and no client printed one."""
    assert all(_TOKEN.fullmatch(token.encode()) for token in hub.users)
    assert [r for r in hub.log if r.origin == "store"]
    assert not [r.path for r in hub.log if r.origin == "store" and "authorization" in r.headers]
    blobs = {blob for repo in hub.repos.values() for commit in repo.commits.values() for blob in commit.tree.values()}
    assert not [blob for blob in blobs if _TOKEN.search(blob.data)]
    if client is not None:
        assert "Request" in client.output, "the client was to log all it does"
        assert not _TOKEN.search(client.output.encode())


@contextmanager
def serve_hub(token: str, **options: Any) -> Iterator[LoopbackHub]:
    """A Hub of one user, ada, whose token must have stayed secret at the end."""
    with LoopbackHub(**options) as hub:
        hub.add_user(token, "ada")
        yield hub
        check_that_tokens_stayed_secret(hub)


@contextmanager
def start_publisher(hub: LoopbackHub, home: Path, token: str) -> Iterator[HubClient]:
    """A process that publishes (`PUBLISHER`) and logs all it does, and must not have printed a token at the end."""
    with HubClient(hub, home, token, HF_DEBUG="1", **QUIET) as client:
        client.run(PUBLISHER, shared=True)
        yield client
        check_that_tokens_stayed_secret(hub, client)


# --- cases of a publication ---

OWN_CARD = b"---\nlicense: mit\n---\n# Mine\n\nBy hand.\n"
ADDED = {"README.md", "data/train-00000-of-00001.parquet", "data/coreset_25-00000-of-00001.parquet"}


class Cases:
    """Cases of a batch: each gets a user with a token, and its faults."""

    def __init__(self, hub: LoopbackHub):
        self.hub = hub
        self.cases: list[dict[str, Any]] = []
        self.names: dict[Any, str] = {}

    def add(self, name: Any, faults: list[Fault], existing: bool = False, **case: Any) -> Repo | None:
        number = len(self.hub.users)
        user, token = f"user{number}", f"hf_{number:034d}"
        self.hub.add_user(token, user)
        for fault in faults:
            fault.owner = user
        self.hub.faults += faults
        repo = None
        if existing:
            repo = self.hub.add_repo("dataset", f"{user}/x", {"README.md": OWN_CARD, "own.txt": b"own"})
        self.names[name] = user
        self.cases.append({"repo_id": f"{user}/x", "token": token} | case)
        return repo

    def run(self, client: HubClient) -> dict[Any, dict]:
        return dict(zip(self.names, client.run("result = push_all(cases)", cases=self.cases), strict=True))

    def get_repo(self, name: Any) -> Repo | None:
        return self.hub.repos.get(("dataset", f"{self.names[name]}/x"))


def is_complete(repo: Repo, existing: bool) -> bool:
    """One commit on top, with everything that was sent and everything that was there."""
    files = repo.files()
    own = {"own.txt"} if existing else set()
    if not existing:
        own_is_kept = True
    else:
        own_is_kept = files["own.txt"] == b"own" and b"By hand." in files["README.md"]
        own_is_kept = own_is_kept and b"license: mit" in files["README.md"]
    return set(files) == ADDED | own | {".gitattributes"} and own_is_kept and len(repo.history()) == 2


def is_untouched(repo: Repo | None, existing: bool) -> bool:
    if repo is None:
        return not existing
    return len(repo.history()) == 1 and len(repo.refs) == 1 and not repo.pulls
