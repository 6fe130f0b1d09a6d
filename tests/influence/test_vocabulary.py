"""A trained output head or input embedding, whole or in part, against the naive oracle, and what is refused."""

import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import FAMILIES
from families import make_config as make_family
from helpers import (
    CHAT_TEMPLATE,
    add_trained_adapter,
    assert_same,
    make_config,
    make_model,
    make_prompt_completion,
    make_sentence,
    make_tokenizer,
    make_trainer,
)
from loops import assert_equals_loop, assert_queries_and_saved_scorer_equal_loop, compute_loops, keep_layers
from naive import compute_datainf, compute_gradients
from peft import LoraConfig, PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from hf_in2core import InfluenceScorer, InfluenceTrainer


# Untied, tied, logits that are scaled after the head, embeddings that are scaled after the module or within, a head
# with a bias.
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "cohere": {"logit_scale": 0.3, "tie_word_embeddings": True},
    "granite": {},
    "gemma3_text": {},
    "phi": {},
}
# Of the input embedding alone: by LoRA, and the tokens that are named, one of which pads.
PARTS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [0, 3, 42, 270, 272, 280]}},
    "tokens_and_head": {
        "trainable_token_indices": {"embed_tokens": [272, 280, 3]},
        "modules_to_save": ["lm_head"],
    },
}
SAVED = {"head": ["lm_head"], "embedding": ["embed_tokens"], "both": ["lm_head", "embed_tokens"]}


def make_adapted(family: str, saved: list[str] | dict[str, Any], **settings: Any) -> PeftModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        make_family(family, **{**FAMILIES[family], **SETTINGS[family], **settings})
    )
    options = saved if isinstance(saved, dict) else {"modules_to_save": saved}
    adapted = add_trained_adapter(model, **{"target_modules": ["q_proj", "v_proj"], **options})
    with torch.no_grad():  # as after training: the copies are not the tied matrices any more
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any(".layers." not in name for name in trained) or not saved
    return adapted


def make_base() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(make_family("llama")).double()


@pytest.mark.usefixtures("exact_damping")
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("family", SETTINGS)
def test_families_equal_the_loop(tmp_path, validation, family, saved) -> None:
    rows = make_prompt_completion(9, seed=2)
    trainer = make_trainer(tmp_path, rows, validation, model=make_adapted(family, SAVED[saved]), tokens_per_batch=100)
    # Gemma's norms and rotary embeddings are in float32, which rounds a batch otherwise than a row.
    assert_equals_loop(trainer, rows, validation, 1e-6 if family == "gemma3_text" else 1e-9)


