"""Runs of the engine that are killed at any moment, in one process or two."""

import json
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from helpers import add_trained_adapter, make_model, make_tokens, make_trainer
from tqdm import tqdm

from hf_in2core.engine import fit, passes, scoring, validation


OPTIONS = {"chunk_size": 3, "tokens_per_batch": 40}


# tqdm's own lock is shared with forked processes, and one that is killed while it holds it would stop all later ones.
tqdm.set_lock(threading.RLock())


def build(folder: Path, pool: Dataset | None = None, **options):
    pool, validation = pool or make_tokens(40, seed=0), make_tokens(5, seed=1)
    model = add_trained_adapter(make_model(), target_modules=["q_proj", "down_proj"])
    return make_trainer(folder, pool, validation, torch.float32, model=model, **{**OPTIONS, **options})


def run(folder: str, options: dict) -> None:
    build(Path(folder), **options).score_influence()


def count_state_files(folder: Path) -> int:
    return sum(path.stat().st_mtime_ns for path in folder.rglob("*.safetensors"))


def wait_for_progress(folder: Path, before: int, processes: list) -> None:
    deadline = time.monotonic() + 60
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        try:
            if count_state_files(folder) != before:
                break
        except FileNotFoundError:
            continue  # renamed while being looked at
        time.sleep(0.002)


def kill_after_progress(folder: Path, generator: random.Random, **options) -> None:
    """Start a run and kill it a random moment after it has written its next state."""
    before = count_state_files(folder)
    process = multiprocessing.get_context("fork").Process(target=run, args=(str(folder), options))
    process.start()
    wait_for_progress(folder, before, [process])
    time.sleep(generator.uniform(0, 0.05))
    stop([process])


def run_rank(folder: str, rank: int, port: int, options: dict) -> None:
    """One of two processes, as a launcher starts them; the parent's state of a single process is left behind."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    trainer = build(Path(folder), **options)
    assert trainer.accelerator.num_processes == 2
    influence = trainer.score_influence()["influence"]
    (Path(folder) / f"{rank}.json").write_text(json.dumps([value.hex() for value in influence]))


def start_two_processes(folder: Path, **options) -> list:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        multiprocessing.get_context("fork").Process(target=run_rank, args=(str(folder), rank, port, options))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    return processes


def stop(processes: list) -> None:
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()


def count_batches(monkeypatch) -> list[int]:
    counted = []
    run_batches = passes.run_batches

    def counting(job, token_rows, step):
        counted.append(len(token_rows))
        return run_batches(job, token_rows, step)

    for module in (passes, fit, scoring, validation):
        monkeypatch.setattr(module, "run_batches", counting)
    return counted
