"""Activation checkpointing in the influence passes: layers run again, in evaluation mode, and nothing else changes."""

import copy
from collections import Counter

import pytest
import torch
from helpers import add_trained_adapter, assert_same, make_model, make_tokens, make_trainer, prepare
from loops import compute_loops
from naive import compute_datainf
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_in2core.analysis.layers import compute_layer_scores
from hf_in2core.engine.batches import TokenBatch, read_token_rows
from hf_in2core.engine.gradients import GradientRecorder
from hf_in2core.engine.passes import run_batches
from hf_in2core.engine.reductions import compute_gradient_sum


@pytest.mark.usefixtures("exact_damping")
def test_scores_are_those_of_the_loop_and_bit_for_bit_those_without(tmp_path, validation) -> None:
    rows = make_tokens(14, seed=2)
    model = add_trained_adapter(make_model(), lora_dropout=0.5)
    options = {"tokens_per_batch": 64, "influence_activation_checkpointing": True}
    trainer = make_trainer(tmp_path / "a", rows, validation, model=copy.deepcopy(model), **options)
    # As SFT leaves it: Transformers' own checkpointing is on, of the other kind, and the embeddings require gradients.
    trainer.model.activation_checkpointing_enable({"use_reentrant": True})
    trainer.model.enable_input_require_grads()
    scored = trainer.score_influence()
    without = make_trainer(tmp_path / "b", rows, validation, model=model, tokens_per_batch=64).score_influence()
    assert scored["influence"] == without["influence"]
    trainer.model.activation_checkpointing_disable()
    assert_same(scored["influence"], compute_datainf(*compute_loops(trainer, rows, validation)), 1e-9)


@pytest.mark.parametrize(
    ("is_checkpointed", "influence_layers", "runs"),
    [(True, None, [2, 2, 2]), (False, None, [1, 1, 1]), (True, "last:1", [1, 1, 2]), (True, [1, 2], [1, 2, 2])],
)
def test_layers_run_again_from_the_lowest_selected_one(
    tmp_path, pool, validation, is_checkpointed, influence_layers, runs
) -> None:
    trainer = make_trainer(
        tmp_path,
        pool,
        validation,
        model=add_trained_adapter(make_model(num_layers=3)),
        influence_layers=influence_layers,
        influence_activation_checkpointing=is_checkpointed,
    )
    trainer.model.train()
    forwards = [module.__dict__.get("forward") for module in trainer.model.modules()]
    passes = trainer.make_passes(trainer.blocks, "")
    counts: Counter[int] = Counter()
    layers = trainer.model.base_model.model.model.layers
    for index, layer in enumerate(layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, index=index: counts.update([index]))
    outputs = []
    layers[0].register_forward_hook(lambda _module, _args, output: outputs.append(output))
    batch_rows = read_token_rows(prepare(pool), 0, 4)

    with GradientRecorder(passes.model, passes.blocks) as recorder:

        def step(batch: TokenBatch) -> None:
            compute_gradient_sum(recorder, batch, "mean")

        run_batches(passes, batch_rows, step)
    assert [counts[index] for index in range(3)] == runs
    assert outputs[0].requires_grad == (influence_layers is None)
    # Everything is as it was: no forward of a pass stays behind.
    assert [module.__dict__.get("forward") for module in trainer.model.modules()] == forwards
    assert trainer.model.training and all(layer.training for layer in layers)


class Unwrapped(nn.Module):
    """A decoder layer that is none of Transformers' checkpointable ones."""

    def __init__(self, layer: LlamaDecoderLayer) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm

    def forward(self, hidden: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), **kwargs)[0]
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def test_a_model_without_checkpointable_layers_is_refused(tmp_path, pool, validation) -> None:
    model = make_model()
    model.model.layers = nn.ModuleList(Unwrapped(layer) for layer in model.model.layers)
    with pytest.raises(ValueError, match="lower `tokens_per_batch`"):
        make_trainer(
            tmp_path,
            pool,
            validation,
            dtype=None,
            model=add_trained_adapter(model),
            influence_activation_checkpointing=True,
        )


def test_the_scores_by_layer_run_so_too(tmp_path, validation) -> None:
    trainer = make_trainer(tmp_path, make_tokens(31, seed=2), validation, influence_activation_checkpointing=True)
    runs: Counter[str] = Counter()
    last = trainer.model.base_model.model.model.layers[-1].self_attn
    last.register_forward_pre_hook(lambda *_: runs.update(["forward"]))
    last.o_proj.base_layer.register_full_backward_hook(lambda *_: runs.update(["backward"]))
    compute_layer_scores(trainer)
    assert runs["forward"] == 2 * runs["backward"] > 0
