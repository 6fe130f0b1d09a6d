"""Faults and attacks on a publication: it ends complete, or the repository is untouched and a rerun completes it.

The real clients talk to the Hub of `loopback_hub.py`. Cases of one batch run at once, each with a user, a token and
repositories of its own, so that the waits of their retries overlap.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_client import HubClient
from loopback_http import Fault
from loopback_hub import Blob, LoopbackHub, Repo


MAIN = "hf_" + "M" * 34
SETUP = """
import logging
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from datasets import Dataset, load_dataset
from hf_in2core.publish import push_influence_dataset as push

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
OWN_CARD = b"---\nlicense: mit\n---\n# Mine\n\nBy hand.\n"
ADDED = {"README.md", "data/train-00000-of-00001.parquet", "data/coreset_25-00000-of-00001.parquet"}
TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
SHA = re.compile(r"[0-9a-f]{40}")


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub(multipart_above=200_000) as hub:
        hub.add_user(MAIN, "ada")
        yield hub
        # Whatever happened above: no large-file request carried a token, and no file holds one.
        assert not [r for r in hub.log if r.origin == "store" and "authorization" in r.headers]
        for repo in hub.repos.values():
            for commit in repo.commits.values():
                for path, blob in commit.tree.items():
                    assert not TOKEN.search(blob.data), (repo.id, path)


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory) -> Iterator[HubClient]:
    quiet = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with HubClient(hub, tmp_path_factory.mktemp("home"), MAIN, HF_DEBUG="1", **quiet) as client:
        client.run(SETUP, shared=True)
        yield client
        # With debug logging of everything, no token was printed.
        printed = client.output
        assert "HTTP Request" in printed or "Request" in printed
        assert all(TOKEN.fullmatch(token.encode()) for token in hub.users)
        assert not TOKEN.search(printed.encode())


class Cases:
    """Cases of a batch: each gets a user with a token, and its faults."""

    def __init__(self, hub: LoopbackHub):
        self.hub = hub
        self.cases: list[dict[str, Any]] = []
        self.names: dict[str, str] = {}

    def add(self, name: str, faults: list[Fault], existing: bool = False, **case: Any) -> Repo | None:
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

    def run(self, client: HubClient) -> dict[str, dict]:
        return dict(zip(self.names, client.run("result = push_all(cases)", cases=self.cases), strict=True))

    def get_repo(self, name: str) -> Repo | None:
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


# A fault at every request of a publication in turn

PASSING: list[tuple[str, dict]] = [
    ("status 429", {"action": "status", "status": 429, "headers": {"Retry-After": "1"}}),
    ("status 500", {"action": "status", "status": 500}),
    ("status 502", {"action": "status", "status": 502}),
    ("status 503", {"action": "status", "status": 503}),
    ("status 504", {"action": "status", "status": 504}),
    ("reset", {"action": "reset"}),
    ("answer lost", {"action": "lost"}),
    ("done, yet 500", {"action": "misanswer", "status": 500}),
]
REFUSING: list[tuple[str, dict]] = [
    (f"status {code}", {"action": "status", "status": code}) for code in (401, 403, 404)
]


def count_requests(hub: LoopbackHub, client: HubClient, existing: bool) -> int:
    cases = Cases(hub)
    cases.add("clean", [], existing)
    assert "error" not in cases.run(client)["clean"]
    return len(hub.requests(owner=cases.names["clean"]))


