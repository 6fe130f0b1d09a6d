"""The tournament of `in2core run --strategy auto`: its runs, from the trained reference on, and what they cost."""

import math
from dataclasses import asdict, replace
from typing import Any

from accelerate import PartialState
from datasets import concatenate_datasets
from trl import SFTConfig

from hf_in2core import InfluenceConfig
from hf_in2core.evaluation.tournament import run_tournament
from hf_in2core.names import COSTS, POOL
from hf_in2core.rows.hashes import hash_rows
from hf_in2core.rows.preparation import Preparation, prepare_rows
from hf_in2core.selection.coreset import select_positions
from hf_in2core.selection.record import describe_choice

from .columns import add_method_columns
from .job import Job
from .run_folder import say
from .steps import evaluate_base, score_pool, show, take_or_train
from .training import make_trainer


CHOSEN_BY_ALL = "It then chose the coreset by all validation rows."


def hold_tournament(job: Job, adapter: str, reference: dict[str, Any]) -> dict[str, Any]:
    """
    Let the methods compete on the reference model: half of the validation rows chooses, and the other half judges.

    What is finished is kept. The runs go on from the trained reference: from its untrained base, a few steps say
    little of tasks that take long to learn, and the seed of a fresh adapter says more than the rows.

    Args:
        job ([`Job`]): The run.
        adapter (`str`), reference (`dict[str, Any]`): Of [`~.steps.train_reference`].

    Returns:
        `dict`: [`~hf_in2core.evaluation.tournament.Tournament`], and of it the `fraction`, the `seconds` of its runs,
        and the `scoring_seconds` of what they were chosen by.
    """
    args, halves, folder = job.args, job.halves, job.folder / "tournament"
    assert halves is not None
    half = replace(job, inputs=halves, identities=job.identities | halves.hashes)
    methods = [*args.candidates, *args.clusters]
    selection = score_pool(half, adapter, reference, methods, folder)
    scored, columns = add_method_columns(half, adapter, methods, folder)
    fraction = next((fraction for fraction in args.fractions if fraction < 1), 1.0)
    largest = 1.0 if "full" in args.arms else max(args.fractions)
    draw = select_positions(scored, fraction=largest, strategy="random", order="original").tolist()
    # The rows of the whole pool are those of the arm; those of a coreset are not known yet, and are as many.
    target_steps = evaluate_base(job, draw, None if "full" in args.arms else folder / "base")["steps"]
    reference_args = job.settings.make(InfluenceConfig, reference=True)
    preparation = Preparation.from_args(reference_args, job.reference_tokenizer, job.inputs.pool)
    held_back = concatenate_datasets([prepare_rows(rows, preparation) for rows in halves.held_back.values()])
    seconds: list[float] = []

    def run(name: str, seed: int, steps: int) -> float:
        _, arguments = describe_choice(name, 1.0 if name == "full" else fraction, seed, groups=args.groups)
        positions = select_positions(scored, **arguments, order="original").tolist()
        kept = folder / f"{name}-seed{seed}"
        # A warm-up is for fresh adapters, and would take most of a short run.
        budget: dict[str, Any] = {"max_steps": steps, "seed": seed, "warmup_steps": 0}
        inputs = [reference["identity"], job.identities[POOL]]
        identity = job.identify(
            True, SFTConfig, inputs, hash_rows(held_back), PartialState().num_processes, positions, budget
        )

        def make() -> Any:
            checkpoints = job.folder / "checkpoints" / kept.name
            training_args = job.settings.make(InfluenceConfig, reference=True, output_dir=str(checkpoints), **budget)
            tokens = job.tokenize_pool(training_args, job.reference_tokenizer).select(positions)
            return make_trainer(job.reference_model, training_args, tokens, job.reference_tokenizer, adapter)

        label = f"Tournament: {name}, seed {seed}"
        result = take_or_train(kept, identity, label, make, held_back, job.reference_model)
        seconds.append(result["seconds"])
        say(f"Tournament: {name}, seed {seed}, {steps} steps: held-back loss {show(result['test_loss'])}.")
        return math.nan if result["test_loss"] is None else result["test_loss"]

    costs = {name: COSTS.index(name) for name in args.candidates}
    found = run_tournament(run, args.candidates, int(args.auto_budget * target_steps), target_steps, costs)
    text = f"{found.text} {CHOSEN_BY_ALL}" if found.outcome == "won" else found.text
    say(text)
    scoring = selection["seconds"] + sum(columns.values())
    return asdict(found) | {"text": text, "seconds": sum(seconds), "scoring_seconds": scoring, "fraction": fraction}
