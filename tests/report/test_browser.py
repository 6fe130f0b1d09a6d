"""The report page in a real browser, headless: Chromium through Playwright, both optional."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk
from report_runs import HOSTILE, NUM_ROWS, get_scored_run, make_results, make_scored, write_run

from hf_in2core.report.page import write_report
from hf_in2core.rows.scored import read_query_scores
from hf_in2core.selection.taking import make_turn_columns


pytestmark = pytest.mark.slow
CALIBRATION = {"nats_per_influence": 1e-9, "error": 1.0, "spearman": 0.9, "rows": 16, "agrees": True}
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> str:
    run = get_scored_run(tmp_path_factory.getbasetemp(), model_folder)
    folder = tmp_path_factory.mktemp("browser")
    in_turn = Path(shutil.copytree(run, folder / "run"))
    results = json.loads((in_turn / "results.json").read_text(encoding="utf-8"))
    results["config"]["strategy"] = "round_robin_rows"
    (in_turn / "results.json").write_text(json.dumps(results), encoding="utf-8")
    write_report(in_turn, folder / "in_turn.html")
    turns = Path(shutil.copytree(run, folder / "turns", ignore=shutil.ignore_patterns("scored", "coresets.json")))
    scored = load_from_disk(str(run / "scored"))
    columns, _ = make_turn_columns("bm25", -read_query_scores(scored))
    for name, values in columns.items():
        scored = scored.add_column(name, values)
    scored.save_to_disk(str(turns / "scored"))
    # The least influence of these validation rows is taken as the most words that are shared.
    results["config"]["strategy"], results["calibration"] = "bm25", CALIBRATION
    (turns / "results.json").write_text(json.dumps(results), encoding="utf-8")
    write_report(turns, folder / "turns.html")
    return write_report(run, folder / "report.html").as_uri()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Opens pages; at the end of the test none of them may have complained or asked for another file."""
    complaints: list[str] = []
    requests: list[str] = []
    contexts = []

    def open_page(address: str, viewport: Any = DESKTOP, **options: Any) -> Any:
        contexts.append(browser.new_context(viewport=viewport, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url.split("#")[0]))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert {url for url in requests if not url.startswith(("file:", "data:,", "about:"))} == set()
    assert len({url for url in requests if url.startswith("file:")}) == 1


def read_column(page: Any, name: str) -> list[str]:
    return page.locator(f"#rows tbody td.{name}").all_inner_texts()


def to_number(text: str) -> float:
    return float(text.replace(",", ""))


def wait_for_count(page: Any, text: str) -> None:
    page.locator("#count", has_text=text).wait_for()


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_loads_and_fits_the_screen(open_page: Any, address: str, viewport: Any, scheme: Any) -> None:
    page = open_page(address, viewport, color_scheme=scheme)
    assert page.locator("#rows tbody tr").count() == 50
    assert page.locator("svg[role=img]").count() == 6
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    sections = page.locator("main > section")
    for box in (sections.nth(n).bounding_box() for n in range(sections.count())):
        assert box["x"] >= 0 and box["x"] + box["width"] <= viewport["width"]
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert brightness > 200 if scheme == "light" else brightness < 60


def test_losses_at_both_budgets_need_no_scrolling_sideways_on_a_telephone(open_page: Any, address: str) -> None:
    page = open_page(address, PHONE)
    boxes = page.locator("#arms .scroll, #arms .plot").all()
    assert len(boxes) == 4  # the picture, a table for each budget, and the differences, which are folded
    for box in boxes[:3]:
        assert box.evaluate("box => box.scrollWidth <= box.clientWidth")
    losses = page.locator("#arms td.loss").all()
    assert len(losses) == 14 and all("±" in cell.inner_text() for cell in losses)
    for box in (cell.bounding_box() for cell in losses):
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]


def test_rows_that_were_taken_in_turn_tell_by_whom(open_page: Any, address: str) -> None:
    page = open_page(address.replace("report.html", "in_turn.html"))
    titles = page.locator("#rows thead th").all_inner_texts()
    assert [title.split(" ↑")[0] for title in titles[:4]] == ["Best rank", "Turn", "Taken by", "Mean influence"]
    page.select_option("#coreset", "0.5")
    assert all(text.startswith("row ") for text in read_column(page, "taker"))
    page.select_option("#sign", "kept")
    assert all(text.startswith("+") for text in read_column(page, "influence"))
    page.locator("#rows tbody tr").first.click()
    facts = page.locator("dialog .row-facts").inner_text()
    assert "in turn" in facts and "by validation row" in facts and "but a coreset keeps it" in facts
    assert "opponent" not in facts
    page.keyboard.press("Escape")
    page.select_option("#sign", "+")
    page.locator("#count", has_text="0 of").wait_for()
    page.click("#show-all")
    page.select_option("#coreset", "no")
    page.select_option("#sign", "+")
    page.locator("#rows tbody tr").first.click()
    assert "opponent: training on it raises the mean validation loss" in page.locator("dialog .row-facts").inner_text()


