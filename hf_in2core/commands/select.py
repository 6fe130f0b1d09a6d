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

    # All others are arguments of `select_coreset` by its names.
    options = dict(vars(settings.arguments))
    scored, output = load_rows(options.pop("scored"), "scored pool"), Path(options.pop("output"))
    coreset = select_coreset(scored, **options)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".jsonl":
        coreset.to_json(output)
    elif output.suffix == ".parquet":
        coreset.to_parquet(output)
    else:
        coreset.save_to_disk(str(output))
    print(f"{len(coreset):,} rows: {output}")