@pytest.mark.usefixtures("exact_damping")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("loss_reduction", ["mean", "max"])
def test_parts_of_the_embedding_and_their_saved_scorer_equal_the_loop(tmp_path, loss_reduction, part) -> None:
    ids = torch.randint(0, 300, (9, 30), generator=torch.Generator().manual_seed(0))
    named = torch.tensor([0, 3, 42, 270, 272, 280])
    tokens = torch.where(ids % 3 == 0, named[ids % 18 // 3], ids).tolist()
    rows = Dataset.from_list([{"input_ids": row[: 30 - k], "labels": row[: 30 - k]} for k, row in enumerate(tokens)])
    model = make_adapted("llama", PARTS[part])
    trainer = make_trainer(tmp_path / "run", rows, rows, model=model, loss_reduction=loss_reduction)
    scorer = trainer.fit_influence(per_example=True)
    scored = trainer.score_influence()
    gradients = compute_gradients(trainer.model, rows, loss_reduction)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(gradients[0])
    expected = np.stack([compute_datainf(gradients, [query]).numpy() for query in gradients], axis=1)
    assert_same(scored["influence_per_query"], expected, 1e-9)
    scorer.save_pretrained(tmp_path / "scorer")
    loaded = InfluenceScorer.from_pretrained(tmp_path / "scorer", model=make_base())
    assert_same(rows.map(loaded, batched=True, batch_size=4)["influence"], expected.mean(1), 1e-9)


@pytest.mark.usefixtures("exact_damping")
@pytest.mark.parametrize("tokens_per_chunk", [1, 3, 1000])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum", "sqrt", "max"])
def test_reductions_equal_the_loop_wherever_chunks_of_logits_end(
    tmp_path, validation, monkeypatch, loss_reduction, tokens_per_chunk
) -> None:
    monkeypatch.setattr("hf_in2core.engine.losses.MAX_LOGITS_PER_CHUNK", tokens_per_chunk * 340)
    rows = make_prompt_completion(9, seed=2)
    model = make_adapted("llama", SAVED["both"])
    trainer = make_trainer(
        tmp_path, rows, validation, model=model, loss_reduction=loss_reduction, tokens_per_batch=100
    )
    assert_equals_loop(trainer, rows, validation)


@pytest.mark.parametrize("estimator", ["gradient_dot", "gradient_cosine"])
@pytest.mark.parametrize(
    ("family", "trained"),
    [("llama", SAVED["both"]), ("cohere", SAVED["both"]), ("llama", PARTS["lora"]), ("llama", PARTS["tokens"])],
)
def test_dot_and_cosine_equal_the_loop(tmp_path, validation, family, trained, estimator) -> None:
    rows = make_prompt_completion(9, seed=2)
    trainer = make_trainer(
        tmp_path,
        rows,
        validation,
        model=make_adapted(family, trained),
        estimator=estimator,
        tokens_per_batch=100,
    )
    assert_equals_loop(trainer, rows, validation)


@pytest.mark.usefixtures("exact_damping")
def test_rows_as_queries_and_a_saved_scorer_equal_the_loop(tmp_path, validation) -> None:
    make = partial(make_trainer, model=make_adapted("llama", SAVED["both"]), tokens_per_batch=100)
    rows = make_prompt_completion(9, seed=2)
    assert_queries_and_saved_scorer_equal_loop(tmp_path, make, rows, validation, make_base())


@pytest.mark.usefixtures("exact_damping")
def test_a_token_that_pads_has_no_gradient_where_it_is_a_word(tmp_path) -> None:
    """Its embedding is not trained wherever it stands: in many tokenizers the pad token ends each row."""
    tokens = torch.randint(0, 6, (8, 9), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_list(
        [{"input_ids": ids[: 9 - row // 3], "labels": ids[: 9 - row // 3]} for row, ids in enumerate(tokens)]
    )
    model = make_adapted("llama", SAVED["both"])
    assert model.get_input_embeddings().padding_idx == 0 and sum(row.count(0) for row in tokens) > 5
    trainer = make_trainer(tmp_path, rows, rows, model=model)
    gradients = compute_gradients(trainer.model, rows)
    assert_same(trainer.score_influence()["influence"], compute_datainf(gradients, gradients), 1e-9)


@pytest.mark.usefixtures("exact_damping")
def test_layers_leave_the_head_and_the_embedding_out(tmp_path, validation) -> None:
    rows = make_prompt_completion(9, seed=2)
    model = make_adapted("llama", SAVED["both"])
    trainer = make_trainer(tmp_path, rows, validation, model=model, influence_layers="last:1", gradient_store_gb=1.0)
    kept = keep_layers(compute_loops(trainer, rows, validation), 1)
    assert_same(trainer.score_influence()["influence"], compute_datainf(*kept), 1e-9)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor of real numbers that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return found


@pytest.mark.parametrize("saved", SAVED)
def test_no_copy_of_the_matrix_is_made_for_every_row(tmp_path, validation, monkeypatch, saved) -> None:
    matrix = 4000 * 32
    monkeypatch.setattr("hf_in2core.engine.losses.MAX_LOGITS_PER_CHUNK", matrix)
    rows = make_prompt_completion(12, seed=2)
    trainer = make_trainer(
        tmp_path, rows, validation, model=make_adapted("llama", SAVED[saved], vocab_size=4000), tokens_per_batch=10_000
    )
    with LargestTensor() as largest:
        trainer.score_influence()
    # The weighted sum and its slope are the largest that there is, of a batch of 12 rows.
    assert matrix < largest.elements <= 2 * matrix


@pytest.mark.parametrize(
    ("saved", "adapter", "options", "message"),
    [
        ("head", {}, {"gradient_store_gb": 1.0}, r"gradient_store_gb=1.0.*lm_head.*gradient_store_gb=0"),
        ("both", {"ensure_weight_tying": True}, {}, r"(?s)shared with.*Without `ensure_weight_tying`"),
    ],
)
def test_what_a_trained_head_cannot_go_with_is_refused(
    tmp_path, pool, validation, saved, adapter, options, message
) -> None:
    model = add_trained_adapter(make_model(), target_modules=["q_proj"], modules_to_save=SAVED[saved], **adapter)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, pool, validation, model=model, **options)


def test_a_cloned_chat_template_whose_tokens_are_trained_equals_the_loop(tmp_path) -> None:
    """TRL adds its tokens to the vocabulary, and `lm_head` and the new tokens to what is trained."""
    tokenizer, base = make_tokenizer(), str(tmp_path / "base")
    make_adapted("llama", []).unload().save_pretrained(base)
    tokenizer.save_pretrained(base)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("</s>", "<|end|>")
    tokenizer.save_pretrained(tmp_path / "template")
    generator = random.Random(0)
    turns = [[make_sentence(generator, 2, 6) for _ in "qa"] for _ in range(12)]
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
    rows = Dataset.from_list([{"messages": chat} for chat in chats])
    settings: dict[str, Any] = {"chat_template_path": str(tmp_path / "template"), "max_steps": 2}
    trainer = InfluenceTrainer(
        model=base,
        args=make_config(tmp_path / "run", model_init_kwargs={"dtype": "float32"}, **settings),
        train_dataset=rows.select(range(8)),
        eval_dataset=rows.select(range(8, 12)),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
    )
    assert {name.split(".")[-2] for name in trainer.blocks} >= {"modules_to_save", "token_adapter"}
    trainer.train()
    found = [
        compute_gradients(trainer.model, part)
        for part in (trainer.prepared_pool, trainer.prepared_validation["validation"])
    ]
    assert_same(trainer.score_influence()["influence"], compute_datainf(*found), 1e-4)


def test_tokens_of_a_tied_embedding_are_refused(tmp_path, pool, validation) -> None:
    model = add_trained_adapter(make_model(), target_modules=["q_proj"], trainable_token_indices=[3])
    with pytest.raises(ValueError, match=r"token_adapter.*tied to the output head.*jinja"):
        make_trainer(tmp_path, pool, validation, model=model)
