"""LoRA on the experts of a mixture (`target_parameters`) against the naive oracle, and what is refused."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from families import make_config as make_family
from helpers import add_trained_adapter, assert_same, make_prompt_completion, make_trainer
from loops import (
    assert_batches_and_order_do_not_matter,
    assert_equals_loop,
    assert_queries_and_saved_scorer_equal_loop,
    compute_loops,
    keep_layers,
)
from naive import compute_datainf
from peft import PeftModel
from transformers import AutoModelForCausalLM


BOTH = ["experts.gate_up_proj", "experts.down_proj"]
# Transposed, interleaved and with biases; with a shared expert and a router in float32; experts without a gate.
MIXTURES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "gpt_oss": (BOTH, {}),
    "qwen3_moe": ([*BOTH, "mlp.gate.weight"], {}),
    "deepseek_v3": (["experts.down_proj", "mlp.gate.weight"], {}),
    "nemotron_h": (["experts.up_proj"], {"layers_block_type": ["moe", "attention"], "n_routed_experts": 4}),
}


def make_base(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = make_family(family, **{**FAMILIES[family], **settings})
    # Grouped products do not exist in float64.
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def make_adapted(family: str, parameters: list[str] | None = None, **settings: Any) -> PeftModel:
    names, others = MIXTURES[family]
    adapted = add_trained_adapter(
        make_base(family, **{**others, **settings}),
        target_modules=["o_proj"],
        target_parameters=parameters or names,
        lora_dropout=0.0,
    )
    assert any(tensor.requires_grad and ".experts." in name for name, tensor in adapted.named_parameters())
    return adapted


def make_mixture_trainer(folder: Any, rows: Any, validation: Any, model: PeftModel, **options: Any) -> Any:
    return make_trainer(
        folder, rows, validation, model=model, router_aux_loss_coef=0.0, **{"tokens_per_batch": 100, **options}
    )


@pytest.mark.usefixtures("exact_damping")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt_oss", {}),
        ("gpt_oss", {"influence_activation_checkpointing": True, "loss_reduction": "sum"}),
        ("qwen3_moe", {"gradient_store_gb": 1.0}),
        ("qwen3_moe", {"loss_reduction": "max"}),
        ("deepseek_v3", {}),
        ("nemotron_h", {}),
    ],
)
def test_trained_experts_equal_the_loop(tmp_path, validation, family, options) -> None:
    rows = make_prompt_completion(9, seed=2)
    settings = {"max_steps": 1, "activation_checkpointing": False, **options}
    trainer = make_mixture_trainer(tmp_path, rows, validation, make_adapted(family), **settings)
    trainer.train()
    # A router or a norm in float32 rounds a batch otherwise than a row.
    assert_equals_loop(trainer, rows, validation, 1e-9 if family in ("gpt_oss", "qwen3_moe") else 1e-6)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("estimator", ["gradient_dot", "gradient_cosine"])
def test_dot_and_cosine_equal_the_loop(tmp_path, validation, family, estimator) -> None:
    rows = make_prompt_completion(9, seed=2)
    trainer = make_mixture_trainer(tmp_path, rows, validation, make_adapted(family), estimator=estimator)
    assert_equals_loop(trainer, rows, validation)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_batches_padding_and_order_do_not_matter(tmp_path, validation, family) -> None:
    def make(folder: Any, pool: Any, validation: Any, **options: Any) -> Any:
        return make_mixture_trainer(folder, pool, validation, make_adapted(family), **options)

    assert_batches_and_order_do_not_matter(tmp_path, make, validation)


@pytest.mark.usefixtures("exact_damping")
def test_rows_as_queries_and_a_saved_scorer_equal_the_loop(tmp_path, validation) -> None:
    make = partial(make_mixture_trainer, model=make_adapted("gpt_oss"))
    rows = make_prompt_completion(9, seed=2)
    assert_queries_and_saved_scorer_equal_loop(tmp_path, make, rows, validation, make_base("gpt_oss"))


@pytest.mark.usefixtures("exact_damping")
def test_a_layer_and_half_of_its_experts(tmp_path, validation) -> None:
    """The layer below runs as PEFT computes it, and so does what is not wrapped."""
    rows = make_prompt_completion(9, seed=2)
    model = make_adapted("qwen3_moe", ["experts.gate_up_proj"])
    trainer = make_mixture_trainer(tmp_path, rows, validation, model, influence_layers="last:1")
    kept = keep_layers(compute_loops(trainer, rows, validation), 1)
    assert sum("experts" in name for name in trainer.blocks) == 2
    assert_same(trainer.score_influence()["influence"], compute_datainf(*kept), 1e-9)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_bfloat16_is_near_float32(tmp_path, validation, family) -> None:
    rows, scores = make_prompt_completion(12, seed=2), []
    for dtype in (torch.float32, torch.bfloat16):
        trainer = make_trainer(
            tmp_path / str(dtype), rows, validation, dtype, model=make_adapted(family), router_aux_loss_coef=0.0
        )
        scores.append(np.array(trainer.score_influence()["influence"]))
    # Where two experts are nearly as good, the rounding of the router chooses between them.
    assert np.corrcoef(scores[0], scores[1])[0, 1] > 0.9 and not np.array_equal(scores[0], scores[1])


def test_a_merged_adapter_is_noticed(tmp_path, pool, validation) -> None:
    trainer = make_mixture_trainer(tmp_path, pool, validation, make_adapted("qwen3_moe"))
    for module in trainer.model.modules():
        if type(module).__name__ == "ParamWrapper":
            module.merge()
    with pytest.raises(ValueError, match="experts.*merged or disabled"):
        trainer.fit_influence()


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (
            "experts.gate_up_proj_bias",
            r"(?s)`gate_up_proj_bias` of the experts GptOssExperts.*gate_up_proj, up_proj, down_proj.*"
            r"target_modules=\['q_proj', 'k_.*--lora_target_modules q_proj k_proj ",
        ),
        ("embed_tokens.weight", r"embed_tokens.*`weight` of Embedding, neither a linear nor experts"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_other_parameters_are_refused_by_name(tmp_path, pool, validation, parameter, message) -> None:
    model = add_trained_adapter(
        make_base("gpt_oss"), target_modules=["o_proj"], target_parameters=[parameter], lora_dropout=0.0
    )
    with pytest.raises(ValueError, match=message):
        make_mixture_trainer(tmp_path, pool, validation, model)