def test_of_a_rank_in_turn_every_row_tells_who_takes_it(open_page: Any, address: str) -> None:
    page = open_page(address.replace("report.html", "turns.html"), PHONE)
    titles = page.locator("#rows thead th").all_text_contents()
    assert titles[:3] == ["Turn", "Taken by: BM25 score", "Mean influence"]
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for coreset, told in (("0.5", "taken in turn 0 by validation row 0, BM25 score"), ("no", "for validation row")):
        page.select_option("#coreset", coreset)
        assert all(text.startswith("row ") for text in read_column(page, "taker"))
        page.locator("#rows tbody tr").first.click()
        facts = page.locator("dialog .row-facts").inner_text()
        assert told in facts and "percentile" in facts and "bm25_" not in facts
        # The step is within its error, whatever the influence.
        assert "so its sign is not known" in facts and "lies within the error" in facts
        assert "raises" not in facts and "lowers" not in facts
        page.keyboard.press("Escape")


def test_the_theme_can_be_chosen_and_is_remembered(open_page: Any, address: str) -> None:
    page = open_page(address, color_scheme="light")
    colours = [page.evaluate("getComputedStyle(document.body).backgroundColor")]
    axis = "getComputedStyle(document.querySelector('.plot text')).fill"
    inks = [page.evaluate(axis)]
    for name in ("light", "dark"):
        page.click("#theme")
        assert page.inner_text("#theme") == f"Theme: {name}"
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        inks.append(page.evaluate(axis))
    assert colours[0] == colours[1] != colours[2] and inks[0] == inks[1] != inks[2]
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == colours[2]


def test_sorts_both_ways(open_page: Any, address: str) -> None:
    page = open_page(address)
    assert read_column(page, "rank") == [str(n) for n in range(50)]
    for column, index in (("influence", 1), ("tokens", 2), ("rank", 0)):
        header = page.locator("#rows thead th").nth(index)
        header.locator("button").click()
        if column == "rank":
            header.locator("button").click()
        rising = [to_number(text) for text in read_column(page, column)]
        assert header.get_attribute("aria-sort") == ("descending" if column == "rank" else "ascending")
        assert rising == sorted(rising, reverse=column == "rank")
        header.locator("button").click()
        falling = [to_number(text) for text in read_column(page, column)]
        assert falling == sorted(falling, reverse=column != "rank") and falling != rising


def test_searches_and_filters(open_page: Any, address: str) -> None:
    page = open_page(address)
    page.keyboard.press("/")
    page.keyboard.type("hostile-SCRIPT")
    wait_for_count(page, f"1 of {NUM_ROWS} rows")
    page.click("#show-all")
    wait_for_count(page, f"{NUM_ROWS} rows, 1 to 50 shown")
    page.select_option("#sign", "+")
    assert all(text.startswith("+") for text in read_column(page, "influence"))
    page.select_option("#sign", "-")
    assert all(text.startswith("-") for text in read_column(page, "influence"))
    page.click("#show-all")
    page.select_option("#coreset", "0.25")
    wait_for_count(page, f"30 of {NUM_ROWS} rows")
    assert sorted(map(int, read_column(page, "rank"))) == list(range(30))
    page.click("#show-all")
    page.locator("#group-filters select").select_option(label="task 1")
    assert set(read_column(page, "group")) == {"task 1"}
    page.fill("#search", "no row has this")
    wait_for_count(page, f"0 of {NUM_ROWS} rows")
    assert page.locator("#rows tbody tr").count() == 0


def test_pages(open_page: Any, address: str) -> None:
    page = open_page(address)
    seen = read_column(page, "rank")
    for _ in range(2):
        page.click("#next")
        seen += read_column(page, "rank")
    assert seen == [str(n) for n in range(NUM_ROWS)]
    assert page.is_disabled("#next") and page.inner_text("#page") == "Page 3 of 3"
    page.click("#first")
    assert read_column(page, "rank")[0] == "0" and page.is_disabled("#previous")


def test_a_row_opens_by_mouse_with_its_mask(open_page: Any, address: str) -> None:
    page = open_page(address)
    page.locator("#rows tbody tr").nth(3).click()
    assert page.locator("dialog[open]").count() == 1
    marked = page.locator("dialog pre.mask mark").inner_text()
    whole = page.locator("dialog pre.mask").inner_text()
    assert marked.endswith("</s>") and whole.endswith(marked) and len(whole) > len(marked)
    row = int(page.inner_text("#reader-title").split()[1])
    assert page.url.endswith(f"#row-{row}")
    page.locator("dialog .close").click()
    assert page.locator("dialog[open]").count() == 0 and "#" not in page.url


