"""An arm trained on tokens that were made once is the arm that TRL's SFT trains on the raw rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from helpers import CHAT_TEMPLATE, make_config, make_model, make_prompt_completion, make_tokenizer
from recipe_runs import Inputs, load_command, write_config
from transformers import AutoTokenizer, set_seed
from trl import ModelConfig, SFTTrainer, get_peft_config

from hf_in2core import InfluenceConfig
from hf_in2core.pipeline.job import check
from hf_in2core.pipeline.training import count_loss_tokens, count_steps, make_model_kwargs, make_trainer, tokenize
from hf_in2core.rows.columns import apply_columns


def make_messages(rows: Dataset) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
                {"role": "user", "content": row["prompt"][::-1]},
                {"role": "assistant", "content": " sat"},
            ]
        }
        for row in rows
    ]


ROWS = make_prompt_completion(24, seed=3)
# A prompt that fills `max_length`: cut, the row carries no loss.
LONG = {"id": "long", "prompt": "the cat " * 40, "completion": " sat"}
# TRL 1.14 appends the end of sequence to the column `text` alone.
FIELD = "text" if trl.__version__.startswith("1.14.") else "note"
TEXTS = Dataset.from_list([{FIELD: row["prompt"] + row["completion"]} for row in [*ROWS, LONG]])
PLAIN = Dataset.from_list([*ROWS, LONG])
CASES: dict[str, tuple[Dataset, dict[str, Any]]] = {
    "assistant_only": (Dataset.from_list(make_messages(ROWS)), {"assistant_only_loss": True}),
    "messages": (Dataset.from_list(make_messages(ROWS)), {}),
    "prompt_completion": (PLAIN, {}),
    "whole_rows": (PLAIN, {"completion_only_loss": False}),
    "keep_end": (PLAIN, {"truncation_mode": "keep_end"}),
    "text": (TEXTS, {"dataset_text_field": FIELD}),
    "columns": (TEXTS, {"columns": [f"text={FIELD}"]}),
    "packing": (PLAIN, {"packing": True}),
    "wrapped": (PLAIN, {"packing": True, "packing_strategy": "wrapped"}),
    "shuffled": (PLAIN, {"shuffle_dataset": True}),
    "tokens": (Dataset.from_list([{"input_ids": [5, 6, 7, n], "labels": [-100, -100, 7, n]} for n in range(9)]), {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    make_model(num_layers=2).save_pretrained(folder)
    return folder


def make_sft(model_args: ModelConfig, args: InfluenceConfig, rows: Dataset, tokenizer: Any) -> SFTTrainer:
    """TRL's own trainer on the raw rows."""
    args.model_init_kwargs = make_model_kwargs(model_args, args)
    set_seed(args.seed)
    return SFTTrainer(
        model=model_args.model_name_or_path or "",
        args=args,
        train_dataset=apply_columns(rows, args.columns, tokenizer) if args.columns else rows,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )


@pytest.mark.parametrize("case", CASES)
def test_training_on_tokens_is_training_on_raw_rows(tmp_path, folder, case) -> None:
    rows, options = CASES[case]
    model_args = ModelConfig(str(folder), use_peft=True, lora_r=4, lora_target_modules=["all-linear"])
    positions = np.arange(len(rows))[::-2]
    trainers = []
    for name in ("once", "raw"):
        args = make_config(
            tmp_path / name,
            **{"max_length": 30, "num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 0.01},
            **{"logging_steps": 1, "seed": 5, **options},
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if name == "once":
            tokens = tokenize(rows, args, tokenizer).select(positions)
            trainer = make_trainer(model_args, args, tokens, tokenizer)
        else:
            trainer = make_sft(model_args, args, rows.select(positions), tokenizer)
        steps = count_steps(trainer)
        trainer.train()
        assert steps == trainer.state.global_step > 1
        trainers.append(trainer)
    once, raw = trainers
    assert count_loss_tokens(once.train_dataset) == count_loss_tokens(raw.train_dataset)
    for column in once.train_dataset.column_names:
        assert once.train_dataset[column][:] == raw.train_dataset[column][:]
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in trainers]
    assert losses[0] == losses[1]
    adapters = [{n: p for n, p in t.model.named_parameters() if p.requires_grad} for t in trainers]
    assert adapters[0].keys() == adapters[1].keys() and adapters[0]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_models_of_a_run_share_the_tokens_of_the_pool(inputs: Inputs, tmp_path: Path) -> None:
    config = inputs[1] | {"output_dir": str(tmp_path / "run"), "reference_max_length": 20}
    job = check(load_command("run").PARSER.parse(["--config", write_config(tmp_path, config)]))
    target, reference = job.settings.make(InfluenceConfig), job.settings.make(InfluenceConfig, reference=True)
    assert target.max_length != reference.max_length
    tokens = job.tokenize_pool(target, job.target_tokenizer)
    assert job.tokenize_pool(reference, job.reference_tokenizer) is tokens
    reference.completion_only_loss = False
    assert job.tokenize_pool(reference, job.reference_tokenizer)["labels"][0] != tokens["labels"][0]
