"""The Space's explorer: what it reads of a repository, and its page in a real browser against the loopback Hub."""

import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset
from helpers import ROOT
from hub_client import QUIET, HubClient, make_env
from loopback_hub import LoopbackHub
from report_runs import HOSTILE, make_results


TOKEN = "hf_" + "S" * 34
SPACE = ROOT / "recipes" / "space"
NUM_ROWS = 120
VERDICT = "pwned <img src=x onerror=\"document.title='pwned'\"> ${document.title='pwned'} {{ 7 * 7 }}"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def make_pool() -> Dataset:
    """Scored rows, the hostile ones first; every eighth carries no loss."""
    texts = [*HOSTILE.values(), *(f"answer number {number}" for number in range(NUM_ROWS - len(HOSTILE)))]
    influence = np.random.default_rng(0).normal(size=NUM_ROWS)
    scores = [None if number % 8 == 7 else float(value) for number, value in enumerate(influence)]
    ranks = np.argsort(np.argsort([np.inf if value is None else value for value in scores]))
    return Dataset.from_dict(
        {
            "prompt": [f"prompt {number} :" for number in range(NUM_ROWS)],
            "completion": texts,
            "task": [f"<i>task {number % 3}</i>" for number in range(NUM_ROWS)],
            "influence": scores,
            "influence_rank": [
                None if value is None else int(rank) for value, rank in zip(scores, ranks, strict=True)
            ],
            "num_loss_tokens": [0 if value is None else 3 + number % 9 for number, value in enumerate(scores)],
            "influence_per_query": [[0.0, 1.0]] * NUM_ROWS,
        }
    )


def to_parquet(table: Dataset | pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer) if isinstance(table, Dataset) else pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def add_pool(hub: LoopbackHub, name: str, columns: dict[str, Any], **options: Any) -> None:
    data = to_parquet(pa.table(columns), **options)
    hub.add_repo("dataset", f"user/{name}", {"data/train-00000-of-00001.parquet": data})


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.add_user(TOKEN, "user")
        yield hub


@pytest.fixture(scope="module")
def client(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubClient]:
    """A process that has published `user/pool`, and reads as the Space does; a token lies in its environment."""
    folder = tmp_path_factory.mktemp("space")
    pool = make_pool()
    pool.to_parquet(folder / "pool.parquet")
    results = make_results()
    results["verdict"]["text"] = VERDICT
    (folder / "results.json").write_text(json.dumps(results))
    with HubClient(hub, folder / "home", TOKEN, **QUIET) as client:
        client.run(
            """
            import sys
            sys.path.insert(0, space)
            from datasets import Dataset
            from hf_in2core import push_influence_dataset, select_coreset
            import published
            from published import CannotShow, read_published

            pool = Dataset.from_parquet(folder + "/pool.parquet")
            coresets = {f"coreset_{share}": select_coreset(pool, fraction=share / 100) for share in (25, 50)}
            push_influence_dataset("user/pool", pool, coresets=coresets, report=folder)

            def read(name, **limits):
                kept = {key: getattr(published, key) for key in limits}
                vars(published).update(limits)
                try:
                    found = read_published(name)
                except CannotShow as error:
                    return str(error)
                finally:
                    vars(published).update(kept)
                table = found.table.astype(object).where(found.table.notna(), None).to_dict("list")
                lengths = None if found.lengths is None else found.lengths.to_dict("list")
                return vars(found) | {"table": table, "influence": found.influence.tolist(), "lengths": lengths}
            """,
            shared=True,
            space=str(SPACE),
            folder=str(folder),
        )
        yield client


def read(client: HubClient, name: str, **limits: int) -> Any:
    return client.run("result = read(name, **limits)", name=name, limits=limits)


