"""InfluenceTrainer against the naive oracle, and what must not change its result."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers import (
    add_trained_adapter,
    assert_same,
    make_model,
    make_prompt_completion,
    make_tokenizer,
    make_trainer,
    prepare,
)
from loops import compute_loops
from naive import compute_datainf, compute_gradients, compute_loss

from hf_in2core import InfluenceScorer
from hf_in2core.engine.batches import collate, read_token_rows
from hf_in2core.engine.blocks import find_blocks
from hf_in2core.engine.fit import MAX_INNER_DAMPING_ERROR, PILOT_ROWS
from hf_in2core.engine.gradients import GradientRecorder
from hf_in2core.engine.reductions import compute_gradient_sum
from hf_in2core.names import LOSS_REDUCTIONS


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum", "sqrt", "max"])
def test_influence_equals_a_batch_size_1_loop(tmp_path, pool, validation, dtype, tolerance, loss_reduction) -> None:
    # The pilot covers a few rows, so its damping is not the exact one; the correction and the bound make up for it.
    trainer = make_trainer(tmp_path, pool, validation, dtype, loss_reduction=loss_reduction, tokens_per_batch=100)
    scored = trainer.score_influence()
    trainer.model.double()
    expected = compute_datainf(*compute_loops(trainer, pool, validation, loss_reduction))
    # No pass more than one was needed for that, except where the bound is exceeded.
    assert trainer.fit_influence().config.inner_damping_error <= MAX_INNER_DAMPING_ERROR[dtype]
    assert_same(scored["influence"], expected, tolerance)
    assert scored["influence_rank"] == np.argsort(np.argsort(scored["influence"], kind="stable")).tolist()


@pytest.mark.parametrize("num_rows", [33, pytest.param(120, marks=pytest.mark.slow)])
def test_one_pass_is_exact_to_a_millionth(tmp_path, validation, monkeypatch, num_rows) -> None:
    """Corrected to first order, the pilot's damping leaves less than an independent loop can tell in float32."""
    monkeypatch.setattr("hf_in2core.engine.fit.MAX_INNER_DAMPING_ERROR", {torch.float64: 1.0})
    rows = make_prompt_completion(num_rows, seed=3)
    trainer = make_trainer(tmp_path, rows, validation, tokens_per_batch=256)
    scored = trainer.score_influence()
    assert 0 < trainer.fit_influence().config.inner_damping_error < 1e-5
    assert_same(scored["influence"], compute_datainf(*compute_loops(trainer, rows, validation)), 1e-6)


@pytest.mark.parametrize("refit", [False, True])
def test_exact_damping_gives_the_loop_to_float64(tmp_path, pool, validation, request, refit) -> None:
    # The damping is exact where the pilot is the whole pool, or where a second fit pass takes it from the first.
    rows = pool if refit else pool.select(range(PILOT_ROWS))
    if refit:
        request.getfixturevalue("exact_damping")
    trainer = make_trainer(tmp_path, rows, validation, tokens_per_batch=64)
    scored = trainer.score_influence()
    assert trainer.fit_influence().config.inner_damping_error < 1e-12
    assert_same(scored["influence"], compute_datainf(*compute_loops(trainer, rows, validation)), 1e-9)


def test_gradient_dot_is_datainf_with_an_identity_inverse(tmp_path, pool, validation) -> None:
    trainer = make_trainer(tmp_path, pool, validation, estimator="gradient_dot")
    scored = trainer.score_influence()
    train, held_out = compute_loops(trainer, pool, validation)
    expected = [
        -sum(float(sum(g[name] for g in held_out) / len(held_out) @ gradients[name]) for name in gradients)
        for gradients in train
    ]
    assert_same(scored["influence"], expected, 1e-9)


