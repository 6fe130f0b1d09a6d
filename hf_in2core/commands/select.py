"""Select a coreset from a scored pool.

    in2core select --scored runs/influence/scored --fraction 0.25 --output runs/coreset

From the pool of a run (RUN/scored) it chooses as the run did, from any other the strongest proponents by default.
`--output` is a folder of `save_to_disk`, or a .jsonl or .parquet file.
"""

from pathlib import Path

from hf_in2core.pipeline.parser import RecipeParser, Settings
from hf_in2core.pipeline.stage_arguments import SelectCoresetArguments


PARSER = RecipeParser("select", SelectCoresetArguments, __doc__, model=False, training=False)


def main(settings: Settings) -> None:
    """Select and write."""
    from hf_in2core import select_coreset
    from hf_in2core.names import INFLUENCE
    from hf_in2core.progress import without_bars
    from hf_in2core.rows.sources import load_rows
    from hf_in2core.selection.coreset import find_column
    from hf_in2core.selection.record import read_choice

    # All others are arguments of `select_coreset` by its names; what is not given is as there, or as the run chose.
    options = {name: value for name, value in vars(settings.arguments).items() if value is not None}
    source, output = options.pop("scored"), Path(options.pop("output"))
    said = {"strategy", "column", "group_column", "group_quota", "seed"} & options.keys()
    chosen = {} if said or options["proponents_only"] else read_choice(source, options.get("fraction"))
    options |= chosen
    coreset = select_coreset(load_rows(source, "scored pool"), **options)
    output.parent.mkdir(parents=True, exist_ok=True)
    with without_bars():
        if output.suffix == ".jsonl":
            coreset.to_json(output)
        elif output.suffix == ".parquet":
            coreset.to_parquet(output)
        else:
            coreset.save_to_disk(str(output))
    strategy, column = find_column(options.get("strategy", "top"), options.get("column", INFLUENCE))
    as_run = ", as the run of this pool chose" if chosen else ""
    print(f"{len(coreset):,} rows by `{column}` (strategy `{strategy}`{as_run}): {output}")
