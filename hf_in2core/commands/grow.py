"""Add rows to a published pool: score them with the scorer published beside it, merge, rank anew, publish the update.

    in2core grow --hub_id user/alpaca-in2core --rows more.jsonl
    in2core grow --hub_id user/alpaca-in2core --combine other/alpaca-in2core

Nothing is fitted again. Rows that the pool holds already are left out, so the same command adds nothing a second time.
Coresets and random controls are selected anew as they were (`splits.json`; else by their names, as `coreset_25` and
`random_25`). Negative influence = proponent.
"""

from typing import Any

from hf_in2core.names import (
    METHODS,
    get_prefix,
    list_method_columns,
    name_coreset,
    name_validation_config,
    parse_coreset,
)
from hf_in2core.pipeline.arguments import describe_command
from hf_in2core.pipeline.parser import RecipeParser, Settings
from hf_in2core.pipeline.stage_arguments import GrowArguments


PARSER = RecipeParser("grow", GrowArguments, __doc__, model=False)


def main(settings: Settings) -> None:
    """Check, score, merge and publish, from the main process only."""
    from accelerate import PartialState
    from datasets import load_dataset

    from hf_in2core import push_influence_dataset, select_coreset
    from hf_in2core.hub.checks import check_can_push
    from hf_in2core.influence.launcher import check_launcher
    from hf_in2core.influence.pools import merge_scored
    from hf_in2core.pipeline.run_folder import agree, join_processes, say, warn
    from hf_in2core.rows.sources import find_hub_id

    args: GrowArguments = settings.arguments
    join_processes(settings)
    check_launcher("`in2core grow`")
    assert args.hub_id is not None
    sources = [hub_id for source in args.rows or [] if (hub_id := find_hub_id(source))] + (args.combine or [])
    # Everything is read at one commit, and published only if that is still the newest.
    head, records = agree(lambda: read_published(args))
    published = load_dataset(args.hub_id, args.config_name, revision=head)
    splits = choose_splits(list(published), args.fractions, records)
    for choice in splits.values():
        # What the repository says of its splits is not ours: what cannot be selected fails before the work.
        select_coreset(published["train"], **choice)
    if PartialState().is_main_process:
        found = check_can_push(
            args.hub_id,
            revision=args.revision,
            create_pr=args.create_pr,
            splits=["train", *splits],
            config_name=args.config_name,
            source_datasets=sources,
        )
        for warning in found.warnings:
            warn(warning)
        for name in sorted(set(published) - {"train"} - set(splits)):
            warn(f"how the split {name!r} was chosen is not known: its rows keep their rank of the old pool.")
        for name in sorted(set(published) & set(splits) - set(records)):
            warn(f"how the split {name!r} was chosen is not recorded: by its name, it is taken as {splits[name]}.")

    pool = published["train"]
    others = load_others(args, head)
    scored, scorer = score_rows(args, pool, head)
    grown = merge_scored([pool, *others, *scored])
    if len(grown) == len(pool) and not args.fractions:
        say(f"{args.hub_id} holds all of it already.")
        return
    message = f"Add {len(grown) - len(pool):,} rows"
    if scorer is not None:
        message += say_agreement(args, scorer, grown, head)
    if not PartialState().is_main_process:
        return
    publication = push_influence_dataset(
        args.hub_id,
        grown,
        coresets=splits,
        source_datasets=sources,
        config_name=args.config_name,
        revision=args.revision,
        create_pr=args.create_pr,
        parent_commit=head,
        commit_message=message,
        command="\n".join(filter(None, [records.get("train", {}).get("command"), describe_command()])),
    )
    assert publication is not None
    say(f"published {len(grown):,} rows: {publication.url}\ncommit: {publication.commit}")


def load_others(args: GrowArguments, head: str) -> list[Any]:
    """The pools to combine with, each of which the same scorer has scored."""
    from datasets import load_dataset

    others = []
    for other in args.combine or []:
        if read_scorer_hash(other, None) != read_scorer_hash(args.hub_id or "", head, get_prefix(args.config_name)):
            raise ValueError(
                f"{other} was scored by another scorer than {args.hub_id}, so their numbers do not compare. Score its "
                f"rows with this one's: --rows {other}:train."
            )
        others.append(load_dataset(other, split="train"))
    return others