def test_rows_of_a_published_pool(hub: LoopbackHub, client: HubClient) -> None:
    before = len(hub.log)
    found = read(client, "user/pool")
    pool = make_pool()
    table = found["table"]
    assert found["rows"] == len(table["row"]) == NUM_ROWS
    assert found["verdict"] == VERDICT
    assert found["splits"] == {"coreset_25": 26, "coreset_50": 52} and found["notes"] == []
    known = [value for value in pool["influence"] if value is not None]
    assert [value for value in table["influence"] if value is not None] == sorted(known)
    assert sorted(found["influence"]) == sorted(known)
    for position, row in enumerate(table["row"]):
        assert table["influence"][position] == pool["influence"][row]
        assert table["rank"][position] == pool["influence_rank"][row]
        assert table["group"][position] == pool["task"][row]
        rank = pool["influence_rank"][row]
        part = "" if rank is None or rank >= 52 else "coreset_25" if rank < 26 else "coreset_50"
        assert table["coreset"][position] == part
        assert table["text"][position] == f"prompt: prompt {row} :\n\ncompletion: {pool['completion'][row]}"
    pairs = zip(found["lengths"]["loss tokens"], found["lengths"]["influence"], strict=True)
    known_pairs = zip(pool["num_loss_tokens"], pool["influence"], strict=True)
    assert sorted(pairs) == sorted((length, value) for length, value in known_pairs if value is not None)
    assert set(table) == {"row", "rank", "influence", "tokens", "coreset", "group", "text"}
    # The token of the environment opens nothing for those who look at the page.
    assert not [request.path for request in hub.log[before:] if "authorization" in request.headers]


@pytest.mark.parametrize(
    "name", ["user/pool ", "https://huggingface.co/datasets/user/pool", "http://x/datasets/user/pool/"]
)
def test_ways_to_name_a_dataset(client: HubClient, name: str) -> None:
    assert read(client, name)["repo_id"] == "user/pool"


def test_what_cannot_be_shown_says_what_to_do(hub: LoopbackHub, client: HubClient) -> None:
    good = to_parquet(make_pool())
    hub.add_repo("dataset", "user/private", {"data/train-00000-of-00001.parquet": good}, private=True)
    hub.add_repo("dataset", "user/gated", {"data/train-00000-of-00001.parquet": good}, gated=True)
    hub.add_repo("dataset", "user/csv", {"data/train.csv": b"a,b"})
    hub.add_repo("dataset", "user/damaged", {"data/train-00000-of-00001.parquet": b"PAR1" + b"x" * 99})
    add_pool(hub, "unscored", {"prompt": ["a"]})
    add_pool(hub, "words", {"prompt": ["a"], "influence": ["low"]})
    add_pool(hub, "empty", {"prompt": pa.array([], pa.string()), "influence": pa.array([], pa.float64())})
    for name, told in {
        "": "no dataset id",
        "pool": "names no user",
        "../../etc/passwd": "no dataset id",
        "user/absent": "no public dataset user/absent",
        "user/private": "no public dataset user/private",
        "user/gated": "gated",
        "user/csv": "no scored pool",
        "user/damaged": "cannot be read",
        "user/unscored": "not scored",
        "user/words": "not scored",
        "user/empty": "no rows",
    }.items():
        message = read(client, name)
        assert isinstance(message, str) and told in message, (name, message)
        assert re.search(r"Give |Check |Publish |public", message), message


def test_a_large_pool_is_sampled_and_its_other_columns_are_not_read(hub: LoopbackHub, client: HubClient) -> None:
    generator = np.random.default_rng(0)
    influence = generator.normal(size=4000)
    blobs = [generator.bytes(2000) for _ in range(4000)]
    columns = {"text": [f"row {n}" for n in range(4000)], "influence": influence, "blob": blobs}
    add_pool(hub, "large", columns, row_group_size=500)
    before = len(hub.log)
    found = read(client, "user/large", MAX_ROWS=100, MAX_INFLUENCES=2000)
    spans = [
        tuple(map(int, request.headers["range"].removeprefix("bytes=").split("-")))
        for request in hub.log[before:]
        if request.origin == "store" and request.method == "GET"
    ]
    assert sum(last - first + 1 for first, last in spans) < 1_000_000  # of 8 MB
    assert found["rows"] == 4000 and len(found["influence"]) == 2000 and len(found["table"]["row"]) == 100
    assert "2,000 of its 4,000 rows were read" in found["notes"][0] and "100 rows are shown" in found["notes"][1]
    for row, value, text in zip(*(found["table"][name] for name in ("row", "influence", "text")), strict=True):
        assert value == influence[row] and text == f"text: row {row}"
    read_values, shown = sorted(found["influence"]), found["table"]["influence"]
    assert shown[:20] == read_values[:20] and shown[-20:] == read_values[-20:]


def test_row_groups_beyond_the_budget_are_not_read(hub: LoopbackHub, client: HubClient) -> None:
    columns = {"text": ["x" * 10, "y" * 10_000, "z" * 10], "influence": [1.0, 2.0, 3.0]}
    add_pool(hub, "groups", columns, row_group_size=1, compression="none", use_dictionary=False)
    found = read(client, "user/groups", MAX_BYTES=5_000)
    assert found["table"]["row"] == [0, 2] and "2 of its 3 rows were read" in found["notes"][0]
    assert "more than 10 bytes" in read(client, "user/groups", MAX_BYTES=10)


