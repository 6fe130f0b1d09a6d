"""Steps on single rows against a plain loop, and what is made of them."""

import numpy as np
import pytest
import torch
from helpers import add_trained_adapter, assert_same, make_model, make_prompt_completion, make_trainer, prepare
from naive import compute_loss
from scipy import stats

from hf_in2core.analysis.calibration import NUM_ROWS, calibrate_influence
from hf_in2core.evaluation.formats import describe_calibration, is_step_unsure, show_step


RATE = 0.05


def step_plainly(model, rows, sets) -> list[float]:
    """Changes of the validation loss by a step of plain descent on each row alone."""
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]

    def judge() -> float:
        with torch.no_grad():
            means = [sum(compute_loss(model, row).item() for row in judges) / len(judges) for judges in sets]
        return sum(means) / len(means)

    start, changes = judge(), []
    for row in rows:
        before = [tensor.detach().clone() for tensor in trained]
        descent = torch.optim.SGD(trained, lr=RATE)
        descent.zero_grad()
        compute_loss(model, row).backward()
        descent.step()
        changes.append(judge() - start)
        for tensor, value in zip(trained, before, strict=True):
            tensor.data.copy_(value)
    return changes


def test_the_scale_is_that_of_steps_really_taken(tmp_path, validation) -> None:
    pool, other = make_prompt_completion(40, seed=0), make_prompt_completion(5, seed=3)
    sets = {"a": validation, "b": other}
    model = add_trained_adapter(make_model()).double()
    trainer = make_trainer(tmp_path, pool, sets, model=model, learning_rate=RATE)
    scored = trainer.score_influence()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    found = calibrate_influence(trainer, scored)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert all(tensor.requires_grad == ("lora" in name) for name, tensor in trainer.model.named_parameters())

    order = np.argsort(scored["influence"][:])
    chosen = order[[round(k * (len(pool) - 1) / (NUM_ROWS - 1)) for k in range(NUM_ROWS)]]
    influence = np.array(scored["influence"][:])[chosen]
    rows = [prepare(pool)[int(row)] for row in chosen]
    changes = np.array(step_plainly(trainer.model.eval(), rows, [list(prepare(part)) for part in sets.values()]))

    def fit(some: np.ndarray) -> float:
        """Of the slopes through each point the one of the least absolute deviations."""
        slopes = changes[some] / influence[some]
        return min(slopes, key=lambda slope: np.abs(changes[some] - slope * influence[some]).sum())

    everything = np.arange(NUM_ROWS)
    assert_same([found.nats_per_influence], [fit(everything)], 1e-9)
    left_out = [abs(changes[k] - fit(np.delete(everything, k)) * influence[k]) for k in everything]
    assert_same([found.error], [np.mean(left_out)], 1e-9)
    assert found.spearman == pytest.approx(stats.spearmanr(influence, changes).statistic)
    assert found.agrees == (found.spearman >= 0.6 and found.error < np.abs(changes).mean())
    assert (found.rows, found.learning_rate) == (NUM_ROWS, RATE)


def test_a_small_step_does_what_the_gradients_say(tmp_path, validation) -> None:
    """To first order a step moves the loss by `-eta v g`, which is the learning rate times the plain influence."""
    pool, rate = make_prompt_completion(40, seed=0), 1e-5
    trainer = make_trainer(tmp_path, pool, validation, learning_rate=rate, estimator="gradient_dot")
    found = calibrate_influence(trainer, trainer.score_influence())
    assert found.agrees and found.spearman > 0.99
    assert found.nats_per_influence == pytest.approx(rate, rel=1e-2)


def test_where_steps_do_not_follow_influence_nothing_is_told_in_nats(tmp_path, validation) -> None:
    pool = make_prompt_completion(40, seed=0)
    trainer = make_trainer(tmp_path, pool, validation, learning_rate=1e-5, estimator="gradient_dot")
    scored = trainer.score_influence()
    influence = np.array(scored["influence"][:])
    # Turned round; and in the right order, but of sizes that foretell no size of a change.
    order = np.argsort(np.argsort(influence)).astype(float)
    for values, spearman in ((-influence, -1), (10.0 ** (order - len(pool) / 2), 1)):
        changed = scored.remove_columns("influence").add_column("influence", values.tolist())
        found = calibrate_influence(trainer, changed)
        assert not found.agrees and found.spearman == pytest.approx(spearman, abs=0.05)
        assert show_step(vars(found), 3.0) == ""
        assert describe_calibration(vars(found)).endswith("so nothing is told in nats")


def test_a_change_is_told_with_its_error() -> None:
    found = {"nats_per_influence": 2e-4, "error": 0.0031, "spearman": 0.8, "rows": 16, "agrees": True}
    assert show_step(found, -40.0) == "-0.008 nats by one more step on it, within 0.003"
    assert describe_calibration(found).startswith(
        "0.0002 nats of the validation loss for an influence of 1, within 0.003"
    )
    # Within the error nobody knows the sign.
    assert show_step(found, -10.0) == "-0.002 nats by one more step on it, within 0.003, so its sign is not known"
    assert is_step_unsure(found, -10.0) and not is_step_unsure(found, -40.0) and not is_step_unsure({}, -10.0)
    assert show_step(found, None) == show_step({}, 1.0) == show_step({"agrees": True}, 1.0) == ""
    assert describe_calibration(None) == "" and describe_calibration({"refused": "too few"}) == "not taken: too few"


def test_what_cannot_be_compared_is_refused(tmp_path, validation) -> None:
    few, many = make_prompt_completion(15, seed=1), make_prompt_completion(20, seed=1)
    trainer = make_trainer(tmp_path / "few", few, validation)
    with pytest.raises(ValueError, match="Steps on 16 rows are compared, but the pool has 15 rows with loss"):
        calibrate_influence(trainer, trainer.score_influence())
    trainer = make_trainer(tmp_path / "many", many, validation)
    same = many.add_column("influence", [1.0] * len(many))
    with pytest.raises(ValueError, match="Nothing moves: learning_rate=.*influence goes from 1 to 1"):
        calibrate_influence(trainer, same)
    wild = make_trainer(tmp_path / "wild", many, validation, learning_rate=1e200)
    with pytest.raises(ValueError, match=r"not finite after a step at learning_rate=1e\+200"):
        calibrate_influence(wild, wild.score_influence())


def test_mixed_precision_hides_no_step_and_coarse_weights_are_refused(tmp_path, validation) -> None:
    pool, rate = make_prompt_completion(40, seed=0), 1e-3
    model = add_trained_adapter(make_model()).float()
    settings = {"learning_rate": rate, "estimator": "gradient_dot", "model": model, "dtype": None}
    trainer = make_trainer(tmp_path / "float32", pool, validation, **settings)
    scored = trainer.score_influence()
    trainer.args.bf16 = True  # as on a machine where TRL trains in it
    assert trainer.autocast == "bf16"
    found = calibrate_influence(trainer, scored)
    assert found.spearman > 0.95
    assert found.nats_per_influence == pytest.approx(rate, rel=0.1)
    settings["model"] = add_trained_adapter(make_model()).to(torch.bfloat16)
    trainer = make_trainer(tmp_path / "coarse", pool, validation, **settings)
    with pytest.raises(ValueError, match=r"does not show in bfloat16. Load the model in float32"):
        calibrate_influence(trainer, trainer.score_influence())
