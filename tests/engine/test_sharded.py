"""Frozen base weights sharded over two real processes (`fully_shard`) give the scores of the whole model."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_same, launch_worker


WORKER = Path(__file__).parent / "workers" / "sharded_worker.py"
RUNS: dict[str, dict[str, Any]] = {
    # 9 and 10 rows in batches of another number on each process.
    "uneven": {"num_rows": 19, "chunk_size": 4, "tokens_per_batch": 60},
    "empty_shard": {"num_rows": 1},
    "queries_in_blocks_checkpointed": {
        "num_rows": 5,
        "per_example": True,
        "query_memory_gb": 1e-6,
        "influence_activation_checkpointing": True,
    },
    "last_layer_row_by_row": {"num_rows": 9, "influence_layers": ["last:1"], "tokens_per_batch": 1},
}


@pytest.mark.slow
def test_sharded_base_weights_change_no_score(tmp_path) -> None:
    two = launch_worker(WORKER.name, tmp_path, "two", 2, runs=list(RUNS.values()))
    spec = importlib.util.spec_from_file_location("sharded_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(worker)  # type: ignore[union-attr]
    for index, (name, options) in enumerate(RUNS.items()):
        _, expected = worker.run(str(tmp_path / name), options)
        for process in two:
            found = process["results"][index]
            assert_same(found["influence"], expected["influence"], 1e-9)
            # The same identity: a scorer fitted on shards loads with the whole model.
            assert found["base_hash"] == expected["base_hash"]
    for process in two:
        assert process["local_elements"] < 0.6 * process["elements"]  # the adapter is whole
        assert "Launch with --accelerate_config multi_gpu" in process["trained_head"]
        assert "trainer.score_influence()" in process["map"]
        assert "Lower `tokens_per_batch`" in process["out_of_memory"]