def sweep(hub: LoopbackHub, client: HubClient, kinds: list, every_kind: bool) -> tuple[int, int]:
    """Publish once per request and kind of fault; returns how many ended complete and how many untouched."""
    complete = untouched = 0
    for existing in (False, True):
        cases, faults = Cases(hub), {}
        for number in range(count_requests(hub, client, existing)):
            chosen = kinds if every_kind else [kinds[(number + existing) % len(kinds)]]
            for label, fields in chosen:
                name = f"{label} at request {number}"
                faults[name] = Fault(number=number, **fields)
                cases.add(name, [faults[name]], existing)
        outcomes = cases.run(client)
        again = []
        for name, outcome in outcomes.items():
            assert faults[name].hits == 1, name
            repo = cases.get_repo(name)
            if "error" not in outcome:
                assert repo is not None and is_complete(repo, existing), (name, outcome)
                assert SHA.fullmatch(outcome["commit"]) and outcome["commit"] == repo.resolve("main").oid, name
                complete += 1
            else:
                # A refusal to be asked what it holds, after the commit, is an error over a complete publication.
                done = repo is not None and is_complete(repo, existing)
                assert done or is_untouched(repo, existing), name
                again += [] if done else [name]
                complete, untouched = complete + done, untouched + (not done)
        # Nothing was lost: the same call afterwards completes every one of them.
        for name, outcome in cases.run(client).items():
            repo = cases.get_repo(name)
            assert repo is not None and is_complete(repo, existing), (name, outcome)
            assert (outcome["changed"] == []) == (name not in again), (name, outcome)
    return complete, untouched


@pytest.mark.parametrize("every_kind", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_passing_fault_at_any_request_does_not_stop_a_publication(hub, client, every_kind) -> None:
    complete, untouched = sweep(hub, client, PASSING, every_kind)
    print(f"{complete} faults in passing, all ended complete")
    assert untouched == 0 and complete >= 25


@pytest.mark.parametrize("every_kind", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_refusal_at_any_request_leaves_all_or_nothing(hub, client, every_kind) -> None:
    complete, untouched = sweep(hub, client, REFUSING, every_kind)
    print(
        f"{complete + untouched} refusals: {complete} ended complete, {untouched} untouched and complete when repeated"
    )
    assert untouched >= 20


# Single cases, run as one batch


def delete_repo(hub: LoopbackHub, user: str) -> None:
    del hub.repos[("dataset", f"{user}/x")]


def corrupt(hub: LoopbackHub, user: str) -> None:
    repo = hub.repos[("dataset", f"{user}/x")]
    repo.resolve("main").tree["data/train-00000-of-00001.parquet"] = Blob(b"something else", True)


def commit_else(hub: LoopbackHub, user: str) -> None:
    repo = hub.repos[("dataset", f"{user}/x")]
    tree = repo.resolve("main").tree
    card = tree["README.md"].data + b"\nAdded meanwhile.\n"
    repo.commit(
        "refs/heads/main", repo.resolve("main").oid, "by hand", "", user, tree | {"README.md": Blob(card, False)}
    )


@pytest.fixture(scope="module")
def batch(hub, client) -> tuple[Cases, dict[str, dict]]:
    cases = Cases(hub)

    def call(function: Callable[[LoopbackHub, str], Any], **fields: Any) -> Fault:
        fault = Fault("call", **fields)
        fault.call = lambda hub: function(hub, str(fault.owner))
        return fault

    pr = {"options": {"create_pr": True}}
    cases.add("lost commit", [Fault("lost", "commit")], existing=True)
    cases.add("late 500", [Fault("misanswer", "commit", status=500)], existing=True)
    cases.add("lost commit, then others", [Fault("lost", "commit"), call(commit_else, kind="commits")], existing=True)
    cases.add("lost pull request", [Fault("lost", "commit")], existing=True, **pr)
    cases.add("late 500 of a pull request", [Fault("misanswer", "commit", status=500)], existing=True, **pr)
    cases.add("moved head", [call(commit_else, kind="commit")], existing=True)
    cases.add("moved head, pull request", [call(commit_else, kind="commit")], existing=True, **pr)
    cases.add("in progress", [Fault("status", "commit", status=409, times=3)], existing=True)
    waits = {"Retry-After": "2"}
    cases.add("asked to wait", [Fault("status", "commit", status=429, headers=waits)], existing=True)
    limit = {"RateLimit": '"api";r=0;t=2'}
    cases.add("rate limit", [Fault("status", "commit", status=429, headers=limit)], existing=True)
    date = {"Retry-After": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 4))}
    cases.add("asked by date", [Fault("status", "commit", status=503, headers=date)], existing=True)
    long = {"Retry-After": "86400"}
    cases.add("asked to wait a day", [Fault("status", "commit", status=429, headers=long)], existing=True)
    cases.add("lonely 412", [Fault("status", "commit", status=412, times=99)], existing=True)
    cases.add("expired address", [Fault("status", "upload", status=403)], existing=True)
    cases.add("other content", [call(corrupt, kind="paths_info")], existing=True)
    ignoring = cases.add("ignored", [], existing=True)
    assert ignoring is not None
    ignoring.resolve("main").tree[".gitignore"] = Blob(b"*.parquet\n", False)
    cases.add("vanishes", [call(delete_repo, kind="preupload")], existing=True)
    appear = lambda hub, user: hub.add_repo("dataset", f"{user}/x", {"README.md": OWN_CARD, "own.txt": b"own"})  # noqa: E731
    cases.add("appears", [call(appear, kind="create_repo")])
    shut = lambda hub, user: setattr(hub.repos[("dataset", f"{user}/x")], "private", True)  # noqa: E731
    cases.add("turns private", [call(shut, kind="preupload")], existing=True)
    opened = lambda hub, user: hub.add_repo("dataset", f"{user}/x", private=False)  # noqa: E731
    cases.add("appears public", [call(opened, kind="create_repo")], options={"private": True})
    cases.add("slow", [Fault("slow", "upload", seconds=1.5), Fault("slow", "commit", seconds=1.5)], existing=True)
    bad_card = cases.add("bad card", [], existing=True)
    assert bad_card is not None
    bad_card.resolve("main").tree["README.md"] = Blob(b"---\na: [1\n---\nmine\n", False)
    return cases, cases.run(client)


