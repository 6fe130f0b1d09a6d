"""Train the reference adapter, through which influence is computed.

    in2core train-reference --model_name_or_path Qwen/Qwen3-0.6B --pool tatsu-lab/alpaca \\
        --columns alpaca --output_dir runs/reference

An ordinary TRL SFT with LoRA; `output_dir` then holds the adapter, config.yaml and training.json.
"""

from hf_in2core.names import POOL
from hf_in2core.pipeline.parser import TRAINING, RecipeParser, Settings
from hf_in2core.pipeline.stage_arguments import TrainReferenceArguments


PARSER = RecipeParser("train-reference", TrainReferenceArguments, __doc__, shown={"reference": TRAINING})


def main(settings: Settings) -> None:
    """Check, train and save."""
    from trl import ModelConfig

    from hf_in2core import InfluenceConfig
    from hf_in2core.pipeline.inputs import load_good_rows, take_fraction
    from hf_in2core.pipeline.models import check_model, load_tokenizer
    from hf_in2core.pipeline.run_folder import join_processes, say
    from hf_in2core.pipeline.training import make_trainer, tokenize, train_and_save

    args: TrainReferenceArguments = settings.arguments
    join_processes(settings)
    model_args = settings.make(ModelConfig)
    training_args = settings.make(InfluenceConfig)
    # Every trainable tensor must have per-example gradients, or the influence would leave it out.
    check_model(model_args, training_args, for_influence=True)
    tokenizer = load_tokenizer(model_args, training_args)
    assert args.pool is not None
    # Every row is looked at, those that the fraction leaves out among them.
    pool = load_good_rows(args.pool, POOL, args, training_args, tokenizer)
    rows = take_fraction(pool, args.reference_fraction, training_args.seed)
    trainer = make_trainer(model_args, training_args, tokenize(rows, training_args, tokenizer), tokenizer)
    trained = train_and_save(trainer, settings, "Reference")
    say(f"{trained['rows']:,} rows, {trained['steps']:,} steps, {trained['seconds']:.0f} s: {args.output_dir}")
