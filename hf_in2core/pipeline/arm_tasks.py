"""Tasks of lm-eval on the models of a run: evaluated once, kept beside each adapter, merged into `results.json`."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from hf_in2core import InfluenceConfig
from hf_in2core.cards.model import add_task_results
from hf_in2core.evaluation.formats import read_object
from hf_in2core.evaluation.tasks import evaluate_tasks, load_tasks
from hf_in2core.influence.config import AUTOCAST_DTYPES, choose_autocast
from hf_in2core.names import REPLAY, RESULTS
from hf_in2core.report.page import write_report
from hf_in2core.report.run import read_results
from hf_in2core.report.terminal import print_tasks
from hf_in2core.rows.hashes import hash_value

from .arguments import In2CoreArguments
from .comparison import Arm, find_equal_run
from .models import hash_folder, load_tokenizer
from .parser import make_run_parser
from .run_folder import agree, lock_folder, quiet_loading, read_tasks, say, warn, write_json
from .stage_arguments import EvaluateArguments, TaskArguments
from .training import load_model


def evaluate_on_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: dict[str, dict[str, Any]],
    limit: float | None,
    training_args: InfluenceConfig,
) -> dict[str, dict[str, Any]]:
    """Evaluate a model on loaded tasks, in the precision that its losses are computed in; on all processes."""
    return evaluate_tasks(
        model,
        tokenizer,
        tasks,
        limit=limit,
        batch_size=training_args.per_device_eval_batch_size,
        autocast=AUTOCAST_DTYPES[choose_autocast(training_args, model.dtype)],
        show_progress=not training_args.disable_tqdm,
    )


def load_given_tasks(args: TaskArguments) -> dict[str, dict[str, Any]]:
    """The tasks that the flags name; the main process fetches their data first."""
    with PartialState().main_process_first(), quiet_loading():
        return load_tasks(args.tasks, args.include_path, args.num_fewshot)


def describe_scores(tasks: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The figures of tasks by name, for a line of text."""
    return {f"{task} {metric}": value for task, found in tasks.items() for metric, value in found["metrics"].items()}


def update_card(folder: Path, tasks: dict[str, dict[str, Any]]) -> None:
    """Write the scores into the model card in an adapter's folder, where it has one that can be read."""
    card = folder / "README.md"
    if not tasks or not card.is_file():
        return
    try:
        text = add_task_results(card.read_text(encoding="utf-8"), tasks, folder.resolve().name)
    except ValueError as error:
        warn(f"{card} stays as it is: {error}")
    else:
        card.write_text(text, encoding="utf-8")


def evaluate_run(args: EvaluateArguments, batch_size: int) -> None:
    """
    Evaluate the target model and the arms of a run on tasks; what is evaluated is not evaluated again.

    Args:
        args ([`EvaluateArguments`]): With `run` and `tasks`.
        batch_size (`int`): Questions in a batch of a process.

    Raises:
        ValueError: the folder is no finished run, an adapter of it is missing, or a task cannot be evaluated.
    """
    run = Path(args.run or "")
    read_results(run)  # what is no run is told before long work
    settings = make_run_parser().parse(["--config", str(run / REPLAY)])
    run_args: In2CoreArguments = settings.arguments
    target = run_args.target_model_name_or_path or run_args.model_name_or_path
    model_args = settings.make(ModelConfig, model_name_or_path=target)
    training_args = settings.make(InfluenceConfig, per_device_eval_batch_size=batch_size)
    folders = find_folders(run, args, run_args, settings.values["max_steps"], model_args.use_peft)
    tokenizer = load_tokenizer(model_args, training_args)
    loaded = load_given_tasks(args)
    lock_folder(run)
    files = hash_folder(args.include_path, (".yaml", ".py", ".json", ".jsonl", ".csv")) if args.include_path else ""
    for number, (name, folder) in enumerate({"base": run / "arms" / "base", **folders}.items(), 1):
        model_identity = read_object(folder / "result.json").get("identity")
        identity = hash_value([model_identity, files, args.num_fewshot, args.limit, version("lm_eval")])
        before = agree(lambda folder=folder: read_object(folder / "tasks.json"))  # type: ignore[misc]
        missing = {task: found for task, found in loaded.items() if before.get(task, {}).get("identity") != identity}
        if missing:
            with quiet_loading(repeated=True):
                model = load_model(model_args, training_args, None if name == "base" else str(folder))
            scores = evaluate_on_tasks(model, tokenizer, missing, args.limit, training_args)
            del model
            if PartialState().is_main_process:
                found = before | {task: score | {"identity": identity} for task, score in scores.items()}
                write_json(folder / "tasks.json", found)
                update_card(folder, read_tasks(folder))
                merge_tasks(run, run_args, settings.values["max_steps"])
            PartialState().wait_for_everyone()
        known = agree(lambda folder=folder: read_tasks(folder))  # type: ignore[misc]
        figures = describe_scores({task: known[task] for task in loaded})
        shown = ", ".join(f"{score} {value:.4f}" for score, value in figures.items())
        say(f"[{number}/{len(folders) + 1}] {name}: {shown}{'' if missing else ' (evaluated before)'}")
    if PartialState().is_main_process:
        merge_tasks(run, run_args, settings.values["max_steps"])
        print_tasks(read_results(run))
        print(f"Report: {write_report(run)}")


def find_folders(
    run: Path, args: EvaluateArguments, run_args: In2CoreArguments, max_steps: int, use_peft: bool
) -> dict[str, Path]:
    """
    The adapters (or models) of the arms that are to be evaluated, by name.

    Raises:
        ValueError: there is none of that kind, or one is missing.
    """
    entries = [
        entry
        for entry in read_results(run)["arms"]
        if entry["arm"] in args.arms and (not args.seeds or entry["seed"] in args.seeds)
    ]
    if not entries:
        raise ValueError(
            f"{run} has no result of the arms {', '.join(args.arms)}"
            + (f" with the seeds {', '.join(map(str, args.seeds))}" if args.seeds else "")
            + ". Give others with --arms or --seeds."
        )
    arms = [find_arm(entry, run_args, max_steps) for entry in entries]
    folders = {arm.name: arm.find_folder(run) for arm in arms}
    for folder in [run / "arms" / "base", *folders.values()]:
        trained = "adapter_config.json" if use_peft else "config.json"
        needed = "result.json" if folder.name == "base" else trained
        if not (folder / needed).is_file():
            raise ValueError(
                f"{folder} holds no {needed}, so this arm cannot be evaluated. Start `in2core run` again into {run}: "
                "it makes what is missing."
            )
    return folders


def find_arm(entry: dict[str, Any], run_args: In2CoreArguments, max_steps: int) -> Arm:
    """The training run behind an entry of `arms`."""
    arm = Arm(entry["arm"], float(entry["fraction"] or 1), entry["seed"], entry["budget"])
    return find_equal_run(arm, run_args, max_steps)


def merge_tasks(run: Path, run_args: In2CoreArguments, max_steps: int) -> None:
    """Write what is kept beside the adapters into the run's `results.json`."""
    results = read_results(run)
    if tasks := read_tasks(run / "arms" / "base"):
        results["base"] = (results.get("base") or {}) | {"tasks": tasks}
    for entry in results["arms"]:
        if tasks := read_tasks(find_arm(entry, run_args, max_steps).find_folder(run)):
            entry["tasks"] = tasks
    write_json(run / RESULTS, results)