def test_a_lost_answer_makes_no_second_commit(hub, batch) -> None:
    cases, outcomes = batch
    for name in ("lost commit", "late 500"):
        repo = cases.get_repo(name)
        assert is_complete(repo, existing=True), outcomes[name]
        assert set(outcomes[name]["changed"]) == ADDED
        assert outcomes[name]["commit"] == repo.resolve("main").oid
        assert len(hub.requests(cases.names[name], "commit")) == 1


def test_a_lost_answer_is_found_under_later_commits(batch) -> None:
    cases, outcomes = batch
    repo = cases.get_repo("lost commit, then others")
    titles = [commit.title for commit in repo.history()]
    assert titles.count("Publish influence") == 1
    ours = next(commit for commit in repo.history() if commit.title == "Publish influence")
    assert outcomes["lost commit, then others"]["commit"] == ours.oid


def test_a_lost_answer_opens_no_second_pull_request(batch) -> None:
    cases, outcomes = batch
    for name in ("lost pull request", "late 500 of a pull request"):
        repo = cases.get_repo(name)
        assert len(repo.pulls) == 1, outcomes[name]
        assert outcomes[name]["pr_url"].endswith("/discussions/1")
        assert outcomes[name]["commit"] == repo.refs["refs/pr/1"]
        assert set(repo.files("main")) == {"README.md", "own.txt", ".gitattributes"}
        assert set(repo.files("refs/pr/1")) > ADDED


def test_a_commit_in_between_is_merged_and_not_overwritten(batch) -> None:
    cases, outcomes = batch
    repo = cases.get_repo("moved head")
    assert [commit.title for commit in repo.history()] == ["Publish influence", "by hand", "initial commit"]
    card = repo.files()["README.md"]
    assert b"Added meanwhile." in card and b"By hand." in card and b"in2core:begin" in card
    pulled = cases.get_repo("moved head, pull request")
    assert len(pulled.pulls) == 1 and "error" not in outcomes["moved head, pull request"]


def test_waits_as_long_as_it_is_asked_to(hub, batch) -> None:
    cases, outcomes = batch
    for name, seconds in (("asked to wait", 2), ("rate limit", 2), ("asked by date", 1)):
        first, second = hub.requests(cases.names[name], "commit")
        assert second.time - first.time >= seconds, name
        assert is_complete(cases.get_repo(name), existing=True)
    assert is_complete(cases.get_repo("in progress"), existing=True)
    too_long = outcomes["asked to wait a day"]
    assert too_long["error"] == "HfHubHTTPError" and "429" in too_long["message"]
    assert is_untouched(cases.get_repo("asked to wait a day"), existing=True)


