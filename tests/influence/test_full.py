"""A model without an adapter, whose own weights are trained, against the naive oracle, and what is refused."""

import re
from functools import partial
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from families import FAMILIES
from families import make_config as make_family
from helpers import assert_same, make_config, make_prompt_completion, make_tokenizer, make_trainer
from loops import (
    assert_batches_and_order_do_not_matter,
    assert_equals_loop,
    assert_queries_and_saved_scorer_equal_loop,
    compute_loops,
    keep_layers,
)
from naive import compute_datainf
from transformers import AutoModelForCausalLM

from hf_in2core import InfluenceScorer, InfluenceTrainer


TIED = {"tie_word_embeddings": True}
# With norms of heads; scaled embeddings and norms of 1 + w; biases everywhere; logits that are scaled after the head.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": TIED,
    "gemma3_text": TIED,
    "phi": {},
    "cohere": TIED | {"logit_scale": 0.3},
}


def make_base(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = make_family(family, **{**FAMILIES[family], **MODELS.get(family, {}), **settings})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.usefixtures("exact_damping")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"influence_activation_checkpointing": True, "loss_reduction": "sum"}),
        ("qwen3", {"loss_reduction": "max"}),
        ("gemma3_text", {}),
        ("phi", {}),
        ("cohere", {"loss_reduction": "sqrt"}),
    ],
)
def test_trained_models_equal_the_loop(tmp_path, validation, family, options) -> None:
    rows = make_prompt_completion(9, seed=2)
    settings = {"max_steps": 1, "activation_checkpointing": False, "tokens_per_batch": 100, **options}
    trainer = make_trainer(tmp_path, rows, validation, model=make_base(family), **settings)
    trainer.train()
    # Gemma's norms and rotary embeddings are in float32, which rounds a batch otherwise than a row.
    assert_equals_loop(trainer, rows, validation, 1e-6 if family == "gemma3_text" else 1e-8)


@pytest.mark.usefixtures("exact_damping")
@pytest.mark.parametrize("tokens_per_chunk", [1, 3])
def test_a_tied_matrix_wherever_chunks_of_logits_end(tmp_path, validation, monkeypatch, tokens_per_chunk) -> None:
    monkeypatch.setattr("hf_in2core.engine.losses.MAX_LOGITS_PER_CHUNK", tokens_per_chunk * 340)
    rows = make_prompt_completion(9, seed=2)
    trainer = make_trainer(tmp_path, rows, validation, model=make_base("qwen3"), tokens_per_batch=100)
    assert [block.kind for block in trainer.blocks.values()].count("tied") == 1
    assert_equals_loop(trainer, rows, validation)


def test_the_logits_that_a_tied_matrix_keeps_are_bounded(tmp_path, validation, monkeypatch) -> None:
    monkeypatch.setattr("hf_in2core.engine.losses.MAX_LOGITS_PER_BATCH", 7 * 340)
    for family, most in (("qwen3", 7), ("llama", None)):
        trainer = make_trainer(tmp_path / family, validation, validation, model=make_base(family))
        assert trainer.make_passes(trainer.blocks, "").max_loss_tokens == most


@pytest.mark.parametrize("family", ["phi", "qwen3"])
@pytest.mark.parametrize("estimator", ["gradient_dot", "gradient_cosine"])
def test_dot_and_cosine_equal_the_loop(tmp_path, validation, family, estimator) -> None:
    rows = make_prompt_completion(9, seed=2)
    trainer = make_trainer(tmp_path, rows, validation, model=make_base(family), estimator=estimator)
    assert_equals_loop(trainer, rows, validation)


def test_batches_and_order_do_not_matter(tmp_path, validation) -> None:
    def make(folder: Any, pool: Any, validation: Any, **options: Any) -> InfluenceTrainer:
        return make_trainer(folder, pool, validation, model=make_base("qwen3"), **options)

    assert_batches_and_order_do_not_matter(tmp_path, make, validation)


@pytest.mark.usefixtures("exact_damping")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rows_as_queries_and_a_saved_scorer_equal_the_loop(tmp_path, validation, family) -> None:
    """The scorer holds the trained model, and needs no other one."""
    make = partial(make_trainer, model=make_base(family), tokens_per_batch=100)
    assert_queries_and_saved_scorer_equal_loop(tmp_path, make, make_prompt_completion(9, seed=2), validation)
    assert not (tmp_path / "scorer" / "adapter").exists()
    other = make_base(family).double()
    InfluenceScorer.from_pretrained(tmp_path / "scorer", model=other)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
    with pytest.raises(ValueError, match="another base model"):
        InfluenceScorer.from_pretrained(tmp_path / "scorer", model=other)


