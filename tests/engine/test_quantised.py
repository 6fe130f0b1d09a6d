"""A base model quantised by bitsandbytes: influence through it is that of a loop over the same quantised model."""

from typing import Any

import pytest
import torch
from helpers import (
    add_trained_adapter,
    assert_same,
    make_model,
    make_tokenizer,
    make_tokens,
    make_trainer,
)
from loops import compute_loops
from naive import compute_datainf
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_in2core import InfluenceScorer


pytest.importorskip("bitsandbytes", reason="bitsandbytes quantises the base model, and is not installed")

BITS: dict[int, dict[str, Any]] = {
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    8: {"load_in_8bit": True},
}


def load_quantised(folder, bits: int):
    config = BitsAndBytesConfig(**BITS[bits])
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )


@pytest.mark.parametrize(
    ("bits", "is_float32", "tokens_per_batch", "tolerance"),
    [
        (4, True, 100, 1e-5),
        (4, False, 100, 0.02),  # as TRL leaves the adapter: in bfloat16
        (8, True, 1, 1e-5),
        (8, True, 100, 0.1),  # inputs are rounded to 8 bits, and the least difference between batches moves them
    ],
)
def test_influence_through_a_quantised_base_equals_the_loop(
    tmp_path, validation, bits, is_float32, tokens_per_batch, tolerance
) -> None:
    rows = make_tokens(12, seed=2)
    make_model(hidden_size=64).save_pretrained(tmp_path / "base")
    trainer = make_trainer(
        tmp_path / "run",
        rows,
        validation,
        dtype=None,
        model=add_trained_adapter(load_quantised(tmp_path / "base", bits)),
        tokens_per_batch=tokens_per_batch,
    )
    assert {p.dtype for p in trainer.model.parameters()} >= {torch.uint8 if bits == 4 else torch.int8}
    for parameter in trainer.model.parameters():
        if parameter.requires_grad and is_float32:
            parameter.data = parameter.data.float()
    # The first forward on the CPU packs 4-bit weights in another way: the scorer names them as they were before it.
    trainer.fit_influence().save_pretrained(tmp_path / "scorer")
    scored = trainer.score_influence()
    assert_same(scored["influence"], compute_datainf(*compute_loops(trainer, rows, validation)), tolerance)
    if bits == 4 and is_float32:
        base = load_quantised(tmp_path / "base", bits)
        loaded = InfluenceScorer.from_pretrained(tmp_path / "scorer", model=base, processing_class=make_tokenizer())
        assert_same(rows.map(loaded, batched=True)["influence"], scored["influence"], 1e-5)
