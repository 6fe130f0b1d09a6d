"""Run folders for the tests of the report page: a small pool that is really scored, with hostile rows in it."""

import json
import math
import random
from dataclasses import asdict
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from helpers import add_trained_adapter, make_prompt_completion, make_trainer
from transformers import AutoModelForCausalLM

from hf_in2core.analysis.coverage import correlate_coverage
from hf_in2core.analysis.layers import LayerScores, choose_layers
from hf_in2core.evaluation.judge import judge
from hf_in2core.report.terminal import print_tables, print_verdict


NUM_ROWS = 120
# What must show as text, row by row; the marker finds each of them.
HOSTILE = {
    "script": "</script><script>document.title='pwned'</script>",
    # An end tag with a blank in it ends a script as well, and this opening keeps a script from ending.
    "spaced": "</script ><!-- <script >document.title='pwned'</script/x>",
    "html": "<img src=x onerror=\"document.title='pwned'\"><b>bold</b>",
    "comment": "<!-- <script> &lt;b&gt; & ]]> \\u003c",
    "quotes": "\"double\" 'single' `back` ${document.title='pwned'} {{ 7 * 7 }} {% raw %}",
    "control": "nul \x00 bell \x07 escape \x1b[31m line\u2028separator",
    "rtl": "left \u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "wide": "日本語 🎉 e\u0301 " + "x" * 60,
}


def make_pool() -> Dataset:
    pool = make_prompt_completion(NUM_ROWS, seed=0)
    rows: list[dict[str, Any]] = [dict(row) | {"task": f"task {number % 3}"} for number, row in enumerate(pool)]
    for number, (name, text) in enumerate(HOSTILE.items()):
        rows[10 * number] |= {"id": f"hostile-{name}", "completion": f" {text}", "task": "<i>$hostile$</i>"}
    return Dataset.from_list(rows)


def make_analyses() -> dict[str, Any]:
    """Layers and coverage as the recipe records them, of made-up scores; the least covered test rows are hostile."""
    generator = np.random.default_rng(0)
    parts = generator.normal(size=(200, 1, 6)) * np.array([0.1, 3.0, 0.2, 2.0, 0.3, 0.1])
    scores = LayerScores(list(range(6)), [10] * 6, np.arange(200), parts)
    choice = asdict(choose_layers(scores, budget=0.5))
    candidates = choose_layers(scores, budget=1.0).candidates
    layers = choice | {"budget": 0.5, "rows": 200, "all_layers": scores.layers, "candidates": candidates}
    coverage = Dataset.from_dict(
        {
            "coverage_top_k": (values := generator.lognormal(size=80)),
            "coverage_sum": 3 * values,
            "coverage_mean": generator.normal(size=80),
            "coverage_share": np.full(80, 0.5),
            "loss": (losses := 2 - 0.4 * np.log(values) + 0.2 * generator.normal(size=80)),
        }
    )
    least = [
        {
            "row": 7 + number,
            "coverage": 0.001 * number,
            "loss": 1.5,
            "num_loss_tokens": 4,
            "text": f"{name}: {text}",
            # The last is of another pool.
            "proponents": [{"row": row, "influence": -0.5 / (row + 1)} for row in (10 * number, 3, 10**6)],
        }
        for number, (name, text) in enumerate(HOSTILE.items())
    ]
    return {
        "layers": layers,
        "coverage": {
            "top_k": 10,
            "estimator": "datainf",
            "test_rows": 1234,
            "correlations": {name: asdict(found) for name, found in correlate_coverage(coverage).items()},
            "points": {"row": list(range(80)), "coverage": values.tolist(), "loss": losses.tolist()},
            "least_covered": least,
        },
    }


def write_run(folder: Path, scored: Dataset, results: dict[str, Any]) -> Path:
    """A run's folder with results and scored rows, without a scorer."""
    folder.mkdir(parents=True)
    scored.save_to_disk(str(folder / "scored"))
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def make_scored(num_rows: int, seed: int = 0, **columns: list[Any]) -> Dataset:
    """Rows with made-up influence."""
    influence = np.random.default_rng(seed).normal(size=num_rows).tolist()
    rows = {"text": [f"row number {number}" for number in range(num_rows)]} | columns
    return Dataset.from_dict(rows | {"influence": influence, "num_loss_tokens": [5] * num_rows})


@cache
def get_scored_run(session_folder: Path, model_folder: str) -> Path:
    """A run whose pool was really scored on every validation row; made once, and nobody writes into it."""
    root = session_folder / "report"
    validation = make_prompt_completion(9, seed=1)
    model = add_trained_adapter(AutoModelForCausalLM.from_pretrained(model_folder))
    trainer = make_trainer(root / "trainer", make_pool(), validation, torch.float32, model=model, max_length=200)
    scorer = trainer.fit_influence(per_example=True)
    scored = trainer.score_influence()
    results = make_results()
    results["selection"]["rows"] = NUM_ROWS
    validation.to_json(str(root / "validation.jsonl"))
    results["config"] = {"task_column": "task", "validation": [str(root / "validation.jsonl")]}
    results |= make_analyses()
    results["command"] = "in2core.py --pool '</script>'"
    folder = write_run(root / "run", scored, results)
    scorer.save_pretrained(folder / "scorer")
    return folder


def make_results(seeds: int = 3, budgets: tuple[str, ...] = ("steps", "epochs"), **losses: float) -> dict[str, Any]:
    """A run as the recipe records it, with the figures of a trial on real data and made-up noise."""
    means = {"full": 3.354, "coreset": 3.158, "random": 3.357, "opponents": 3.567} | losses
    generator = random.Random(0)
    arms = [
        {
            "arm": arm,
            "fraction": 1.0 if arm == "full" else fraction,
            "seed": seed,
            "budget": budget,
            "rows": 1600 if arm == "full" else round(1600 * fraction),
            "loss_tokens": 152_340 if arm == "full" else round(152_340 * fraction),
            "steps": 100,
            "seconds": 45.0 if arm == "full" or budget == "steps" else 45.0 * fraction,
            "test_loss": (loss := mean + generator.gauss(0, 0.02)),
            "test_perplexity": math.exp(loss),
        }
        for budget in budgets
        for arm, mean in means.items()
        for fraction in ((1.0,) if arm == "full" else (0.25, 0.5))
        for seed in range(seeds)
    ]
    selection = {"seconds": 62.0, "reference_seconds": 60.0, "rows": 1600}
    pair = {"row": 3, "pool_row": 5, "share": 0.9, "text": HOSTILE["script"], "pool_text": HOSTILE["spaced"]}
    data = {
        "pool": {"rows": 1600, "shared": {"validation": 0, "test": 0}},
        "test": {"rows": 200, "near_copies": {"rows": 1, "pairs": [pair]}},
    }
    return {"arms": arms, "selection": selection, "verdict": asdict(judge(arms, selection)), "data": data}


class Page(HTMLParser):
    """The elements, scripts, styles and text of a page, as a browser would take it apart."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.text = ""
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag if tag in self.raw else ""
        if tag in ("td", "th"):
            self.text += " "
        if self._inside:
            self.raw[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.raw[self._inside][-1] += data
        else:
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.raw["script"][0])

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def list_paths(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths to every value in JSON; of a list to its first item alone."""
    children = (
        value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else []
    )
    return [path, *[found for name, child in children for found in list_paths(child, (*path, name))]]


def print_results(results: dict[str, Any]) -> None:
    """All that a run says in the terminal, in its order."""
    print_tables(results)
    print_verdict(results)
