"""What a notebook shows of the public objects: what they found, escaped, and what they are besides."""

import copy
import json
import math
import pickle
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import make_prompt_completion, make_trainer
from report_runs import make_results, make_scored

from hf_in2core import select_coreset
from hf_in2core.evaluation.judge import judge
from hf_in2core.influence.plan import plan_influence
from hf_in2core.notebook import render_html
from hf_in2core.selection.lengths import compare_lengths


HOSTILE = "<script>alert('x')</script>&\"`"


class Shown(HTMLParser):
    """The text and the elements of what a notebook shows."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.closed: list[str] = []
        self.text = ""
        self.feed(value if isinstance(value, str) else value._repr_html_())
        self.close()
        assert sorted(self.elements) == sorted(self.closed)  # every element ends

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not attrs
        self.elements.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.closed.append(tag)
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data


def test_whatever_is_shown_is_text() -> None:
    shown = Shown(render_html(HOSTILE, [(HOSTILE, HOSTILE)], columns=[HOSTILE], notes=[HOSTILE, ""]))
    assert "script" not in shown.elements and shown.elements.count("p") == 2
    assert shown.text.count(HOSTILE) == 5


def test_a_verdict_keeps_and_shows_its_sentences() -> None:
    results = make_results()
    verdict = judge(results["arms"], results["selection"])
    assert json.loads(json.dumps(asdict(verdict))) == asdict(verdict)
    assert pickle.loads(pickle.dumps(verdict)) == copy.deepcopy(verdict) == verdict
    assert verdict.headline in repr(verdict) and verdict.text in repr(verdict) and len(repr(verdict)) < 1500
    text = Shown(verdict).text
    assert verdict.headline in text and verdict.text in text
    loss = verdict.by_fraction[0].losses["coreset"]
    assert f"coreset 0.25 equal steps {loss.mean:.4g} {loss.half_width:.4g} 3" in text


def test_a_verdict_of_one_seed_or_of_nothing_shows() -> None:
    diverged = make_results(seeds=1, budgets=("steps",))
    diverged["arms"][1]["test_loss"] = math.nan
    for arms in (diverged["arms"], [arm for arm in diverged["arms"] if arm["arm"] == "full"]):
        verdict = judge(arms, {})
        assert verdict.text in repr(verdict) and verdict.text in Shown(verdict).text


def test_lengths() -> None:
    scored = make_scored(40).remove_columns("num_loss_tokens").add_column("num_loss_tokens", list(range(1, 41)))
    lengths = compare_lengths(scored, scored.select(range(30, 40)))
    assert (
        lengths.warning is not None
        and lengths.warning in repr(lengths)
        and f"ratio {lengths.ratio:.4g}" in repr(lengths)
    )
    assert f"of the coreset {lengths.coreset_tokens:.4g}" in Shown(lengths).text
    assert lengths.warning in Shown(lengths).text and json.loads(json.dumps(asdict(lengths))) == asdict(lengths)
    same = compare_lengths(scored, select_coreset(scored, fraction=1.0))
    assert same.warning is None and "None" not in repr(same) + Shown(same).text


def test_trainer_scorer_and_plan(tmp_path: Path, pool: Dataset) -> None:
    sets = {"math": make_prompt_completion(4, seed=1), HOSTILE: make_prompt_completion(3, seed=2)}
    trainer = make_trainer(tmp_path, pool, sets, torch.float32)
    assert f"pool of {len(pool)} rows ({len(pool)} with loss)" in repr(trainer)
    assert "math (4 rows)" in repr(trainer) and "0 steps trained, not fitted" in repr(trainer)

    plan = plan_influence(trainer)
    assert repr(plan) == str(plan) and "Pool: 23 rows" in repr(plan)
    shown = Shown(plan)
    assert str(plan).splitlines()[0] in shown.text and str(plan).splitlines()[-1] in shown.text
    assert shown.elements.count("tr") == 1 + len(plan.passes) and "padded tokens" in shown.text
    assert "Rows by length" not in shown.text and "Time: about" in shown.text

    scorer = trainer.fit_influence()
    assert "fitted)" in repr(trainer) and "not fitted" not in repr(trainer)
    shown = Shown(scorer)
    assert "script" not in shown.elements and f"validation set {HOSTILE} 3 rows" in shown.text
    assert f"fitted on {len(pool)} rows" in shown.text and "Negative influence = proponent" in shown.text


@pytest.mark.parametrize("per_example", [False, True])
def test_a_scorer_says_what_its_queries_are(tmp_path: Path, pool: Dataset, per_example: bool) -> None:
    trainer = make_trainer(tmp_path, pool, make_prompt_completion(4, seed=1), torch.float32, influence_layers=[1])
    text = Shown(trainer.fit_influence(per_example)).text
    assert ("every validation row" in text) == per_example and "layers 1 " in text
