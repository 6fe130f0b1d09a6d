"""Publish an existing run folder to the Hub: the annotated pool, its coresets, the scorer, plots, results and card.

    in2core publish --run runs/quickstart --hub_id user/repo

One commit; publishing the same run again changes nothing. Negative influence = proponent.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from hf_in2core.names import REPLAY, RESULTS, name_coreset
from hf_in2core.pipeline.arguments import describe_command
from hf_in2core.pipeline.parser import RecipeParser, Settings
from hf_in2core.pipeline.stage_arguments import PublishArguments


PARSER = RecipeParser("publish", PublishArguments, __doc__, model=False, training=False)


def main(settings: Settings) -> None:
    """Check everything that can be checked, then publish, from the main process only."""
    from datasets import load_from_disk

    from hf_in2core import push_influence_dataset
    from hf_in2core.hub.checks import check_can_push
    from hf_in2core.hub.commits import is_main_process
    from hf_in2core.rows.places import describe_missing
    from hf_in2core.rows.sources import find_sources
    from hf_in2core.selection.record import describe_choice, take_coresets

    args: PublishArguments = settings.arguments
    if not is_main_process():
        return
    run = Path(args.run or "")
    if not run.exists():
        raise FileNotFoundError(f"The run `{run}`: {describe_missing(str(run))}")
    if not (run / "scored").is_dir():
        raise ValueError(f"{run} holds no scored/ folder. Give the output_dir of `in2core run`.")
    fractions = args.fractions if args.fractions is not None else read_fractions(run)
    arms = ["coreset", "random"] if args.random_controls else ["coreset"]
    splits = {name_coreset(share, arm): (arm, share) for arm in arms for share in fractions}
    sources = args.source_datasets if args.source_datasets is not None else find_sources(read_config(run).get("pool"))
    private = True if args.private else None
    found = check_can_push(
        args.hub_id or "",
        revision=args.revision,
        private=private,
        create_pr=args.create_pr,
        splits=["train", *splits],
        config_name=args.config_name,
        source_datasets=sources,
    )
    for path in found.overwrites:
        print(f"replaces (where it differs): {path}")

    scored = load_from_disk(str(run / "scored"))
    tournament = read_results(run).get("tournament") or {}
    strategy = tournament.get("winner") or read_config(run).get("strategy", "top")
    groups = {key: value for key in ("group_column", "group_quota") if (value := read_config(run).get(key))}
    wanted = {name: describe_choice(arm, share, args.seed, strategy, groups) for name, (arm, share) in splits.items()}
    coresets = take_coresets(run, scored, dict(wanted.values()))
    published = push_influence_dataset(
        args.hub_id or "",
        scored,
        coresets={name: coresets[rows] for name, (rows, _) in wanted.items()},
        scorer=run / "scorer" if (run / "scorer").is_dir() else None,
        report=run if has_report(run) else None,
        source_datasets=sources,
        config_name=args.config_name,
        private=private,
        revision=args.revision,
        create_pr=args.create_pr,
        command="\n".join(filter(None, [read_results(run).get("command"), describe_command()])),
    )
    if published is not None:
        done = "published" if published.changed else "nothing new to publish"
        print(f"{done}: {published.url}\ncommit: {published.commit}")


def read_fractions(run: Path) -> list[float]:
    """Fractions of the coreset arms in the run's results, largest last."""
    arms = read_results(run).get("arms") or []
    return sorted({float(arm["fraction"]) for arm in arms if arm.get("arm") == "coreset"})


def read_results(run: Path) -> dict[str, Any]:
    """The run's results, if it compared anything."""
    path = run / RESULTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_config(run: Path) -> dict[str, Any]:
    """The run's configuration, if it kept one."""
    path = run / REPLAY
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


def has_report(run: Path) -> bool:
    """Whether the run has anything to show beside its rows."""
    return any(run.glob("*.png")) or any((run / name).is_file() for name in (RESULTS, REPLAY))