def test_gradient_cosine_is_taken_over_whole_gradients(tmp_path, pool, validation) -> None:
    trainer = make_trainer(tmp_path, pool, validation, estimator="gradient_cosine")
    scored = trainer.score_influence()
    train, held_out = (
        [torch.cat(list(g.values())) for g in compute_gradients(trainer.model, prepare(rows))]
        for rows in (pool, validation)
    )
    mean = torch.stack(held_out).mean(0)
    expected = [-float(torch.cosine_similarity(mean, g, dim=0)) for g in train]
    assert_same(scored["influence"], expected, 1e-9)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens_per_batch": 1},
        {"tokens_per_batch": 10_000},
        {"chunk_size": 5},
        {"gradient_checkpointing": False},
        {"tokens_per_batch": 1, "loss_reduction": "max"},
        {"tokens_per_batch": 10_000, "loss_reduction": "max"},
        {"chunk_size": 5, "loss_reduction": "max", "gradient_store_gb": 1.0},
    ],
)
def test_batching_chunking_and_checkpointing_change_nothing(tmp_path, pool, validation, change) -> None:
    model = add_trained_adapter(make_model())
    options = {"tokens_per_batch": 150, "loss_reduction": change.get("loss_reduction", "mean")}
    reference = make_trainer(tmp_path / "a", pool, validation, model=copy.deepcopy(model), **options)
    changed = make_trainer(tmp_path / "b", pool, validation, model=model, **{**options, **change})
    assert_same(changed.score_influence()["influence"], reference.score_influence()["influence"], 1e-9)


@pytest.mark.usefixtures("exact_damping")  # the pilot rows are chosen by position
def test_row_order_and_padding_side_change_nothing(tmp_path, pool, validation) -> None:
    model = add_trained_adapter(make_model())
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    order = np.random.default_rng(0).permutation(len(pool))
    reference = make_trainer(tmp_path / "a", pool, validation, model=copy.deepcopy(model)).score_influence()
    shuffled = make_trainer(
        tmp_path / "b", pool.select(order), validation.select(range(6, -1, -1)), model=model, tokenizer=tokenizer
    )
    scored = shuffled.score_influence()
    assert scored["id"] == pool.select(order)["id"]
    assert_same(scored["influence"], np.array(reference["influence"])[order], 1e-9)


def test_several_validation_sets_are_scored_together(tmp_path, pool, validation) -> None:
    model = add_trained_adapter(make_model())
    other = make_prompt_completion(5, seed=9)
    both = make_trainer(
        tmp_path / "both", pool, {"a": validation, "b": other}, model=copy.deepcopy(model)
    ).score_influence()
    alone = [
        make_trainer(tmp_path / name, pool, rows, model=copy.deepcopy(model)).score_influence()["influence"]
        for name, rows in (("a", validation), ("b", other))
    ]
    assert_same(both["influence_a"], alone[0], 1e-9)
    assert_same(both["influence_b"], alone[1], 1e-9)
    assert_same(both["influence"], np.mean(alone, axis=0), 1e-9)


def test_upweighting_moves_the_validation_loss_with_the_sign_of_the_influence(tmp_path, validation) -> None:
    """A gradient step on one row lowers the validation loss where gradient influence is negative, and the reverse."""
    rows = make_prompt_completion(12, seed=4)
    trainer = make_trainer(tmp_path, rows, validation, estimator="gradient_dot")
    influence = trainer.score_influence()["influence"]
    model, held_out = trainer.model.eval(), prepare(validation)

    def validation_loss() -> float:
        with torch.no_grad():
            return sum(float(compute_loss(model, row)) for row in held_out) / len(held_out)

    # Llama's norms compute in float32 whatever the model's dtype: a central difference with a step that drowns that.
    epsilon = 1e-3
    for row, value in zip(compute_gradients(model, prepare(rows)), influence, strict=True):
        parameters = dict(model.named_parameters())
        moved = []
        for step in (epsilon, -2 * epsilon):
            with torch.no_grad():
                for name, gradient in row.items():
                    parameters[name] -= step * gradient.view_as(parameters[name])
            moved.append(validation_loss())
        with torch.no_grad():
            for name, gradient in row.items():
                parameters[name] -= epsilon * gradient.view_as(parameters[name])
        change = (moved[0] - moved[1]) / (2 * epsilon)
        assert math.isclose(change, value, rel_tol=1e-2, abs_tol=1e-3 * max(map(abs, influence)))


