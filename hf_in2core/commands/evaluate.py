"""Evaluate adapters beside the base model: loss per labelled token of a test set, tasks of lm-eval such as MMLU.

    in2core evaluate --model_name_or_path Qwen/Qwen3-4B --adapters runs/target --columns alpaca \\
        --test my_test.jsonl --tasks mmlu --num_fewshot 5 --limit 100 --per_device_eval_batch_size 16 \\
        --output_dir runs/evaluation
    in2core evaluate --run runs/mine --tasks mmlu --num_fewshot 5

Prints a table; with `--output_dir`, evaluation.json holds the figures. With `--run`, every arm of a run is
evaluated, and its results.json, report.html and the cards of its adapters show the figures; the same command
resumes. Tasks need `pip install 'hf-in2core[eval]'`; `--include_path` names a folder of task files, for machines
without the Hub.
"""

from pathlib import Path
from typing import Any

from hf_in2core.names import REPLAY
from hf_in2core.pipeline.parser import RecipeParser, Settings
from hf_in2core.pipeline.stage_arguments import EvaluateArguments


PARSER = RecipeParser("evaluate", EvaluateArguments, __doc__, shown={"targets": ("per_device_eval_batch_size",)})


def main(settings: Settings) -> None:
    """Check, evaluate and write."""
    from accelerate import PartialState
    from trl import ModelConfig

    from hf_in2core import InfluenceConfig
    from hf_in2core.evaluation.tasks import check_task_settings
    from hf_in2core.influence.launcher import check_launcher
    from hf_in2core.pipeline.arm_tasks import (
        describe_scores,
        evaluate_on_tasks,
        evaluate_run,
        load_given_tasks,
        update_card,
    )
    from hf_in2core.pipeline.inputs import check_trainable, load_good_rows
    from hf_in2core.pipeline.models import check_adapter, load_tokenizer
    from hf_in2core.pipeline.run_folder import join_processes, write_json
    from hf_in2core.pipeline.training import evaluate_model, load_model
    from hf_in2core.report.terminal import print_table

    args: EvaluateArguments = settings.arguments
    join_processes(settings)
    check_launcher("`--tasks`" if args.tasks else None)
    model_args, training_args = settings.make(ModelConfig), settings.make(InfluenceConfig)
    if args.tasks:
        check_task_settings(args.tasks, args.include_path, args.num_fewshot, args.limit)
    if args.run is not None:
        evaluate_run(args, training_args.per_device_eval_batch_size)
        return
    for given in args.adapters:
        check_adapter(given, model_args, training_args)
    tokenizer = load_tokenizer(model_args, training_args)
    prepared = None
    if args.test is not None:
        test = load_good_rows(args.test, "test set", args, training_args, tokenizer)
        prepared = check_trainable(test, "test set", training_args, tokenizer)
    tasks = load_given_tasks(args) if args.tasks else {}
    results: list[dict[str, Any]] = []
    adapter: str | None
    for adapter in [None, *args.adapters]:
        model = load_model(model_args, training_args, adapter)
        result: dict[str, Any] = {"adapter": adapter}
        if prepared is not None:
            result |= {"rows": len(prepared)}
            result |= evaluate_model(model, prepared, training_args)
        if tasks:
            result["tasks"] = evaluate_on_tasks(model, tokenizer, tasks, args.limit, training_args)
        results.append(result)
    if not PartialState().is_main_process:
        return
    lines = [
        {name: value for name, value in result.items() if name != "tasks"} | describe_scores(result.get("tasks", {}))
        for result in results
    ]
    print_table(list(lines[0]), [[show(value) for value in line.values()] for line in lines])
    if args.output_dir is not None:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        settings.save(folder / REPLAY)
        write_json(folder / "evaluation.json", results)
    for result in results:
        if result["adapter"] is not None and "tasks" in result:
            update_card(Path(result["adapter"]), result["tasks"])


def show(value: Any) -> str:
    """A figure as text; the base model has no adapter."""
    return (
        f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value or "–")
    )
