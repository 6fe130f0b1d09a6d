"""What `--analyses` adds to a run: how few layers rank the pool alike, how well it covers the test rows, and nats."""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, load_from_disk

from hf_in2core import InfluenceConfig, InfluenceTrainer
from hf_in2core.analysis.calibration import NUM_ROWS, calibrate_influence
from hf_in2core.analysis.coverage import compute_coverage, correlate_coverage
from hf_in2core.analysis.layers import choose_layers, compute_layer_scores
from hf_in2core.evaluation.formats import describe_calibration
from hf_in2core.evaluation.intervals import MIN_PAIRS
from hf_in2core.names import POOL, describe_set
from hf_in2core.rows.columns import apply_columns
from hf_in2core.rows.text import render_row

from .arguments import ANALYSES
from .comparison import LONGEST_TEXT
from .job import Job
from .run_folder import say, warn, write_json
from .steps import find_influence
from .training import make_influence_trainer, release


PILOT_ROWS = 512
LAYER_BUDGET = 0.5
# Coverage holds a number for every row of the pool and every test row.
MAX_TEST_ROWS = 500
TOP_K = 10
NUM_LEAST_COVERED, NUM_PROPONENTS = 10, 3


def analyse_run(job: Job, adapter: str, reference: dict[str, Any]) -> dict[str, Any]:
    """
    Compute the analyses that `--analyses` names; one that an earlier run has finished is taken as it is.

    What cannot be analysed ends in a warning and in the reason, so that the run goes on.

    Args:
        job ([`Job`]): The run, whose pool is scored.
        adapter (`str`): Adapter of the reference.
        reference (`dict[str, Any]`): How it was trained, with its `identity`.

    Returns:
        `dict`: `layers`, `coverage` and `calibration` of `results.json`, where they were computed: the figures and
        `seconds`, or `refused`.
    """
    computed: dict[str, Callable[[Job, InfluenceTrainer], dict[str, Any]]] = {
        "layers": analyse_layers,
        "coverage": analyse_coverage,
        "calibration": analyse_calibration,
    }
    sizes = {"layers": (PILOT_ROWS, LAYER_BUDGET), "coverage": (MAX_TEST_ROWS, TOP_K), "calibration": NUM_ROWS}
    findings: dict[str, Any] = {}
    for name in ANALYSES:
        judges = ["test"] if name == "coverage" else map(describe_set, job.inputs.validation)
        inputs = {key: job.identities[key] for key in [POOL, *judges]}
        path = job.folder / "analyses" / f"{name}.json"
        result, identity = find_influence(job, path, reference["identity"], inputs, name, sizes[name])
        if result is None and name in job.args.analyses:
            started = time.perf_counter()
            try:
                result = computed[name](job, make_trainer(job, adapter, name))
            except ValueError as error:
                # Every process has the same data and refuses alike. What is refused is tried again by the next run.
                warn(f"No {name} in the results: {error}")
                findings[name] = {"refused": str(error)}
                continue
            result |= {"seconds": time.perf_counter() - started, "identity": identity}
            if PartialState().is_main_process:
                path.parent.mkdir(exist_ok=True)
                write_json(path, result)
                # The state of the passes, which is of no use once they are finished.
                shutil.rmtree(path.parent / "influence", ignore_errors=True)
            PartialState().wait_for_everyone()
        if result is not None:
            findings[name] = {key: value for key, value in result.items() if key != "identity"}
    return findings


def make_trainer(job: Job, adapter: str, name: str) -> InfluenceTrainer:
    """The reference with the validation sets, or for coverage with (a seeded sample of) the test rows as queries."""
    influence_args = job.settings.make(InfluenceConfig, reference=True, output_dir=str(job.folder / "analyses"))
    if name == "coverage":
        if len(job.inputs.test) < MIN_PAIRS:
            raise ValueError(
                f"the test set has {len(job.inputs.test)} rows, but whether coverage goes with the loss can be seen "
                f"from {MIN_PAIRS} on, and some hundred are wanted. Give a larger --test."
            )
        queries: Any = job.inputs.test.select(choose_test_rows(job))
    else:
        queries = job.inputs.validation
    inputs = (job.inputs.pool, queries, job.reference_tokenizer)
    return make_influence_trainer(job.reference_model, influence_args, adapter, *inputs)


