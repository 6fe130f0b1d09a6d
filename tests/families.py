"""Model families of Transformers as tiny random models, each trained and scored against the loop.

`python tests/families.py` writes what came out into docs/families.md; test_families.py holds it to that.
"""

import logging
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from helpers import ROOT, add_trained_adapter, make_prompt_completion, make_trainer
from loops import compute_loops
from naive import compute_datainf
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from hf_in2core.engine import fit
from hf_in2core.engine.blocks import ATTENTION


PAGE = ROOT / "docs" / "families.md"
SIZE: dict[str, Any] = {
    **{
        "vocab_size": 340,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "initializer_range": 0.2,
    },
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
GPT2: dict[str, Any] = {"vocab_size": 340, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
GPT2 |= {"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
LATENT = {"num_key_value_heads": 4, "head_dim": None, "q_lora_rank": 16, "kv_lora_rank": 16}
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
DELTA |= {"layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
LATENT_TARGETS = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


def make_config(kind: str, **settings: Any) -> PretrainedConfig:
    known = {name: value for name, value in (SIZE | settings).items() if value is not None}
    return CONFIG_MAPPING[kind](**known)


# What a family needs beside SIZE.
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("apertus", "arcee", "bitnet", "cohere", "diffllama", "doge", "ernie4_5", "gemma", "glm")},
    **{name: {} for name in ("glm4", "gpt_neox", "helium", "hunyuan_v1_dense", "jais2", "llama", "ministral3")},
    **{name: {} for name in ("nanochat", "nemotron", "olmo", "olmo2", "persimmon", "phi", "phi3", "qwen2", "qwen3")},
    **{name: {} for name in ("seed_oss", "smollm3", "stablelm", "starcoder2")},
    **{name: SLIDING for name in ("exaone4", "ministral")},
    **{name: {"sliding_window": 8} for name in ("cohere2", "cwm", "mistral", "olmo3")},
    "gemma2": SLIDING | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": SLIDING | {"query_pre_attn_scalar": 8},
    "gemma3n_text": SLIDING
    | {"vocab_size_per_layer_input": 340, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    | {"laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [64, 64]},
    "gemma4_text": SLIDING
    | {"vocab_size_per_layer_input": 340, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    | {"global_head_dim": 8, "num_global_key_value_heads": 2},
    "vaultgemma": SLIDING | {"query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "youtu": LATENT,
    # Of before Llama, with names of their own.
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"alibi": False, "head_dim": None},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64, "init_std": 0.2},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": GPT2 | {"rotary_dim": 4},
    "codegen": GPT2 | {"rotary_dim": 4},
    # Mixtures of experts.
    **{name: EXPERTS for name in ("granitemoe", "minimax_m2", "mixtral", "olmoe", "phimoe")},
    **{name: ROUTED | {"first_k_dense_replace": 1} for name in ("dots1", "glm4_moe")},
    "afmoe": ROUTED,
    "solar_open": ROUTED,
    "deepseek_v3": ROUTED | LATENT | {"first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1}
    | {"moe_layer_start_index": 1},
    "gpt_oss": EXPERTS | SLIDING,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "qwen3_moe": EXPERTS | {"decoder_sparse_step": 1},
    # With state spaces, convolutions or linear attention.
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "granitemoehybrid": EXPERTS | MAMBA | {"shared_intermediate_size": 32, "layer_types": ["mamba", "attention"]},
    "jamba": {"num_experts": 2, "num_experts_per_tok": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4}
    | {"use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "lfm2_moe": EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "n_groups": 1, "expand": 2, "chunk_size": 16},
    "minimax": EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8}
    | {"n_groups": 1, "ssm_state_size": 8, "chunk_size": 16},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA | EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_next": DELTA | EXPERTS | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    "zamba2": {"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "chunk_size": 16}
    | {"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1},
}
# Not in float64 in Transformers itself: grouped products of experts, attention in float32, masks that overflow.
SINGLE = {"gemma2", "gpt_neo", "vaultgemma", "xglm"} | {
    name for name, settings in FAMILIES.items() if any("expert" in setting for setting in settings)
}
# Where `all-linear` is refused and the four projections of the attention are called otherwise.
TARGETS: dict[str, list[str]] = {
    "deepseek_v3": LATENT_TARGETS,
    "mamba": ["in_proj", "x_proj"],
    "mamba2": ["in_proj"],
}
# What a refusal says, and the words for it.
REASONS = {
    "is incompatible with Mamba-based models": "refused by PEFT: `out_proj` of Mamba",
    "where once was expected": "refused: a linear that is called twice",
    "'tuple' object has no attribute": "fails in Transformers: a router under LoRA",
    "none of a kind whose rows can be told apart": "refused",
}
# Without rotary embeddings the bias of the keys has no gradient but rounding, and DataInf weighs it like any other.
ROUNDING = {"xglm"}


def compare(kind: str, targets: str | list[str] | None) -> float:
    """Largest difference from the loop, of the largest influence, after a step of training; as users get it."""
    torch.manual_seed(0)
    dtype = torch.float32 if kind in SINGLE else torch.float64
    model = AutoModelForCausalLM.from_config(make_config(kind, **FAMILIES[kind]))
    rows, validation = make_prompt_completion(12, seed=2), make_prompt_completion(5, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        adapted = add_trained_adapter(model, target_modules=targets, lora_dropout=0.0) if targets else model
        settings: dict[str, Any] = {"router_aux_loss_coef": 0.0, "max_steps": 1, "activation_checkpointing": False}
        trainer = make_trainer(folder, rows, validation, dtype=dtype, model=adapted, **settings)
        trainer.train()
        expected = compute_datainf(*compute_loops(trainer, rows, validation)).numpy()
        found = np.array(trainer.score_influence()["influence"][:])
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def describe(kind: str, targets: str | list[str] | None) -> str:
    """`equal`, or why not; what is neither equal nor refused in known words raises."""
    try:
        error = compare(kind, targets)
    except (ValueError, AttributeError) as refusal:
        for text, words in REASONS.items():
            if text in str(refusal):
                return words
        raise
    tolerance = 1e-4 if kind in SINGLE else 1e-6
    if targets is None and kind in ROUNDING:
        tolerance = 1e-2
    if not error <= tolerance:
        raise AssertionError(f"{kind} with {targets}: {error} from the loop, at most {tolerance}")
    return "equal"


def make_line(kind: str) -> str:
    """The family's line of the table."""
    found, instead = describe(kind, "all-linear"), ""
    if found != "equal":
        targets = TARGETS.get(kind, ATTENTION)
        instead = f"{describe(kind, targets)} with {', '.join(f'`{name}`' for name in targets)}"
    return f"| `{kind}` | {found} | {instead} | {describe(kind, None)} |"


def write_page(show: Callable[[str], object] = print) -> None:
    """docs/families.md, from what comes out now."""
    fit.MAX_INNER_DAMPING_ERROR = {torch.float64: 0.0, torch.float32: 0.0}
    lines = []
    for kind in sorted(FAMILIES):
        lines.append(make_line(kind))
        show(lines[-1])
    text = f"""# Model families

{len(lines)} families of Transformers as tiny random models with a LoRA adapter and without one, each trained
for a step and scored. *Equal*: the influence of every row is that of a loop over single rows with plain
automatic differentiation (to 1e-6 in float64, 1e-4 in float32). A mixture of experts needs
`router_aux_loss_coef=0.0`. What is refused without an adapter has trained tensors of other kinds than linear
layers, norms, input embedding and head. Llama 4 is missing, which TRL does not train. `python
tests/families.py` writes this page, and a test holds the package to it.

| `model_type` | `target_modules="all-linear"` | otherwise | without an adapter |
|---|---|---|---|
"""
    PAGE.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    write_page()
