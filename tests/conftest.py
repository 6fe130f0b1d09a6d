"""Tiny models and rows made on the spot; nothing is downloaded."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


datasets.disable_progress_bars()
torch.set_num_threads(1)

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


def make_model(seed: int = 0, num_layers: int = 3, hidden_size: int = 32, vocab_size: int = 340) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
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
    peft_model = get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.normal_(std=0.2)
    return peft_model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a model and data, and the settings of a recipe's run on them; nobody writes into it."""
    from recipe_runs import make_inputs  # which takes its words and model from here

    folder = tmp_path_factory.mktemp("recipe-inputs")
    return folder, make_inputs(folder)


@pytest.fixture(scope="session")
def finished(inputs: tuple[Path, dict[str, Any]]) -> Path:
    """The same folder with a finished run of the pipeline; nobody writes into it."""
    from recipe_runs import run_command, write_config

    folder, config = inputs
    run_command("run", "--config", write_config(folder, config))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, headless, through Playwright; both are optional."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="needs Playwright: pip install -c constraints.txt -e '.[browser]'"
    )
    with sync_api.sync_playwright() as playwright:
        installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:
            launched = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium (apt-get install chromium, or playwright install chromium): {str(error)[:200]}")
        yield launched
        launched.close()


@pytest.fixture
def pool() -> Dataset:
    return make_prompt_completion(23, seed=0)


@pytest.fixture
def validation() -> Dataset:
    return make_prompt_completion(7, seed=1)


@pytest.fixture
def exact_damping(monkeypatch) -> None:
    """A second fit pass takes the exact damping from the first, whatever the bound on the pilot's error says."""
    monkeypatch.setattr("hf_in2core.engine.fit.MAX_INNER_DAMPING_ERROR", 0.0)
