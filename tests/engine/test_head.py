"""Logits are built chunk by chunk where the model's are those of its head, and all at once elsewhere."""

from typing import Any

import pytest
import torch
from helpers import (
    add_trained_adapter,
    make_model,
    make_tokenizer,
    make_tokens,
    make_trainer,
)
from loops import assert_equals_loop
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_in2core.engine import losses
from hf_in2core.engine.losses import find_max_loss_tokens, has_plain_head


# What these families do to the output of their head.
SCALED: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0},
}


@pytest.mark.parametrize("loss_reduction", ["mean", "max"])
def test_chunks_of_logits_change_nothing(tmp_path, monkeypatch, loss_reduction) -> None:
    pool, validation = make_tokens(9, seed=0), make_tokens(4, seed=1)
    # 7 tokens at a time, and rows of up to some 20 labelled ones.
    monkeypatch.setattr(losses, "MAX_LOGITS_PER_CHUNK", 7 * make_model().config.vocab_size)
    model = add_trained_adapter(make_model().to(torch.float64))
    trainer = make_trainer(tmp_path, pool, validation, model=model, loss_reduction=loss_reduction)
    assert find_max_loss_tokens(trainer.model) is None
    assert_equals_loop(trainer, pool, validation, 1e-6)


@pytest.mark.parametrize("family", list(SCALED))
def test_what_a_model_does_to_its_logits_is_seen(tmp_path, family) -> None:
    pool, validation = make_tokens(9, seed=0), make_tokens(4, seed=1)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": len(make_tokenizer())}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **size, **heads, **SCALED[family]))
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trainer = make_trainer(tmp_path, pool, validation, model=model.to(torch.float64))
    assert not has_plain_head(trainer.model, None)
    assert find_max_loss_tokens(trainer.model) == losses.MAX_LOGITS_PER_BATCH // size["vocab_size"]
    assert_equals_loop(trainer, pool, validation, 1e-5)