def test_odd_columns(hub: LoopbackHub, client: HubClient) -> None:
    turns = [{"role": "user", "content": "hello <b>"}, {"role": "assistant", "content": "x" * 30_000}]
    add_pool(
        hub,
        "odd",
        {
            "messages": [turns, None],
            "influence": [float("nan"), -1.0],
            "influence_math": [0.5, None],
            "influence_rank": ["zero", "one"],
            "num_loss_tokens": [1.5, 2.5],
        },
    )
    found = read(client, "user/odd")
    assert set(found["table"]) == {"row", "influence", "influence_math", "text"}
    first, second = found["table"]["text"]
    assert first == "messages: " and second.startswith("messages: [user] hello <b>\n[assistant] xxx")
    assert second.endswith("characters)") and len(second) < 21_000
    assert found["verdict"].startswith("No comparison with random rows")
    add_pool(hub, "bytes", {"text": pa.array([b"\xff\xfe", b"fine"]).view(pa.string()), "influence": [1.0, 2.0]})
    assert read(client, "user/bytes")["table"]["text"] == ["text: \ufffd\ufffd", "text: fine"]


def test_the_hub_is_down(hub: LoopbackHub, client: HubClient) -> None:
    from loopback_http import Fault

    hub.faults.append(Fault("status", kind="info", status=500, times=20))
    try:
        assert "did not deliver user/pool" in read(client, "user/pool")
    finally:
        hub.faults.clear()