def test_a_refusal_that_looks_like_a_race_is_named(batch) -> None:
    cases, outcomes = batch
    assert outcomes["lonely 412"]["error"] == "PermissionError"
    assert "create_pr=True" in outcomes["lonely 412"]["message"]
    assert is_untouched(cases.get_repo("lonely 412"), existing=True)


def test_expired_addresses_and_slow_answers_are_survived(batch) -> None:
    cases, outcomes = batch
    for name in ("expired address", "slow", "turns private"):
        assert is_complete(cases.get_repo(name), existing=True), outcomes[name]
    assert cases.get_repo("turns private").private


def test_what_the_hub_holds_is_compared_with_what_was_sent(batch) -> None:
    _, outcomes = batch
    for name in ("other content", "ignored"):
        assert outcomes[name]["error"] == "PublicationError", outcomes[name]
        assert "data/train-00000-of-00001.parquet" in outcomes[name]["message"]


def test_repositories_that_come_and_go(hub, client, batch) -> None:
    cases, outcomes = batch
    assert outcomes["vanishes"]["error"] == "RepositoryNotFoundError"
    assert cases.get_repo("vanishes") is None
    case = next(case for case in cases.cases if case["repo_id"] == f"{cases.names['vanishes']}/x")
    assert "error" not in client.run("result = try_push(case)", case=case)
    assert is_complete(cases.get_repo("vanishes"), existing=False)
    assert is_complete(cases.get_repo("appears"), existing=True), outcomes["appears"]
    assert outcomes["appears public"]["error"] == "ValueError" and "is public" in outcomes["appears public"]["message"]
    assert is_untouched(cases.get_repo("appears public"), existing=True)


def test_a_card_that_cannot_be_merged_is_left_alone(batch) -> None:
    cases, outcomes = batch
    assert outcomes["bad card"]["error"] == "ValueError" and "README.md" in outcomes["bad card"]["message"]
    assert is_untouched(cases.get_repo("bad card"), existing=True)


# Several publishers


def test_five_publishers_at_once_all_end_published(hub, client) -> None:
    hub.add_repo("dataset", "lab/five", {"README.md": OWN_CARD, "own.txt": b"own"})
    cases = []
    for number in range(5):
        hub.add_user(f"hf_five{number:030d}", f"five{number}", orgs=("lab",))
        # Three add a coreset to the same configuration, two bring a configuration of their own.
        options = {"config_name": f"config_{number}"} if number >= 3 else {}
        case = {"repo_id": "lab/five", "token": f"hf_five{number:030d}", "options": options}
        cases.append(case | {"coresets": [f"coreset_{number}"]})
    hub.commit_seconds = 0.15
    try:
        outcomes = client.run("result = push_all(cases)", cases=cases)
    finally:
        hub.commit_seconds = 0.0
    assert not [outcome for outcome in outcomes if "error" in outcome]
    repo = hub.repos[("dataset", "lab/five")]
    # Each commit is one publisher's, whole, and none took away what another had published.
    assert {outcome["commit"] for outcome in outcomes} == {
        c.oid for c in repo.history() if c.title != "initial commit"
    }
    assert len(repo.history()) == 6
    assert [r.status for r in hub.log if r.kind == "commit" and "lab/five" in r.path and r.status in (409, 412)]
    loaded = client.run(
        """
        result = [load_dataset("lab/five").num_rows]
        result += [load_dataset("lab/five", name).num_rows for name in ("config_3", "config_4")]
        """
    )
    assert loaded[0] == {"train": 40, "coreset_0": 10, "coreset_1": 10, "coreset_2": 10}
    assert loaded[1:] == [{"train": 40, "coreset_3": 10}, {"train": 40, "coreset_4": 10}]
    card = repo.files()["README.md"].decode()
    assert "By hand." in card and "license: mit" in card and repo.files()["own.txt"] == b"own"
    assert [card.count(f"in2core:begin {name} -->") for name in ("default", "config_3", "config_4")] == [1, 1, 1]


# Interruptions


