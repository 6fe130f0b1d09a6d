"""What chose the rows, as page, terminal and card show it: the score that decided, and no opponent that is kept."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Value
from report_runs import NUM_ROWS, Page, get_scored_run, make_results, make_scored, print_results, write_run

from hf_in2core.cards.dataset import summarise_influence
from hf_in2core.cards.splits import find_coreset
from hf_in2core.report.page import write_report
from hf_in2core.selection.record import RECORD, describe_choice, read_record, take_coresets
from hf_in2core.selection.taking import make_turn_columns
from hf_in2core.selection.turns import find_ends, read_deciding_score


FRACTIONS = (0.25, 0.5)


@pytest.fixture(scope="module", params=["round_robin_rows", "greedy"])
def run(request: Any, tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> Path:
    """A run whose coresets were chosen in turn by its nine validation rows."""
    given = get_scored_run(tmp_path_factory.getbasetemp(), model_folder)
    folder = Path(shutil.copytree(given, tmp_path_factory.mktemp("choice") / "run"))
    # Other pages of the same run may have recorded what another strategy chooses.
    (folder / RECORD).unlink(missing_ok=True)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    results["config"]["strategy"] = request.param
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def scored(run: Path) -> Dataset:
    return Dataset.load_from_disk(str(run / "scored"))


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(write_report(run))


def read_strategy(run: Path) -> str:
    return json.loads((run / "results.json").read_text(encoding="utf-8"))["config"]["strategy"]


def rank_best(scored: Dataset) -> np.ndarray:
    """The definition of the best rank, by counting."""
    influence = np.array(scored["influence_per_query"][:])
    return np.array([min((influence[:, q] < row[q]).sum() for q in range(len(row))) for row in influence])


def test_every_row_shows_who_took_it_for_what_and_when(page: Page, run: Path) -> None:
    recorded = json.loads((run / RECORD).read_text(encoding="utf-8"))["coresets"]
    quarter, half = (recorded[f"coreset_{100 * fraction:g}"] for fraction in FRACTIONS)
    shown = page.data["taken"]
    kept = {row: number for number, row in enumerate(quarter["positions"])}
    for row, number in kept.items():
        assert shown[row]["turn"] == quarter["turns"][number] and shown[row]["for"] == quarter["scores"][number]
        assert shown[row]["by"] == f"validation row {quarter['takers'][number]}"
        assert f"in turn {quarter['turns'][number]} by {shown[row]['by']}" in shown[row]["words"]
    # A row that the larger coreset alone has shows what chose it there, and a row of none shows nothing.
    others = {row: number for number, row in enumerate(half["positions"]) if row not in kept}
    assert others and all(shown[row]["turn"] == half["turns"][number] for row, number in others.items())
    assert [row for row in range(NUM_ROWS) if shown[row] is None] == sorted(set(range(NUM_ROWS)) - {*kept, *others})


def test_what_all_rows_are_ordered_by_is_their_best_rank(page: Page, scored: Dataset) -> None:
    best = rank_best(scored)
    assert page.data["rank"] == best.tolist()
    influence = np.array(scored["influence_per_query"][:])
    for row in (0, 7, 50):
        rank, words = best[row], page.data["standing"][row]
        taker = int(words.split("validation row ")[1].split(",")[0])
        assert words.startswith(f"best rank {rank} ") and (influence[:, taker] < influence[row, taker]).sum() == rank
        assert f"influence on it {influence[row, taker]:+.3g}" in words
        # Of the other 119 rows so many stand before it; several have the same best rank.
        assert f"(percentile {100 * (best < rank).sum() / (NUM_ROWS - 1):.1f};" in words
    is_task = np.array(scored["task"][:]) == "task 1"
    assert re.search(rf"task 1 {is_task.sum()} \d+ % {np.median(best[is_task]):,.0f} ", page.words)


def test_the_page_says_how_the_coreset_was_chosen(page: Page) -> None:
    assert "The coreset was chosen in turn by 9 validation rows" in page.words
    assert "chose nothing" in page.words and "How many rows have which best rank over 9 validation rows" in page.words
    # Where all rows of a best rank are kept and none of a larger one, that is a cut.
    assert re.search(r"best rank over 9 validation rows\. The (coreset|cut) keeps 30", page.words)
    pictures = [attributes["aria-label"] or "" for tag, attributes in page.elements if tag == "svg"]
    assert [name for name in pictures if "influence" in name.lower()] == []
    assert "median best rank" in page.words and "median influence" not in page.words


def test_nothing_that_a_coreset_keeps_counts_as_an_opponent(page: Page, run: Path, scored: Dataset) -> None:
    influence = np.array(scored["influence"][:])
    kept = [value is not None for value in page.data["coreset"]]
    opponents, positive = int((influence[~np.array(kept)] > 0).sum()), int((influence[kept] > 0).sum())
    assert positive > 0
    assert f"{opponents} opponents by mean influence {positive} of positive mean influence, but kept" in page.words


def test_by_the_mean_influence_the_page_is_about_influence(tmp_path: Path) -> None:
    scored = make_scored(40)
    page = Page(write_report(write_run(tmp_path / "run", scored, make_results())))
    assert (
        "How many rows have which influence; the coreset of fraction 0.25 is what lies left of the cut" in page.words
    )
    assert "in turn" not in page.words and page.data["rank"] == np.argsort(np.argsort(scored["influence"])).tolist()
    first = page.data["rank"].index(0)
    assert (
        page.data["taken"][first]["words"] == f"taken in turn 0 for its influence, {scored['influence'][first]:+.3g}"
    )
    # Of a pool that helps nowhere every row has positive influence, and those that are kept are no opponents.
    harmful = scored.map(lambda row: {"influence": abs(row["influence"]) + 1})
    page = Page(write_report(write_run(tmp_path / "harmful", harmful, make_results())))
    assert "20 opponents 20 of positive influence, but kept" in page.words


def test_where_another_column_chose_the_page_is_about_that(tmp_path: Path) -> None:
    scored = make_scored(40).add_column("bm25_rank", [(7 * row) % 40 for row in range(40)])
    run = write_run(tmp_path / "run", scored, make_results())
    take_coresets(run, scored, dict(describe_choice("coreset", fraction, strategy="bm25") for fraction in FRACTIONS))
    page = Page(write_report(run))
    assert (
        "The coreset was chosen by bm25_rank (BM25: shared words" in page.words
        # Of turns, one for each row, a histogram would be flat.
        and "Lengths, groups and lists are of it." in page.words
        and "How many rows have which mean influence: this score did not choose. " in page.words
        and "The coreset keeps 10" in page.words
        and "Bm25_rank (smallest = first in line) against the number of loss tokens." in page.words
    )
    assert "was not measured for rows taken in turn" in page.words
    assert page.data["rank"] == scored["bm25_rank"][:]
    assert [row for row, words in enumerate(page.data["taken"]) if words] == [
        row for row in range(40) if scored["bm25_rank"][row] < 20
    ]


def test_of_a_rank_in_turn_every_row_tells_who_takes_it_and_for_what(tmp_path: Path) -> None:
    """As by default, with cosines; rows that no coreset has stand in the same line, further behind."""
    generator = np.random.default_rng(0)
    columns, records = make_turn_columns("cosine", generator.normal(size=(12, 40)) - 0.5)
    scored = make_scored(40)
    for name, values in columns.items():
        scored = scored.add_column(name, values, feature=Value(str(values.dtype), id=records.get(name)))
    results = make_results() | {"agreement": {"agreement": {}, "in_turn": "Two halves share much.", "warning": None}}
    run = write_run(tmp_path / "run", scored, results)
    (run / "scorer").mkdir()
    sets = {"validation_sets": {"math": 5, "code": 7}}
    (run / "scorer" / "config.json").write_text(json.dumps(sets), encoding="utf-8")
    take_coresets(run, scored, dict(describe_choice("coreset", share, strategy="cosine") for share in FRACTIONS))
    page = Page(write_report(run))
    assert page.data["choice"] == {
        "inTurn": True,
        "isTurns": True,
        "byInfluence": False,
        "score": "cosine_rank",
        "takenFor": "cosine",
        "meaning": "Each validation row in turn takes the row of smallest cosine with it that none has taken yet "
        "(turn 0 = taken first; a negative cosine = proponent); the influence on the mean chose nothing.",
    }
    for row, turn in enumerate(columns["cosine_rank"].tolist()):
        taker, score = turn % 12, columns["cosine_score"][row]
        by = f"validation math row {taker}" if taker < 5 else f"validation code row {taker - 5}"
        assert page.data["takers"][row] == {"by": by, "for": pytest.approx(score, rel=1e-5)}
        if turn < 20:
            assert page.data["taken"][row]["words"] == f"taken in turn {turn} by {by}, cosine {score:+.3g}"
            assert page.data["standing"][row] == f"percentile {100 * turn / 39:.1f}"
        else:
            assert page.data["taken"][row] is None
            assert (
                page.data["standing"][row].startswith(f"turn {turn}, percentile") and by in page.data["standing"][row]
            )
    assert "How many rows have which cosine with the validation row that takes it. The coreset keeps 10" in page.words
    assert "Two halves share much." in page.words
    # What is told of every row stands in no column of its own beside that.
    assert not {"cosine_rank", "cosine_score", "cosine_taker"} & set(page.data["columns"])
    summary = summarise_influence(scored, list(read_record(run / RECORD, 40)[1].values()), 1, sets["validation_sets"])
    said = summary.extremes[0][0].replace("\\", "")
    assert all("cosine" not in text for _, text in summary.extremes) and summary.choice.count("chose nothing") == 1
    first = int(np.argmin(columns["cosine_rank"]))
    score = columns["cosine_score"][first]
    assert f"percentile 0.0; taken in turn 0 by validation math row 0, cosine {score:+.3g}; mean" in said


def test_ends_are_of_the_score_that_chose_and_opponents_are_not_kept(run: Path, scored: Dataset) -> None:
    deciding, best = read_deciding_score(scored, read_strategy(run)), rank_best(scored)
    influence, per_query = np.array(scored["influence"][:]), np.array(scored["influence_per_query"][:])
    name, arguments = describe_choice("coreset", 0.25, strategy=read_strategy(run))
    kept = take_coresets(run, scored, {name: arguments})[name].positions
    proponents, opponents = find_ends(deciding, influence, kept, 12)
    assert best[proponents].tolist() == sorted(best[(per_query < 0).any(axis=1)])[:12]
    left = [row for row in range(NUM_ROWS) if influence[row] > 0 and row not in kept]
    assert best[opponents].tolist() == sorted(best[left], reverse=True)[:12] and set(opponents) <= set(left)
    # The strongest opponent by the mean may be kept, and then another one is named.
    worst = int(influence.argmax())
    assert worst not in find_ends(deciding, influence, [worst], NUM_ROWS)[1]


def test_the_card_names_what_chose_and_no_opponent_that_is_published(run: Path, scored: Dataset) -> None:
    name, arguments = describe_choice("coreset", 0.5, strategy=read_strategy(run))
    recorded = take_coresets(run, scored, {name: arguments})[name]
    kept = set(recorded.positions)
    influence = np.array(scored["influence"][:])
    for given in (recorded, arguments, recorded.take_from(scored)):
        coreset = find_coreset(name, given, scored)
        assert coreset is not None and set(coreset.positions) == kept
        summary = summarise_influence(scored, [coreset], show=NUM_ROWS)
        opponents = [int(title.split("row ")[1].split(",")[0]) for title, _ in summary.extremes if "Opponent" in title]
        assert sorted(opponents) == [row for row in range(NUM_ROWS) if influence[row] > 0 and row not in kept]
    summary = summarise_influence(scored, [recorded])
    assert "chosen in turn by 9 validation rows" in summary.choice
    assert "best rank 0 " in summary.extremes[0][0] and "taken in turn" in summary.extremes[0][0]
    assert "mean influence" in summary.extremes[-1][0]
    # Without the scores of single validation rows the card is about influence, and still tells what took a row.
    summary = summarise_influence(scored.remove_columns("influence_per_query"), [recorded])
    assert summary.choice == "" and "rank 0, percentile 0.0, influence" in summary.extremes[0][0]
    for control in ("random", "opponents"):
        name, arguments = describe_choice(control, 0.5)
        assert find_coreset(name, take_coresets(run, scored, {name: arguments}, write=False)[name], scored) is None


def test_the_terminal_names_what_chose(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    choice = {
        "how": "in turn by 64 validation rows",
        "score": "best rank over 64 validation rows",
        "meaning": "It is.",
    }
    row = {"influence": 0.5, "influence_rank": 9, "standing": "best rank 3", "taken": "taken in turn 5", "text": "a"}
    print_results(make_results() | {"choice": choice, "examples": {"proponents": [row], "opponents": [row]}})
    shown = capsys.readouterr().out
    assert "The coreset was chosen in turn by 64 validation rows. It is." in shown
    assert "Strongest proponents by best rank over 64 validation rows" in shown
    assert "1. best rank 3; taken in turn 5; mean influence +0.5" in shown and "no coreset keeps them" in shown
    assert "raises the validation loss" in shown
    # Of a step within its error nothing is said to raise the loss.
    unsure = {"nats_per_influence": 1e-9, "error": 1.0, "spearman": 0.9, "rows": 16, "agrees": True}
    print_results(make_results() | {"choice": choice, "examples": {"opponents": [row]}, "calibration": unsure})
    shown = capsys.readouterr().out
    assert "so its sign is not known" in shown and "raises the validation loss" not in shown