def choose_test_rows(job: Job) -> np.ndarray:
    """Positions of the test rows that are analysed, ascending, int64: all, or a seeded sample of many."""
    order = np.random.default_rng(0).permutation(len(job.inputs.test))
    return np.sort(order[:MAX_TEST_ROWS])


def analyse_layers(job: Job, trainer: InfluenceTrainer) -> dict[str, Any]:
    """How sets of layers rank a pilot sample of the pool, and the choice under half of the gradient memory."""
    scores = compute_layer_scores(trainer, PILOT_ROWS)
    choice = choose_layers(scores, budget=LAYER_BUDGET)
    release(trainer)
    say(str(choice))
    return asdict(choice) | {
        "budget": LAYER_BUDGET,
        "rows": len(scores.rows),
        "all_layers": scores.layers,
        # Those beyond the budget belong into the picture too.
        "candidates": choose_layers(scores, budget=1.0).candidates,
    }


def analyse_coverage(job: Job, trainer: InfluenceTrainer) -> dict[str, Any]:
    """Coverage of the test rows by the pool against their loss, and the least covered rows with their proponents."""
    coverage = compute_coverage(trainer, top_k=TOP_K)
    release(trainer)
    correlations = correlate_coverage(coverage)
    found = correlations["coverage_top_k"]
    if found.estimate is not None:
        say(
            f"Coverage: {found.n:,} test rows, Spearman with their loss {found.estimate:+.3f} "
            f"[{found.low:+.3f}, {found.high:+.3f}]."
        )
    rows = choose_test_rows(job)[coverage["test_row"][:]]
    values, losses = (np.array(coverage[name][:]) for name in ("coverage_top_k", "loss"))
    return {
        "top_k": TOP_K,
        "estimator": trainer.args.estimator,
        "test_rows": len(job.inputs.test),
        "correlations": {name: asdict(correlation) for name, correlation in correlations.items()},
        "points": {"row": rows.tolist(), "coverage": values.tolist(), "loss": losses.tolist()},
        "least_covered": list_least_covered(job, coverage, rows),
    }


def analyse_calibration(job: Job, trainer: InfluenceTrainer) -> dict[str, Any]:
    """What one more step on a row changes the validation loss by, for an influence of 1."""
    calibration = asdict(calibrate_influence(trainer, load_from_disk(str(job.folder / "scored"))))
    release(trainer)
    say(f"One more step on a row: {describe_calibration(calibration)}.")
    return calibration


def list_least_covered(job: Job, coverage: Dataset, rows: np.ndarray) -> list[dict[str, Any]]:
    """
    The test rows of the smallest `coverage_top_k`, smallest first, with their text and strongest proponents.

    Args:
        job ([`Job`]): The run.
        coverage ([`~datasets.Dataset`]): From `compute_coverage`.
        rows (`np.ndarray` of int64): Position in the test set of every row of it.
    """
    order = np.argsort(coverage["coverage_top_k"][:], kind="stable")[:NUM_LEAST_COVERED]
    texts = apply_columns(job.inputs.test.select(rows[order]), job.args.columns, job.reference_tokenizer)
    return [
        {
            "row": int(rows[position]),
            "coverage": entry["coverage_top_k"],
            "loss": entry["loss"],
            "num_loss_tokens": entry["num_loss_tokens"],
            "text": render_row(text, LONGEST_TEXT, job.reference_tokenizer),
            "proponents": [
                {"row": row, "influence": influence}
                for row, influence in zip(entry["proponents"], entry["proponent_influence"], strict=True)
                if influence < 0
            ][:NUM_PROPONENTS],
        }
        for position, entry, text in zip(order, coverage.select(order), texts, strict=True)
    ]
