"""What a fit tells of halves of its validation set, against the influence on every validation row of a pool."""

import logging
import re

import numpy as np
import pytest
from datasets import Dataset
from helpers import add_trained_adapter, make_model, make_tokens, make_trainer

from hf_in2core.analysis.agreement import measure_agreement
from hf_in2core.engine.halves import MIN_AGREEMENT, correlate_halves, extrapolate
from hf_in2core.engine.validation import run_per_example_validation_pass
from hf_in2core.influence.scorer_files import read_scorer_config


@pytest.mark.parametrize("estimator", ["datainf", "gradient_dot"])
@pytest.mark.parametrize("num_queries", [12, 80])
def test_a_sample_tells_what_the_pool_would(tmp_path, caplog, monkeypatch, estimator, num_queries) -> None:
    monkeypatch.setattr("hf_in2core.influence.quality.MAX_CHECKED_SHARE", 1.0)  # the dot product has no fit
    pool, validation = make_tokens(150, seed=5), make_tokens(num_queries, seed=6)
    model = add_trained_adapter(make_model())
    options = {"model": model, "estimator": estimator}
    with caplog.at_level(logging.WARNING):
        told = make_trainer(tmp_path / "mean", pool, validation, **options).fit_influence().config
    trainer = make_trainer(tmp_path / "rows", pool, validation, **options)
    assert trainer.fit_influence(per_example=True).config.validation_agreement == {}
    expected = measure_agreement(trainer.score_influence()).agreement
    agreement = told.validation_agreement["validation"]
    assert agreement == pytest.approx(expected, abs=0.15)
    warned = re.findall(r"Halves of the validation set .*Spearman ([\d.-]+)", caplog.text)
    assert warned == ([f"{agreement:.2f}"] if agreement < MIN_AGREEMENT else [])
    again = make_trainer(tmp_path / "mean", pool, validation, **options).fit_influence()
    assert again.config.validation_agreement == told.validation_agreement
    again.save_pretrained(tmp_path / "scorer")
    assert read_scorer_config(tmp_path / "scorer") == again.config


def test_the_checks_pass_a_hundredth_of_the_pool_at_most(tmp_path, caplog, monkeypatch) -> None:
    """What no fit has kept (there is none, or it went on where another stopped) is measured where that is enough."""
    pool, validation = make_tokens(150, seed=5), make_tokens(12, seed=6)
    passed = []

    def count(passes, rows, text):
        passed.append(len(rows))
        return run_per_example_validation_pass(passes, rows, text)

    monkeypatch.setattr("hf_in2core.engine.curvature.run_per_example_validation_pass", count)
    for share, expected in ((0.01, []), (0.25, [37]), (1.0, [64])):
        monkeypatch.setattr("hf_in2core.influence.quality.MAX_CHECKED_SHARE", share)
        passed.clear()
        caplog.clear()
        with caplog.at_level(logging.INFO):
            trainer = make_trainer(tmp_path / str(share), pool, validation, estimator="gradient_dot")
            config = trainer.fit_influence().config
        assert passed == expected
        assert bool(config.validation_agreement) == bool(expected)
        assert ("Not measured" in caplog.text) == (not expected)


def test_copies_agree_and_few_rows_say_nothing(tmp_path, caplog) -> None:
    pool, one = make_tokens(40, seed=0), make_tokens(1, seed=1)
    sets = {"same": Dataset.from_list(one.to_list() * 12), "few": make_tokens(9, seed=2)}
    with caplog.at_level(logging.WARNING):
        config = make_trainer(tmp_path, pool, sets, model=add_trained_adapter(make_model())).fit_influence().config
    assert config.validation_agreement == {"same": pytest.approx(1)}
    assert "Halves" not in caplog.text


def test_more_rows_are_expected_to_agree_more() -> None:
    generator = np.random.default_rng(0)
    influence = 0.2 * generator.normal(size=(1, 2000)) + generator.normal(size=(160, 2000))
    quarter, whole = (float(np.mean(correlate_halves(rows, 0))) for rows in (influence[:40], influence))
    assert quarter < whole and extrapolate(quarter, 4) == pytest.approx(whole, abs=0.05)