KILLED = """
import numpy as np
from datasets import Dataset
from hf_in2core.publish import push_influence_dataset
scores = np.random.default_rng(0).normal(size=30_000)
pool = Dataset.from_dict({"prompt": [f"p{i}" for i in range(30_000)], "influence": scores.tolist()})
coresets = {"coreset_50": pool.select(range(15_000))}
result = vars(push_influence_dataset("ada/killed", pool, coresets=coresets, max_shard_size="40KB"))
"""


def test_killed_during_the_upload_and_run_again(hub, tmp_path) -> None:
    slow = Fault("slow", "upload", owner="ada", times=99, seconds=1.0)
    hub.faults += [Fault("slow", "upload", owner="ada", times=3, seconds=0.0), slow]
    with HubClient(hub, tmp_path / "killed", MAIN) as victim:
        victim.start(KILLED)
        for _ in range(600):
            arrived = [r.path for r in hub.requests("ada", "upload") if r.status == 200]
            if len(arrived) >= 2:
                break
            time.sleep(0.05)
        victim.kill()
    slow.times = 0
    repo = hub.repos[("dataset", "ada/killed")]
    assert len(arrived) >= 2 and len(repo.history()) == 1, "it was killed in the middle of the upload"
    while any(request.status is None for request in hub.requests("ada", "upload")):
        time.sleep(0.05)  # what was under way arrives, or breaks off
    stored = set(repo.objects)
    sent_before = len(hub.requests("ada", "upload"))
    with HubClient(hub, tmp_path / "again", MAIN) as second:
        published = second.run(KILLED)
    sent = {request.path.rsplit("/", 1)[1] for request in hub.requests("ada", "upload")[sent_before:]}
    assert len(repo.history()) == 2 and published["commit"] == repo.resolve("main").oid
    shards = {blob.sha256 for path, blob in repo.resolve("main").tree.items() if path.endswith(".parquet")}
    assert sent == shards - stored, "what had arrived was sent again"
    assert sent and stored & shards


def test_a_reset_in_the_middle_of_a_part_of_a_large_file(hub, client) -> None:
    hub.add_user("hf_parts" + "p" * 29, "parts")
    hub.faults.append(Fault("reset", "upload", owner="parts", number=None, times=2))
    outcome = client.run(
        """
        generator = np.random.default_rng(0)
        pool = Dataset.from_dict({"influence": generator.normal(size=60_000)})
        result = vars(push("parts/x", pool, token=token))
        """,
        token="hf_parts" + "p" * 29,
    )
    assert len(hub.requests("parts", "complete")) == 1
    assert len(hub.requests("parts", "upload")) >= 4
    repo = hub.repos[("dataset", "parts/x")]
    assert repo.resolve("main").oid == outcome["commit"]
    rows = client.run("result = load_dataset('parts/x', split='train').num_rows")
    assert rows == 60_000


def test_a_full_disk_sends_nothing_and_a_rerun_completes(hub, client, tmp_path) -> None:
    code = """
    import os, resource, tempfile
    tempfile.tempdir = folder
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    case = {"repo_id": "ada/disk", "token": None, "rows": 20_000}
    if limit:
        # No file may grow beyond this: writing a shard fails as it does on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        result = try_push(case)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        tempfile.tempdir = None
    result["left"] = os.listdir(folder)
    """
    with HubClient(hub, tmp_path / "home", MAIN) as fresh:  # its own log file stays small
        fresh.run(SETUP.replace("level=logging.DEBUG", "level=logging.ERROR"), shared=True)
        failed = fresh.run(code, folder=str(tmp_path), limit=60_000)
        assert failed["error"] == "OSError" and "too large" in failed["message"].lower()
        assert ("dataset", "ada/disk") not in hub.repos
        assert not [name for name in failed["left"] if name.startswith("in2core-")]
        done = fresh.run(code, folder=str(tmp_path), limit=0)
    assert "error" not in done
    assert len(hub.repos[("dataset", "ada/disk")].history()) == 2
    assert not [name for name in done["left"] if name.startswith("in2core-")]


# Readers