@pytest.mark.usefixtures("exact_damping")
@pytest.mark.parametrize("chosen", ["frozen", "layers"])
def test_what_is_frozen_or_left_out_does_not_count(tmp_path, validation, chosen) -> None:
    rows = make_prompt_completion(9, seed=2)
    model: Any = make_base("qwen3")
    options: dict[str, Any] = {"gradient_store_gb": 1.0}
    if chosen == "layers":
        options["influence_layers"] = "last:1"
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".layers.1." in name)
    trainer = make_trainer(tmp_path / "run", rows, validation, model=model, **options)
    kept = keep_layers(compute_loops(trainer, rows, validation), 1)
    assert set(kept[0][0]) == set(trainer.blocks)
    expected = compute_datainf(*kept)
    assert_same(trainer.score_influence()["influence"], expected, 1e-9)
    trainer.fit_influence().save_pretrained(tmp_path / "scorer")
    loaded = InfluenceScorer.from_pretrained(tmp_path / "scorer")
    assert_same(rows.map(loaded, batched=True)["influence"], expected, 1e-9)


def test_a_model_trained_further_is_noticed(tmp_path, pool, validation) -> None:
    trainer = make_trainer(tmp_path, pool, validation, model=make_base("qwen3"), max_steps=1)
    scorer = trainer.fit_influence()
    first = np.array(trainer.score_influence()["influence"])
    trainer.train()
    with pytest.raises(ValueError, match="no longer the one"):
        pool.map(scorer, batched=True)
    assert not np.allclose(trainer.score_influence()["influence"], first)


def test_bfloat16_is_near_float32(tmp_path, pool, validation) -> None:
    scores = []
    for dtype in (torch.float32, torch.bfloat16):
        trainer = make_trainer(tmp_path / str(dtype), pool, validation, dtype, model=make_base("qwen3"))
        scores.append(np.array(trainer.score_influence()["influence"]))
    assert 0 < np.linalg.norm(scores[0] - scores[1]) < 0.1 * np.linalg.norm(scores[0])


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gpt2", r"(?s)wpe.weight: a tensor of Embedding.*attn.c_attn.weight: a tensor of Conv1D.*peft_config=Lora"),
        ("mixtral", r"(?s)experts.gate_up_proj: a tensor of MixtralExperts.*requires_grad_\(False\)"),
    ],
)
def test_other_tensors_are_refused_by_name(tmp_path, pool, validation, family, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, pool, validation, model=make_base(family), router_aux_loss_coef=0.0)


def test_too_many_weights_are_refused_before_training(tmp_path, pool, validation, monkeypatch) -> None:
    model = make_base("qwen3")
    count = sum(tensor.numel() for tensor in model.parameters())
    told = psutil.virtual_memory()._replace(available=80 * count)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: told)
    make_trainer(tmp_path, pool, validation, model=model)
    message = f"{count:,} trained elements need .*2 validation.*peft_config=LoraConfig.*influence_layers"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, pool, {"one": validation, "two": validation}, model=model)
    make_trainer(tmp_path, pool, {"one": validation, "two": validation}, model=model, influence_layers="last:1")


def test_checkpoints_are_refused(tmp_path, pool, validation) -> None:
    trainer = make_trainer(tmp_path, pool, validation, model=make_base("llama"))
    with pytest.raises(ValueError, match=re.escape("`checkpoints` are read of an adapter")):
        trainer.score_influence(checkpoints=[tmp_path])


def test_a_model_by_name(tmp_path, pool, validation) -> None:
    """As TRL trains it where no adapter is asked for."""
    make_base("qwen3").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    trainer = InfluenceTrainer(
        model=str(tmp_path / "model"),
        args=make_config(tmp_path / "run", model_init_kwargs={"dtype": "float32"}, max_steps=2),
        train_dataset=pool,
        eval_dataset=validation,
    )
    trainer.train()
    assert_equals_loop(trainer, pool, validation, 1e-3)
