"""Score a pool: the influence of each row on a validation set. Negative = proponent.

    in2core score --model_name_or_path Qwen/Qwen3-0.6B \\
        --reference_adapter runs/reference --pool tatsu-lab/alpaca --columns alpaca \\
        --validation my_validation.jsonl --output_dir runs/influence

`output_dir` then holds scored/ (the pool with its influence), scorer/ and config.yaml; the same command resumes. With
`--scorer PATH|ID` in place of model and adapter, a scorer fitted before scores another pool.
"""

from pathlib import Path

from hf_in2core.names import PER_CHECKPOINT, POOL, REPLAY, describe_set, list_method_columns
from hf_in2core.pipeline.parser import RecipeParser, Settings
from hf_in2core.pipeline.stage_arguments import ScoreInfluenceArguments


PARSER = RecipeParser(
    "score",
    ScoreInfluenceArguments,
    __doc__,
    shown={"influence": ("estimator", "fit_examples", "tokens_per_batch", "max_length")},
)


def main(settings: Settings) -> None:
    """Check, score and save."""
    from accelerate import PartialState
    from trl import ModelConfig

    from hf_in2core import InfluenceConfig, InfluenceScorer
    from hf_in2core.influence.launcher import check_launcher
    from hf_in2core.influence.plan import plan_influence
    from hf_in2core.influence.pools import check_fitted_pool
    from hf_in2core.pipeline.inputs import check_pool_columns, keep_good_rows, load_validation
    from hf_in2core.pipeline.methods import Reference, add_columns, check_methods, list_columns, needs_queries
    from hf_in2core.pipeline.models import check_adapter, load_tokenizer
    from hf_in2core.pipeline.run_folder import (
        join_processes,
        leaving_nothing,
        lock_folder,
        save_rows,
        say,
        written_folder,
    )
    from hf_in2core.pipeline.training import compute_influence, make_influence_trainer, score_with
    from hf_in2core.rows.preparation import Preparation
    from hf_in2core.rows.sources import load_raw_rows, parse_named_sources

    args: ScoreInfluenceArguments = settings.arguments
    join_processes(settings)
    check_launcher("`--scorer`" if args.scorer is not None else None)
    assert args.pool is not None and args.output_dir is not None
    folder = Path(args.output_dir)
    scorer = None if args.scorer is None else InfluenceScorer.from_pretrained(args.scorer)
    columns = args.columns if scorer is None else scorer.preparation.columns
    pool = load_raw_rows(args.pool, POOL, columns)
    validation = load_validation(parse_named_sources(args.validation or []), columns)
    if scorer is not None:
        check_pool_columns(pool, scorer.config.validation_sets, per_query=scorer.config.per_example)
        pool = keep_good_rows(pool, POOL, scorer.preparation, args.bad_rows)
        check_fitted_pool(scorer, pool, validation)
        lock_folder(folder)
        scored = score_with(scorer, pool)
    else:
        columns, per_query = list_columns(args.methods), needs_queries(args.methods)
        check_methods(args.methods, args.encoder, args.checkpoints)
        also = [*list_method_columns(columns), *[PER_CHECKPOINT] * bool(args.checkpoints)]
        check_pool_columns(pool, validation, per_query=per_query, also=also)
        model_args, influence_args = settings.make(ModelConfig), settings.make(InfluenceConfig)
        assert args.reference_adapter is not None
        check_adapter(args.reference_adapter, model_args, influence_args)
        tokenizer = load_tokenizer(model_args, influence_args)
        preparation = Preparation.from_args(influence_args, tokenizer, pool)
        pool = keep_good_rows(pool, POOL, preparation, args.bad_rows)
        validation = {
            name: keep_good_rows(rows, f"{describe_set(name)} set", preparation, args.bad_rows)
            for name, rows in validation.items()
        }
        inputs = (model_args, influence_args, args.reference_adapter, pool, validation, tokenizer)
        if args.dry_run:
            with leaving_nothing(folder):
                say(str(plan_influence(make_influence_trainer(*inputs), per_query)))
            return
        lock_folder(folder)
        scorer, scored, seconds, _ = compute_influence(*inputs, per_query, args.checkpoints)
        scored, _ = add_columns(scored, columns, Reference(*inputs, args.encoder, args.checkpoints))
        say(f"Influence: {len(scored):,} rows, {seconds:.0f} s.")
    with written_folder(folder / "scored") as temporary:
        if PartialState().is_main_process:
            save_rows(scored, temporary)
    with written_folder(folder / "scorer") as temporary:
        if PartialState().is_main_process:
            scorer.save_pretrained(temporary)
            settings.save(folder / REPLAY)
    say(f"{folder / 'scored'} has the pool with its influence, {folder / 'scorer'} what scores other rows alike.")