def score_rows(args: GrowArguments, pool: Any, head: str) -> tuple[list[Any], Any]:
    """The rows to add that are not in the pool yet, scored by the pool's scorer; and that scorer, if there are any."""
    from hf_in2core import InfluenceScorer
    from hf_in2core.influence.pools import align_types
    from hf_in2core.pipeline.inputs import keep_good_rows
    from hf_in2core.pipeline.run_folder import say
    from hf_in2core.pipeline.training import score_with
    from hf_in2core.rows.hashes import find_shared_rows, hash_rows
    from hf_in2core.rows.scored import list_own_columns
    from hf_in2core.rows.sources import load_rows

    own = list_own_columns(pool)
    fresh: list[Any] = []
    if not args.rows:
        return fresh, None
    scorer = InfluenceScorer.from_pretrained(
        args.hub_id or "", revision=head, repo_type="dataset", subfolder=f"{get_prefix(args.config_name)}scorer"
    )
    for source in args.rows or []:
        rows = load_rows(source, "rows to add", columns=scorer.preparation.columns)
        missing = [name for name in own if name not in rows.column_names]
        if missing and set(missing) <= set(list_method_columns(method.column for method in METHODS.values())):
            raise ValueError(
                f"{args.hub_id} was chosen by {', '.join(missing)}, which ranks the pool's rows among themselves: "
                "its scorer gives new rows their influence, and no such rank. Run it again with the new rows in the "
                "pool; a pool that is to grow is run with --strategy top."
            )
        if missing:
            raise ValueError(
                f"{source} lacks the column(s) {', '.join(missing)} of {args.hub_id} (it has "
                f"{', '.join(rows.column_names)}). Bring its rows into the same columns."
            )
        rows = keep_good_rows(rows.select_columns(own), "rows to add", scorer.preparation, args.bad_rows)
        align_types([pool, rows], own)  # what makes no one pool is told before anything is scored
        is_known = find_shared_rows(hash_rows(rows), hash_rows(pool.select_columns(own)))
        say(f"{source}: {(~is_known).sum():,} of {len(rows):,} rows are not in {args.hub_id} yet.")
        if not is_known.all():
            fresh.append(rows.select((~is_known).nonzero()[0]))
    if not fresh:
        return [], None
    return [score_with(scorer, rows) for rows in fresh], scorer


def say_agreement(args: GrowArguments, scorer: Any, grown: Any, head: str) -> str:
    """Warn that the scorer was fitted before the pool grew; what was measured of it, for the commit's message."""
    from hf_in2core.influence.pools import check_fitted_pool

    # Every process measures the same, on the same sample.
    correlation = check_fitted_pool(scorer, grown, find_validation(args, head))
    return "" if correlation is None else f" (rank correlation with a refit on a sample: {correlation:.3f})"


def read_published(args: GrowArguments) -> tuple[str, dict[str, dict[str, Any]]]:
    """Commit of the repository, and how its splits were made."""
    from hf_in2core.cards.splits import read_records
    from hf_in2core.hub.state import read_head

    head = read_head(args.hub_id or "", repo_type="dataset", revision=args.revision)
    return head.oid, read_records(head.read(f"{get_prefix(args.config_name)}splits.json"))


def choose_splits(
    published: list[str], fractions: list[float] | None, records: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Split → arguments of `select_coreset`, for those that can be selected anew from a grown pool."""
    known = {
        name: {key: value for key, value in record.items() if key != "command"}
        for name, record in records.items()
        if "strategy" in record and name in published
    }
    if fractions is not None:
        named = {name_coreset(fraction): fraction for fraction in fractions}
        return {name: known.get(name, {}) | {"fraction": fraction} for name, fraction in named.items()}
    parsed = {name: parse_coreset(name) for name in published}
    by_name = {
        name: {"strategy": "random" if arm == "random" else "top", "fraction": fraction}
        for name, (arm, fraction) in parsed.items()
        if arm in ("coreset", "random") and fraction is not None
    }
    return {name: (by_name | known)[name] for name in published if name in by_name | known}


def read_scorer_hash(repo_id: str, revision: str | None, prefix: str = "") -> str:
    """Hash of the scorer's file in a repository, as the Hub lists it; raises where there is none."""
    from hf_in2core.hub.state import read_head

    files = read_head(repo_id, repo_type="dataset", revision=revision).files
    path = f"{prefix}scorer/scorer.safetensors"
    if path not in files:
        raise ValueError(f"{repo_id} holds no {path}: it was published without its scorer. Publish that first.")
    return files[path].sha256 or files[path].blob_id


def find_validation(args: GrowArguments, head: str) -> Any:
    """The validation sets as they were given, or as they are published beside the pool; `None` where neither is."""
    from datasets import get_dataset_config_names, load_dataset

    from hf_in2core.pipeline.inputs import load_validation
    from hf_in2core.rows.sources import parse_named_sources

    if args.validation:
        return load_validation(parse_named_sources(args.validation))
    name = name_validation_config(args.config_name)
    if name not in get_dataset_config_names(args.hub_id, revision=head):
        return None
    return dict(load_dataset(args.hub_id, name, revision=head))
