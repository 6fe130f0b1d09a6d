"""DoRA against the naive oracle: its magnitudes count beside A and B."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from families import make_config as make_family
from helpers import add_trained_adapter, make_prompt_completion, make_trainer
from loops import assert_equals_loop, assert_queries_and_saved_scorer_equal_loop
from peft import PeftModel
from transformers import AutoModelForCausalLM


def make_base(family: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_family(family, **FAMILIES[family]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # PEFT takes it out of what the magnitude scales
                parameter.normal_()
    return model


def make_dora(family: str, **kwargs: Any) -> PeftModel:
    model = add_trained_adapter(make_base(family), use_dora=True, **kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sum("magnitude" in name for name in trained) == len(trained) // 3
    return model


@pytest.mark.usefixtures("exact_damping")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen2", {"loss_reduction": "sqrt"}),  # biases on a few linears
        ("opt", {"loss_reduction": "max"}),  # on all of them, whose inputs are flattened
        ("gpt2", {"loss_reduction": "sum"}),  # transposed weights
        ("cohere", {"influence_activation_checkpointing": True}),
        ("llama", {"gradient_store_gb": 1.0}),
    ],
)
def test_dora_equals_the_loop(tmp_path, validation, family, options) -> None:
    rows = make_prompt_completion(9, seed=2)
    trainer = make_trainer(tmp_path, rows, validation, model=make_dora(family), tokens_per_batch=100, **options)
    assert_equals_loop(trainer, rows, validation)


@pytest.mark.parametrize("estimator", ["gradient_dot", "gradient_cosine"])
def test_dot_and_cosine_equal_the_loop(tmp_path, validation, estimator) -> None:
    rows = make_prompt_completion(9, seed=2)
    trainer = make_trainer(tmp_path, rows, validation, model=make_dora("qwen2"), estimator=estimator)
    assert_equals_loop(trainer, rows, validation)


@pytest.mark.usefixtures("exact_damping")
def test_rows_as_queries_and_a_saved_scorer_equal_the_loop(tmp_path, validation) -> None:
    make = partial(make_trainer, model=make_dora("qwen2"), tokens_per_batch=100)
    rows = make_prompt_completion(9, seed=2)
    assert_queries_and_saved_scorer_equal_loop(tmp_path, make, rows, validation, make_base("qwen2").double())


def test_layers_and_bfloat16(tmp_path, pool, validation) -> None:
    scores = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_dora("llama", lora_dropout=0.0)
        trainer = make_trainer(tmp_path / str(dtype), pool, validation, dtype, model=model, influence_layers="last:1")
        assert sum("magnitude" in name for name in trainer.blocks) == 7
        scores.append(np.array(trainer.score_influence()["influence"]))
    assert 0 < np.linalg.norm(scores[0] - scores[1]) < 0.1 * np.linalg.norm(scores[0])
