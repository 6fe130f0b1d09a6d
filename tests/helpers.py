"""What tests of several rooms share: tiny models and rows made on the spot; nothing is downloaded."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ACCELERATE_USE_CPU", "false" if os.environ.get("TESTS_ON_GPU") == "1" else "true")

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from markdown_it import MarkdownIt
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_in2core import InfluenceConfig, InfluenceTrainer
from hf_in2core.rows.preparation import Preparation, prepare_rows


datasets.disable_progress_bars()
torch.set_num_threads(1)

ON_GPU = os.environ.get("TESTS_ON_GPU") == "1"  # CONTRIBUTING.md
ROOT = Path(__file__).resolve().parents[1]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = "the cat sat on a mat and saw red blue green birds fly over old stone walls near slow rivers".split()


def make_sentence(generator: random.Random, low: int, high: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(low, high)))


def make_prompt_completion(num_rows: int, seed: int) -> Dataset:
    generator = random.Random(seed)
    return Dataset.from_list(
        [
            {
                "id": f"{seed}-{index}",
                "prompt": make_sentence(generator, 2, 9) + " :",
                "completion": " " + make_sentence(generator, 1, 12),
            }
            for index in range(num_rows)
        ]
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), " " + " ".join(WORDS)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def make_model(
    seed: int = 0,
    num_layers: int = 2,
    hidden_size: int = 32,
    vocab_size: int = 340,
    max_position_embeddings: int = 256,
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_position_embeddings,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def add_trained_adapter(model: LlamaForCausalLM, seed: int = 1, **kwargs: object) -> PeftModel:
    """A LoRA adapter whose B is not zero: a fresh one hides the gradients of A."""
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1}
    config = LoraConfig(**{**options, **kwargs})
    torch.manual_seed(seed)  # A is drawn too
    peft_model = get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.normal_(std=0.2)
    return peft_model


def make_config(folder, **kwargs) -> InfluenceConfig:
    defaults = {"bf16": False, "use_cpu": not ON_GPU, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    return InfluenceConfig(output_dir=str(folder), **{**defaults, **kwargs})


def make_trainer(
    folder, pool, validation, dtype=torch.float64, model=None, tokenizer=None, peft_config=None, **kwargs
):
    """A trainer of a tiny model, in float64 unless it is to stay as it is (`dtype=None`); `kwargs` are settings."""
    model = add_trained_adapter(make_model()) if model is None else model
    return InfluenceTrainer(
        model=model if dtype is None else model.to(dtype),
        args=make_config(folder, **kwargs),
        train_dataset=pool,
        eval_dataset=validation,
        processing_class=tokenizer or make_tokenizer(),
        peft_config=peft_config,
    )


def train_reference(folder, save_steps: int, adapter: dict | None = None, **options) -> None:
    """A reference of six steps, whose learning rate changes in each, and its checkpoints."""
    settings: dict[str, Any] = {"max_steps": 6, "warmup_steps": 3, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"save_strategy": "steps", "save_steps": save_steps, "per_device_train_batch_size": 4}
    lora = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **(adapter or {})})
    rows = make_prompt_completion(23, seed=0), make_prompt_completion(5, seed=1)
    make_trainer(folder, *rows, dtype=None, model=make_model(), peft_config=lora, **settings | options).train()


def prepare(rows: Dataset) -> Dataset:
    """Tokens and labels of rows, once for each set of them: most tests compare the same few with the loop."""
    key = json.dumps(rows.to_list())
    if key not in _prepared:
        _prepared[key] = prepare_rows(rows, Preparation(make_tokenizer(), completion_only_loss=True))
    return _prepared[key]


_prepared: dict[str, Dataset] = {}


def make_tokens(num_rows: int, seed: int) -> Dataset:
    """The rows of `make_prompt_completion` as tokens, which take each trainer less time than texts."""
    return prepare(make_prompt_completion(num_rows, seed)).select_columns(["input_ids", "labels"])


def assert_same(actual, expected, tolerance: float) -> None:
    actual, expected = np.asarray(actual, dtype=float), np.asarray(expected, dtype=float)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * np.nanmax(np.abs(expected)))


def read_markdown(text: str):
    """Tokens of a CommonMark parser with tables and bare links, as pages on the Hub have them."""
    return MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table").parse(text)


def flatten(tokens):
    for token in tokens:
        yield token
        yield from flatten(token.children or [])


def launch_worker(worker: str, tmp_path: Path, name: str, world_size: int, check: bool = True, **options):
    """A script of tests/engine/workers on as many processes, and the JSON that each of them leaves."""
    arguments = {
        "out": str(tmp_path / name),
        "output_dir": str(tmp_path / f"{name}-run"),
        "world_size": world_size,
        **options,
    }
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines=1", "--mixed_precision=no"]
    launcher += ["--dynamo_backend=no", f"--num_processes={world_size}", "--main_process_port=0"]
    # Without the variable `--multi_gpu` gives two independent copies, with `--cpu` one process, both silently.
    launcher += ["--multi_gpu"] if world_size > 1 else ["--cpu"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(ROOT / "tests" / "engine" / "workers" / worker), json.dumps(arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if check:
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads((tmp_path / f"{name}.{rank}.json").read_text()) for rank in range(world_size)]
    return done
