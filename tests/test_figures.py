"""Figures of README, guides and benchmarks: each comes from the record of a run, and an invented one is found.

- Tables of arms are computed anew from `docs/results/*.json`, cell by cell (`WITH_ARMS`).
- Sentences are rendered from the same files; where a figure changes, the sentence is no longer found.
- "Mean ± half interval" in a guide stands so in `docs/benchmarks/`, or is that of an arm in `docs/results/*.json`.
- Every other figure is listed here with the document it stands in (`LISTED`): thresholds, versions, and single figures
  that are quoted from `docs/benchmarks/`.
- Sections of `docs/benchmarks/` that stood at commit eecc9d2 are frozen, all but the targets of their links. A section
  that is new names its record in a comment, `<!-- figures: docs/results/NAME.json -->` (or one of
  `benchmarks/records`), and its figures are values of that file. What stands before the first section of a page names
  no figure.

A figure is a number with a decimal point or a thousands comma, or one followed by a percent sign or seconds.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from hf_in2core.evaluation.intervals import compute_confidence_interval


RECORDS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "docs" / "results").glob("*.json"))}
MEASURED = sorted((ROOT / "docs" / "benchmarks").glob("*.md"))
WITH_ARMS = ("README.md", "docs/results.md")
FIGURE = re.compile(
    r"(?<![\w.,/^])(?:\d{1,3}(?:,\d{3})+|\d*\.\d+|\d+(?= (?:%|s\b|min\b)))(?: ± \d*\.\d+)?(?: %)?(?![\w.]*\w)"
)
# Each stands in its document this often: options, thresholds, versions, single figures that a benchmark measured.
LISTED = {
    "README.md": ["2408.03560", "2310.00902", "95 %", "2408.03560", "2310.00902", "2.0"],
    "docs/results.md": ["95 %", "0.25", "0.25", "55", "3", "24", "1.621", "1.586"],
    "docs/choices.md": (
        ["1,600", "95 %", "1,000", "0.998", "1.74", "3.3", "0.01", "5.12", "3.56", "2.79", "2.55", "0.068", "0.098"]
        + ["0.02", "0.72", "0.76", "0.58", "0.70", "3 %"]
    ),
    "docs/report.md": ["0.6", "95 %", "10,000"],
    "docs/several_gpus.md": ["0.567"],
    "docs/validation_set.md": ["0.554", "0.895", "0.640"],
    "docs/when_not.md": ["20 %", "40 %", "0.95", "0.91", "0.60"],
}
# Of these, what a benchmark measured, and the section of `docs/benchmarks` that says so.
QUOTED = {
    "docs/choices.md": {
        "peers.md: Peers": ["1.74", "3.3"],
        "speed.md: Scaling": ["5.12", "3.56", "2.79", "2.55"],
        "length.md: Length": ["0.068", "0.098"],
        "layers.md: Layers": ["0.02", "0.72", "0.76", "0.58", "0.70"],
    },
    "docs/several_gpus.md": {"speed.md: Scaling": ["0.567"]},
    "docs/validation_set.md": {
        "selection.md: Three tasks of interest in a pool of ten (the quickstart's generated data)": (
            ["0.554", "0.895", "0.640"]
        )
    },
    "docs/when_not.md": {"pools.md: Pools": ["0.95", "0.91", "0.60"]},
}
# Sections at commit eecc9d2, by the start of their SHA-256: without their heading and the targets of links.
FROZEN = {
    "Passes": "2f2b16e57158d396",
    "Memory": "dc0d4554358851b6",
    "Scaling": "a2f6d283964f9f8b",
    "Plan": "8e27439b99d0ead5",
    "Peers": "0af536e8775d34e4",
    "How it was measured": "32a9a2a1d3486e02",
    "Three tasks of interest in a pool of ten (the quickstart's generated data)": "144cf793c153d09d",
    (
        "One task of interest among real instructions (`recipes/mixture`: GSM8K in GSM8K, BoolQ, ARC-Easy and Dolly)"
    ): "fbd67f84838eeb52",
    "Two tasks of interest among real instructions": "e1917a95a97692ea",
    "When to read influence": "fa02c065ceb96dfd",
    "Wrong answers": "73670c26acca2fad",
    "Length": "70a221fe48e0fbc9",
    "DataInf's own task": "302720389a6c8846",
    "Not measured yet": "7aba92402c0ec864",
    "Faults of the Hub": "38e394362ee60df0",
    "Layers": "3ad7bfd220a33b62",
    "Coverage of test points": "db59fdd2131549c7",
    "Against the exact answer": "4273fd208b8bbfca",
    "Against retraining": "d0018431040dad1e",
    "Groups: pools that repeat themselves": "7423d75ff358170a",
    "Transfer": "6fb788e8c2ad1158",
}


def summarise(record: dict[str, Any], arm: str, fraction: float, budget: str = "steps") -> dict[str, float]:
    """Means over the seeds of one arm, and half of the 95 % interval of its loss."""
    runs = [run for run in record["arms"] if (run["arm"], run["fraction"], run["budget"]) == (arm, fraction, budget)]
    assert runs, (arm, fraction, budget)
    means = {
        name: sum(run[name] for run in runs) / len(runs)
        for name in ("rows", "loss_tokens", "steps", "seconds", "test_loss", "test_perplexity")
    }
    return means | {"half": compute_confidence_interval([run["test_loss"] for run in runs]).half_width}


def strip_zero(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def show_loss(record: str, arm: str, fraction: float = 0.25, budget: str = "steps") -> str:
    found = summarise(RECORDS[record], arm, fraction, budget)
    return f"{found['test_loss']:.3f} ± {strip_zero(found['half'])}"


def get_difference(record: str, name: str) -> dict[str, float]:
    return RECORDS[record]["verdict"]["intervals"][name]


def show_gain(record: str, other: str) -> str:
    """How much lower the coreset's loss is, with its interval."""
    found = get_difference(record, f"coreset_minus_{other}")
    return f"{-found['mean']:.3f} ({-found['high']:.3f} to {-found['low']:.3f})"


