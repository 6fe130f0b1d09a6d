"""Layers and coverage on the report page: what it says, hostile texts, and shapes that nobody knows."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import HOSTILE, Page, list_paths, make_analyses, make_results, make_scored, write_run

import hf_in2core.report.page as report_page
from hf_in2core.report.analyses import show_coverage, show_layers
from hf_in2core.report.page import write_report
from hf_in2core.report.rows import choose_rows, read_pool
from hf_in2core.report.run import Run, read_run


ANALYSES = make_analyses()


def make_run(**findings: Any) -> Run:
    return Run("run", make_results(seeds=1) | findings, None, {}, Path())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    results = make_results(seeds=1, budgets=("steps",)) | ANALYSES
    return Page(write_report(write_run(tmp_path_factory.mktemp("page") / "run", make_scored(100), results)))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time."""
    monkeypatch.setattr(report_page, "find_spec", lambda name: None)


def test_the_layers_are_those_of_the_choice(page: Page) -> None:
    layers = ANALYSES["layers"]
    assert layers["layers"] != [3, 4, 5]
    listed = ", ".join(map(str, layers["layers"]))
    assert f"layers {listed} of the 6 layers rank 200 rows" in page.words
    interval = f"{layers['spearman']:+.3f} (95 % interval {layers['low']:+.3f} to {layers['high']:+.3f})"
    assert f"Spearman {interval}" in page.words
    assert f"judged by the other, it has {layers['held_out_spearman']:+.3f}" in page.words
    assert f"share {layers['overlap']:.0%} of their layers".replace("%", " %") in page.words
    by_layers = {tuple(entry["layers"]): entry for entry in layers["candidates"]}
    last = by_layers[3, 4, 5]
    assert f"at the end (layers 3, 4, 5) have Spearman {last['spearman']:+.3f} and a backward pass" in page.words
    two = max((entry for entry in layers["candidates"] if len(entry["layers"]) == 2), key=lambda e: e["spearman"])
    cells = f"2 33 % {two['layers'][0]} {two['layers'][1]} {two['spearman']:+.3f} {two['backward_layers']} "
    assert cells + f"{by_layers[4, 5]['spearman']:+.3f} 2" in page.words


def test_the_coverage_is_said_with_its_interval(page: Page) -> None:
    found = ANALYSES["coverage"]["correlations"]
    strongest, flat = found["coverage_top_k"], found["coverage_share"]
    interval = f"{strongest['low']:+.2f} to {strongest['high']:+.2f}"
    assert strongest["conclusion"] == "negative" and flat["estimate"] is None
    sentence = f"{strongest['estimate']:+.2f} (95 % interval {interval}). Better covered rows have the lower loss"
    assert sentence in page.words
    assert f"mean of the 10 strongest {strongest['estimate']:+.2f} {interval}" in page.words
    assert "share of proponents – –" in page.words
    assert "A random sample of 80 of 1,234 test rows." in page.words
    pictures = [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"]
    assert "Loss of test rows against their coverage by the pool" in pictures and len(pictures) == 5


@pytest.mark.parametrize("conclusion", ["negative", "positive", "none"])
def test_each_conclusion_has_its_sentence(conclusion: str) -> None:
    coverage = copy.deepcopy(ANALYSES["coverage"])
    coverage["correlations"]["coverage_top_k"]["conclusion"] = conclusion
    shown = show_coverage(make_run(coverage=coverage))
    sentences = {"negative": "have the lower loss", "positive": "have the higher loss", "none": "does not tell"}
    assert shown is not None
    assert [name for name, words in sentences.items() if words in shown["headline"]] == [conclusion]


def test_texts_of_test_rows_are_text(page: Page) -> None:
    for name in ("script", "html", "comment", "quotes"):
        assert f"{name}: {' '.join(HOSTILE[name].split())}" in page.words
    assert "nul \N{REPLACEMENT CHARACTER} bell" in page.words and "\u202e" not in page.text
    used = {tag for tag, _ in page.elements}
    assert not used & {"img", "i", "iframe"} and len(page.raw["script"]) == 2
    assert [name for _, attributes in page.elements for name in attributes if name.startswith("on")] == []


def test_proponents_are_links_to_rows_that_are_there(page: Page) -> None:
    links = {attributes["href"] for _, attributes in page.elements if attributes.get("class") == "row-link"}
    assert links == {f"#row-{row}" for row in (0, 3, *range(10, 80, 10))}
    assert "row 1,000,000 (-5.00e-07)" in page.words


def test_proponents_of_the_least_covered_rows_are_in_the_table_of_a_large_pool(
    tmp_path: Path, no_pictures: None
) -> None:
    results = make_results(seeds=1) | copy.deepcopy(ANALYSES)
    folder = write_run(tmp_path / "run", make_scored(12_000), results)
    run = read_run(folder)
    assert run.scored is not None
    missing = next(iter(set(range(12_000)) - set(choose_rows(read_pool(run, run.scored), []).tolist())))
    results["coverage"]["least_covered"][0]["proponents"][0]["row"] = missing
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    page = Page(write_report(folder))
    assert missing in page.data["rows"] and f"#row-{missing}" in {a.get("href") for _, a in page.elements}


def test_refusals_are_said(tmp_path: Path, no_pictures: None) -> None:
    results = make_results(seeds=1) | {name: {"refused": f"<b>{name}</b> is too small"} for name in ANALYSES}
    page = Page(write_report(write_run(tmp_path / "run", make_scored(20), results)))
    for name in ANALYSES:
        assert f"Not computed. <b>{name}</b> is too small" in page.words


def test_without_scored_rows_the_sections_stay(tmp_path: Path, no_pictures: None) -> None:
    folder = write_run(tmp_path / "run", make_scored(20), make_results(seeds=1) | ANALYSES)
    (folder / "scored").rename(tmp_path / "elsewhere")
    page = Page(write_report(folder))
    assert "Least covered test rows" in page.words and "#layers" in {a.get("href") for _, a in page.elements}
    assert not [attributes for _, attributes in page.elements if attributes.get("class") == "row-link"]


def test_a_run_without_analyses_says_nothing_of_them(tmp_path: Path, no_pictures: None) -> None:
    page = Page(write_report(write_run(tmp_path / "run", make_scored(20), make_results(seeds=1))))
    assert not {"layers", "coverage"} & {attributes.get("id") for _, attributes in page.elements}


@pytest.mark.parametrize("name", ["layers", "coverage"])
def test_an_unknown_shape_is_left_out_with_a_note(name: str) -> None:
    show = {"layers": show_layers, "coverage": show_coverage}[name]
    wrong: Any
    for wrong in ("x", [], 7, {}, {"points": {"loss": [1.0]}}, {"candidates": "x"}, {"refused": 3}):
        run = make_run(**{name: wrong})
        assert show(run) is None
        assert len(run.notes) == 1 and "not shown: results.json holds" in run.notes[0]
    for path in list_paths(ANALYSES[name])[1:]:
        for wrong in (None, "x", [], {"y": 1}, -1.5, True, 10**400, float("nan")):
            damaged = copy.deepcopy(ANALYSES[name])
            parent = damaged
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = wrong
            run = make_run(**{name: damaged})
            shown = show(run)
            assert (shown is None) == bool(run.notes), (path, wrong)
            if shown is not None:  # what is left can be drawn
                drawn = [shown[key] for key in ("coverage", "loss") if key in shown]
                drawn += [[entry["memory"], entry["spearman"]] for entry in shown.get("candidates", [])]
                assert all(type(value) in (int, float) and abs(value) < 1e300 for part in drawn for value in part)
