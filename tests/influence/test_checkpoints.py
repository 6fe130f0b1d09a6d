"""Influence at checkpoints of a real run against separate trainers on each, weighted by hand; and its refusals."""

import copy
import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, make_model, make_prompt_completion, make_trainer, train_reference
from peft import LoraConfig, PeftModel, get_peft_model

from hf_in2core import InfluenceTrainer
from hf_in2core.engine.state import hash_adapter
from hf_in2core.influence.checkpoints import compute_checkpoint_weights, read_checkpoints
from hf_in2core.influence.pools import merge_scored


ADAPTER: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A reference trained for six steps, with a checkpoint after each second one."""
    folder = tmp_path_factory.mktemp("run")
    train_reference(folder, save_steps=2)
    return folder, [folder / f"checkpoint-{step}" for step in (2, 4, 6)]


def load(folder, checkpoint, pool, validation, **options):
    model = PeftModel.from_pretrained(make_model(), checkpoint, is_trainable=True)
    return make_trainer(folder, pool, validation, model=model, **options)


def weigh_by_hand(run) -> np.ndarray:
    history = json.loads((run[1][-1] / "trainer_state.json").read_text())["log_history"]
    rates = {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}
    weights = np.array([(rates[step - 1] + rates[step]) / 2 for step in (2, 4, 6)])
    assert len(set(weights.round(6))) == 3  # else a mix-up would not show
    return weights / weights.sum()


def test_the_average_is_that_of_separate_readings(tmp_path, run, pool, validation) -> None:
    sets = {"a": validation, "b": make_prompt_completion(3, seed=9)}
    trainer = load(tmp_path / "all", run[1][1], pool, sets)
    before = copy.deepcopy(trainer.model.state_dict())
    scored = trainer.score_influence(checkpoints=run[1][::-1])  # in any order
    alone = [
        load(tmp_path / str(index), checkpoint, pool, sets).score_influence()
        for index, checkpoint in enumerate(run[1])
    ]
    weights = weigh_by_hand(run)
    for column in ("influence", "influence_a", "influence_b"):
        expected = sum(w * np.array(one[column]) for w, one in zip(weights, alone, strict=True))
        assert_same(scored[column], expected, 1e-9)
    assert_same(scored["influence_per_checkpoint"], np.array([one["influence"] for one in alone]).T, 1e-9)
    assert scored["influence_rank"] == np.argsort(np.argsort(scored["influence"])).tolist()
    assert scored["num_loss_tokens"] == alone[0]["num_loss_tokens"]
    assert scored.select_columns(pool.column_names)[:] == pool[:]
    # The trainer is as it was.
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert_same(trainer.score_influence()["influence"], alone[1]["influence"], 1e-9)


def test_validation_rows_as_queries_are_averaged_too(tmp_path, run, pool, validation) -> None:
    trainer = load(tmp_path / "all", run[1][2], pool, validation)
    trainer.fit_influence(per_example=True)
    scored = trainer.score_influence(checkpoints=run[1][:2])
    matrices = []
    for index in (0, 1):
        alone = load(tmp_path / str(index), run[1][index], pool, validation)
        alone.fit_influence(per_example=True)
        matrices.append(np.array(alone.score_influence()["influence_per_query"]))
    weights = weigh_by_hand(run)[:2] / weigh_by_hand(run)[:2].sum()
    assert_same(scored["influence_per_query"], weights[0] * matrices[0] + weights[1] * matrices[1], 1e-6)
    assert_same(scored["influence"], np.mean(scored["influence_per_query"], axis=1), 1e-6)


def test_a_call_resumes_and_repeats_to_the_bit(tmp_path, run, pool, validation, monkeypatch) -> None:
    def start(folder):
        return load(folder, run[1][2], pool, validation, chunk_size=6)

    expected = start(tmp_path / "whole").score_influence(checkpoints=run[1])
    interrupted = start(tmp_path / "parts")
    fit, calls = InfluenceTrainer.fit_influence, []

    def stop_at_the_third(self, per_example=False):
        calls.append(hash_adapter(self.model))
        if len(set(calls)) == 3:
            raise KeyboardInterrupt
        return fit(self, per_example)

    monkeypatch.setattr(InfluenceTrainer, "fit_influence", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        interrupted.score_influence(checkpoints=run[1])
    monkeypatch.undo()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("parts/influence/*/scores-*.safetensors")}
    assert len({path.parent for path in kept}) == 2
    resumed = start(tmp_path / "parts").score_influence(checkpoints=run[1])
    assert resumed["influence"] == expected["influence"]
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())


def test_rows_without_loss_stay_null(tmp_path, run, validation) -> None:
    rows = make_prompt_completion(18, seed=3)
    rows = rows.map(lambda row, i: {"prompt": "the cat " * 90 if i == 2 else row["prompt"]}, with_indices=True)
    scored = load(tmp_path, run[1][0], rows, validation, max_length=60).score_influence(checkpoints=run[1][:2])
    for column in ("influence", "influence_rank", "influence_per_checkpoint"):
        assert [row for row, value in enumerate(scored[column]) if value is None] == [2]
    # Readings at single checkpoints belong to one pool and are left out of a merged one.
    merged = merge_scored([scored, scored])
    assert merged["influence"] == scored["influence"]
    assert "influence_per_checkpoint" not in merged.column_names


def test_adapters_without_a_run_weigh_the_same(tmp_path, run, pool, validation, caplog) -> None:
    folders = []
    for index in (0, 1):
        folders.append(shutil.copytree(run[1][index], tmp_path / f"adapter{index}"))
        (folders[-1] / "trainer_state.json").unlink()
    trainer = load(tmp_path / "out", run[1][0], pool, validation)
    assert compute_checkpoint_weights(read_checkpoints(folders, trainer.model)).tolist() == [0.5, 0.5]
    assert "weighted equally" in caplog.text
    with pytest.raises(ValueError, match="has no trainer_state.json"):
        trainer.score_influence(checkpoints=[folders[0], run[1][2]])


def test_what_is_no_checkpoint_of_the_run_is_refused_before_work(tmp_path, run, pool, validation) -> None:
    trainer = load(tmp_path / "out", run[1][0], pool, validation)
    other = copy.deepcopy(trainer.model)
    other.peft_config["default"].lora_alpha = 99
    other.save_pretrained(tmp_path / "alpha")
    get_peft_model(make_model(), LoraConfig(**ADAPTER | {"r": 2})).save_pretrained(tmp_path / "rank")
    unlogged = shutil.copytree(run[1][0], tmp_path / "unlogged")
    state = json.loads((unlogged / "trainer_state.json").read_text())
    (unlogged / "trainer_state.json").write_text(json.dumps(state | {"log_history": []}))
    for checkpoints, message in (
        ([], "is no list of folders"),
        (str(run[1][0]), "is no list of folders"),
        ([tmp_path / "nothing"], "holds no adapter"),
        ([run[1][0], run[1][0]], "names a step twice"),
        ([tmp_path / "alpha"], "other lora_alpha"),
        ([tmp_path / "rank"], "other tensors"),
        ([unlogged], "No learning rate was logged between steps 0 and 2"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.score_influence(checkpoints=checkpoints)
    trainer.fit_influence(per_example=True)
    with pytest.raises(ValueError, match="keeps other rows at every checkpoint"):
        trainer.score_influence(checkpoints=run[1], top_k=3)
    named = make_trainer(tmp_path / "named", pool.add_column("influence_per_checkpoint", [0.0] * 23), validation)
    with pytest.raises(ValueError, match=r"already has the column\(s\) influence_per_checkpoint"):
        named.score_influence(checkpoints=run[1])
    scored = make_trainer(tmp_path / "scored", pool.add_column("influence", [0.0] * 23), validation)
    with pytest.raises(ValueError, match=r"already has the column\(s\) influence\."):
        scored.score_influence(checkpoints=run[1])
    assert not (tmp_path / "scored" / "influence").exists()


def test_an_adapter_of_another_name_is_read_where_peft_saves_it(tmp_path, run, pool, validation) -> None:
    model = PeftModel.from_pretrained(make_model(), run[1][0], adapter_name="ref", is_trainable=True)
    trainer = make_trainer(tmp_path / "out", pool, validation, model=model)
    before = hash_adapter(trainer.model)
    trainer.model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "ref").is_dir()
    expected = load(tmp_path / "alone", run[1][1], pool, validation).score_influence()["influence"]
    assert_same(trainer.score_influence(checkpoints=[run[1][1]])["influence"], expected, 1e-9)
    assert hash_adapter(trainer.model) == before
    here = trainer.score_influence(checkpoints=[tmp_path / "saved"])["influence"]
    assert_same(here, trainer.score_influence()["influence"], 1e-12)


def test_the_average_is_what_the_history_ends_with(tmp_path, run, pool, validation) -> None:
    trainer = load(tmp_path / "out", run[1][2], pool, validation)
    scored = trainer.score_influence(checkpoints=run[1][:2])
    told = [entry["influence/median"] for entry in trainer.state.log_history if "influence/median" in entry]
    assert told[-1] == pytest.approx(np.median(scored["influence"]), rel=1e-12)