def show_signed(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def render_passages() -> dict[str, list[str]]:
    """What the documents say in words, from the records."""
    mixture, transfer, demo, top = (RECORDS[name] for name in ("mixture", "transfer", "quickstart", "quickstart_top"))
    cost = {name: record["verdict"]["cost"] for name, record in RECORDS.items()}
    first = get_difference("mixture", "coreset_minus_random")
    random, full = (get_difference("quickstart", f"coreset_minus_{name}") for name in ("random", "full"))
    auc = {name: record["auc"] for name, record in RECORDS.items() if "auc" in record}
    interest = {name: found["tasks of interest"] for name, found in auc.items()}
    no_gain = f"{show_loss('no_gain', 'coreset')} against {show_loss('no_gain', 'random')}"
    return {
        "README.md": [no_gain],
        "docs/results.md": [
            f"Before fine-tuning the test loss is {mixture['base']['test_loss']:.3f} and "
            f"{transfer['base']['test_loss']:.3f}.",
            f"beats random rows by {-first['mean']:.3f} (95 % interval {-first['high']:.3f} to {-first['low']:.3f}) "
            f"and the full pool by {show_gain('mixture', 'full')}; for the larger target by "
            f"{show_gain('transfer', 'random')} and {show_gain('transfer', 'full')}.",
            f"with an AUC of {interest['mixture']['influence']:.2f} (reference chosen for the larger target: "
            f"{interest['transfer']['influence']:.2f}); the row's own low loss does not "
            f"({interest['mixture']['loss']:.2f} and {interest['transfer']['loss']:.2f}).",
            f"Selecting cost {cost['mixture']['selection_seconds']:.0f} s (reference "
            f"{cost['mixture']['reference_seconds']:.0f} s, influence {cost['mixture']['influence_seconds']:.0f} s)",
            f"(difference {show_signed(random['mean'])}, 95 % interval {show_signed(random['low'])} to "
            f"{show_signed(random['high'])}) and the full pool ({show_signed(full['mean'])}, "
            f"{show_signed(full['low'])} to {show_signed(full['high'])})",
            f"Selecting cost {cost['quickstart']['selection_seconds']:.1f} s (reference "
            f"{cost['quickstart']['reference_seconds']:.1f} s, influence "
            f"{cost['quickstart']['influence_seconds']:.1f} s, ranking "
            f"{cost['quickstart']['ranking_seconds']:.1f} s); a target run at equal epochs was "
            f"{cost['quickstart']['saving_per_run']:.1f} s shorter",
            f"in turn ( ), the coreset is {show_loss('quickstart_turns', 'coreset')}; by",
            f"it is {show_loss('quickstart_top', 'coreset')} and does not beat",
            f"with an AUC of {interest['quickstart_top']['influence']:.2f} (the row's own loss: "
            f"{interest['quickstart_top']['loss']:.2f}, : {interest['quickstart']['cosine_rank']:.2f}) and wrong "
            "answers with "
            f"{top['auc']['wrong answers']['influence']:.2f}",
            f"{demo['selection']['rows']:,} generated rows",
            no_gain,
        ],
        "docs/choices.md": [
            f"a quarter gave {summarise(mixture, 'coreset', 0.25)['test_loss']:.3f} and a half "
            f"{summarise(mixture, 'coreset', 0.5)['test_loss']:.3f}, where the whole pool gave "
            f"{summarise(mixture, 'full', 1.0)['test_loss']:.3f}",
        ],
        "docs/when_not.md": [no_gain],
    }


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def read_prose(text: str) -> str:
    """The document on one line, without code, targets of links and comments."""
    return " ".join(
        re.sub(r"```.*?^```|`[^`]*`|\]\([^)]*\)|<!--.*?-->", " ", text, flags=re.DOTALL | re.MULTILINE).split()
    )


def read_tables(text: str) -> Iterator[list[dict[str, str]]]:
    """Rows of each table by the names of its columns, without the asterisks of bold print."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        lines = [
            [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")] for line in block.splitlines()
        ]
        yield [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


def find_wrong_cells(text: str) -> tuple[list[str], int]:
    """Cells of tables of arms that are not what the records give, and the number of cells compared."""
    wrong, compared = [], 0
    for table in read_tables(text):
        if not table or "test loss" not in table[0] or "arm" not in table[0]:
            continue
        for row in table:
            name = {"itself": "mixture", "larger": "transfer"}[row["model"]] if "model" in row else "quickstart"
            fraction = float(row.get("fraction", "1" if row["arm"] == "full" else "0.25"))
            budget = row.get("budget", "steps")
            found = summarise(RECORDS[name], row["arm"], fraction, budget)
            expected = {
                "rows": f"{found['rows']:,.0f}",
                "loss tokens": f"{found['loss_tokens']:,.0f}",
                "steps": f"{found['steps']:.0f}",
                "seconds": f"{found['seconds']:.1f}",
                "test loss": show_loss(name, row["arm"], fraction, budget),
                "perplexity": f"{found['test_perplexity']:.2f}",
            }
            for column in expected.keys() & row.keys():
                compared += 1
                if row[column] != expected[column]:
                    wrong.append(f"{row['arm']}, {column}: {row[column]} is {expected[column]}")
    return wrong, compared


def list_losses(*names: str) -> set[str]:
    """Every arm's loss as a guide prints it, with and without the zero before the point."""
    shown = set()
    for name, record in ((name, RECORDS[name]) for name in names or RECORDS):
        for arm, fraction, budget in {(run["arm"], run["fraction"], run["budget"]) for run in record["arms"]}:
            text = show_loss(name, arm, fraction, budget)
            shown |= {text, text.replace("± .", "± 0.")}
    return shown


def find_wrong_figures(name: str, text: str) -> list[str]:
    """What in a document comes from no record."""
    wrong = find_wrong_cells(text)[0] if name in WITH_ARMS else []
    prose = read_prose(re.sub(r"^\|.*±.*\n", "", text, flags=re.MULTILINE) if name in WITH_ARMS else text)
    for passage in render_passages().get(name, []):
        if passage not in prose:
            wrong.append(f"not said any more: {passage}")
        prose = prose.replace(passage, " ", 1)
    measured = " ".join(read_measured().split())
    known = list_losses()
    listed = list(LISTED.get(name, []))
    for match in FIGURE.finditer(prose):
        figure = match[0]
        if "±" in figure and (figure in known or re.search(rf"(?<![\d.,]){re.escape(figure)}(?!\d)", measured)):
            continue
        if figure in listed:
            listed.remove(figure)
        else:
            wrong.append(f"{figure}: …{prose[max(0, match.start() - 40) : match.end() + 20]}…")
    return wrong + [f"{figure} is listed and stands there no more" for figure in listed]


@pytest.mark.parametrize("name", QUOTED)
def test_single_figures_are_those_of_the_section_that_measured_them(name):
    for source, figures in QUOTED[name].items():
        page, heading = source.split(": ")
        text = (ROOT / "docs" / "benchmarks" / page).read_text(encoding="utf-8")
        (section,) = [body for title, body in read_sections(text).items() if title.lstrip("# ") == heading]
        missing = [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", section)]
        assert missing == [] and set(figures) <= set(LISTED[name]), (source, missing)


def read_measured() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in MEASURED)


def read_sections(text: str) -> dict[str, str]:
    """Every section, and what stands before the first one of each page, by its heading."""
    return {
        heading: body
        for heading, _, body in (part.partition("\n") for part in re.split(r"^(?=##? )", text, flags=re.MULTILINE))
        if heading
    }


def compute_digest(section: str) -> str:
    body = re.sub(r"\]\([^)]*\)", "]", re.sub(r"^#+ ", "# ", section, flags=re.MULTILINE))
    return hashlib.sha256(body.strip().encode()).hexdigest()[:16]


def list_values(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from list_values(child)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield abs(value)
    elif isinstance(value, str):  # "Spearman 0.75 with our DataInf"
        yield from map(float, re.findall(r"(?<![\w.])\d*\.\d+(?![\w.])", value))


def find_wrong_in_results(text: str) -> list[str]:
    """Frozen sections that were changed, and figures of new ones that are no values of the record that they name."""
    sections, wrong = read_sections(text), []
    for title, digest in FROZEN.items():
        if compute_digest(sections.pop(f"## {title}", "")) != digest:
            wrong.append(f"{title}: frozen at commit eecc9d2; write a new section")
    for title, section in sections.items():
        named = re.findall(r"<!-- figures: docs/results/(\w+)\.json -->", section)
        recorded = re.findall(r"<!-- figures: (benchmarks/records/\w+\.json) -->", section)
        shown = {text for name in named for text in list_losses(name)}
        # Not those of single runs and settings, of which some would match by chance.
        parts = [RECORDS[name].get(part) for name in named for part in ("base", "selection", "verdict", "auc")]
        values = list(list_values([*parts, *(json.loads((ROOT / path).read_text()) for path in recorded)]))
        for match in FIGURE.finditer(re.sub(r"```.*?^```|<!--.*?-->", " ", section, flags=re.DOTALL | re.MULTILINE)):
            number = match[0].removesuffix(" %").replace(",", "")
            decimals = len(number.partition(".")[2])
            scale = 100 if match[0].endswith("%") else 1
            is_value = "±" not in number and float(number) in {round(value * scale, decimals) for value in values}
            if match[0] not in shown and not is_value:
                wrong.append(f"{title}: {match[0]} is no value of {named + recorded or 'a record: name one'}")
    return wrong


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_figure_comes_from_a_record(document: Path) -> None:
    assert find_wrong_figures(name_of(document), document.read_text(encoding="utf-8")) == []


def test_results_are_frozen_and_new_sections_name_their_record() -> None:
    assert find_wrong_in_results(read_measured()) == []


@pytest.mark.parametrize(
    "name, said, changed",
    [
        ("README.md", "| **2.994 ± .044** |", "| **2.984 ± .044** |"),  # a loss in a table
        ("README.md", "3.703 ± .027", "3.703 ± .011"),  # its interval
        ("README.md", "1.507 ± .030", "1.517 ± .030"),  # a sentence
        ("README.md", "| 400 | **2.994", "| 401 | **2.994"),  # rows
        ("docs/results.md", "| 400 | 40,158 |", "| 401 | 40,158 |"),  # rows
        ("docs/results.md", "| 14,503 | 100 |", "| 14,503 | 110 |"),  # steps
        ("docs/results.md", "| 25 | 2.4 |", "| 25 | 2.3 |"),  # seconds
        ("docs/results.md", "| 5.37 |", "| 5.36 |"),  # a perplexity
        ("docs/results.md", "0.172 to 0.386", "0.182 to 0.386"),  # a bound of an interval
        ("docs/results.md", "−0.252", "0.252"),  # a sign
        ("docs/results.md", "AUC of 0.77", "AUC of 0.78"),
        ("docs/results.md", "reference 60 s", "reference 61 s"),
        ("docs/results.md", "1,600 generated rows", "1,500 generated rows"),
        ("docs/results.md", "(1.621 against 1.586)", "(1.621 against 1.596)"),  # a figure that no record holds
        ("docs/results.md", "95 % interval over seeds", "90 % interval over seeds"),  # a percentage
        ("docs/results.md", "no better than chance.", "no better than chance. It saves 40 % of the time."),  # invented
        ("docs/choices.md", "1.366 ± 0.011", "1.366 ± 0.012"),
        ("docs/choices.md", "1.333 ± 0.016", "1.343 ± 0.016"),
        ("docs/choices.md", "a half 3.132", "a half 3.123"),
        ("docs/choices.md", "0.58 to 0.70", "0.58 to 0.71"),
        ("docs/when_not.md", "1.507 ± .030", "1.507 ± .012"),
        ("docs/when_not.md", "With 20 %", "With 25 %"),
        ("docs/validation_set.md", "0.895", "0.885"),
        ("docs/hub.md", "# ", "# 0.731 of "),
    ],
)
def test_a_changed_figure_is_found(name: str, said: str, changed: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert said in text
    assert find_wrong_figures(name, text.replace(said, changed, 1)) != []


def test_a_changed_figure_of_the_results_is_found() -> None:
    text = read_measured()
    assert find_wrong_in_results(text.replace("2.930 ± 0.052", "2.920 ± 0.052", 1)) != []
    new = "\n## Again\n<!-- figures: docs/results/mixture.json -->\nThe coreset ends at {} at fraction 0.25.\n"
    assert find_wrong_in_results(text + new.format("2.994 ± 0.044")) == []
    assert find_wrong_in_results(text + new.format("2.994 ± 0.018")) != []
    assert find_wrong_in_results(text + new.format("2.997")) != []
    assert find_wrong_in_results(text + "\n## Again\nThe coreset ends at 2.994 ± 0.044.\n") != []
