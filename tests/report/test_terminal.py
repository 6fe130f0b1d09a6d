"""What the terminal and the pictures show of a run, read back from the output itself."""

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from report_runs import make_results, print_results

from hf_in2core.report.plots import plot_arms, plot_influence
from hf_in2core.report.terminal import print_tables


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def show(results: dict[str, Any], width: int = 100) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        print_results(results)
        return capsys.readouterr().out

    return show


# --- terminal ---


def test_every_arm_is_one_row_with_its_interval(show: Any) -> None:
    results = make_results()
    random.Random(1).shuffle(results["arms"])  # the order of the file does not matter
    output = show(results)
    lines = output.splitlines()
    shown = [line.split()[0:2] for line in lines if re.match(r"(full|coreset|random|opponents) .* ± ", line)]
    fractions = list(dict.fromkeys(entry["fraction"] for entry in results["arms"] if entry["arm"] != "full"))
    by_fraction = [[arm, f"{fraction:g}"] for fraction in fractions for arm in ("coreset", "random", "opponents")]
    assert shown == [["full", "1,600"], *by_fraction] * 2
    assert output.index("Arms at equal steps") < output.index("Arms at equal epochs")

    losses = [
        e["test_loss"] for e in results["arms"] if (e["arm"], e["budget"], e["fraction"]) == ("random", "epochs", 0.5)
    ]
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(losses), scipy.stats.sem(losses))
    line = [line for line in lines if line.startswith("random 0.5")][1]
    assert f"{np.mean(losses):.3f} ± {(high - low) / 2:.3f}" in line
    assert [cell for cell in ("800", "76,170", "100", "22.5") if cell not in line.split()] == []
    assert "over 3 seeds" in output and "nats per labelled token, lower is better" in " ".join(output.split())


@pytest.mark.parametrize("width", [20, 44, 60, 80, 120, 200])
def test_nothing_is_lost_or_too_wide_at_any_width(show: Any, width: int) -> None:
    results = make_results()
    results["auc"] = {"tasks of interest": {"influence": 0.97, "loss": 0.61}}
    tasks = {"metrics": {"acc": 0.3125}, "stderr": {"acc": 0.01}, "questions": 14_042, "num_fewshot": 5}
    results["base"] = {"tasks": {"mmlu": tasks, "arc_challenge": tasks | {"metrics": {"acc_norm": 0.4375}}}}
    results["examples"] = {"proponents": [{"influence": -2.5, "influence_rank": 0, "text": "word " * 30}]}
    output = show(results, width)
    assert max(map(len, output.splitlines())) <= width
    words = " ".join(output.split())
    assert results["verdict"]["text"] in words.replace("Verdict: ", "")
    losses = [
        e["test_loss"] for e in results["arms"] if (e["arm"], e["budget"], e["fraction"]) == ("coreset", "steps", 0.5)
    ]
    assert f"{np.mean(losses):.3f} ±" in words and "76,170" in words and "0.970" in words
    assert "0.312" in words and "0.438" in words and "mmlu: 14,042 questions, 5 examples before each" in words
    assert words.count("word ") + words.endswith("word") == 30
    assert "…" not in output


@pytest.mark.slow
def test_piped_output_is_plain_and_survives_ascii(tmp_path: Path) -> None:
    code = (
        "import json, sys\nfrom hf_in2core.report.terminal import print_tables, print_verdict\n"
        "results = json.load(open(sys.argv[1], encoding='utf-8'))\nprint_tables(results)\nprint_verdict(results)"
    )
    results = make_results() | {"examples": {"opponents": [{"influence": 1.0, "text": "Überraschung 日本"}]}}
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    for encoding, sign, text in (("utf-8", "±", "Überraschung 日本"), ("ascii", "+/-", "?berraschung ??")):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "results.json")],
            env={"PYTHONIOENCODING": encoding, "PYTHONPATH": ":".join(filter(None, sys.path)) + ":.", "COLUMNS": "90"},
            capture_output=True,
            timeout=120,
            check=True,
        )
        output = done.stdout.decode(encoding)
        assert "\x1b" not in output and sign in output and text in output


