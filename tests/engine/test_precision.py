"""One precision per run, and gradients that float16 can hold."""

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import add_trained_adapter, make_model, make_tokens, make_trainer

from hf_in2core.engine import gradients
from hf_in2core.engine.batches import collate, read_token_rows
from hf_in2core.engine.blocks import find_blocks
from hf_in2core.engine.gradients import GradientRecorder, Gradients, form_gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("precision", ["bf16", "no", "launcher"])
def test_scores_do_not_hang_on_where_the_adapter_was_trained(tmp_path, dtype, precision, monkeypatch) -> None:
    """
    accelerate leaves its own mixed precision around a model that was trained in this process.

    It may be the launcher's alone (`accelerate launch --mixed_precision bf16`), which the arguments do not know of.
    """
    options: dict[str, Any] = {"bf16": True} if precision == "bf16" else {}
    if precision == "launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    scores, fingerprints = [], []
    for train in (False, True):
        pool, validation = make_tokens(14, seed=0), make_tokens(5, seed=1)
        options |= {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 2}
        trainer = make_trainer(tmp_path / str(train), pool, validation, dtype, **options)
        if train:
            trainer.train()
        assert trainer.autocast == ("bf16" if precision == "bf16" else "no")  # what the arguments say, for any base
        model = trainer.accelerator.unwrap_model(trainer.model)
        assert ("_original_forward" in vars(model)) == (train and precision != "no")
        before = vars(model).get("forward")
        scores.append(trainer.score_influence()["influence"][:])
        assert vars(model).get("forward") is before  # training goes on as it was
        fingerprints.append(trainer.fingerprint)
    assert scores[0] == scores[1] and fingerprints[0] == fingerprints[1]


def compute_all(
    model: Any, rows: Dataset, autocast: torch.dtype | None, scale: float | None
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    blocks = find_blocks(model, "default")
    token_rows = read_token_rows(rows)
    with GradientRecorder(model, blocks, autocast) as recorder:
        if scale is not None:
            recorder.loss_scale = scale

        def keep(name: str, gradients: Gradients) -> None:
            found[name] = form_gradients(gradients, torch.float32)

        recorder.run(collate(token_rows, np.arange(len(token_rows))), "mean", keep)
    return found


def make_long_rows(length: int) -> Dataset:
    tokens = torch.randint(6, 330, (2, length), generator=torch.Generator().manual_seed(3)).tolist()
    return Dataset.from_list([{"row": row, "input_ids": ids, "labels": ids} for row, ids in enumerate(tokens)])


def test_float16_keeps_the_gradients_of_long_rows() -> None:
    model = add_trained_adapter(make_model(num_layers=2, hidden_size=64, max_position_embeddings=1100))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            # Weights of a usual size, and an adapter as after a few hundred steps.
            tensor.mul_(0.01 if "lora_B" in name else 0.1 if "lora" not in name and tensor.dim() == 2 else 1.0)
    rows = make_long_rows(1024)
    exact = compute_all(model, rows, None, None)

    def measure(scale: float | None) -> np.ndarray:
        half = compute_all(model, rows, torch.float16, scale)
        return np.array([float((half[name] - exact[name]).norm() / exact[name].norm()) for name in exact])

    assert np.median(measure(None)) <= 0.005 and measure(None).max() <= 0.005
    assert measure(1.0).max() > 0.1


def test_a_scale_that_is_too_large_gets_smaller_and_the_batch_runs_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gradients, "LOSS_SCALE", 2.0**40)
    pool, validation = make_tokens(9, seed=0), make_tokens(4, seed=1)
    scaled = make_trainer(tmp_path / "a", pool, validation, torch.float32, fp16=True).score_influence()
    monkeypatch.setattr(gradients, "LOSS_SCALE", 2.0**14)
    plain = make_trainer(tmp_path / "b", pool, validation, torch.float32, fp16=True).score_influence()
    expected = np.array(plain["influence"][:])
    np.testing.assert_allclose(scaled["influence"][:], expected, atol=0.01 * np.abs(expected).max())
