"""`--dry_run`: what a run will take, timed on a few steps and batches of each of its parts; writes nothing."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback
from trl import ModelConfig

from hf_in2core import InfluenceConfig
from hf_in2core.analysis.calibration import NUM_ROWS
from hf_in2core.engine.batches import read_token_rows
from hf_in2core.evaluation.arms import describe_data
from hf_in2core.evaluation.tournament import plan_tournament
from hf_in2core.influence.plan import InfluencePlan, plan_influence, show_seconds
from hf_in2core.names import AUTO, CLUSTERS, COSINE_RANK, IFD, LOSS, RDS_RANK
from hf_in2core.rows.preparation import Preparation, prepare_rows

from .analyses import PILOT_ROWS, choose_test_rows
from .comparison import find_equal_run, plan_arms
from .job import Job, estimate_disk
from .methods import list_columns, needs_queries
from .run_folder import agree, quiet_loading, say
from .training import (
    count_steps,
    evaluate_model,
    make_influence_trainer,
    make_reference_trainer,
    make_trainer,
    release,
    train,
)


# Steps and rows that are timed; the first step, which is slower, counts as starting.
TIMED_STEPS, TIMED_ROWS = 6, 64
# Passes over the pool's tokens that a column takes, beside those of the influence, in forward passes.
FORWARDS = {LOSS: 1, IFD: 2, RDS_RANK: 1, **dict.fromkeys(CLUSTERS, 1)}


@dataclass
class Speed:
    """How fast a model is here: seconds to load and start, of a training step, and of a token that is evaluated."""

    start: float
    step: float
    token: float


class _StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def measure_speed(
    job: Job, model_args: ModelConfig, tokenizer: Any, judged: Dataset, reference: bool
) -> tuple[Speed, Callable[[int], int]]:
    """
    Time a few steps of a training on the whole pool, and the evaluation of a few rows.

    Args:
        job ([`Job`]): The run.
        model_args ([`~trl.ModelConfig`]), tokenizer: The model.
        judged ([`~datasets.Dataset`]): Prepared rows, of which some are evaluated.
        reference (`bool`): Whether the settings of the reference model hold.

    Returns:
        `tuple`: the speed, and how many steps a training on so many rows takes.
    """
    with TemporaryDirectory() as own:
        folder = agree(lambda: own)
        quiet: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        args = job.settings.make(InfluenceConfig, reference, output_dir=folder, **quiet)
        # Tokens are made once for all trainings: their seconds are not those of a start.
        with quiet_loading(repeated=True):
            tokens = job.tokenize_pool(args, tokenizer)
        begun = time.perf_counter()
        with quiet_loading(repeated=True):
            trainer = make_trainer(model_args, args, tokens, tokenizer)
        all_steps = args.max_steps if args.max_steps > 0 else count_steps(trainer)
        trainer.args.max_steps = min(TIMED_STEPS + 1, all_steps)
        clock = _StepTimes()
        trainer.add_callback(clock)
        train(trainer, "", model_args)
        first = clock.ends[0]
        step = (clock.ends[-1] - first) / max(len(clock.ends) - 1, 1) or first - begun
        chosen = np.unique(np.linspace(0, len(judged) - 1, TIMED_ROWS).astype(int))
        sample = judged.select(chosen)
        evaluate_model(trainer.model, sample.select(range(1)), args)
        start = time.perf_counter()
        evaluate_model(trainer.model, sample, args)
        token = (time.perf_counter() - start) / count_tokens(sample)
        release(trainer)

    def count(rows: int) -> int:
        return max(round(all_steps * rows / len(tokens)), 1)

    return Speed(first - begun, step, token), count


def count_tokens(prepared: Dataset) -> int:
    """Tokens of prepared rows."""
    return sum(
        int(read_token_rows(prepared, start, min(start + 10_000, len(prepared))).lengths.sum())
        for start in range(0, len(prepared), 10_000)
    )


def plan_run(job: Job, begun: float) -> None:
    """
    Say what a run will take: reference, influence, columns of methods, analyses, tournament, every arm, and disk.

    Args:
        job ([`Job`]): The run, checked.
        begun (`float`): When the command began, by `time.perf_counter`: a run checks and tokenises as this one has.
    """
    args = job.args
    influence_args = job.settings.make(InfluenceConfig, reference=True)
    validation = job.inputs.validation
    inputs = (job.inputs.pool, validation, job.reference_tokenizer)
    started = time.perf_counter()
    if args.reference_adapter is not None:
        trainer = make_influence_trainer(job.reference_model, influence_args, args.reference_adapter, *inputs)
    else:
        with quiet_loading():
            trainer = make_reference_trainer(job.reference_model, influence_args, *inputs)
    loading = time.perf_counter() - started
    plan = plan_influence(trainer, needs_queries(args.methods))
    pool_tokens = plan.tokens
    release(trainer)
    parts: dict[str, float] = {}
    preparation = Preparation.from_args(influence_args, job.reference_tokenizer, job.inputs.pool)
    selecting = prepare_rows(next(iter(validation.values())), preparation)
    speed, count = measure_speed(job, job.reference_model, job.reference_tokenizer, selecting, reference=True)
    if args.reference_adapter is None:
        rows = round(args.reference_fraction * len(job.inputs.pool))
        say(f"Reference: to be trained on {rows:,} rows. A rerun with --reference_adapter takes a trained one.")
        parts["reference"] = loading + speed.start + count(rows) * speed.step
    say(str(plan))
    parts["influence"] = loading + plan.seconds
    parts |= plan_columns(args.methods, plan, loading, pool_tokens * speed.token)
    if args.analyses:
        parts["analyses"] = plan_analyses(job, influence_args, plan, loading, speed)
    target, count_target = measure_speed(
        job, job.target_model, job.target_tokenizer, job.prepared_test, reference=False
    )
    max_steps = job.settings.values["max_steps"]
    largest = 1.0 if "full" in args.arms else max(args.fractions)

    def count_arm(fraction: float, budget: str) -> int:
        rows = round((largest if budget == "steps" else fraction) * len(job.inputs.pool))
        return max_steps if budget == "steps" and max_steps > 0 else count_target(rows)

    if args.strategy == AUTO:
        assert job.halves is not None
        target_steps = count_arm(largest, "steps")
        tournament = plan_tournament(args.candidates, int(args.auto_budget * target_steps), target_steps)
        held_back = sum(map(len, job.halves.held_back.values()))
        judging = speed.token * count_tokens(selecting) / len(selecting) * held_back
        parts["tournament"] = tournament.num_runs * (speed.start + tournament.steps * speed.step + judging)
        # Half of the validation rows scores for it; then all do, for what costs most where it wins.
        parts["tournament"] += parts["influence"] + parts.get("columns of methods", 0.0)
    say("".join(f"Test set: {text}." for name, text in describe_data(job.inputs.facts) if name == "test"))
    arms = plan_arms(args)
    say(f"Targets: {len(arms)} trainings and evaluations after that: {', '.join(arm.name for arm in arms)}.")
    judging = target.token * count_tokens(job.prepared_test)
    runs = {find_equal_run(arm, args, max_steps) for arm in arms}
    training = sum(target.start + count_arm(run.fraction, run.budget) * target.step + judging for run in runs)
    parts["targets"] = training + target.start + judging  # and the model before any training
    parts["start and checks"] = started - begun
    # At each checkpoint the gradients are others, and so is the index.
    indexes = (1 + (args.reference_checkpoints or 0)) * bool(plan.index)
    disk = estimate_disk(job.inputs.pool, job.target_parameters, len(runs), num_scored=1 + bool(job.halves))
    disk += (1 + bool(job.halves)) * plan.disk + indexes * plan.store
    told = ", ".join(f"{name} {show_seconds(seconds)}" for name, seconds in parts.items())
    say(f"Altogether: about {show_seconds(sum(parts.values()))} on this machine ({told}), and {disk / 1e9:.2f} GB.")


def plan_columns(methods: list[str], plan: InfluencePlan, loading: float, forward: float) -> dict[str, float]:
    """Seconds of the columns that methods rank by; nothing where they rank by influence alone."""
    seconds = 0.0
    for column in list_columns(methods):
        if column in FORWARDS:
            seconds += loading + FORWARDS[column] * forward
        elif column == COSINE_RANK:
            seconds += loading + sum(item.seconds for item in plan.passes if item.name == "score")
    return {"columns of methods": seconds} if seconds else {}


def plan_analyses(
    job: Job, influence_args: InfluenceConfig, plan: InfluencePlan, loading: float, speed: Speed
) -> float:
    """Seconds of the analyses: influence by layers on a pilot sample, that on test rows one by one, single steps."""
    scoring = sum(item.seconds for item in plan.passes if item.name == "score")
    took = 0.0
    for name in job.args.analyses:
        took += loading
        if name == "layers":
            took += plan.seconds - scoring * (1 - min(PILOT_ROWS / plan.rows, 1))
        elif name == "coverage":
            rows = job.inputs.test.select(choose_test_rows(job))
            with quiet_loading():
                trainer = make_reference_trainer(
                    job.reference_model, influence_args, job.inputs.pool, rows, job.reference_tokenizer
                )
            took += plan_influence(trainer, per_example=True).seconds
            release(trainer)
        else:
            tokens = plan.num_processes * sum(item.tokens for item in plan.passes if item.name == "validation")
            took += (NUM_ROWS + 1) * tokens * speed.token
    return took
