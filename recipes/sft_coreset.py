"""Fine-tune a target model on a coreset, from the Hub or from disk.

    accelerate launch recipes/sft_coreset.py --model_name_or_path Qwen/Qwen3-4B --dataset_name user/alpaca-in2core \\
        --split coreset_25 --columns alpaca --output_dir runs/target

An ordinary TRL SFT with LoRA; `output_dir` then holds the adapter, config.yaml and training.json. With a scored pool
(`--dataset_name RUN/scored`), `--fraction` selects the strongest proponents.
"""

from arguments import SftCoresetArguments
from recipe_parser import RecipeParser, Settings


def make_parser() -> RecipeParser:
    """Parser of this recipe."""
    return RecipeParser(SftCoresetArguments, description=__doc__)


def main(settings: Settings) -> None:
    """Check, train and save."""
    from inputs import check_model, load_tokenizer
    from run_folder import join_processes, say
    from stages import make_trainer, train_and_save
    from trl import ModelConfig

    from hf_in2core import InfluenceConfig, select_coreset
    from hf_in2core.data import load_rows

    args: SftCoresetArguments = settings.arguments
    join_processes(settings)
    model_args = settings.make(ModelConfig, use_peft=True)
    training_args = settings.make(InfluenceConfig)
    check_model(model_args, training_args, for_influence=False)
    tokenizer = load_tokenizer(model_args, training_args)
    source = f"{args.dataset_name}:{args.split}" if args.split else args.dataset_name
    assert source is not None
    rows = load_rows(source, "coreset")
    if args.fraction is not None:
        rows = select_coreset(rows, fraction=args.fraction)
    trainer = make_trainer(model_args, training_args, rows, tokenizer)
    trained = train_and_save(trainer, settings, "Target")
    say(f"{trained['rows']:,} rows, {trained['steps']:,} steps, {trained['seconds']:.0f} s: {args.output_dir}")


if __name__ == "__main__":
    make_parser().run(main)