def test_the_address_of_a_row_opens_it(open_page: Any, address: str) -> None:
    page = open_page(address)
    page.goto("about:blank")
    page.goto(address + "#row-7")
    assert page.inner_text("#reader-title") == "Row 7"


def test_the_keyboard_does_what_the_mouse_does(open_page: Any, address: str) -> None:
    page = open_page(address)
    page.locator("#rows thead button").last.focus()
    page.keyboard.press("Tab")  # into the table, which is one stop
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator("dialog dd").nth(1).inner_text().startswith("2 ")
    page.keyboard.press("ArrowRight")
    assert page.locator("dialog dd").nth(1).inner_text().startswith("3 ")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    assert page.evaluate("document.activeElement.cells[0].textContent") == "1"
    page.keyboard.press("End")
    page.keyboard.press("ArrowDown")  # over the edge of the page
    assert page.evaluate("document.activeElement.cells[0].textContent") == "50"
    page.keyboard.press("Tab")
    page.locator("#rows thead button").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#rows thead th").first.get_attribute("aria-sort") == "descending"


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_text_shows_as_text(open_page: Any, address: str, name: str) -> None:
    page = open_page(address)
    page.fill("#search", f"hostile-{name}")
    wait_for_count(page, f"1 of {NUM_ROWS} rows")
    page.locator("#rows tbody tr").click()
    shown = page.locator("dialog pre.mask mark").text_content()
    named = {"\x00": "␀", "\x07": "␇", "\x1b": "␛", "\u2028": "‹U+2028›", "\u202e": "‹U+202E›", "\u202c": "‹U+202C›"}
    assert shown == " " + "".join(named.get(c, c) for c in HOSTILE[name]) + "</s>"
    page.locator("dialog summary").click()
    assert page.title() == "run · In2Core report"
    assert page.locator("main img, main b b, dialog img, dialog script").count() == 0
    box = page.locator("dialog").bounding_box()
    assert page.locator("dialog").evaluate("d => d.scrollWidth <= d.clientWidth") and box["width"] <= 1280


def test_a_validation_row_names_who_helps_it(open_page: Any, address: str) -> None:
    page = open_page(address)
    page.locator("#query-list button").nth(4).click()
    values = page.locator("dialog .helpers b").all_inner_texts()
    assert [text[0] for text in values] == ["-"] * 8 + ["+"] * 8
    target = page.locator("dialog .helpers button").first.inner_text().split("row ")[1].split(":")[0]
    page.locator("dialog .helpers button").first.press("Enter")
    assert page.inner_text("#reader-title") == f"Row {target}"
    page.locator("dialog .steps button").click()
    assert page.inner_text("#reader-title") == "Validation row 4 (validation)"


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE])
def test_a_least_covered_row_leads_to_its_proponents(open_page: Any, address: str, viewport: Any) -> None:
    page = open_page(address, viewport)
    cells = page.locator("#coverage .texts tbody tr").nth(2).locator("td")
    assert cells.nth(2).inner_text() == f"html: {HOSTILE['html']}"
    link = cells.nth(3).locator("a").first
    link.focus()
    page.keyboard.press("Enter")
    assert page.inner_text("#reader-title") == "Row 20"
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0 and "#" not in page.url
    assert link.evaluate("link => link === document.activeElement")
    link.click()  # the same again
    assert page.inner_text("#reader-title") == "Row 20"
    page.locator("dialog .close").click()
    # Nothing of the sections is wider than the screen; tables scroll in themselves.
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    page.locator("#layers summary").click()
    assert page.locator("#layers tbody tr").count() == 6
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


def test_thousands_of_rows(open_page: Any, tmp_path: Path) -> None:
    texts = [f"number {n} " + "word " * 100 for n in range(20_000)]
    run = write_run(tmp_path / "run", make_scored(20_000, text=texts), make_results())
    page = open_page(write_report(run).as_uri(), PHONE)
    wait_for_count(page, "5,000 rows, 1 to 50 shown")
    page.fill("#search", "number 1999")
    page.locator("#count", has_text=" of 5,000 rows").wait_for()
    assert all("1999" in text for text in read_column(page, "text"))
    page.click("#show-all")
    page.select_option("#sorter", "influence down")
    values = [to_number(text) for text in read_column(page, "influence")]
    assert values == sorted(values, reverse=True) and values[0] > 3
