"""A run whose training teaches nothing concludes nothing: in its results, on its page and on the card."""

from pathlib import Path

import pytest
from datasets import Features
from recipe_runs import NUM_POOL, Inputs, read_results, run_command, write_config
from report_runs import Page

from hf_in2core.cards.dataset import render_influence_section


def test_a_learning_rate_far_too_low_is_told(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, config = inputs
    changed = config | {"output_dir": str(tmp_path / "run"), "learning_rate": 1e-7, "reference_learning_rate": 3e-3}
    changed |= {"budgets": ["steps"], "seeds": [0, 1], "arms": ["full", "coreset", "random"]}
    run_command("run", "--config", write_config(tmp_path, changed))
    results = read_results(tmp_path)
    verdict = results["verdict"]
    assert not (verdict["beats_random"] or verdict["matches_full"])
    gain = verdict["gain"]
    losses = [arm["test_loss"] for arm in results["arms"] if arm["arm"] == "full"]
    assert (gain["arm"], gain["clear"], gain["before"]) == ("full", False, results["base"]["test_loss"])
    assert gain["after"] == pytest.approx(sum(losses) / 2) and abs(gain["share"]) < 0.001
    assert "WARNING: nothing is concluded" in verdict["text"] and "no conclusion" in verdict["headline"]
    assert "nothing is concluded at fraction 0.25, equal steps" in " ".join(capsys.readouterr().out.split())
    assert results["agreement"] == {"agreement": {}, "warning": None}  # 8 validation rows say nothing of their halves
    page = Page(tmp_path / "run" / "report.html").words
    assert verdict["headline"] in page and "No: training clearly improved the untrained model" in page
    assert "beats random rows beyond noise" not in page
    card = render_influence_section("user/pool", features=Features(), splits={"train": NUM_POOL}, results=results)
    assert "nothing is concluded at fraction 0.25, equal steps" in " ".join(card.split())
