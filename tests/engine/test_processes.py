"""Two real processes give one process's result; a failing one takes the others down with its error."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import assert_same, launch_worker

from hf_in2core.engine.passes import Passes


WORKER = Path(__file__).parent / "workers" / "influence_worker.py"


def to_floats(values: list[str]) -> list[float]:
    return [float.fromhex(value) for value in values]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path) -> None:
    # 19 rows over two processes and chunks of 4: uneven shards, uneven chunks.
    one = launch_worker(WORKER.name, tmp_path, "one", 1, num_rows=19, chunk_size=4)[0]
    two = launch_worker(WORKER.name, tmp_path, "two", 2, num_rows=19, chunk_size=4)
    assert two[0]["pid"] != two[1]["pid"]
    assert two[0]["influence"] == two[1]["influence"]
    assert two[0]["id"] == one["id"]
    assert_same(to_floats(two[0]["influence"]), to_floats(one["influence"]), 1e-5)


@pytest.mark.slow
def test_layers_checkpoints_and_coverage_are_the_same_on_two_processes(tmp_path) -> None:
    """With the check of the curvature (from 32 rows on) and a gradient store."""
    options: dict[str, Any] = {
        "num_rows": 35,
        "chunk_size": 4,
        "gradient_store_gb": 1,
        "analyse": True,
        "dtype": "float64",
    }
    one = launch_worker(WORKER.name, tmp_path, "one", 1, **options)[0]
    two = launch_worker(WORKER.name, tmp_path, "two", 2, **options)
    for name in ("layers", "averaged", "coverage", "loss"):
        assert two[0][name] == two[1][name]
        assert_same(two[0][name], one[name], 1e-9)
    assert_same(two[0]["averaged"], to_floats(one["influence"]), 1e-9)
    assert not list(tmp_path.glob("*-run/influence/*/gradients-*"))


@pytest.mark.slow
def test_a_sampled_fit_is_the_same_on_two_processes(tmp_path) -> None:
    options: dict[str, Any] = {"num_rows": 2000, "chunk_size": 4096, "tokens_per_batch": 4096, "dtype": "float64"}
    options |= {"fit_examples": "auto", "damping_scale": 10.0, "adapter_seed": 3}  # of which halves agree
    one = launch_worker(WORKER.name, tmp_path, "one", 1, **options)[0]
    two = launch_worker(WORKER.name, tmp_path, "two", 2, **options)
    assert two[0]["fit"] == two[1]["fit"] and two[0]["influence"] == two[1]["influence"]
    assert two[0]["fit"]["num_fit_examples"] == one["fit"]["num_fit_examples"] < 2000
    assert two[0]["fit"]["fit_agreement"] == pytest.approx(one["fit"]["fit_agreement"], abs=1e-9)
    # Of the same rows: each process has kept those of its shard, and none is passed for it.
    assert two[0]["fit"]["exact_agreement"] == pytest.approx(one["fit"]["exact_agreement"], abs=1e-9)
    assert_same(to_floats(two[0]["influence"]), to_floats(one["influence"]), 1e-9)


@pytest.mark.slow
def test_more_processes_than_rows(tmp_path) -> None:
    one = launch_worker(WORKER.name, tmp_path, "one", 1, num_rows=2)[0]
    three = launch_worker(WORKER.name, tmp_path, "three", 3, num_rows=2)
    assert_same(to_floats(three[2]["influence"]), to_floats(one["influence"]), 1e-5)


@pytest.mark.slow
def test_a_failing_rank_stops_the_others_with_its_error(tmp_path) -> None:
    start = time.monotonic()
    done = launch_worker(WORKER.name, tmp_path, "fails", 2, num_rows=19, check=False, fail_rank=1)
    assert done.returncode != 0
    assert "this rank fails on purpose" in done.stderr
    assert time.monotonic() - start < 120  # imports take most of it; the survivors must not wait for a time-out


@pytest.mark.slow
def test_a_rank_failing_in_a_pass_stops_those_that_wait_for_it(tmp_path) -> None:
    start = time.monotonic()
    done = launch_worker(WORKER.name, tmp_path, "fails", 2, num_rows=19, check=False, fail_rank=1, fail_in_pass=True)
    assert done.returncode != 0
    assert "merged or disabled" in done.stderr
    assert not list(tmp_path.glob("fails.*.json"))
    assert time.monotonic() - start < 120


@pytest.mark.slow
def test_two_machines_equal_one_process(tmp_path) -> None:
    """Two `accelerate launch` commands that meet on the loopback address, as on two nodes."""
    one = launch_worker(WORKER.name, tmp_path, "one", 1, num_rows=19)[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = {
        "out": str(tmp_path / "two"),
        "output_dir": str(tmp_path / "two-run"),
        "world_size": 2,
        "num_rows": 19,
    }
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    machines = []
    for rank in (0, 1):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=2"]
        command += ["--num_processes=2", f"--machine_rank={rank}", "--main_process_ip=127.0.0.1"]
        command += [f"--main_process_port={port}", "--mixed_precision=no", "--dynamo_backend=no"]
        machines.append(subprocess.Popen([*command, str(WORKER), json.dumps(arguments)], env=environment))
    assert [machine.wait(timeout=240) for machine in machines] == [0, 0]
    found = [json.loads((tmp_path / f"two.{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0]["influence"] == found[1]["influence"]
    assert_same(to_floats(found[0]["influence"]), to_floats(one["influence"]), 1e-5)


@pytest.mark.parametrize("order", ["short first", "long first", "mixed"])
def test_shards_have_equal_tokens_whatever_the_order(order: str) -> None:
    generator = np.random.default_rng(0)
    mixed = generator.permutation(np.concatenate([generator.integers(5, 20, 900), generator.integers(100, 400, 900)]))
    lengths = {"short first": np.sort(mixed), "long first": -np.sort(-mixed), "mixed": mixed}[order]
    made = [{"row": row, "input_ids": [1] * int(n), "labels": [1] * int(n)} for row, n in enumerate(lengths)]
    rows = Dataset.from_list(made)
    for positions in (None, np.sort(generator.choice(len(rows), 1200, replace=False))):
        found = lengths if positions is None else lengths[positions]
        shards = []
        for rank in range(8):
            accelerator: Any = SimpleNamespace(process_index=rank, num_processes=8)
            passes = Passes(torch.nn.Linear(1, 1), {}, "mean", 1, accelerator=accelerator)
            shards.append(passes.shard(rows, positions))
        assert [start for start, _ in shards[1:]] == [end for _, end in shards[:-1]]
        assert (shards[0][0], shards[-1][1]) == (0, len(found))
        tokens = np.array([found[start:end].sum() for start, end in shards])
        assert np.abs(tokens / tokens.mean() - 1).max() < 0.02