def test_datainf_influence_has_the_sign_of_a_preconditioned_step(tmp_path, pool, validation) -> None:
    """Stepping along `u` itself lowers the loss of a row at the rate that its influence states."""
    trainer = make_trainer(tmp_path, pool, validation)
    scored = trainer.score_influence()
    directions = trainer.fit_influence().directions
    model = trainer.model.eval()
    blocks = find_blocks(model, "default")
    scale = 1e-3 / max(float(u.abs().max()) for u in directions.values())
    prepared = prepare(pool)

    def losses() -> np.ndarray:
        with torch.no_grad():
            return np.array([float(compute_loss(model, row)) for row in prepared])

    moved = []
    for step in (scale, -2 * scale):
        with torch.no_grad():
            for name, u in directions.items():
                blocks[name].tensor.add_(u[0].view_as(blocks[name].tensor), alpha=step)
        moved.append(losses())
    slopes = (moved[0] - moved[1]) / (2 * scale)
    # influence = - u . g, so a step along u moves the row's loss by minus its influence.
    np.testing.assert_allclose(-slopes, scored["influence"], rtol=1e-2, atol=1e-3 * np.abs(slopes).max())


def test_token_sum_gradients_over_tokens_are_the_training_gradient(tmp_path, pool, validation) -> None:
    trainer = make_trainer(tmp_path, pool, validation, gradient_checkpointing=False)
    token_rows = read_token_rows(prepare(pool))
    batch = collate(token_rows, np.arange(9))
    model = trainer.model
    with GradientRecorder(model, find_blocks(model, "default")) as recorder:
        sums = compute_gradient_sum(recorder, batch, "sum")
    inputs = trainer.data_collator([trainer.train_dataset[index] for index in range(9)])
    model.eval()  # training_step switches to training mode, so dropout is set to zero by hand
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.training_step(model, inputs, num_items_in_batch=batch.num_loss_tokens.sum())
    for name, block in find_blocks(model, "default").items():
        expected = block.tensor.grad
        assert expected is not None
        actual = sums[name].view_as(expected) / batch.num_loss_tokens.sum()
        # TRL's fused head works in float32.
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_layers_reduce_to_the_blocks_of_those_layers(tmp_path, pool, validation) -> None:
    trainer = make_trainer(tmp_path, pool, validation, influence_layers="last:1", estimator="gradient_dot")
    scored = trainer.score_influence()
    train, held_out = compute_loops(trainer, pool, validation)
    names = [name for name in train[0] if ".layers.1." in name]
    assert names
    expected = [
        -sum(float(sum(g[name] for g in held_out) / len(held_out) @ gradients[name]) for name in names)
        for gradients in train
    ]
    assert_same(scored["influence"], expected, 1e-9)


def test_rows_without_loss_come_back_with_null_influence(tmp_path, validation) -> None:
    rows = make_prompt_completion(9, seed=3)
    long_prompt = "the cat sat on a mat " * 20
    rows = rows.map(
        lambda row, index: {"prompt": long_prompt if index in (2, 5) else row["prompt"]}, with_indices=True
    )
    scored = make_trainer(tmp_path, rows, validation, max_length=40).score_influence()
    assert [index for index, value in enumerate(scored["influence"]) if value is None] == [2, 5]
    assert [index for index, value in enumerate(scored["influence_rank"]) if value is None] == [2, 5]
    assert [scored["num_loss_tokens"][index] for index in (2, 5)] == [0, 0]
    assert scored["prompt"] == rows["prompt"]
    assert scored["completion"] == rows["completion"]  # TRL appends EOS to its own copy, not to the user's rows


def test_packing_scores_rows_unpacked(tmp_path, pool, validation) -> None:
    model = add_trained_adapter(make_model())
    plain = make_trainer(tmp_path / "a", pool, validation, model=copy.deepcopy(model)).score_influence()
    packed = make_trainer(
        tmp_path / "b", pool, validation, model=model, packing=True, packing_strategy="wrapped", max_length=128
    )
    assert len(packed.train_dataset) < len(pool)
    assert_same(packed.score_influence()["influence"], plain["influence"], 1e-9)


