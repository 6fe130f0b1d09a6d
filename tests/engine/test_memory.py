"""A real shortage of memory: the passes go on with smaller batches, and a row that cannot fit is named."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import assert_same, make_trainer

from hf_in2core.engine import budget
from hf_in2core.engine.losses import MAX_LOGITS_PER_CHUNK


WORKER = Path(__file__).parent / "workers" / "memory_worker.py"


def score(folder: Path, free_mib: int, **options) -> subprocess.CompletedProcess:
    arguments = {"output_dir": str(folder), "free_mib": free_mib, "tokens_per_batch": 20_000, **options}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), json.dumps(arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def read_scores(done: subprocess.CompletedProcess) -> list[float]:
    """The worker prints them last, after what the trainer logs."""
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_out_of_memory_halves_the_budget_and_changes_nothing(tmp_path) -> None:
    plenty, short = score(tmp_path / "plenty", 0), score(tmp_path / "short", 60)
    assert plenty.returncode == 0 and "Out of memory" not in plenty.stderr
    assert short.returncode == 0, short.stderr[-2000:]
    budgets = [int(found) for found in re.findall(r"going on with `tokens_per_batch=(\d+)`", short.stderr)]
    assert len(budgets) >= 2 and max(budgets) < 20_000
    # Each is smaller than the one before: the score pass begins where the fit pass has got to.
    assert budgets == sorted(set(budgets), reverse=True)
    assert_same(read_scores(short), read_scores(plenty), 1e-5)


@pytest.mark.slow
def test_a_row_that_does_not_fit_alone_is_named_with_its_length(tmp_path) -> None:
    done = score(tmp_path, 60, max_length=8000, long_row=7000)
    assert done.returncode != 0
    found = re.search(r"Row 7 alone, with (\d+) tokens, does not fit in memory, even with activation", done.stderr)
    assert found is not None, done.stderr[-2000:]
    assert int(found.group(1)) > 7000


@pytest.mark.slow
def test_a_row_that_fits_with_activation_checkpointing_only_is_scored_so(tmp_path) -> None:
    options: dict[str, Any] = {
        "long_index": 3,
        "max_length": 8000,
        "long_row": 1500,
        "num_layers": 24,
        "num_rows": 4,
        "tokens_per_batch": 1000,
    }
    plenty, short = score(tmp_path / "plenty", 0, **options), score(tmp_path / "short", 290, **options)
    assert plenty.returncode == 0 and "Out of memory" not in plenty.stderr
    assert short.returncode == 0, short.stderr[-2000:]
    # Once: what the fit pass has learnt, the score pass knows.
    assert len(re.findall(r"row 3 alone, with 1506 tokens: going on with activation checkpointing", short.stderr)) == 1
    assert_same(read_scores(short), read_scores(plenty), 1e-5)


def test_the_budgets_of_a_gpu_fit_into_its_memory_together() -> None:
    """Batches get what single queries leave."""
    for free, per_token in ((80e9, 8e6), (24e9, 2e6)):
        queries = budget.QUERY_SHARE * free
        tokens = budget.divide_memory(free, queries, per_token)
        assert 256 < tokens < budget.MAX_GPU_TOKENS
        logits = MAX_LOGITS_PER_CHUNK * budget.BYTES_PER_LOGIT
        assert 0.8 * free < tokens * per_token + queries + logits < 0.95 * free


def test_single_queries_take_a_share_of_what_a_cpu_has_free(tmp_path, pool, validation, monkeypatch) -> None:
    trainer = make_trainer(tmp_path, pool, validation)
    job = trainer.make_passes(trainer.blocks, "")
    for available, expected in ((2e9, 0.5e9), (64e9, budget.CPU_QUERY_BYTES)):
        told = psutil.virtual_memory()._replace(available=available)
        monkeypatch.setattr(psutil, "virtual_memory", lambda told=told: told)
        assert budget.choose_query_memory(job) == expected
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert 0 < budget.choose_query_memory(job) <= budget.CPU_QUERY_BYTES