def test_text_from_the_data_stays_text(show: Any) -> None:
    hostile = "[bold red]no[/bold red] [/] \x1b[31mred\x1b[0m \x07\u202eabc\nsecond line\ttab [link=x]y[/link] \x00"
    results = make_results() | {
        "examples": {"opponents": [{"influence": 0.5, "influence_rank": 1599, "text": hostile}]},
        "auc": {"[red]wrong answers[/red]": {"influence": None, "loss": 0.75}},
    }
    output = show(results)
    assert "[bold red]no[/bold red] [/] ?[31mred?[0m ??abc second line tab [link=x]y[/link] ?" in output.replace(
        "\N{REPLACEMENT CHARACTER}", "?"
    )
    assert re.search(r"\[red\]wrong answers\[/red\] +– +– +0.750", output)
    assert not {"\x1b", "\x07", "\u202e", "\x00", "\t"} & set(output)
    assert "rank 1,599, influence +0.5" in output and "positive influence: raises the validation loss" in output


def test_long_texts_are_cut(show: Any) -> None:
    texts = ["x" * 240, "y" * 241, "z" * 5_000_000, " " * 5000 + "late"]
    results = make_results() | {"examples": {"proponents": [{"influence": -1.0, "text": text} for text in texts]}}
    output = show(results).replace("\n", "").replace(" ", "")
    assert output.count("x" * 240) == 1 and "x…" not in output
    assert output.count("y" * 240 + "…") == 1 and output.count("z" * 240 + "…") == 1
    assert "late" not in output and output.count("…") == 3  # what is cut off is said, even behind blanks


def test_what_is_missing_is_not_shown(show: Any) -> None:
    results = make_results()
    del results["verdict"]
    output = show(results)
    assert not [word for word in ("Verdict", "AUC", "Strongest") if word in output]
    assert show(results | {"verdict": {}, "auc": {}, "examples": {"proponents": []}}) == output


def test_runs_without_an_interval(show: Any) -> None:
    single = make_results(seeds=1, budgets=("steps",))
    assert "over 1 seed (none can be given)" in show(single)
    assert re.search(r"coreset 0.25 .* 45.0 +3.\d{3} +\d\d.\d\d\n", show(single))
    diverged = make_results(budgets=("steps",))
    for entry in diverged["arms"]:
        if (entry["arm"], entry["seed"]) == ("opponents", 1):
            entry["test_loss"] = entry["test_perplexity"] = math.nan
    assert show(diverged, 120).count("not finite in 1 of 3") == 4


@pytest.mark.parametrize("function", [print_tables, lambda results: plot_arms(results, "unused.png")])
def test_results_without_arms(function: Any) -> None:
    with pytest.raises(ValueError, match=r"hold no arms \(their keys: \['arms', 'selection'\]\)"):
        function({"selection": {}, "arms": []})


# --- pictures ---

BLUE, PINK, GREY, ORANGE = (0, 114, 178), (204, 121, 167), (153, 153, 153), (230, 159, 0)


def find_pixels(path: Path, colour: tuple[int, int, int]) -> np.ndarray:
    """Row and column of the pixels of a colour, shape [n, 2]."""
    image = pytest.importorskip("PIL.Image", reason="reads the picture back")
    return np.argwhere((np.asarray(image.open(path).convert("RGB")) == colour).all(-1))


def read_svg(path: Path) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", path.read_text()).split())


@pytest.fixture
def svg_text() -> Any:
    matplotlib = pytest.importorskip("matplotlib", reason="pictures need the report extra")
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters as text instead of outlines
        yield