def test_shuffled_training_data_keeps_the_rows_apart(tmp_path, pool, validation) -> None:
    model = add_trained_adapter(make_model())
    plain = make_trainer(tmp_path / "a", pool, validation, model=copy.deepcopy(model)).score_influence()
    shuffled = make_trainer(tmp_path / "b", pool, validation, model=model, shuffle_dataset=True).score_influence()
    assert shuffled["id"] == pool["id"]
    assert_same(shuffled["influence"], plain["influence"], 1e-9)


def test_training_and_influence_leave_each_other_alone(tmp_path, pool, validation) -> None:
    """Influence passes put back training mode, gradients and forwards: training goes on as if they had not run."""
    losses = []
    for with_influence in (False, True):
        trainer = make_trainer(
            tmp_path / str(with_influence), pool, validation, torch.float32, max_steps=4, logging_steps=1
        )
        if with_influence:
            trainer.fit_influence()
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_a_fitted_scorer_is_returned_until_something_changes(tmp_path, pool, validation) -> None:
    trainer = make_trainer(tmp_path, pool, validation)
    scorer = trainer.fit_influence()
    assert trainer.fit_influence() is scorer
    with torch.no_grad():
        next(iter(find_blocks(trainer.model, "default").values())).tensor.mul_(1.5)
    changed = trainer.fit_influence()
    assert changed is not scorer
    assert changed.fingerprint != scorer.fingerprint
    trainer.args.damping_scale = 0.2
    assert trainer.fit_influence() is not changed


@pytest.mark.parametrize("loss_reduction", ["sqrt", "max"])
def test_scorers_keep_the_reduction(tmp_path, pool, validation, loss_reduction) -> None:
    """A saved scorer gives raw rows what the trainer gave them, in batches of another make-up."""
    trainer = make_trainer(tmp_path / "run", pool, validation, torch.float32, loss_reduction=loss_reduction)
    scored = trainer.score_influence()
    trainer.fit_influence().save_pretrained(tmp_path / "scorer")
    scorer = InfluenceScorer.from_pretrained(tmp_path / "scorer", model=add_trained_adapter(make_model()).unload())
    again = pool.map(scorer, batched=True, batch_size=5)
    assert_same(again["influence"], scored["influence"], 1e-5)
    assert LOSS_REDUCTIONS[loss_reduction] in scorer._repr_html_()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_models_accumulate_in_float32(tmp_path, pool, validation, autocast) -> None:
    """A bfloat16 base, or bfloat16 autocast, stays within the rounding of its forward and keeps the ranking."""
    expected = np.array(make_trainer(tmp_path / "a", pool, validation, torch.float32).score_influence()["influence"])
    dtype = torch.float32 if autocast else torch.bfloat16
    trainer = make_trainer(tmp_path / "b", pool, validation, dtype, bf16=autocast)
    actual = np.array(trainer.score_influence()["influence"])
    assert {u.dtype for u in trainer.fit_influence().directions.values()} == {torch.float32}
    assert 0 < np.linalg.norm(actual - expected) < 0.1 * np.linalg.norm(expected)
    ranks = [np.argsort(np.argsort(values)) for values in (expected, actual)]
    assert np.corrcoef(ranks[0], ranks[1])[0, 1] > 0.98


def test_the_same_tensors_at_another_scaling_are_another_run(tmp_path, pool, validation) -> None:
    readings = []
    for alpha in (8, 16):
        model = add_trained_adapter(make_model(), lora_alpha=alpha)
        readings.append(make_trainer(tmp_path / "one", pool, validation, model=model).score_influence())
    fresh = make_trainer(tmp_path / "two", pool, validation, model=add_trained_adapter(make_model(), lora_alpha=16))
    assert readings[1]["influence"] == fresh.score_influence()["influence"] != readings[0]["influence"]
