"""Evaluate adapters on a test set: loss, perplexity and accuracy per labelled token, beside the base model's.

    accelerate launch recipes/evaluate.py --model_name_or_path Qwen/Qwen3-4B --adapters runs/target --columns alpaca \\
        --test my_test.jsonl --output_dir runs/evaluation

Prints a table; with `--output_dir`, evaluation.json holds the figures.
"""

from pathlib import Path
from typing import Any

from arguments import EvaluateArguments
from recipe_parser import RecipeParser, Settings


def make_parser() -> RecipeParser:
    """Parser of this recipe."""
    return RecipeParser(EvaluateArguments, description=__doc__)


def main(settings: Settings) -> None:
    """Check, evaluate and write."""
    from accelerate import PartialState
    from inputs import check_adapter, check_trainable, check_whole_model, load_tokenizer
    from run_folder import join_processes, say, write_json
    from stages import evaluate_model, load_model
    from trl import ModelConfig

    from hf_in2core import InfluenceConfig
    from hf_in2core.data import load_rows

    args: EvaluateArguments = settings.arguments
    join_processes(settings)
    check_whole_model()
    model_args, training_args = settings.make(ModelConfig, use_peft=True), settings.make(InfluenceConfig)
    for adapter in args.adapters:
        check_adapter(adapter, model_args.model_name_or_path or "")
    tokenizer = load_tokenizer(model_args, training_args)
    assert args.test is not None
    prepared = check_trainable(load_rows(args.test, "test set"), "test set", training_args, tokenizer)
    results: list[dict[str, Any]] = []
    for adapter in [None, *args.adapters]:
        model = load_model(model_args, training_args, adapter)
        result = evaluate_model(model, prepared, training_args, training_args.tokens_per_batch)
        results.append({"adapter": adapter, "rows": len(prepared), **result})
        say("  ".join(f"{name} {show(value)}" for name, value in results[-1].items()))
    if args.output_dir is not None and PartialState().is_main_process:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        settings.save(folder / "config.yaml")
        write_json(folder / "evaluation.json", results)


def show(value: Any) -> str:
    """A figure as text."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    make_parser().run(main)
