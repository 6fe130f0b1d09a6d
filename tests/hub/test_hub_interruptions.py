"""Publications that are killed, cut off or run out of disk, and readers with old caches or hostile rows.

The real clients talk to the Hub of `loopback_hub.py` from processes of their own.
"""

import html
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_client import PUBLISHER, HubClient, serve_hub, start_publisher
from loopback_http import Fault
from loopback_hub import Blob, LoopbackHub


MAIN = "hf_" + "M" * 34


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with serve_hub(MAIN, multipart_above=200_000) as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory) -> Iterator[HubClient]:
    with start_publisher(hub, tmp_path_factory.mktemp("home"), MAIN) as client:
        yield client


def wait_until(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 400
    while not happened():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


# Interruptions


KILLED = """
import numpy as np
from datasets import Dataset
from hf_in2core.cards.publish import push_influence_dataset
scores = np.random.default_rng(0).normal(size=30_000)
pool = Dataset.from_dict({"prompt": [f"p{i}" for i in range(30_000)], "influence": scores.tolist()})
coresets = {"coreset_50": pool.select(range(15_000))}
result = vars(push_influence_dataset("ada/killed", pool, coresets=coresets, max_shard_size="40KB"))
"""


@pytest.mark.slow
def test_killed_during_the_upload_and_run_again(hub, tmp_path) -> None:
    # Two files arrive; the others are held until the client is dead, however long that takes.
    is_dead = threading.Event()
    hub.faults.append(Fault("slow", "upload", owner="ada", times=2, seconds=0.0))
    hub.faults.append(Fault("call", "upload", owner="ada", times=99, call=lambda hub: is_dead.wait()))
    with HubClient(hub, tmp_path / "killed", MAIN) as victim:
        victim.start(KILLED)
        try:
            wait_until(lambda: [r for r in hub.requests("ada", "upload") if r.status == 200][1:])
        finally:
            victim.kill()
            is_dead.set()
    repo = hub.repos[("dataset", "ada/killed")]
    assert len(repo.history()) == 1, "it was killed in the middle of the upload"
    # What was under way arrives, or breaks off.
    wait_until(lambda: all(request.status is not None for request in hub.requests("ada", "upload")))
    stored = set(repo.objects)
    sent_before = len(hub.requests("ada", "upload"))
    with HubClient(hub, tmp_path / "again", MAIN) as second:
        published = second.run(KILLED)
    sent = {request.path.rsplit("/", 1)[1] for request in hub.requests("ada", "upload")[sent_before:]}
    assert len(repo.history()) == 2 and published["commit"] == repo.resolve("main").oid
    shards = {blob.sha256 for path, blob in repo.resolve("main").tree.items() if path.endswith(".parquet")}
    assert sent == shards - stored, "what had arrived was sent again"
    assert sent and stored & shards


@pytest.mark.slow
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
        fresh.run(PUBLISHER.replace("level=logging.DEBUG", "level=logging.ERROR"), shared=True)
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
    # The strongest proponent, as text that does nothing: control characters are blanks.
    shown = html.unescape(re.findall(r"<pre><code>(.*?)</code></pre>", card, flags=re.DOTALL)[0])
    assert shown.splitlines()[0] == evil[6].replace("\x00", " ").replace("\x1b", " ")


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
    noticed = [r for r in hub.log if r.origin == "store" and "authorization" in r.headers]
    assert [r.headers["authorization"] for r in noticed] == ["Bearer hf_nobody"]
    hub.log.remove(noticed[0])
