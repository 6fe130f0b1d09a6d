"""What to do after a run: the rows that its verdict speaks for, and the commands that train on them and publish it."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from trl import SFTConfig

from hf_in2core import InfluenceConfig
from hf_in2core.evaluation.verdict import FractionVerdict, Verdict
from hf_in2core.names import BUDGETS, REPLAY
from hf_in2core.report.terminal import print_verdict
from hf_in2core.selection.record import Coreset, describe_choice

from .comparison import judge_run
from .coreset_folders import write_coresets
from .defaults import LEARNING_RATES
from .job import Job
from .parser import RecipeParser, Settings
from .run_folder import find_command, say
from .stage_arguments import SftCoresetArguments


# What of a run is no setting of a single training: its places, and all of influence but how rows are read and batched.
NOT_OF_SFT = {"output_dir", "hub_id", "run_name", "overwrite_output_dir"} | (
    {entry.name for entry in fields(InfluenceConfig)}
    - {entry.name for entry in fields(SFTConfig)}
    - {"columns", "tokens_per_batch"}
)
SHOWN_AS_GOOD = ("better", "no worse")
LONGER = 3


@dataclass(frozen=True)
class Recommendation:
    """
    Rows to train on.

    Attributes:
        rows (`str`): `"coreset"`, `"random"` or `"full"`.
        budget (`str`): That at which they were found good; `""` for the full pool, which needs none.
        reason (`str`): Why, as the end of a sentence.
        undecided (`FractionVerdict`, *optional*): What concluded nothing, so that another run should come first.
    """

    rows: str
    budget: str
    reason: str
    undecided: FractionVerdict | None = None


def recommend(verdict: Verdict) -> Recommendation:
    """
    The rows that a verdict speaks for: the coreset only where it is shown to be worth it.

    Its headline alone decides, which no outcome has chosen.

    Returns:
        [`Recommendation`]: at equal epochs where the coreset is worth it there, since that training is shorter.
    """
    entries = {
        entry.budget: entry
        for entry in verdict.by_fraction
        if entry.fraction == verdict.fraction and "coreset" in entry.losses
    }
    if not entries or verdict.fraction == 1:
        return Recommendation("full", "", "since the run has no coreset that leaves rows out")
    for budget in reversed(BUDGETS):
        if budget in entries and _is_worth(entries[budget]):
            others = [BUDGETS[name] for name, entry in entries.items() if not _is_worth(entry)]
            provisos = [f"not at {name}" for name in others]
            provisos += [f"not compared with {name}" for name in _list_outcomes(entries[budget], "not run")]
            reason = ", ".join([f"which is worth it at {BUDGETS[budget]}", *provisos])
            return Recommendation("coreset", budget, reason)
    concluded = [entry for entry in entries.values() if entry.taught]
    head = (concluded or list(entries.values()))[0]
    if not concluded or len(_list_outcomes(head, "no interval", "not run")) == 2:
        return Recommendation("full", "", "for now: this run concludes nothing, so run it again first", head)
    if head.opponents_won:
        return Recommendation("full", "", "since the ranking does not point the right way")
    random, full = head.get_outcome("coreset", "random"), head.get_outcome("coreset", "full")
    if random == "worse" and full in (*SHOWN_AS_GOOD, "not run"):
        return Recommendation("random", head.budget, "random rows that beat the coreset and need no selecting")
    if random == "inconclusive" and full in SHOWN_AS_GOOD:
        reason = "random rows that need no selecting, and that the coreset was not shown to beat"
        return Recommendation("random", head.budget, reason)
    lost = "the coreset was worse than it" if full == "worse" else "leaving rows out was not shown to be worth it"
    return Recommendation("full", "", f"since {lost}")


def _is_worth(entry: FractionVerdict) -> bool:
    """Whether nothing that was compared speaks against the coreset, and something for it."""
    random, full = entry.get_outcome("coreset", "random"), entry.get_outcome("coreset", "full")
    good = random in ("better", "not run") and full in (*SHOWN_AS_GOOD, "not run")
    return good and (random, full) != ("not run", "not run") and not entry.opponents_won


def _list_outcomes(entry: FractionVerdict, *outcomes: str) -> list[str]:
    """Of random rows and the full pool those against which the coreset came out so."""
    names = {"random": "random rows", "full": "the full pool"}
    return [name for arm, name in names.items() if entry.get_outcome("coreset", arm) in outcomes]


def change_run(undecided: FractionVerdict, settings: Settings) -> list[str]:
    """The flags by which a run that concluded nothing may conclude something; it goes to a new folder if it must."""
    args, values, gain = settings.arguments, settings.values, undecided.gain
    other_folder = ["--output_dir", f"{Path(args.output_dir or '')}-again"]
    if undecided.diverged or (gain is not None and gain.share <= 0):
        return ["--learning_rate", f"{values['learning_rate'] / 10:g}", *other_folder]
    if gain is not None and gain.share < gain.min_share:
        advised = LEARNING_RATES[values["use_peft"]]
        if values["learning_rate"] < advised:
            return ["--learning_rate", f"{advised:g}", *other_folder]
        length = "max_steps" if values["max_steps"] > 0 else "num_train_epochs"
        return [f"--{length}", f"{LONGER * values[length]:g}", *other_folder]
    # What follows changes no result that is there, so the run goes on where it is.
    if len(_list_outcomes(undecided, "not run")) == 2:
        return ["--arms", *dict.fromkeys(["full", "coreset", "random", *args.arms])]
    seeds = dict.fromkeys([*args.seeds, *range(max(args.seeds) + 1, max(args.seeds) + 3)])
    return ["--seeds", *map(str, seeds)]


def say_next(job: Job, results: Mapping[str, Any], scored: Dataset, coresets: Mapping[str, Coreset]) -> None:
    """
    Say which rows to train on, where they lie, and the commands that train on them and publish; the verdict last.

    Random rows are written where they are recommended, and `sft.yaml` gets the settings by which the arms were
    trained. For all processes of a launch.

    Args:
        job ([`Job`]): The run.
        results (`Mapping[str, Any]`): `results.json` of the complete comparison.
        scored ([`~datasets.Dataset`]): The scored pool.
        coresets (`Mapping[str, Coreset]`): Those of the record.
    """
    args, run, several, command = job.args, job.folder, PartialState().num_processes, find_command()
    processes = ["--num_processes", str(several)] if several > 1 else []
    verdict = judge_run(results["arms"], results["selection"], results["base"], args.fractions)
    chosen, lines, folder = recommend_rows(verdict, run, scored, coresets, args.seeds[0])
    budget = {}
    if chosen.rows != "full":
        budget = {"max_steps": results["base"]["steps"] if chosen.budget == "steps" else -1}
    settings = run / "sft.yaml"
    if PartialState().is_main_process:
        write_sft_settings(job.settings, settings, seed=args.seeds[0], **budget)
    train = ["--config", str(settings), "--dataset_name", str(folder), "--output_dir", str(run / "target")]
    if chosen.undecided is not None:
        again = ["--config", str(run / REPLAY), *change_run(chosen.undecided, job.settings)]
        lines.append(f"Run again: {shlex.join([command, 'run', *processes, *again])}")
    lines.append(f"Train on it: {shlex.join([command, 'sft', *processes, *train])}")
    if args.hub_id is None:
        lines.append(describe_publication(run))
    for line in lines:
        say(line)
    if PartialState().is_main_process:
        print_verdict(results)


def recommend_rows(
    verdict: Verdict, run: Path, scored: Dataset, coresets: Mapping[str, Coreset], seed: int
) -> tuple[Recommendation, list[str], Path]:
    """
    The rows that a verdict speaks for, in a run's folder; random rows are written there where they are recommended.

    Args:
        verdict ([`Verdict`]): Of a complete comparison.
        run (`Path`), scored ([`~datasets.Dataset`]), coresets (`Mapping[str, Coreset]`): As of [`say_next`].
        seed (`int`): Of the random rows.

    Returns:
        `tuple`: the recommendation, the same in lines, and the folder of the rows.
    """
    chosen = recommend(verdict)
    name, folder = "the whole pool", run / "scored"
    if chosen.rows != "full":
        assert verdict.fraction is not None
        name, _ = describe_choice(chosen.rows, verdict.fraction, seed)
        folder = write_coresets(run, scored, {name: coresets[name]})[name]
        if chosen.rows == "coreset" and coresets[name].arguments.get("strategy") == "random":
            name += " (random rows: no method was shown to beat them)"
    return chosen, [f"Recommended: {name}, {chosen.reason}.", f"It lies in {folder}."], folder


def describe_publication(run: Path) -> str:
    """The command that publishes a run."""
    publish = [find_command(), "publish", "--run", str(run), "--hub_id", f"USER/{run.resolve().name}"]
    return f"Publish the run (USER is your name on the Hub): {shlex.join(publish)}"


def write_sft_settings(settings: Settings, path: Path, **changes: Any) -> None:
    """
    Write what `in2core sft` has to be told to train as the arms did.

    Args:
        settings ([`Settings`]):
            Those of the run.
        path (`Path`):
            YAML file to write.
        **changes (`Any`):
            Settings that are those of an arm.
    """
    target = settings.values["target_model_name_or_path"] or settings.values["model_name_or_path"]
    needed = ["--model_name_or_path", target, "--dataset_name", "rows", "--output_dir", "target"]
    defaults = RecipeParser("sft", SftCoresetArguments).parse(needed).values
    values = {name: value for name, value in settings.values.items() if name in defaults and name not in NOT_OF_SFT}
    values |= changes
    kept = {name: value for name, value in values.items() if value != defaults[name]}
    Settings(None, {"model_name_or_path": target} | kept).save(path)
