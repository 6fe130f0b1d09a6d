"""The support table: each line is an equality with the naive oracle, or a refusal by name before any long work."""

from collections.abc import Callable
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
)
from loops import assert_equals_loop, compute_loops
from naive import compute_datainf, compute_gradients
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPTJConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
)

from hf_in2core import InfluenceTrainer
from hf_in2core.influence.launcher import check_layer_classes


SUPPORTED: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "attention_only": {"target_modules": ["q_proj", "v_proj"]},
    "lora_bias": {"lora_bias": True},
    "base_bias": {"bias": "lora_only"},
    "modules_to_save_linear": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["down_proj"]},
    "modules_to_save_norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
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
    assert_same(scored["influence"], compute_datainf(*compute_loops(trainer, rows, validation)), 1e-9)


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
    "dora_embedding": (lambda: LoraConfig(target_modules=["embed_tokens"], use_dora=True), "DoraEmbeddingLayer"),
    "trainable_tokens": (
        lambda: LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]),
        "trainable_tokens",
    ),
    "lora_head": (lambda: LoraConfig(target_modules=["lm_head"]), "lm_head"),
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
    with pytest.raises(ValueError, match=name):
        make_trainer(tmp_path, pool, validation, dtype=None, model=get_peft_model(make_model(), make_peft_config()))


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
    assert_same(scored["influence"], compute_datainf(*compute_loops(trainer, rows, validation)), 1e-4)
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


