"""The scorer's preparation of rows against SFT's own, without barriers, and tokens that are made once."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from accelerate import DistributedType, PartialState
from datasets import Dataset
from helpers import (
    CHAT_TEMPLATE,
    ROOT,
    add_trained_adapter,
    make_config,
    make_model,
    make_prompt_completion,
    make_tokenizer,
    make_trainer,
)

from hf_in2core import InfluenceTrainer
from hf_in2core.rows.hashes import hash_tokenization
from hf_in2core.rows.preparation import Preparation, prepare_batch, prepare_rows, tokenize_rows
from hf_in2core.rows.sources import load_rows
from hf_in2core.rows.trainer_data import TESTED_TRL


class OtherTRL(InfluenceTrainer):
    """As under a TRL that prepares one row in another way than the function that the scorer calls."""

    changed: dict[str, Any]

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        def change(row: dict[str, Any], index: int) -> dict[str, Any]:
            return {name: edit(row[name]) for name, edit in self.changed.items()} if index == 1 else {}

        return super()._prepare_dataset(dataset, *args, **kwargs).map(change, with_indices=True)


def make_other(folder: Path, pool: Dataset, validation: Dataset, **options: Any) -> InfluenceTrainer:
    return OtherTRL(
        model=add_trained_adapter(make_model()),
        args=make_config(folder, **options),
        train_dataset=pool,
        eval_dataset=validation,
        processing_class=make_tokenizer(),
    )


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"input_ids": lambda ids: [*ids[:2], 3, *ids[3:]]}, "row 1 of the pool .*`input_ids` differs at token 2 "),
        ({"labels": lambda labels: [*labels[:-1], -100]}, "row 1 .*`labels` differs at "),
        ({name: lambda values: values[:-1] for name in ("input_ids", "labels")}, "row 1 .*`input_ids` differs at "),
        ({name: lambda values: [1, *values] for name in ("input_ids", "labels")}, "row 1 .*`input_ids` .* token 0 "),
    ],
)
def test_a_trl_that_prepares_rows_in_another_way_is_named(tmp_path, pool, validation, monkeypatch, changed, what):
    monkeypatch.setattr(OtherTRL, "changed", changed, raising=False)
    with pytest.raises(ValueError, match=f"TRL {trl.__version__} prepares {what}") as raised:
        make_other(tmp_path, pool, validation)
    assert f"trl>={TESTED_TRL[0]},<={TESTED_TRL[1]}" in str(raised.value)


def test_rows_that_sft_packs_are_not_compared(tmp_path, pool, validation, monkeypatch) -> None:
    monkeypatch.setattr(OtherTRL, "changed", {"input_ids": lambda ids: ids[::-1]}, raising=False)
    assert len(make_other(tmp_path, pool, validation, packing=True, max_length=64).prepared_pool) == len(pool)


@pytest.mark.parametrize("options", [{}, {"shuffle_dataset": True}, {"packing": True}])
def test_rows_cut_dropped_shuffled_and_of_another_format_agree(tmp_path, validation, options) -> None:
    rows = make_prompt_completion(12, seed=5)
    long = {"id": "long", "prompt": "the cat " * 60, "completion": " sat"}
    pool = Dataset.from_list([long, rows[0], long, *rows.select(range(1, 12))]).with_format("torch")
    trainer = make_trainer(tmp_path, pool, validation, max_length=20, **options)
    assert trainer.prepared_pool.with_format(None)["row"][:3] == [1, 3, 4]


def test_what_is_promised_and_called_tested_is_what_the_tests_run_on() -> None:
    oldest, newest = (
        dict(re.findall(r"^(\w+)==(.+)$", (ROOT / f"constraints-{end}.txt").read_text(encoding="utf-8"), re.MULTILINE))
        for end in ("oldest", "newest")
    )
    assert (oldest["trl"], newest["trl"]) == TESTED_TRL
    promised = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in ("trl", "transformers", "datasets"):
        assert f'"{name}>={oldest[name].rpartition(".")[0]},<' in promised


def test_a_batch_is_prepared_without_waiting_for_other_processes(pool, monkeypatch) -> None:
    """Under two processes, of which the other never comes: without a process group a barrier fails at once."""
    monkeypatch.setattr(PartialState(), "distributed_type", DistributedType.MULTI_CPU)
    preparation = Preparation(make_tokenizer(), completion_only_loss=True)
    prepared, _ = prepare_batch(pool[:3], preparation)
    assert PartialState().distributed_type == DistributedType.MULTI_CPU
    with pytest.raises((ValueError, RuntimeError), match="process group"):
        prepare_rows(pool, preparation)
    monkeypatch.undo()
    assert prepared.to_list() == prepare_rows(pool.select(range(3)), preparation).to_list()


def test_tokens_made_once_are_cut_as_raw_rows_are(pool) -> None:
    preparation = Preparation(make_tokenizer(), completion_only_loss=True, max_length=9)
    tokens = tokenize_rows(pool, preparation)
    assert tokens.column_names == ["input_ids", "labels"] and len(tokens) == len(pool)
    cut, raw = prepare_rows(tokens, preparation), prepare_rows(pool, preparation)
    assert cut.to_list() == raw.to_list() and 0 < len(cut) < len(pool)


def test_models_that_tokenise_alike_share_the_tokens() -> None:
    def make(tokenizer: Any = None, **options: Any) -> str:
        return hash_tokenization(Preparation(tokenizer or make_tokenizer(), **options))

    chat, other_end = make_tokenizer(), make_tokenizer()
    chat.chat_template, other_end.eos_token = CHAT_TEMPLATE, "<s>"
    assert make() == make(max_length=7, truncation_mode="keep_end")
    different = [make(), make(chat), make(other_end), make(completion_only_loss=True), make(columns=["alpaca"])]
    assert len(set(different)) == len(different)


def test_a_stream_is_scored_as_the_pool_is(tmp_path, pool, validation) -> None:
    trainer = make_trainer(tmp_path, pool, validation, torch.float32)
    scored = trainer.score_influence()
    mapped = pool.to_iterable_dataset().map(trainer.fit_influence(), batched=True, batch_size=5)
    assert [row["influence"] for row in mapped] == pytest.approx(scored["influence"][:], rel=1e-4)


TOOL_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}</s>",
    "{{ message['content'] or '' }}{% for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}</s>",
)


def make_tool_rows() -> list[dict[str, Any]]:
    """Conversations whose tool calls, contents and unused columns have no type in common."""
    rows: list[dict[str, Any]] = []
    for number in range(4):
        for arguments in ({"city": f"red {number}"}, {"a": number, "b": [2, None]}, {}):
            call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
            answer = {"role": "assistant", "content": None, "tool_calls": [call]}
            turns = [{"role": "user", "content": f"birds {number}"}, answer, {"role": "assistant", "content": "walls"}]
            rows.append({"messages": turns, "note": str(number) if number % 2 else None})
    return rows


def test_a_row_is_prepared_as_in_training_whatever_stands_beside_it(tmp_path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_tool_rows()), encoding="utf-8")
    pool = load_rows(str(path))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    trainer = make_trainer(tmp_path / "ref", pool, pool.select([0, 4]), tokenizer=tokenizer)
    trained = {row["row"]: (row["input_ids"], row["labels"]) for row in trainer.prepared_pool.with_format(None)}
    assert len(trained) == len(pool)
    for size in (1, 5, len(pool)):
        for start in range(0, len(pool), size):
            batch = pool[start : start + size]
            for row in prepare_batch(batch, trainer.preparation)[0]:
                assert (row["input_ids"], row["labels"]) == trained[start + row["row"]]
    scored = trainer.score_influence()
    for mapped in (pool, pool.to_iterable_dataset()):
        rows = list(mapped.map(trainer.fit_influence(), batched=True, batch_size=5))
        torch.testing.assert_close([row["influence"] for row in rows], list(scored["influence"]), rtol=1e-9, atol=0)


def test_contents_of_different_types_stand_in_one_batch() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    contents = ["walls", [{"type": "text", "text": "walls"}]]
    turns = [[{"role": "user", "content": "birds"}, {"role": "assistant", "content": content}] for content in contents]
    preparation = Preparation(tokenizer)
    together, _ = prepare_batch({"messages": turns}, preparation)
    alone = [prepare_batch({"messages": [one]}, preparation)[0][0] for one in turns]
    assert [row["input_ids"] for row in together] == [row["input_ids"] for row in alone]
