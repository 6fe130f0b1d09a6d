"""How the cost of fit and score scales with processes, rows and layers: CPU seconds on one thread.

python benchmarks/scaling.py [--quick] [--output_dir benchmarks/results]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from common import make_parser, report, set_up
from datasets import Dataset
from workload import compute_mean_gradients, make_model, make_passes, make_rows, run_fit_and_score, time_interleaved

from hf_in2core.engine.blocks import find_blocks, select_blocks
from hf_in2core.engine.passes import Passes


VOCAB_SIZE = 4096


def run_all(passes: Passes, rows: Dataset, held_out: Dataset) -> None:
    """The validation, fit and score passes."""
    run_fit_and_score(passes, rows, compute_mean_gradients(passes, held_out))


def make_data(num_rows: int) -> tuple[Dataset, Dataset]:
    """Pool and validation rows."""
    return make_rows(num_rows, VOCAB_SIZE, 32, 128), make_rows(16, VOCAB_SIZE, 32, 128, seed=1)


def work_as_one_process(world_size: int, num_rows: int, width: int, folder: str) -> None:
    """One process of a launch: writes the CPU seconds of its passes, without imports and set-up."""
    accelerator = Accelerator(cpu=True)
    if accelerator.num_processes != world_size:
        raise SystemExit(f"{accelerator.num_processes} processes where {world_size} were launched")
    passes = make_passes(make_model(width, 8, VOCAB_SIZE), tokens_per_batch=1024, accelerator=accelerator)
    rows, held_out = make_data(num_rows)
    run_all(passes, rows.select(range(world_size * 8)), held_out)  # warm
    accelerator.wait_for_everyone()
    cpu, wall = time.process_time(), time.perf_counter()
    run_all(passes, rows, held_out)
    result = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    Path(folder, f"{world_size}-{accelerator.process_index}.json").write_text(json.dumps(result))
    accelerator.end_training()


def launch(world_size: int, num_rows: int, width: int, folder: str) -> list[dict[str, float]]:
    """CPU seconds of every process of an `accelerate launch`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines=1", "--mixed_precision=no"]
    command += ["--dynamo_backend=no", f"--num_processes={world_size}", "--main_process_port=0"]
    command += ["--multi_gpu"] if world_size > 1 else ["--cpu"]
    command += [__file__, "--worker", json.dumps([world_size, num_rows, width, folder])]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment)
    return [json.loads(Path(folder, f"{world_size}-{rank}.json").read_text()) for rank in range(world_size)]


def main() -> None:
    parser = make_parser(__doc__, "Small sizes: shows that it runs, not how fast.")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = set_up(parser)
    if args.worker is not None:
        work_as_one_process(*args.worker)
        return
    width, num_rows, repetitions = (64, 48, 1) if args.quick else (256, 192, 3)
    table: list[dict[str, object]] = []

    # Processes: launches take turns, one and two.
    cpu: dict[int, list[float]] = {1: [], 2: []}
    wall: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repetitions):
            for world_size in cpu:
                results = launch(world_size, num_rows, width, folder)
                cpu[world_size].append(max(result["cpu"] for result in results))
                wall[world_size].append(max(result["wall"] for result in results))
    for world_size in cpu:
        seconds, elapsed = sorted(cpu[world_size])[repetitions // 2], sorted(wall[world_size])[repetitions // 2]
        if world_size == 1:
            one = seconds
        line = {"what": f"{world_size} process(es), {num_rows} rows", "CPU s": seconds, "ratio": seconds / one}
        table.append(line | {"target": "<= 0.60" if world_size == 2 else "", "wall s": elapsed})

    # Rows.
    model = make_model(width, 8, VOCAB_SIZE)
    works: dict[str, Callable[[], object]] = {}
    counts = [num_rows // 4, num_rows // 2, num_rows]
    rows, held_out = make_data(num_rows)
    for count in counts:
        works[f"{count} rows"] = partial(run_all, make_passes(model, 1024), rows.select(range(count)), held_out)
    seconds_of = time_interleaved(works, repetitions)
    per_row = seconds_of[f"{counts[0]} rows"] / counts[0]
    for count in counts:
        seconds = seconds_of[f"{count} rows"]
        table.append({"what": f"{count} rows, CPU s per row / that of {counts[0]} rows", "CPU s": seconds})
        table[-1]["ratio"] = seconds / count / per_row

    # Layers.
    works = {}
    rows = rows.select(range(num_rows // 4))
    for layers in (8, 4, 2, 1):
        passes = make_passes(model, 1024, blocks=select_blocks(find_blocks(model, "default"), f"last:{layers}", 8))
        works[f"last {layers} of 8 layers"] = partial(run_all, passes, rows, held_out)
    seconds_of = time_interleaved(works, repetitions)
    for name, seconds in seconds_of.items():
        table.append({"what": name, "CPU s": seconds, "ratio": seconds / seconds_of["last 8 of 8 layers"]})
    report("scaling", table, args.output_dir)


if __name__ == "__main__":
    main()