TINY: dict[str, Any] = {
    **{
        "vocab_size": 340,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
    },
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256},
}
ROUTED: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 64}
SHARED: dict[str, Any] = {"num_key_value_heads": 2, "num_experts": 4, "shared_expert_intermediate_size": 16}
LATENT: dict[str, Any] = {
    **{"num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1},
    **{"first_k_dense_replace": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
}
# Linears that see rows in another shape than `[batch, tokens, features]`: configuration, target modules, tolerance.
RESHAPED: dict[str, tuple[Callable[[], PretrainedConfig], str | list[str], torch.dtype]] = {
    "opt": (lambda: OPTConfig(**TINY, ffn_dim=64, word_embed_proj_dim=32), "all-linear", torch.float64),
    "gptj": (
        lambda: GPTJConfig(vocab_size=340, n_embd=32, n_layer=2, n_head=4, n_positions=256, rotary_dim=4),
        "all-linear",
        torch.float64,
    ),
    "qwen2_moe": (
        lambda: Qwen2MoeConfig(
            **TINY,
            **ROUTED,
            **SHARED,
            router_aux_loss_coef=0.0,
        ),
        r".*(q_proj|shared_expert\.(gate|up|down)_proj)",
        torch.float32,
    ),
    "deepseek_v3": (
        lambda: DeepseekV3Config(
            **TINY,
            **ROUTED,
            **LATENT,
        ),
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        torch.float32,
    ),
}


@pytest.mark.usefixtures("exact_damping")
@pytest.mark.parametrize("family", RESHAPED)
def test_linears_that_see_rows_in_another_shape_equal_the_loop(tmp_path, validation, family) -> None:
    make, targets, dtype = RESHAPED[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make())
    rows = make_prompt_completion(12, seed=2)
    adapted = add_trained_adapter(model, target_modules=targets)
    trainer = make_trainer(tmp_path, rows, validation, dtype=dtype, model=adapted)
    assert_equals_loop(trainer, rows, validation, 1e-6 if dtype == torch.float64 else 1e-3)


def test_what_cannot_be_told_apart_is_refused_before_training(tmp_path, pool, validation) -> None:
    """Rows that a layer mixes show on two of them, whether the adapter is trained or not."""

    class Mixing(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return self.inner(x.flip(0), *args, **kwargs).flip(0) if len(x) > 1 else self.inner(x, *args, **kwargs)

    model = make_model()
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp)
    adapter = LoraConfig(r=4, target_modules=["up_proj"])
    with pytest.raises(ValueError, match=r"layers.1.mlp.inner.up_proj.lora_B.weight. differs from automatic"):
        make_trainer(tmp_path, pool, validation, dtype=None, model=model, peft_config=adapter)


@pytest.mark.parametrize(
    ("message", "variables"),
    [
        ("`zero_stage: 2`.*`zero_stage: 3`.*zero3", {"ACCELERATE_USE_DEEPSPEED": "true"}),
        (
            "ACCELERATE_USE_DEEPSPEED.*script of your own with fsdp",
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
        ),
        ("launcher shards the model .*ACCELERATE_USE_MEGATRON_LM", {"ACCELERATE_USE_MEGATRON_LM": "true"}),
        ("fsdp_version: 1.*fsdp_version: 2", {"FSDP_VERSION": "1"}),
        ("fsdp_state_dict_type: SHARDED_STATE_DICT.*FULL_STATE_DICT", {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}),
        ("fsdp_offload_params: true", {"FSDP_OFFLOAD_PARAMS": "true"}),
        ("fsdp_activation_checkpointing: true", {"FSDP_ACTIVATION_CHECKPOINTING": "true"}),
        (
            "dynamo_backend: INDUCTOR.*dynamo_backend: no",
            {"FSDP_VERSION": "2", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
        ),
        (
            "`parallelism_config` .*ACCELERATE_USE_PARALLELISM_CONFIG.*multi_gpu",
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
        ),
        ("mixed_precision: fp8.*mixed_precision: bf16", {"ACCELERATE_MIXED_PRECISION": "fp8"}),
        # On a CPU accelerate does not shard, and says nothing.
        ("nothing would be sharded: the launch is NO", {}),
    ],
)
def test_a_launch_that_cannot_work_is_refused_before_the_model_loads(
    tmp_path, pool, validation, monkeypatch, message, variables
) -> None:
    args = make_config(tmp_path)
    if not variables or any(name.startswith("FSDP") for name in variables):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
        monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        InfluenceTrainer(model="no/such-model", args=args, train_dataset=pool, eval_dataset=validation)


@pytest.mark.parametrize("by_name", [True, False])
def test_layers_that_the_model_does_not_have_are_refused_before_it_loads(
    tmp_path, pool, validation, monkeypatch, by_name
) -> None:
    model = make_model()
    model.config.save_pretrained(tmp_path / "model")  # no weights are there to be loaded
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    args, given = make_config(tmp_path / "run"), str(tmp_path / "model") if by_name else model
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer")
    check_layer_classes(given, args)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer,NopeLayer")
    message = "fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer,NopeLayer.* no NopeLayer.*: LlamaDecoderLayer"
    with pytest.raises(ValueError, match=message):
        check_layer_classes(given, args)


def make_multimodal() -> torch.nn.Module:
    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    size["num_attention_heads"] = 4
    text = {**size, "vocab_size": len(make_tokenizer()), "num_key_value_heads": 2, "head_dim": 8}
    vision = {**size, "image_size": 28, "patch_size": 14}
    tokens: dict[str, Any] = {
        "mm_tokens_per_image": 4,
        "image_token_index": 3,
        "boi_token_index": 4,
        "eoi_token_index": 5,
    }
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **tokens))


def test_what_text_does_not_reach_is_left_out_by_the_advice(tmp_path, validation) -> None:
    rows = make_prompt_completion(9, seed=2)

    def build(folder, target_modules) -> InfluenceTrainer:
        model = get_peft_model(make_multimodal().double(), LoraConfig(r=2, target_modules=target_modules))
        return make_trainer(folder, rows, validation, model=model)

    with pytest.raises(ValueError, match=r"vision_tower.*text does not reach.*target_modules=r") as error:
        build(tmp_path / "all", "all-linear")
    advice = str(error.value).split('target_modules=r"')[1].split('"')[0]
    trainer = build(tmp_path / "text", advice)
    assert trainer.blocks and not any("vision" in name for name in trainer.blocks)
