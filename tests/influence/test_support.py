"""The support table: each line is an equality with the naive oracle, or a refusal by name before any long work."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import (
    CHAT_TEMPLATE,
    add_trained_adapter,
    assert_same,
    make_config,
    make_model,
    make_prompt_completion,
    make_tokenizer,
    make_trainer,
    prepare,
)
from naive import compute_datainf, compute_gradients
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from hf_in2core import InfluenceTrainer


SUPPORTED: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "attention_only": {"target_modules": ["q_proj", "v_proj"]},
    "lora_bias": {"lora_bias": True},
    "base_bias": {"bias": "lora_only"},
    "modules_to_save_linear": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["down_proj"]},
    "pissa": {"init_lora_weights": "pissa"},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
}


@pytest.mark.usefixtures("exact_damping")
@pytest.mark.parametrize("variant", SUPPORTED)
def test_supported_adapters_equal_the_loop(tmp_path, validation, variant) -> None:
    rows = make_prompt_completion(12, seed=2)
    model = make_model()
    if variant == "base_bias":
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.bias = torch.nn.Parameter(torch.zeros(module.out_features))
    trainer = make_trainer(tmp_path, rows, validation, model=add_trained_adapter(model, **SUPPORTED[variant]))
    scored = trainer.score_influence()
    train = compute_gradients(trainer.model, prepare(rows))
    counted = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert counted == set(train[0])  # nothing trainable is left out
    expected = compute_datainf(train, compute_gradients(trainer.model, prepare(validation)))
    assert_same(scored["influence"], expected, 1e-9)


def make_moe() -> MixtralForCausalLM:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=340,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
            num_experts_per_tok=1,
        )
    )


REFUSED_ADAPTERS = {
    "dora": (lambda: LoraConfig(target_modules=["q_proj"], use_dora=True), "DoRA"),
    "embedding": (lambda: LoraConfig(target_modules=["embed_tokens"]), "lora_embedding_A"),
    "trainable_tokens": (
        lambda: LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]),
        "trainable_tokens",
    ),
    "modules_to_save_norm": (lambda: LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]), "norm"),
    "modules_to_save_head": (lambda: LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "lm_head"),
    "target_parameters": (
        lambda: LoraConfig(target_modules=[], target_parameters=["mlp.experts.down_proj"]),
        "target_parameters",
    ),
    "ia3": (
        lambda: IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
        "ia3_l",
    ),
    "prompt_tuning": (lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "prompt_encoder"),
}


@pytest.mark.parametrize("variant", REFUSED_ADAPTERS)
def test_refused_adapters_are_named_at_construction(tmp_path, pool, validation, variant) -> None:
    make_peft_config, name = REFUSED_ADAPTERS[variant]
    model = make_moe() if variant == "target_parameters" else make_model()
    with pytest.raises(ValueError, match=name):
        InfluenceTrainer(
            model=get_peft_model(model, make_peft_config()),
            args=make_config(tmp_path),
            train_dataset=pool,
            eval_dataset=validation,
            processing_class=make_tokenizer(),
        )


REFUSED_SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dft": ({"loss_type": "dft"}, {}, "loss_type"),
    "label_smoothing": ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor"),
    "collator": ({}, {"data_collator": lambda rows: rows}, "data_collator"),
    "formatting_func": ({}, {"formatting_func": lambda row: row["prompt"]}, "formatting_func"),
    "loss_func": ({}, {"compute_loss_func": lambda *_: 0}, "compute_loss_func"),
    "skip_prepare": ({"dataset_kwargs": {"skip_prepare_dataset": True}}, {}, "skip_prepare_dataset"),
    "liger": ({"use_liger_kernel": True}, {}, "use_liger_kernel"),
}


@pytest.mark.parametrize("setting", REFUSED_SETTINGS)
def test_settings_that_change_the_loss_are_refused(tmp_path, pool, validation, setting) -> None:
    options, kwargs, name = REFUSED_SETTINGS[setting]
    with pytest.raises(ValueError, match=name):
        InfluenceTrainer(
            model=add_trained_adapter(make_model()),
            args=make_config(tmp_path, **options),
            train_dataset=pool,
            eval_dataset=validation,
            processing_class=make_tokenizer(),
            **kwargs,
        )


def test_full_fine_tuning_is_refused(tmp_path, pool, validation) -> None:
    with pytest.raises(ValueError, match="full fine-tuning"):
        InfluenceTrainer(
            model=make_model(),
            args=make_config(tmp_path),
            train_dataset=pool,
            eval_dataset=validation,
            processing_class=make_tokenizer(),
        )


def test_a_frozen_adapter_is_refused_with_the_remedy(tmp_path, pool, validation) -> None:
    model = add_trained_adapter(make_model())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        make_trainer(tmp_path, pool, validation, model=model)


def test_a_merged_adapter_is_noticed(tmp_path, pool, validation) -> None:
    trainer = make_trainer(tmp_path, pool, validation)
    trainer.model.base_model.merge_adapter()
    with pytest.raises(ValueError, match="merged or disabled"):
        trainer.fit_influence()


def test_a_router_without_its_auxiliary_loss_is_supported_and_with_it_refused(tmp_path, validation) -> None:
    rows = make_prompt_completion(8, seed=2)
    model = add_trained_adapter(make_moe(), target_modules=["q_proj", "v_proj"])
    # Experts' grouped products exist in float32 only.
    trainer = make_trainer(tmp_path / "a", rows, validation, torch.float32, model=model, router_aux_loss_coef=0.0)
    scored = trainer.score_influence()
    train = compute_gradients(trainer.model, prepare(rows))
    assert_same(
        scored["influence"], compute_datainf(train, compute_gradients(trainer.model, prepare(validation))), 1e-4
    )
    with pytest.raises(ValueError, match="router_aux_loss_coef=0.0"):
        make_trainer(
            tmp_path / "b", rows, validation, model=add_trained_adapter(make_moe(), target_modules=["q_proj"])
        )


def test_padding_free_scores_the_same(tmp_path, pool, validation) -> None:
    plain = make_trainer(tmp_path / "a", pool, validation).score_influence()
    flat = make_trainer(tmp_path / "b", pool, validation, padding_free=True, max_length=None).score_influence()
    assert_same(flat["influence"], plain["influence"], 1e-9)


def test_formats_and_loss_masks_follow_sft(tmp_path) -> None:
    """Tokens and labels are those of the trainer's own training set, in every format of TRL."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    user, assistant = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": " sat on a mat"}
    tools = [{"type": "function", "function": {"name": "look", "description": "look up", "parameters": {}}}]
    formats: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "messages": ({"messages": [user, assistant]}, {}),
        "assistant_only": ({"messages": [user, assistant, user, assistant]}, {"assistant_only_loss": True}),
        "conversational_prompt": ({"prompt": [user], "completion": [assistant]}, {}),
        "prompt_completion": ({"prompt": "the cat", "completion": " sat"}, {"completion_only_loss": False}),
        "text": ({"text": "the cat sat on a mat"}, {}),
        "tools": ({"messages": [user, assistant], "tools": str(tools).replace("'", '"')}, {}),
        "tokens": ({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {}),
    }
    for name, (row, options) in formats.items():
        rows = Dataset.from_list([{**row, "note": "kept"}] * 3)
        trainer = make_trainer(tmp_path / name, rows, rows, tokenizer=tokenizer, **options)
        scored = trainer.score_influence()
        sft = trainer.train_dataset[0]
        prepared = trainer.prepared_pool[0]
        assert (prepared["input_ids"], prepared["labels"]) == (sft["input_ids"], sft["labels"])
        expected = compute_datainf(
            compute_gradients(trainer.model, trainer.train_dataset),
            compute_gradients(trainer.model, trainer.train_dataset),
        )
        assert_same(scored["influence"], expected, 1e-8)
        mapped = rows.map(trainer.fit_influence(), batched=True)
        assert_same(mapped["influence"], scored["influence"], 1e-8)
        assert mapped["note"] == rows["note"]


def test_deepspeed_and_fsdp_are_refused(tmp_path, pool, validation) -> None:
    for name in ("deepspeed", "fsdp"):
        args = make_config(tmp_path)
        setattr(args, name, {"zero_optimization": {"stage": 2}} if name == "deepspeed" else "full_shard")
        with pytest.raises(ValueError, match="DeepSpeed|FSDP"):
            InfluenceTrainer(
                model=add_trained_adapter(make_model()),
                args=args,
                train_dataset=pool,
                eval_dataset=validation,
                processing_class=make_tokenizer(),
            )
