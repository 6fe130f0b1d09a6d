"""InfluenceScorer: maps over raw rows, hashing, saving and loading."""

import datetime
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset, load_dataset, load_from_disk
from datasets.fingerprint import Hasher
from helpers import (
    CHAT_TEMPLATE,
    add_trained_adapter,
    assert_same,
    make_model,
    make_prompt_completion,
    make_tokenizer,
    make_trainer,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import chat_template_utils

from hf_in2core import InfluenceScorer, InfluenceTrainer
from hf_in2core.rows.scored import find_set_columns, list_own_columns


@pytest.fixture
def trainer(tmp_path, pool, validation, model_folder):
    model = add_trained_adapter(AutoModelForCausalLM.from_pretrained(model_folder))
    return make_trainer(tmp_path / "run", pool, validation, torch.float32, model=model)


def test_map_scores_raw_rows_as_the_trainer_does(trainer, pool) -> None:
    scorer, scored = trainer.fit_influence(), trainer.score_influence()
    mapped = pool.map(scorer, batched=True, batch_size=5)
    assert_same(mapped["influence"], scored["influence"], 1e-5)
    assert mapped["num_loss_tokens"] == scored["num_loss_tokens"]
    assert mapped.column_names == [*pool.column_names, "influence", "num_loss_tokens"]
    assert mapped.features["influence"].dtype == "float64"


def test_streams_are_scored_too(trainer, pool) -> None:
    scorer, scored = trainer.fit_influence(), trainer.score_influence()
    stream = pool.to_iterable_dataset(num_shards=3).map(scorer, batched=True, batch_size=4)
    rows = list(stream)
    assert [row["id"] for row in rows] == pool["id"]
    assert_same([row["influence"] for row in rows], scored["influence"], 1e-5)


def test_rows_without_loss_map_to_nan(trainer) -> None:
    rows = Dataset.from_dict({"prompt": ["the cat " * 600, "the cat :"], "completion": [" sat", " sat on"]})
    for batch_size in (1, 2):  # a first batch that is all NaN must not decide the column's type
        mapped = rows.map(trainer.fit_influence(), batched=True, batch_size=batch_size)
        assert np.isnan(mapped["influence"]).tolist() == [True, False]
        assert mapped["num_loss_tokens"][0] == 0 < mapped["num_loss_tokens"][1]


def test_hashing_is_cheap_stable_and_tells_scorers_apart(trainer, tmp_path, pool, validation) -> None:
    scorer = trainer.fit_influence()
    assert Hasher.hash(scorer) == Hasher.hash(scorer)
    assert len(Hasher.dumps(scorer)) < 2_000 if hasattr(Hasher, "dumps") else True
    scorer.save_pretrained(tmp_path / "scorer")
    loaded = InfluenceScorer.from_pretrained(tmp_path / "scorer")
    assert Hasher.hash(loaded) == Hasher.hash(scorer)
    trainer.args.damping_scale = 0.7
    assert Hasher.hash(trainer.fit_influence()) != Hasher.hash(scorer)


@pytest.mark.slow
def test_another_process_hashes_alike(trainer, tmp_path) -> None:
    scorer = trainer.fit_influence()
    scorer.save_pretrained(tmp_path / "scorer")
    script = (
        "import sys; from datasets.fingerprint import Hasher; from hf_in2core import InfluenceScorer\n"
        "print(Hasher.hash(InfluenceScorer.from_pretrained(sys.argv[1])))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "scorer")]
    elsewhere = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert elsewhere == Hasher.hash(scorer)


def test_a_rerun_of_the_same_map_comes_from_the_cache(trainer, tmp_path, pool, monkeypatch) -> None:
    pool.save_to_disk(str(tmp_path / "pool"))
    rows = Dataset.load_from_disk(str(tmp_path / "pool"))
    first = rows.map(trainer.fit_influence(), batched=True)
    monkeypatch.setattr(InfluenceScorer, "__call__", lambda *_: pytest.fail("scored again"))
    assert rows.map(trainer.fit_influence(), batched=True)["influence"] == first["influence"]


@pytest.mark.slow
def test_other_processes_are_refused_with_the_remedy(trainer, pool) -> None:
    import pickle

    data = pickle.dumps(trainer.fit_influence())
    script = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
    done = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True)
    assert done.returncode != 0
    assert b"accelerate launch" in done.stderr


def test_saved_and_loaded_it_scores_the_same_bits(trainer, tmp_path, pool) -> None:
    scorer = trainer.fit_influence()
    scorer.save_pretrained(tmp_path / "scorer")
    loaded = InfluenceScorer.from_pretrained(tmp_path / "scorer")
    assert pool.map(loaded, batched=True)["influence"] == pool.map(scorer, batched=True)["influence"]
    assert loaded.config == scorer.config
    assert "negative = proponent" in repr(loaded)


def test_columns_and_chat_template_travel_with_the_scorer(tmp_path, model_folder, pool, validation) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    renamed = [d.rename_columns({"prompt": "question", "completion": "answer"}) for d in (pool, validation)]
    alpaca = [d.map(lambda r: {"instruction": r["question"], "input": "", "output": r["answer"]}) for d in renamed]
    for name, (rows, held_out), columns in (
        ("pairs", renamed, ["prompt=question", "completion=answer"]),
        ("alpaca", [d.remove_columns(["question", "answer"]) for d in alpaca], ["alpaca"]),
    ):
        trainer = make_trainer(
            tmp_path / name,
            rows,
            held_out,
            dtype=None,
            model=add_trained_adapter(AutoModelForCausalLM.from_pretrained(model_folder)),
            tokenizer=tokenizer,
            columns=columns,
        )
        scored = trainer.score_influence()
        trainer.fit_influence().save_pretrained(tmp_path / f"{name}-scorer")
        mapped = rows.map(InfluenceScorer.from_pretrained(tmp_path / f"{name}-scorer"), batched=True)
        assert scored.column_names[: len(rows.column_names)] == rows.column_names
        assert_same(mapped["influence"], scored["influence"], 1e-5)


def save_and_load(trainer: InfluenceTrainer, folder, rows: Dataset, tokenizer=None) -> None:
    """The scores of the trainer are those of its scorer, saved and loaded."""
    scored = trainer.score_influence()
    trainer.fit_influence().save_pretrained(folder)
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    base = AutoModelForCausalLM.from_pretrained(trainer.fit_influence().config.base_model)
    loaded = InfluenceScorer.from_pretrained(folder, model=base)
    assert rows.map(loaded, batched=True)["influence"][:] == scored["influence"][:]


def test_an_adapter_of_any_name_is_saved_and_loaded(tmp_path, model_folder, pool, validation) -> None:
    add_trained_adapter(AutoModelForCausalLM.from_pretrained(model_folder)).save_pretrained(tmp_path / "one")
    add_trained_adapter(AutoModelForCausalLM.from_pretrained(model_folder), seed=4).save_pretrained(tmp_path / "two")
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(base, tmp_path / "one", adapter_name="sft", is_trainable=True)
    alone = make_trainer(tmp_path / "a", pool, validation, torch.float32, model=model)
    save_and_load(alone, tmp_path / "scorer-a", pool)
    # A second adapter that is loaded and not active changes nothing.
    model.load_adapter(str(tmp_path / "two"), adapter_name="other")
    model.set_adapter("sft")
    beside = make_trainer(tmp_path / "b", pool, validation, torch.float32, model=model)
    assert beside.score_influence()["influence"][:] == alone.score_influence()["influence"][:]
    save_and_load(beside, tmp_path / "scorer-b", pool)
    model.base_model.set_adapter(["sft", "other"])  # type: ignore
    with pytest.raises(ValueError, match="adapters sft, other are active together"):
        make_trainer(tmp_path / "c", pool, validation, torch.float32, model=model)


@pytest.mark.parametrize("names", [["default", "tool_use"], ["tool_use", "default"]])
def test_templates_by_name_are_saved_and_loaded_in_any_order(tmp_path, model_folder, names) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {
        name: CHAT_TEMPLATE if name == "default" else "{{ tools }}" + CHAT_TEMPLATE for name in names
    }
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    rows = Dataset.from_list([{"messages": turns, "tools": tools} for tools in (None, '[{"name": "look"}]', None)])
    model = add_trained_adapter(AutoModelForCausalLM.from_pretrained(model_folder))
    trainer = make_trainer(tmp_path / "run", rows, rows, torch.float32, model=model, tokenizer=tokenizer)
    save_and_load(trainer, tmp_path / "scorer", rows)


def test_a_date_in_the_template_stays_that_of_the_fit(tmp_path, model_folder, monkeypatch, caplog) -> None:
    def set_day(*day: int) -> None:
        class Day(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(*day)  # type: ignore

        monkeypatch.setattr(chat_template_utils, "datetime", Day)
        chat_template_utils._compile_jinja_template.cache_clear()

    template = (Path(trl.__file__).parent / "chat_templates" / "llama3_2.jinja").read_text()
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    rows = Dataset.from_list([{"messages": turns}] * 3)
    set_day(2031, 1, 2)
    model = add_trained_adapter(AutoModelForCausalLM.from_pretrained(model_folder))
    with caplog.at_level(logging.WARNING, logger="hf_in2core"):
        trainer = make_trainer(tmp_path / "run", rows, rows, torch.float32, model=model, tokenizer=tokenizer)
    assert "prints the date, 2031-01-02 today" in caplog.text
    assert "02 Jan 2031" in tokenizer.decode(trainer.prepared_pool[0]["input_ids"])
    fitted = trainer.fit_influence().fingerprint
    save_and_load(trainer, tmp_path / "scorer", rows)
    before = rows.map(trainer.fit_influence(), batched=True)["influence"][:]
    set_day(2031, 11, 28)
    loaded = InfluenceScorer.from_pretrained(
        tmp_path / "scorer", model=AutoModelForCausalLM.from_pretrained(model_folder)
    )
    assert loaded.fingerprint == fitted
    assert rows.map(loaded, batched=True, batch_size=2)["influence"][:] == before
    assert tokenizer.chat_template == template  # the user's own tokenizer goes on printing the date


def test_a_date_that_cannot_be_pinned_is_told(tmp_path, pool, validation, caplog) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% set form = '%d' %}{{ strftime_now(form) }}" + CHAT_TEMPLATE
    make_trainer(tmp_path, pool, validation, tokenizer=tokenizer)
    assert "cannot be pinned: scores of conversations change" in caplog.text


def test_a_later_scoring_takes_the_columns_of_the_earlier_one_away(tmp_path, pool, validation) -> None:
    """Told by what that scoring recorded, which outlasts files: a column that is only called like one stays."""
    own = pool.add_column("influence_notes", ["x"] * len(pool)).add_column("influence_prior", [0.5] * len(pool))
    sets = {name: validation.select([number, number + 3]) for number, name in enumerate(("math", "code"))}
    old = make_trainer(tmp_path / "old", own, sets, torch.float32).score_influence()
    old.save_to_disk(tmp_path / "disk")
    old.to_parquet(tmp_path / "old.parquet")
    kept = load_dataset("parquet", data_files=str(tmp_path / "old.parquet"), split="train")
    # `map` leaves no record; there the mean tells.
    law = {"law": sets["math"], "med": sets["code"]}
    mapped = validation.map(make_trainer(tmp_path / "map", own, sets, torch.float32).fit_influence(), batched=True)
    again = make_trainer(tmp_path / "again", mapped, law, torch.float32).score_influence(overwrite=True)
    assert (
        find_set_columns(again.features) == ["influence_law", "influence_med"]
        and "influence_math" not in again.column_names
    )
    for number, earlier in enumerate(
        (old, load_from_disk(str(tmp_path / "disk")), kept, old.filter(lambda row: True))
    ):
        trainer = make_trainer(
            tmp_path / f"new-{number}", earlier, {"law": sets["math"], "med": sets["code"]}, torch.float32
        )
        with pytest.raises(ValueError, match="influence_math, influence_code.*overwrite=True"):
            trainer.score_influence()
        scored = trainer.score_influence(overwrite=True)
        added = ["influence", "influence_rank", "influence_law", "influence_med", "num_loss_tokens"]
        assert scored.column_names == [*own.column_names, *added]
        assert list_own_columns(scored) == own.column_names
        assert find_set_columns(scored.features) == ["influence_law", "influence_med"]


def test_named_sets_add_their_columns(tmp_path, pool, validation, model_folder) -> None:
    sets = {"second": validation, "first": make_prompt_completion(4, seed=5)}  # in no alphabetical order
    model = add_trained_adapter(AutoModelForCausalLM.from_pretrained(model_folder))
    trainer = make_trainer(tmp_path / "run", pool, sets, torch.float32, model=model)
    scored = trainer.score_influence()
    trainer.fit_influence().save_pretrained(tmp_path / "scorer")
    for scorer in (trainer.fit_influence(), InfluenceScorer.from_pretrained(tmp_path / "scorer")):
        mapped = pool.map(scorer, batched=True)
        for column in ("influence", "influence_first", "influence_second"):
            assert_same(mapped[column], scored[column], 1e-5)


def test_a_base_in_memory_is_saved_with_a_warning_and_needs_the_model_back(tmp_path, pool, validation, caplog) -> None:
    base = make_model()
    trainer = make_trainer(tmp_path / "run", pool, validation, torch.float32, model=add_trained_adapter(base))
    trainer.model.config._name_or_path = ""
    scorer = trainer.fit_influence()
    scorer.save_pretrained(tmp_path / "scorer")
    assert "model=" in caplog.text
    with pytest.raises(ValueError, match="base model in memory"):
        InfluenceScorer.from_pretrained(tmp_path / "scorer")
    loaded = InfluenceScorer.from_pretrained(tmp_path / "scorer", model=make_model())
    assert pool.map(loaded, batched=True)["influence"] == pool.map(scorer, batched=True)["influence"]


@pytest.mark.parametrize("part", ["base model", "adapter", "tokenizer", "chat template"])
def test_loading_names_what_differs(trainer, tmp_path, part) -> None:
    folder = tmp_path / "scorer"
    trainer.fit_influence().save_pretrained(folder)
    kwargs = {}
    if part == "base model":
        kwargs["model"] = make_model(seed=5)
    elif part == "adapter":
        weights = load_file(folder / "adapter" / "adapter_model.safetensors")
        weights = {name: tensor * 2 for name, tensor in weights.items()}
        save_file(weights, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    elif part == "tokenizer":
        kwargs["processing_class"] = make_tokenizer()
        kwargs["processing_class"].add_tokens(["new"])
    else:
        kwargs["processing_class"] = make_tokenizer()
        kwargs["processing_class"].chat_template = CHAT_TEMPLATE
    with pytest.raises(ValueError, match=f"another {part} than"):
        InfluenceScorer.from_pretrained(folder, **kwargs)


def test_damaged_or_foreign_folders_are_refused(trainer, tmp_path) -> None:
    folder = tmp_path / "scorer"
    trainer.fit_influence().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"format_version": 99}, "newer|Upgrade"),
        ({"surprise": 1}, "unknown keys"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            InfluenceScorer.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    directions = load_file(folder / "scorer.safetensors")
    name = next(iter(directions))
    for tensor, message in (
        (torch.zeros(1, 2, 2), "shape"),
        (directions[name] * float("nan"), "not a finite"),
        (directions[name].half(), "float32"),
    ):
        save_file({**directions, name: tensor.contiguous()}, folder / "scorer.safetensors")
        with pytest.raises(ValueError, match=message):
            InfluenceScorer.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="holds no scorer"):
        InfluenceScorer.from_pretrained(tmp_path)


def test_misuse_is_explained(trainer, pool) -> None:
    scorer = trainer.fit_influence()
    with pytest.raises(ValueError, match="batched=True"):
        pool.map(scorer)
    with pytest.raises(ValueError, match="already have"):
        pool.add_column("influence", [0.0] * len(pool)).map(scorer, batched=True)
    with pytest.raises(ValueError, match="none of TRL's formats"):
        Dataset.from_dict({"question": ["a"], "answer": ["b"]}).map(scorer, batched=True)


def test_a_reference_trained_further_is_refused(tmp_path, pool, validation) -> None:
    trainer = make_trainer(tmp_path, pool, validation, max_steps=1, learning_rate=1e-2)
    scorer = trainer.fit_influence()
    assert len(scorer(pool[:2])["influence"]) == 2
    trainer.train()
    with pytest.raises(ValueError, match="no longer the one that the scorer was fitted with"):
        scorer(pool[:2])
    assert len(trainer.fit_influence()(pool[:2])["influence"]) == 2
