"""FSDP2 as `accelerate launch` sets it up, base and adapter sharded over two processes (see sharded_on_cpu.py)."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_same, launch_worker, make_prompt_completion
from safetensors.torch import load_file

from hf_in2core import InfluenceScorer, select_coreset


WORKER = Path(__file__).parent / "workers" / "fsdp_worker.py"
# Two orders of summing in float32.
ROUNDING = 1e-4


def load_worker() -> Any:
    spec = importlib.util.spec_from_file_location("fsdp_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(worker)  # type: ignore[union-attr]
    return worker


@pytest.mark.slow
def test_from_training_to_the_coreset(tmp_path: Path, model_folder: str) -> None:
    first, second = launch_worker(WORKER.name, tmp_path, "two", 2, model=model_folder)
    assert first["influence"] == second["influence"] and first["coreset"] == second["coreset"]
    assert first["losses"][-1] < first["losses"][0] - 0.5  # the adapter has learnt
    worker = load_worker()
    for name, columns in first["variants"].items():
        alone = worker.score_trained(model_folder, first["adapter"], str(tmp_path / name), name).pool
        for column, values in columns.items():
            assert_same(values, alone[column][:], ROUNDING)
    # The same pool and adapter, scored by the process that trained it.
    alone = worker.score_trained(model_folder, first["adapter"], str(tmp_path / "whole"), "uneven").pool
    assert_same(first["influence"], alone["influence"][:], ROUNDING)
    assert first["coreset"] == select_coreset(alone, fraction=0.5)["id"][:]
    # Checkpoints: the last one is the trained adapter.
    per_checkpoint = np.array(first["checkpoints"])
    assert_same(per_checkpoint[:, 1], first["influence"], ROUNDING)
    assert np.abs(per_checkpoint[:, 0] - per_checkpoint[:, 1]).max() > 0.01 * np.abs(per_checkpoint).max()
    # Training goes on from a checkpoint.
    assert_same(first["resumed"], first["influence"], 1e-3)
    # What it saved is whole, and scores elsewhere.
    folder = tmp_path / "two-run"
    saved = load_file(folder / "scorer" / "adapter" / "adapter_model.safetensors")
    trained = load_file(Path(first["adapter"]) / "adapter_model.safetensors")
    assert saved.keys() == trained.keys() and all(np.array_equal(saved[key], trained[key]) for key in saved)
    scorer = InfluenceScorer.from_pretrained(folder / "scorer")
    rows = make_prompt_completion(19, 0)
    assert_same(rows.map(scorer, batched=True)["influence"][:], first["influence"], ROUNDING)


@pytest.mark.slow
def test_a_process_that_ends_stops_the_other_and_the_run_goes_on(tmp_path: Path, model_folder: str) -> None:
    options = {"model": model_folder, "variants": ["uneven"]}
    stopped = launch_worker(WORKER.name, tmp_path, "two", 2, check=False, stop_in="uneven", **options)
    assert stopped.returncode != 0 and "exitcode  : 9" in stopped.stderr
    assert not list(tmp_path.glob("two.*.json"))
    states = list((tmp_path / "two-run-uneven").rglob("*.safetensors"))
    assert states  # what was done is kept
    before = {path: path.stat().st_mtime_ns for path in states}
    again = launch_worker(WORKER.name, tmp_path, "two", 2, **options)
    assert any(path.exists() and path.stat().st_mtime_ns == before[path] for path in states)
    alone = load_worker().score_trained(model_folder, again[0]["adapter"], str(tmp_path / "alone"), "uneven").pool
    assert_same(again[0]["variants"]["uneven"]["influence"], alone["influence"][:], ROUNDING)


@pytest.mark.slow
def test_processes_with_unequal_memory_make_the_same_batches(tmp_path: Path, model_folder: str) -> None:
    """Else each would gather another layer in passes of the same rows, and both wait for ever."""
    first, second = launch_worker(WORKER.name, tmp_path, "two", 2, model=model_folder, budgets=[60, 300])
    assert first == second and first["agreement"].keys() == {"validation"}
    assert "`fsdp_transformer_layer_cls_to_wrap: NopeLayer` cannot work here" in first["refused"]["layers"]
    assert "`torch_compile` cannot work where the launcher shards" in first["refused"]["compiled"]
    worker = load_worker()
    alone = worker.score_same_rows(
        worker.make_trainer(model_folder, str(tmp_path / "alone"), num_rows=40, num_validation=12)
    )
    for name in ("influence", "layers", "coverage"):
        assert_same(first[name], alone[name], ROUNDING)