def test_an_old_cached_revision_does_not_pass_for_the_new_one(hub, client) -> None:
    case: dict[str, Any] = {"repo_id": "ada/stale", "token": None}
    assert "error" not in client.run("result = try_push(case)", case=case)
    read = "result = load_dataset('ada/stale', split='train', revision=revision).num_rows"
    assert client.run(read, revision=None) == 40
    failing = Fault("status", "resolve", owner="ada", method="HEAD", times=0, status=503)
    hub.faults.append(failing)
    second = client.run("result = try_push(case)", case=case | {"rows": 50})
    failing.times = failing.hits + 1
    # Even the new commit asked for by name is answered from the old cache when the first HEAD fails. So a publication
    # is not judged by loading it, but by the hashes that the Hub lists for its commit.
    assert client.run(read, revision=second["commit"]) in (40, 50)
    # While every HEAD fails, a publisher with an old card in that cache still merges with the one that is there.
    failing.times = 1000
    repo = hub.repos[("dataset", "ada/stale")]
    tree = repo.resolve("main").tree
    card = tree["README.md"].data + b"\nBy hand, meanwhile.\n"
    repo.commit("refs/heads/main", second["commit"], "by hand", "", "ada", tree | {"README.md": Blob(card, False)})
    third = client.run("result = try_push(case)", case=case | {"rows": 60})
    failing.times = 0
    assert third["commit"] == repo.resolve("main").oid
    assert b"By hand, meanwhile." in repo.files()["README.md"]
    assert client.run(read, revision=third["commit"]) == 60


def test_private_data_is_read_with_the_token_on_one_origin_only(hub, client) -> None:
    case: dict[str, Any] = {"repo_id": "ada/closed", "token": None, "options": {"private": True}}
    assert "error" not in client.run("result = try_push(case)", case=case)
    downloads = len(hub.requests(kind="download"))
    rows = client.run(
        """
        rows = load_dataset("ada/closed", split="train").num_rows
        streamed = sum(1 for _ in load_dataset("ada/closed", split="coreset_25", streaming=True))
        result = [rows, streamed]
        """
    )
    assert rows == [40, 10]
    assert len(hub.requests(kind="download")) > downloads  # whose headers the hub fixture looks at in the end


def test_text_in_the_rows_does_not_break_the_published_card(hub, client) -> None:
    evil = ["---\nlicense: evil\n---", "{{ 7 * 7 }}{% raw %}", "```\n# h\n```", "<script>x</script>", "[a](http://b)"]
    evil += ["<!-- in2core:end default -->", "nul \x00 \x1b[2J"]
    columns = {
        "text": evil,
        "influence": [-1.0, 2.0, -3.0, 4.0, -5.0, 6.0, -7.0],
        "a\n---\nb": [1] * 7,
        "<b>|`": [2] * 7,
    }
    rows = client.run(
        """
        pool = Dataset.from_dict(columns)
        push("ada/evil", pool)
        push("ada/evil", pool.add_column("more", [3] * 7))
        back = load_dataset("ada/evil", split="train")
        result = [back["text"][:], back.column_names]
        """,
        columns=columns,
    )
    assert rows == [evil, [*columns, "more"]]
    card = hub.repos[("dataset", "ada/evil")].files()["README.md"].decode()
    assert card.count("<!-- in2core:end default -->") == 1 and "<script>" not in card and "\x00" not in card
    assert "license: evil" not in card.split("\n---\n")[0]
    assert json.loads(re.findall(r"```json\n(.*?)\n```", card, flags=re.DOTALL)[0])["text"] == evil[6]


def test_the_loopback_store_would_notice_a_token(hub, tmp_path: Path) -> None:
    # The fixture's last assertion can fail: a request to the store with a token is refused and logged.
    with HubClient(hub, tmp_path, MAIN) as reader:
        status = reader.run(
            """
            from huggingface_hub.utils import get_session
            result = get_session().get(url, headers={"authorization": "Bearer " + token}).status_code
            """,
            url=f"{hub.storage}/store/dataset/ada/x/abc",
            token="hf_nobody",
        )
    assert status == 400
    assert hub.log.pop().headers["authorization"] == "Bearer hf_nobody"