def test_the_space_is_deployable() -> None:
    """Front matter that the Hub asks for, and one version of Gradio in it and in the instructions."""
    readme = (SPACE / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(readme.split("---\n")[1])
    assert front["sdk"] == "gradio" and (SPACE / front["app_file"]).is_file()
    assert f"gradio=={front['sdk_version']}\n" in readme
    assert len(front["short_description"]) <= 60
    assert {path.name for path in SPACE.iterdir() if path.is_file()} == {
        "README.md",
        "app.py",
        "published.py",
        "requirements.txt",
    }


# --- in the browser ---


def find_python() -> str:
    """A Python with Gradio, whose pins exclude ours: `IN2CORE_SPACE_PYTHON`, or this one where it has it."""
    if path := os.environ.get("IN2CORE_SPACE_PYTHON"):
        return path
    if importlib.util.find_spec("gradio") is None:
        pytest.skip(
            "needs Gradio, which does not fit beside constraints.txt: python -m venv space, space/bin/pip install -r "
            "recipes/space/requirements.txt gradio==6.31.0, then IN2CORE_SPACE_PYTHON=space/bin/python"
        )
    return sys.executable


@pytest.fixture(scope="module")
def app(hub: LoopbackHub, client: HubClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    python = find_python()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = make_env(hub, tmp_path_factory.mktemp("space-home"), TOKEN, GRADIO_SERVER_PORT=str(port))
    env |= {"GRADIO_ANALYTICS_ENABLED": "False", "PYTHONPATH": ""}
    log = tmp_path_factory.mktemp("space-log") / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [python, "recipes/space/app.py"], cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{port}/"
            for _ in range(600):
                try:
                    urllib.request.urlopen(address, timeout=5).read()
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()[-3000:]
                    time.sleep(0.5)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert "Traceback" not in log.read_text(), log.read_text()[-3000:]


@pytest.fixture
def open_page(browser: Any, app: str) -> Iterator[Any]:
    """Opens the page of a dataset; at the end of the test none may have failed at anything of its own."""
    errors: list[str] = []
    contexts = []

    def open_page(query: str = "", viewport: Any = DESKTOP) -> Any:
        contexts.append(browser.new_context(viewport=viewport))
        page = contexts[-1].new_page()
        page.set_default_timeout(90_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        # Fonts and the like of Gradio's own come from elsewhere; there is no network here.
        page.route(lambda url: not url.startswith(app), lambda route: route.abort())
        page.goto(app + query)
        return page

    yield open_page
    for context in contexts:
        if folder := os.environ.get("IN2CORE_SCREENSHOTS"):
            size = context.pages[0].viewport_size["width"]
            name = f"{os.environ['PYTEST_CURRENT_TEST'].split('::')[1].split(' ')[0]}-{size}.png"
            context.pages[0].screenshot(path=Path(folder) / name, full_page=True)
        context.close()
    assert errors == []


def wait_for_rows(page: Any, text: str) -> None:
    page.wait_for_function("text => document.querySelector('#count textarea, #count input')?.value === text", arg=text)


@pytest.mark.slow
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_page_shows_a_pool_and_fits_the_screen(open_page: Any, viewport: Any) -> None:
    page = open_page("?dataset=user/pool", viewport)
    wait_for_rows(page, f"{NUM_ROWS} of {NUM_ROWS} rows")
    assert VERDICT in page.inner_text("#notes")
    page.locator("#rows [role=gridcell]").first.wait_for()
    assert "120 rows" in page.inner_text("#notes") and "coreset_25: 26 rows" in page.inner_text("#notes")
    page.locator("#pool canvas, #pool svg.marks").nth(1).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert page.title() == "In2Core explorer"


def choose(page: Any, field: str, option: str) -> None:
    page.locator(f"#{field} input").click()
    page.get_by_role("option", name=option).click()


def search(page: Any, words: str) -> None:
    page.fill("#search textarea, #search input", words)
    page.keyboard.press("Enter")


def wait_for_first(page: Any, numbers: list[int]) -> None:
    """Wait until the table begins with these rows of the pool."""
    page.wait_for_function(
        """numbers => {
            const cells = [...document.querySelectorAll('#rows [role=gridcell][data-col="0"]')];
            const shown = cells.map(cell => cell.innerText.trim()).slice(0, numbers.length);
            return JSON.stringify(shown) === JSON.stringify(numbers.map(String));
        }""",
        arg=numbers,
    )


def wait_for_text(page: Any, text: str) -> None:
    page.wait_for_function("text => document.querySelector('#row-text textarea')?.value === text", arg=text)


@pytest.mark.slow
def test_searches_orders_and_opens_rows(open_page: Any) -> None:
    pool = make_pool()
    scored = [(value, row) for row, value in enumerate(pool["influence"]) if value is not None]
    page = open_page("?dataset=user/pool")
    wait_for_first(page, [row for _, row in sorted(scored)[:8]])
    choose(page, "order", "strongest opponents first")
    wait_for_first(page, [row for _, row in sorted(scored, reverse=True)[:8]])
    choose(page, "which", "opponents")
    opponents = [row for value, row in scored if value > 0]
    wait_for_rows(page, f"{len(opponents)} of {NUM_ROWS} rows")
    choose(page, "order", "as in the pool")
    wait_for_first(page, sorted(opponents)[:8])
    search(page, "NUMBER 5")
    found = [row for row in opponents if "number 5" in pool["completion"][row]]
    assert len(found) > 2
    wait_for_rows(page, f"{len(found)} of {NUM_ROWS} rows")
    wait_for_first(page, found)
    page.locator("#rows [role=gridcell]", has_text=f"prompt: prompt {found[1]} :").click()
    wait_for_text(page, f"prompt: prompt {found[1]} :\n\ncompletion: {pool['completion'][found[1]]}")
    # By keyboard.
    page.fill("#number input", str(found[2]))
    page.keyboard.press("Enter")
    wait_for_text(page, f"prompt: prompt {found[2]} :\n\ncompletion: {pool['completion'][found[2]]}")
    assert page.input_value("#row-facts textarea, #row-facts input").startswith(f"Row {found[2]}: rank")


@pytest.mark.slow
def test_hostile_text_stays_text(open_page: Any) -> None:
    page = open_page("?dataset=user/pool")
    for row in (0, 2, 4):
        wait_for_rows(page, f"{NUM_ROWS if row == 0 else 1} of {NUM_ROWS} rows")
        search(page, f"prompt {row} :")
        wait_for_first(page, [row])
        page.locator("#rows [role=gridcell]", has_text=f"prompt: prompt {row} :").click()
        wait_for_text(page, f"prompt: prompt {row} :\n\ncompletion: {list(HOSTILE.values())[row]}")
    assert page.title() == "In2Core explorer"
    assert page.locator("#rows img, #rows b, #rows i, #notes img, #rows script").count() == 0


@pytest.mark.slow
def test_a_wrong_name_is_answered(open_page: Any) -> None:
    page = open_page()
    page.fill("#dataset textarea, #dataset input", "user/<b>absent</b>")
    page.click("#show")
    page.locator("#notes [role=alert]", has_text="no dataset id").wait_for()
    page.fill("#dataset textarea, #dataset input", "user/absent")
    page.keyboard.press("Enter")
    page.locator("#notes [role=alert]", has_text="no public dataset user/absent").wait_for()
    assert not page.locator("#rows").is_visible()
