"""Faults and attacks on a publication: it ends complete, or the repository is untouched and a rerun completes it.

The real clients talk to the Hub of `loopback_hub.py`. Cases of one batch run at once, each with a user, a token and
repositories of its own, so that the waits of their retries overlap.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from hub_client import ADDED, OWN_CARD, Cases, HubClient, is_complete, is_untouched, serve_hub, start_publisher
from loopback_http import Fault
from loopback_hub import Blob, LoopbackHub


MAIN = "hf_" + "M" * 34
SHA = re.compile(r"[0-9a-f]{40}")


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with serve_hub(MAIN) as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory) -> Iterator[HubClient]:
    with start_publisher(hub, tmp_path_factory.mktemp("home"), MAIN) as client:
        yield client


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


@dataclass
class Tally:
    """Publications that met a fault, by how they ended; every untouched one was completed by the same call again."""

    complete: int = 0
    untouched: int = 0


def sweep(hub: LoopbackHub, client: HubClient, kinds: list, every_kind: bool) -> dict[str, Tally]:
    """Publish once per request and kind of fault, to a new repository and to an existing one; how they ended."""
    tallies = {label: Tally() for label, _ in kinds}
    cases, faults = Cases(hub), {}
    for existing in (False, True):
        for number in range(count_requests(hub, client, existing)):
            chosen = kinds if every_kind else [kinds[(number + existing) % len(kinds)]]
            for label, fields in chosen:
                name = label, number, existing
                faults[name] = Fault(number=number, **fields)
                cases.add(name, [faults[name]], existing)
    again = []
    for name, outcome in cases.run(client).items():
        assert faults[name].hits == 1, name
        label, _, existing = name
        repo, tally = cases.get_repo(name), tallies[label]
        if "error" not in outcome:
            assert repo is not None and is_complete(repo, existing), (name, outcome)
            assert SHA.fullmatch(outcome["commit"]) and outcome["commit"] == repo.resolve("main").oid, name
            tally.complete += 1
        else:
            # A refusal to be asked what it holds, after the commit, is an error over a complete publication.
            done = repo is not None and is_complete(repo, existing)
            assert done or is_untouched(repo, existing), name
            again += [] if done else [name]
            tally.complete, tally.untouched = tally.complete + done, tally.untouched + (not done)
    # Nothing was lost: the same call afterwards completes every one of them.
    for name, outcome in cases.run(client).items():
        repo = cases.get_repo(name)
        assert repo is not None and is_complete(repo, existing=name[2]), (name, outcome)
        assert (outcome["changed"] == []) == (name not in again), (name, outcome)
    return tallies


@pytest.mark.parametrize("every_kind", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_passing_fault_at_any_request_does_not_stop_a_publication(hub, client, every_kind) -> None:
    tallies = sweep(hub, client, PASSING, every_kind)
    assert sum(tally.complete for tally in tallies.values()) >= 25
    assert not any(tally.untouched for tally in tallies.values())


@pytest.mark.parametrize("every_kind", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_refusal_at_any_request_leaves_all_or_nothing(hub, client, every_kind) -> None:
    tallies = sweep(hub, client, REFUSING, every_kind)
    assert sum(tally.untouched for tally in tallies.values()) >= 20


# A Hub that takes a request and never answers it

SILENT: list[tuple[str, dict]] = [("silent", {"action": "silent"})]
SET_LIMIT = """
from hf_in2core.hub import silence as hub_silence
usual, hub_silence.LONGEST_SILENCE = hub_silence.LONGEST_SILENCE, limit
result = usual
"""


@contextmanager
def short_patience(client: HubClient, seconds: float) -> Iterator[None]:
    """The client process waits only so long for an answer; the usual limit is minutes."""
    usual = client.run(SET_LIMIT, limit=seconds)
    try:
        yield
    finally:
        client.run(SET_LIMIT, limit=usual)


@pytest.mark.slow
def test_a_silence_at_any_request_does_not_stop_a_publication(hub, client) -> None:
    with short_patience(client, 4.0):
        tallies = sweep(hub, client, SILENT, every_kind=True)
    assert tallies["silent"].complete >= 25 and not tallies["silent"].untouched


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [["info", "commit"], ["upload"]])
def test_a_hub_that_stays_silent_ends_in_an_error_and_a_rerun_goes_on(hub, client, kinds) -> None:
    cases = Cases(hub)
    silences = {kind: Fault("silent", kind, times=1000) for kind in kinds}
    for kind, silence in silences.items():
        cases.add(kind, [silence], existing=True)
    with short_patience(client, 1.5):
        outcomes = cases.run(client)
    arrived = {}
    for kind, outcome in outcomes.items():
        assert outcome["error"] == "TimeoutError", outcome
        assert "did not answer for 2 s" in outcome["message"] and "is not sent again" in outcome["message"]
        repo = cases.get_repo(kind)
        assert repo is not None and is_untouched(repo, existing=True)
        arrived[kind] = len(repo.objects), len(hub.requests(cases.names[kind], "upload"))
        silences[kind].times = 0
    assert {kind: objects for kind, (objects, _) in arrived.items()} == {k: 2 if k == "commit" else 0 for k in kinds}
    outcomes = cases.run(client)
    for kind, (objects, sent) in arrived.items():
        repo = cases.get_repo(kind)
        assert repo is not None and is_complete(repo, existing=True), outcomes[kind]
        assert len(hub.requests(cases.names[kind], "upload")) - sent == 2 - objects


def test_only_requests_without_a_limit_get_one_and_only_meanwhile(hub, client) -> None:
    """A part of another library's that has a limit, or that asks when nothing is published, keeps what it has."""
    limits = client.run(
        """
        from huggingface_hub.utils import get_session
        from hf_in2core.hub.silence import limited_silence
        session = get_session()
        hooks = list(session.event_hooks["request"])
        read = lambda **limit: session.get(url, **limit).request.extensions["timeout"]["read"]
        before = read()
        with limited_silence(), limited_silence():
            during = [read(), read(timeout=None), read(timeout=7)]
        result = [before, during, read(), session.event_hooks["request"] == hooks]
        """,
        url=f"{hub.endpoint}/api/datasets/no/where",
    )
    assert limits == [None, [120.0, 120.0, 7], None, True]


