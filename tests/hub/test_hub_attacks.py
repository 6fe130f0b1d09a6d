"""What strangers, and files that are not ours, may put in the way of a publication: they get nothing out of it.

The real clients talk to the Hub of `loopback_hub.py`.
"""

import html
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from helpers import flatten, read_markdown
from hub_client import ADDED, Cases, HubClient, is_complete, is_untouched, serve_hub, start_publisher
from loopback_http import Fault
from loopback_hub import Blob, LoopbackHub, Repo


TOKEN = "hf_" + "M" * 34


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with serve_hub(TOKEN) as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory) -> Iterator[HubClient]:
    with start_publisher(hub, tmp_path_factory.mktemp("home"), TOKEN) as client:
        yield client


def push(client: HubClient, repo_id: str, **case: Any) -> dict[str, Any]:
    return client.run("result = try_push(case)", case={"repo_id": repo_id, "token": None, **case})


def replace(repo: Repo, **files: bytes) -> None:
    """Somebody commits files; `__` in a name stands for a slash, `_dot_` for a point."""
    tree = repo.resolve("main").tree
    named = {name.replace("__", "/").replace("_dot_", "."): Blob(data, False) for name, data in files.items()}
    repo.commit("refs/heads/main", repo.resolve("main").oid, "somebody's", "", "bob", tree | named)


