"""Select a coreset from a scored pool, the strongest proponents by default.

    in2core select --scored runs/influence/scored --fraction 0.25 --output runs/coreset

`--output` is a folder of `save_to_disk`, or a .jsonl or .parquet file.
"""

from pathlib import Path

from hf_in2core.pipeline.parser import RecipeParser, Settings
from hf_in2core.pipeline.stage_arguments import SelectCoresetArguments


def make_parser() -> RecipeParser:
    """Parser of this command."""
    return RecipeParser("select", SelectCoresetArguments, __doc__, model=False, training=False)


def main(settings: Settings) -> None:
    """Select and write."""
    from hf_in2core import select_coreset
    from hf_in2core.rows.sources import load_rows

    args: SelectCoresetArguments = settings.arguments
    assert args.scored is not None and args.output is not None
    coreset = select_coreset(
        load_rows(args.scored, "scored pool"),
        fraction=args.fraction,
        size=args.size,
        strategy=args.strategy,
        column=args.column,
        proponents_only=args.proponents_only,
        group_column=args.group_column,
        group_quota=args.group_quota,
        order=args.order,
        seed=args.seed,
    )
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".jsonl":
        coreset.to_json(output)
    elif output.suffix == ".parquet":
        coreset.to_parquet(output)
    else:
        coreset.save_to_disk(str(output))
    print(f"{len(coreset):,} rows: {output}")
