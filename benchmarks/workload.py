"""Models, rows and timing that the benchmarks share; everything is made on the spot from a seed."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_in2core import InfluenceConfig, InfluenceTrainer
from hf_in2core.engine.blocks import find_blocks
from hf_in2core.engine.fit import run_fit_pass
from hf_in2core.engine.passes import Passes
from hf_in2core.engine.scoring import run_score_pass
from hf_in2core.engine.store import GradientStore
from hf_in2core.engine.validation import run_validation_pass


def make_model(hidden_size: int, num_layers: int, vocab_size: int, rank: int = 8) -> PeftModel:
    """A random Llama with a LoRA adapter on every linear whose B is not zero."""
    torch.manual_seed(0)
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    model = get_peft_model(LlamaForCausalLM(make_config(hidden_size, num_layers, vocab_size)), adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


def make_config(hidden_size: int, num_layers: int, vocab_size: int) -> LlamaConfig:
    """Shape of that Llama."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=int(2.75 * hidden_size) // 16 * 16,
        num_hidden_layers=num_layers,
        num_attention_heads=max(hidden_size // 64, 2),
        num_key_value_heads=max(hidden_size // 128, 1),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def make_rows(num_rows: int, vocab_size: int, low: int, high: int, prompt: float = 0.3, seed: int = 0) -> Dataset:
    """Prepared rows of random tokens, `low` to `high` long, the first `prompt` of each without loss."""
    generator = np.random.default_rng(seed)
    rows = []
    for row in range(num_rows):
        input_ids = generator.integers(5, vocab_size, generator.integers(low, high + 1))
        labels = input_ids.copy()
        labels[: int(prompt * len(labels))] = -100
        rows.append({"row": row, "input_ids": input_ids.tolist(), "labels": labels.tolist()})
    return Dataset.from_list(rows)


def make_topics(num_rows: int, vocab_size: int, length: int, seed: int, topics: int = 4) -> Dataset:
    """Rows of a few topics with words of their own, so that some are more like the validation rows than others."""
    generator = np.random.default_rng(seed)
    words = (vocab_size - 5) // 8
    rows = []
    for row in range(num_rows):
        low = 5 + words * (row % topics)
        tokens = low + np.minimum(generator.zipf(1.3, length), words) - 1
        mixed = generator.random(length) < 0.3
        tokens[mixed] = generator.integers(5, vocab_size, int(mixed.sum()))
        rows.append({"row": row, "input_ids": tokens.tolist(), "labels": tokens.tolist()})
    return Dataset.from_list(rows)


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer that the trainer can hold; the rows are tokens already."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{token}": token for token in range(3, vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_passes(model: PeftModel, tokens_per_batch: int = 4096, **kwargs: Any) -> Passes:
    """A pass over every block of the model, without state on disk."""
    options = {"chunk_size": 100_000, "show_progress": False, **kwargs}
    blocks = options.pop("blocks", None) or find_blocks(model, "default")
    return Passes(model, blocks, "mean", tokens_per_batch, **options)


def make_trainer(folder: Path, model: PeftModel, pool: Dataset, held_out: Dataset, **options: Any) -> InfluenceTrainer:
    """The trainer as users call it, on the CPU in float32 and silent; `options` are fields of its configuration."""
    settings = {"bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True, **options}
    return InfluenceTrainer(
        model=model,
        args=InfluenceConfig(output_dir=str(folder), **settings),
        train_dataset=pool.remove_columns("row"),
        eval_dataset=held_out.remove_columns("row"),
        processing_class=make_tokenizer(model.config.vocab_size),
    )


def compute_mean_gradients(passes: Passes, rows: Dataset) -> dict[str, Tensor]:
    """The mean gradient of the rows as one query, `[1, out, in]` per block."""
    return {name: v[None] for name, v in run_validation_pass(passes, rows, "v", "v").items()}


def fit_directions(passes: Passes, rows: Dataset, v: dict[str, Tensor]) -> dict[str, Tensor]:
    """What rows are scored on, by DataInf: the fit pass."""
    return {name: u.float() for name, u in run_fit_pass(passes, rows, v, 0.1, None, 0).ihvp.items()}


def run_fit_and_score(passes: Passes, rows: Dataset, v: dict[str, Tensor]) -> np.ndarray:
    """DataInf of the rows on the queries, `[n, Q]`: the fit pass and the score pass."""
    return run_score_pass(passes, rows, fit_directions(passes, rows, v), cosine=False).influence


def measure_error(found: np.ndarray, exact: np.ndarray) -> float:
    """`||found - exact|| / ||exact||`."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@contextmanager
def storing(passes: Passes) -> Iterator[Passes]:
    """The same passes with the gradients of the fit pass kept on disk (`gradient_store_gb`), float32."""
    elements = {name: block.tensor.numel() for name, block in passes.blocks.items()}
    with tempfile.TemporaryDirectory() as folder:
        store = GradientStore(Path(folder), "benchmark", elements, torch.float32)
        yield replace(passes, folder=Path(folder), fingerprint="benchmark", store=store)


def measure_apart(script: str, arguments: list[Any], **environment: str) -> dict[str, float]:
    """What a script prints last, as JSON, when a process of its own runs it with `--measure`."""
    command = [sys.executable, script, "--measure", json.dumps(arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def time_interleaved(
    works: dict[str, Callable[[], object]],
    repetitions: int,
    clock: Callable[[], float] = time.process_time,
    not_counted: int = 1,
) -> dict[str, float]:
    """
    Median seconds of each work, of the CPU by default, the works taking turns so that a slow minute meets all of them.

    The repetitions that are not counted come before the others.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repetition in range(not_counted + repetitions):
        for name, work in works.items():
            start = clock()
            work()
            if repetition >= not_counted:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