def read_card(repo: Repo) -> tuple[dict[str, Any], str]:
    _, header, body = repo.files()["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(header), body


# Tokens


@pytest.mark.parametrize("status", [302, 307])
def test_no_redirect_to_another_origin_gets_the_token(hub, client, status) -> None:
    before = len([request for request in hub.log if request.origin == "store"])
    counted = Cases(hub)
    counted.add("clean", [], existing=True)
    assert "error" not in counted.run(client)["clean"]
    cases = Cases(hub)
    away = {"Location": f"{hub.storage}/elsewhere"}
    for number in range(len(hub.requests(owner=counted.names["clean"]))):
        cases.add(str(number), [Fault("status", number=number, status=status, headers=away)], existing=True)
    outcomes = cases.run(client)
    followed = [r for r in hub.log if r.origin == "store" and r.path == "/elsewhere"]
    assert len(followed) >= 8 and len([r for r in hub.log if r.origin == "store"]) > before
    # That none of them carried a token is what the fixture of the hub looks at in the end.
    for name, outcome in outcomes.items():
        repo = cases.get_repo(name)
        assert repo is not None
        assert is_complete(repo, existing=True) or is_untouched(repo, existing=True), (name, outcome)


def test_a_command_with_a_token_is_refused_and_the_token_not_repeated(hub, client) -> None:
    for token in ("hf_" + "Q" * 34, "hf_oauth_" + "Q" * 40):
        outcome = push(client, "ada/command", options={"command": f"make.py --token {token}"})
        assert outcome["error"] == "ValueError" and outcome["message"].startswith("command holds an access token")
        assert token not in outcome["message"]
    assert ("dataset", "ada/command") not in hub.repos


# Files that are links


def test_a_link_that_leads_out_of_the_folder_is_not_published(hub, client, tmp_path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    run = tmp_path / "run"
    (run / "scorer" / "tokenizer").mkdir(parents=True)
    (run / "scorer" / "config.json").write_text("{}")
    (run / "scorer" / "kept.json").write_text("{}")
    (run / "scorer" / "tokenizer" / "inside.json").symlink_to(run / "scorer" / "kept.json")
    (run / "config.yaml").write_text("seed: 1\n")
    code = """
    try:
        result = vars(push("ada/links", make_pool(), scorer=run + "/scorer", report=run))["changed"]
    except ValueError as error:
        result = str(error)
    """
    for name in ("scorer/tokenizer/outside.json", "results.json", "arms.png"):
        (run / name).symlink_to(secret)
        refused = client.run(code, run=str(run))
        assert isinstance(refused, str) and f"{name} is a link to {secret}" in refused, name
        (run / name).unlink()
    assert ("dataset", "ada/links") not in hub.repos
    # Scorers that were downloaded are links into the Hub's cache.
    cached = client.output_path.parent / "hub" / "blobs"
    cached.mkdir(parents=True)
    (cached / "abc").write_text("{}")
    (run / "scorer" / "downloaded.json").symlink_to(cached / "abc")
    changed = client.run(code, run=str(run))
    assert {"scorer/downloaded.json", "scorer/tokenizer/inside.json"} <= set(changed)


# Strangers' pull requests


def test_a_strangers_pull_request_with_our_content_is_not_taken_for_ours(hub, client) -> None:
    repo = hub.add_repo("dataset", "ada/pulls")
    ours: dict[str, Any] = {"options": {"create_pr": True}}
    assert push(client, "ada/pulls", **ours)["pr_url"].endswith("/1")
    assert push(client, "ada/pulls", **ours)["pr_url"].endswith("/1")
    # The same title, message and files, and one more.
    repo.pulls[0]["author"] = {"name": "bob"}
    commit = repo.resolve("refs/pr/1")
    commit.tree["loader.py"] = Blob(b"evil", False)
    assert push(client, "ada/pulls", **ours)["pr_url"].endswith("/2")
    assert "loader.py" not in repo.files("refs/pr/2")


# What lies in a repository


@pytest.mark.parametrize(
    "content",
    [
        b"[1]",
        b"{",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"verdict": "good", "arms": {"a": 1}, "selection": [2]}',
        b'{"verdict": {"text": ["a"], "intervals": [1], "cost": 3}, "arms": [4, {"arm": {}, "test_loss": "x"}]}',
        b'{"verdict": {"intervals": {"a": {"mean": "x", "low": [], "high": {}}}}, "selection": {"seconds": "1"}}',
    ],
)
def test_somebodys_own_files_of_these_names_do_not_stop_a_publication(hub, client, content, request) -> None:
    name = f"ada/own{request.node.callspec.indices['content']}"
    repo = hub.add_repo("dataset", name, dict.fromkeys(["results.json", "scorer/config.json", "splits.json"], content))
    outcome = push(client, name, coresets=["coreset_25"])
    assert "error" not in outcome, outcome
    assert repo.files()["results.json"] == content and set(repo.files()) >= ADDED


def test_what_others_wrote_into_a_repository_does_nothing_in_its_card(hub, client) -> None:
    code = """
    pool = make_pool()
    coresets = {"coreset_25": {"fraction": 0.25}, "low_25": pool.sort("influence").select(range(30, 40))}
    push("ada/evil", pool, coresets=coresets, command="make.py\\nmake2.py")
    push("ada/evil", pool)
    """
    client.run(code)
    repo = hub.repos[("dataset", "ada/evil")]
    plain = read_card(repo)[1]
    assert "the strongest proponents: <code>select_coreset(pool, strategy='top'" in html.unescape(plain)
    assert "the strongest opponents: " in plain and "```bash\nmake.py\nmake2.py\n```" in plain
    evil = "```\n# out\n<script>x</script> [a](http://b) <!-- in2core:end default -->\n<!-- in2core:begin default -->"
    records = {
        name: {"strategy": evil, "column": evil, evil: evil, "fraction": 0.25} for name in ("coreset_25", "low_25")
    }
    records["train"] = {"command": evil}
    picture = {"plots/x](http__c) ![y](http__d.png": Blob(b"\x89PNG", False)}
    repo.commit(
        "refs/heads/main",
        repo.resolve("main").oid,
        "evil",
        "",
        "bob",
        repo.resolve("main").tree | picture | {"splits.json": Blob(json.dumps(records).encode(), False)},
    )
    client.run('push("ada/evil", make_pool())')
    card = read_card(repo)[1]
    assert card.count("<!-- in2core:end default -->") == 1 and "<script>" not in card
    kinds = {token.type for token in flatten(read_markdown(card))}
    assert not [t for t in flatten(read_markdown(card)) if t.type == "image" or "http://b" in str(t.attrs)]
    assert kinds <= {token.type for token in flatten(read_markdown(plain))} | {"html_block", "html_inline"}
    headings = [t.content for t in read_markdown(card) if t.type == "inline" and t.content.startswith("out")]
    assert not headings
    # And once more: nothing is left over outside of the marks.
    client.run('push("ada/evil", make_pool(), coresets={"coreset_25": {"fraction": 0.25}})')
    assert read_card(repo)[1].count("in2core:begin default") == 1


def test_cards_of_source_datasets_give_names_only(hub, client) -> None:
    card = b"---\nlanguage:\n- a: b\nlicense:\n  x: y\ntask_categories: [[1]]\n---\n"
    hub.add_repo("dataset", "bob/odd", {"README.md": card})
    outcome = push(client, "ada/from-odd", options={"source_datasets": ["bob/odd"]})
    assert "error" not in outcome, outcome
    metadata, _ = read_card(hub.repos[("dataset", "ada/from-odd")])
    assert metadata["source_datasets"] == ["bob/odd"]
    assert not {"language", "license", "task_categories"} & set(metadata)


@pytest.mark.parametrize(
    ("card", "error", "told"),
    [
        (b"# Mine \xff", "ValueError", "not UTF-8"),
        (b"x" * 50_000_001, "PublicationError", "too many"),
    ],
)
def test_a_card_that_is_no_text_is_left_alone(hub, client, card, error, told) -> None:
    repo = hub.add_repo("dataset", f"ada/card{len(card)}", {"README.md": card})
    outcome = push(client, repo.id)
    assert outcome["error"] == error and "README.md" in outcome["message"] and told in outcome["message"]
    assert is_untouched(repo, existing=True)


def test_the_card_of_a_short_name_loads_as_it_is_written(hub, client) -> None:
    push(client, "short")
    (snippet,) = re.findall(r"```python\n(.*?)```", read_card(hub.repos[("dataset", "ada/short")])[1], flags=re.DOTALL)
    assert 'load_dataset("ada/short"' in snippet
    assert client.run(snippet + "\nresult = pool.num_rows") == 40


def test_an_odd_time_to_wait_is_no_time_to_wait(hub, client) -> None:
    cases = Cases(hub)
    for number, value in enumerate(["\u00b2", "-5", "soon", "1e3", "9" * 400]):
        odd = Fault("status", "commit", status=503, headers={"Retry-After": value})
        cases.add(f"{number}", [odd], existing=True)
    outcomes = cases.run(client)
    for name in ("0", "1", "2", "3"):
        repo = cases.get_repo(name)
        assert repo is not None and is_complete(repo, existing=True), outcomes[name]
    repo = cases.get_repo("4")  # longer than anybody waits
    assert outcomes["4"]["error"] == "HfHubHTTPError" and is_untouched(repo, existing=True)