# Single cases, run as one batch


def delete_repo(hub: LoopbackHub, user: str) -> None:
    del hub.repos[("dataset", f"{user}/x")]


def corrupt(hub: LoopbackHub, user: str, path: str = "data/train-00000-of-00001.parquet") -> None:
    tree = hub.repos[("dataset", f"{user}/x")].resolve("main").tree
    tree[path] = Blob(tree[path].data[::-1], tree[path].lfs)  # as many bytes, but others


def corrupt_card(hub: LoopbackHub, user: str) -> None:
    corrupt(hub, user, "README.md")


def commit_else(hub: LoopbackHub, user: str) -> None:
    repo = hub.repos[("dataset", f"{user}/x")]
    tree = repo.resolve("main").tree
    card = tree["README.md"].data + b"\nAdded meanwhile.\n"
    repo.commit(
        "refs/heads/main", repo.resolve("main").oid, "by hand", "", user, tree | {"README.md": Blob(card, False)}
    )


def ask_by_date() -> dict[str, str]:
    return {"Retry-After": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 4))}


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
    cases.add("asked by date", [Fault("status", "commit", status=503, headers=ask_by_date)], existing=True)
    long = {"Retry-After": "86400"}
    cases.add("asked to wait a day", [Fault("status", "commit", status=429, headers=long)], existing=True)
    cases.add("lonely 412", [Fault("status", "commit", status=412, times=99)], existing=True)
    cases.add("expired address", [Fault("status", "upload", status=403)], existing=True)
    cases.add("other content", [call(corrupt, kind="paths_info")], existing=True)
    cases.add("other card than listed", [call(corrupt_card, kind="resolve")], existing=True)
    cases.add("page instead of JSON", [Fault("status", "validate_yaml", status=502)], existing=True)
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
    for name in ("expired address", "slow", "turns private", "page instead of JSON"):
        assert is_complete(cases.get_repo(name), existing=True), outcomes[name]
    assert cases.get_repo("turns private").private


def test_what_the_hub_holds_is_compared_with_what_was_sent(batch) -> None:
    cases, outcomes = batch
    for name in ("other content", "ignored"):
        assert outcomes[name]["error"] == "PublicationError", outcomes[name]
        assert "data/train-00000-of-00001.parquet" in outcomes[name]["message"]
    assert outcomes["other card than listed"]["error"] == "PublicationError"
    assert is_untouched(cases.get_repo("other card than listed"), existing=True)


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


@pytest.mark.slow
def test_five_publishers_at_once_all_end_published(hub, client) -> None:
    hub.add_repo("dataset", "lab/five", {"README.md": OWN_CARD, "own.txt": b"own"})
    cases = []
    for number in range(5):
        hub.add_user(f"hf_five{number:030d}", f"five{number}", orgs=("lab",))
        # Three add a coreset to the same configuration, two bring a configuration of their own.
        options = {"config_name": f"config_{number}"} if number >= 3 else {}
        case = {"repo_id": "lab/five", "token": f"hf_five{number:030d}", "options": options}
        cases.append(case | {"coresets": [f"coreset_{number}"]})
    # All five have read the same head before the first of them commits.
    together = threading.Barrier(5)
    hub.faults += [Fault("call", "commit", owner=f"five{n}", call=lambda hub: together.wait(400)) for n in range(5)]
    outcomes = client.run("result = push_all(cases)", cases=cases)
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