@pytest.mark.parametrize("losses", [{}, {"coreset": 3.6, "opponents": 3.1}])
def test_lower_loss_is_drawn_lower(tmp_path: Path, losses: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the report extra")
    plot_arms(make_results(**losses), tmp_path / "arms.png")
    height = {}
    for name, colour in (("coreset", BLUE), ("opponents", PINK), ("random", ORANGE)):
        pixels = find_pixels(tmp_path / "arms.png", colour)
        height[name] = -pixels[pixels[:, 0] < 560, 0].mean()  # above the legend
    if losses:
        assert height["opponents"] < height["random"] < height["coreset"]
    else:
        assert height["coreset"] < height["random"] < height["opponents"]


@pytest.mark.usefixtures("svg_text")
def test_arms_are_labelled_with_units_and_the_finding(tmp_path: Path) -> None:
    results = make_results()
    plot_arms(results, tmp_path / "arms.svg")
    text = read_svg(tmp_path / "arms.svg")
    assert results["verdict"]["headline"] in text
    for label in (
        "(nats per labelled token, lower is better)",
        "equal steps",
        "equal epochs",
        "full pool",
        "fraction of the pool's rows kept",
        "95 % Student-t interval over 3 seeds",
        "full coreset random opponents",
    ):
        assert label in text, label

    plot_arms(make_results(budgets=("epochs",), coreset=3.36), tmp_path / "one.svg")
    text = read_svg(tmp_path / "one.svg")
    assert "did not beat random rows beyond noise" in text and "equal steps)" not in text and "full pool 0.25" in text


@pytest.mark.usefixtures("svg_text")
def test_pictures_of_incomplete_runs(tmp_path: Path) -> None:
    results = make_results(seeds=1)
    del results["verdict"]
    results["arms"][0]["test_loss"] = None
    results["arms"].append(results["arms"][1] | {"arm": "zero_shot", "fraction": 0.0})
    plot_arms(results, tmp_path / "arms.svg")
    text = read_svg(tmp_path / "arms.svg")
    assert "Test loss of the arms" in text and "not finite" in text and "zero_shot" in text


def test_histogram_colours_what_the_cut_keeps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the report extra")
    influence = np.random.default_rng(0).normal(size=2000)
    plot_influence(influence, tmp_path / "influence.png", kept=influence <= -0.5)
    kept, rest = (find_pixels(tmp_path / "influence.png", colour) for colour in (BLUE, GREY))
    kept, rest = (pixels[pixels[:, 1] < 700] for pixels in (kept, rest))  # left of the legend
    assert len(kept) > 1000 and np.quantile(kept[:, 1], 0.99) < np.quantile(rest[:, 1], 0.05)
    plot_influence(influence, tmp_path / "no_cut.png")
    assert len(find_pixels(tmp_path / "no_cut.png", BLUE)) == 0


@pytest.mark.usefixtures("svg_text")
def test_histogram_says_the_sign_and_the_counts(tmp_path: Path) -> None:
    influence = [-3.0, -2.0, -1.0, 0.0, 2.0, None, math.nan]
    kept = np.array([True, True, *[False] * 5])
    plot_influence(influence, tmp_path / "influence.svg", kept=kept)
    text = read_svg(tmp_path / "influence.svg")
    assert "negative = proponent (lowers the validation loss)" in text and "positive = opponent" in text
    assert "3 of 5 rows are proponents; the cut keeps 2; 2 rows carry no loss" in text
    assert "coreset (2 rows)" in text and "not kept (3 rows)" in text and "cut at -2" in text
    # What was chosen by another score ends at no cut of influence.
    plot_influence(influence, tmp_path / "turns.svg", kept=kept[[1, 2, 0, 3, 4, 5, 6]])
    text = read_svg(tmp_path / "turns.svg")
    assert "coreset (2 rows)" in text and "the coreset keeps 2" in text and "cut" not in text
    # One row a thousand times as far out as the rest does not squeeze them into one bar, and is not hidden silently.
    plot_influence([*np.linspace(-1, 1, 999), 1000.0], tmp_path / "tail.svg")
    assert "rows lie beyond the axis" in read_svg(tmp_path / "tail.svg")
    plot_influence([1.0, 1.0], tmp_path / "constant.svg")
    assert "0 of 2 rows are proponents" in read_svg(tmp_path / "constant.svg")


def test_histogram_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="None of the 2 rows carries loss"):
        plot_influence([None, math.nan], tmp_path / "influence.png")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for plot in (lambda path: plot_arms(make_results(), path), lambda path: plot_influence([-1.0], path)):
        with pytest.raises(ImportError, match=r"pip install hf-in2core\[report\]"):
            plot(tmp_path / "picture.png")
