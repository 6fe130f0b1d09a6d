"""Every selector on every pool: how it ranks the useful and the harmful rows, and which of them a run takes by itself.

    python benchmarks/pools/compare.py --rank [--pools unlike …] [--pool_seeds 0] [--methods encoder less]
    python benchmarks/pools/compare.py --train [--pools unlike …] [--pool_seeds 0 1] [--arms full bm25 rds cosine]
    python benchmarks/pools/compare.py --train --pool_seeds 1 2 3 4 5 --seeds 0 --arms bm25 rds encoder cosine

`--rank` scores each pool by every method and prints, of the rows chosen by it, the share of useful and harmful
rows: `pools_ranked.json`. `--train` runs `in2core run --strategy auto` on it, with some arms beside the choice:
`pools_trained.json`, where several fresh draws of a pool (`--pool_seeds`; 0 is the draw that settings were chosen on)
are compared too, each draw a pair. What the records say of other pools stays, and of methods and arms that were
measured before; the same command resumes.
"""

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import yaml
from datasets import Dataset, load_from_disk
from trl import ModelConfig


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import print_table, write_results

from benchmarks.pools.make import POOLS, find_pool
from benchmarks.pools.pool import HARMFUL, ROOT, USEFUL
from hf_in2core import InfluenceConfig
from hf_in2core.commands import run as run_command
from hf_in2core.commands import score as score_command
from hf_in2core.commands import train_reference
from hf_in2core.evaluation.intervals import compare_losses
from hf_in2core.names import METHODS
from hf_in2core.pipeline.inputs import load_validation
from hf_in2core.pipeline.methods import Reference, add_columns, list_columns
from hf_in2core.pipeline.models import load_tokenizer
from hf_in2core.pipeline.training import make_saving
from hf_in2core.rows.sources import load_rows, parse_named_sources
from hf_in2core.selection.answers import compare_answers
from hf_in2core.selection.coreset import select_positions


# What a training of the reference and scoring by it take over from a pool's settings.
SETTINGS = """
    model_name_or_path pool learning_rate warmup_steps per_device_train_batch_size max_length lora_r lora_alpha
    lora_dropout lora_target_modules activation_checkpointing
""".split()
BY_WORDS = ("bm25", "encoder")


def call(command: Any, folder: Path, name: str, settings: dict[str, Any]) -> None:
    """Call a command of `in2core` in this process with settings from a file."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command.main(command.PARSER.parse(["--config", str(path)]))


def rank_pool(folder: Path, names: list[str], before: dict[str, Any]) -> dict[str, Any]:
    """
    Score a pool by some methods: the share of useful and of harmful rows in what each chooses.

    And how many equally frequent answers would be as mixed as theirs, and as those of as many random rows. Other
    methods of the record `before` stay where it is of the same rows.
    """
    settings = yaml.safe_load((folder / "in2core.yaml").read_text(encoding="utf-8"))
    kept = {name: settings[name] for name in SETTINGS if name in settings}
    reference = folder / "reference"
    if not (reference / "training.json").is_file() and not set(names) <= set(BY_WORDS):
        epochs = {"num_train_epochs": settings.get("reference_num_train_epochs", settings.get("num_train_epochs", 1))}
        call(train_reference, folder, "reference", kept | epochs | make_saving(4) | {"output_dir": str(reference)})
    kept |= {"reference_adapter": str(reference), "validation": settings["validation"]}
    words = [name for name in names if name in BY_WORDS]
    scored = dict.fromkeys(words, score_by_words(folder, words, kept)) if words else {}
    # `less` apart, for what is averaged over checkpoints is another influence than that of the other methods.
    parts = {"scores": [name for name in names if name not in (*words, "less")], "averaged": {"less"} & set(names)}
    for part, methods in parts.items():
        scored |= dict.fromkeys(methods, score(folder, part, list(methods), kept)) if methods else {}
    kinds = np.array(next(iter(scored.values()))["kind"])
    fraction = settings["fractions"][0]
    found: dict[str, Any] = {"rows": len(kinds), "useful": float(np.mean(kinds == USEFUL)), "methods": {}}
    found["harmful"] = float(np.mean(kinds == HARMFUL))
    for name, dataset in scored.items():
        options = {"column": METHODS[name].column, "strategy": METHODS[name].strategy, "order": "original"}
        positions = select_positions(dataset, fraction=fraction, **options)
        found["methods"][name] = {kind: float(np.mean(kinds[positions] == kind)) for kind in (USEFUL, HARMFUL)}
        answers = compare_answers(dataset["completion"][:], positions)
        found["methods"][name] |= {"answers": answers.coreset_kinds, "collapsed": answers.warning is not None}
        found["answers"] = answers.expected_kinds
    if all(before.get(name) == value for name, value in found.items() if name != "methods"):
        known = before["methods"] | found["methods"]
        found["methods"] = {name: known[name] for name in METHODS if name in known}
    return found


def score_by_words(folder: Path, methods: list[str], settings: dict[str, Any]) -> Dataset:
    """The pool with the columns of methods that read no reference, for which `in2core score` would ask."""
    path = folder / "words.yaml"
    path.write_text(yaml.safe_dump(settings | {"output_dir": str(folder / "words")}), encoding="utf-8")
    parsed = score_command.PARSER.parse(["--config", str(path)])
    model, args = parsed.make(ModelConfig), parsed.make(InfluenceConfig)
    pool = load_rows(settings["pool"], "pool")
    validation = load_validation(parse_named_sources(settings["validation"]), None)
    reference = Reference(model, args, "", pool, validation, load_tokenizer(model, args))
    return add_columns(pool, list_columns(methods), reference)[0]


def score(folder: Path, part: str, methods: list[str], settings: dict[str, Any]) -> Dataset:
    """The pool scored by some methods with one command; what is there already is taken."""
    output = folder / "-".join([part, *methods])
    if not (output / "scored").is_dir():
        more: dict[str, Any] = {"methods": methods, "output_dir": str(output)}
        if not {"mean", "turns", "cosine", "cosine_clean", "fused"} & set(methods):
            # No other method reads what the fit would be for.
            more["estimator"] = "gradient_dot"
        if part == "averaged":
            more["checkpoints"] = sorted(map(str, Path(settings["reference_adapter"]).glob("checkpoint-*")))
        call(score_command, folder, output.name, settings | more)
    return load_from_disk(str(output / "scored"))


def train_pool(
    folder: Path, arms: list[str], seeds: list[int], budget: float, before: dict[str, Any]
) -> dict[str, Any]:
    """
    A run that chooses by itself, beside some arms; the test losses by arm and seed, and the tournament.

    Other arms of the record `before` stay where random rows end at the same losses, to the last digit: on one machine
    that is the same training. `commits` says of each arm at which it was measured.
    """
    settings = yaml.safe_load((folder / "in2core.yaml").read_text(encoding="utf-8"))
    settings |= {"strategy": "auto", "auto_budget": budget, "arms": ["random", "coreset", *arms]}
    settings |= {"seeds": seeds, "budgets": ["steps"], "output_dir": str(folder / "run")}
    call(run_command, folder, "auto", settings)
    results = json.loads((folder / "run" / "results.json").read_text(encoding="utf-8"))
    losses: dict[str, Any] = {}
    for arm in results["arms"]:
        losses.setdefault(arm["arm"], {})[str(arm["seed"])] = arm["test_loss"]
    commits = dict.fromkeys(losses, read_commit())
    if before.get("losses", {}).get("random") == losses["random"]:
        losses, commits = before["losses"] | losses, before["commits"] | commits
    tournament = {key: results["tournament"][key] for key in ("outcome", "winner", "steps", "num_runs", "losses")}
    # The runs, and beside them influence on half of the validation rows and the columns of the methods.
    spent = {"run_seconds": results["tournament"]["seconds"]}
    spent["seconds"] = results["verdict"]["cost"]["tournament_seconds"]
    seconds = [arm["seconds"] for arm in results["arms"] if arm["arm"] == "random"]
    pairs = [(arm, "random") for arm in losses]
    pairs += [(first, arm) for first in ("cosine", "mean") if first in losses for arm in losses]
    return {
        "losses": losses,
        "missed": find_missed(losses),
        "commits": commits,
        "means": {arm: float(np.mean(list(by_seed.values()))) for arm, by_seed in losses.items()},
        "before": results["base"]["test_loss"],
        # As many equally frequent ones would be as mixed as those of the coreset, and of as many random rows.
        "answers": {kind: results["answers"][f"{kind}_kinds"] for kind in ("coreset", "expected")},
        "tournament": tournament | spent | {"target_seconds": float(np.mean(seconds))},
        "intervals": {f"{a}_minus_{b}": asdict(compare_losses(losses[a], losses[b])) for a, b in pairs if a != b},
    }


def compare_draws(pools: dict[str, Any], name: str) -> dict[str, Any] | None:
    """
    Some fresh draws of a pool together: a draw is a pair, with the mean over its targets' seeds.

    `None` where there are fewer than two. `missed` as of [`find_missed`], and intervals of each arm less random rows
    and of `cosine` less each.
    """
    draws = {found: pools[found] for found in pools if re.fullmatch(rf"{name}-\d+", found)}
    if len(draws) < 2:
        return None
    arms = [arm for arm in METHODS if all(arm in pool["means"] for pool in draws.values())]
    losses: dict[str, Any] = {
        arm: {draw: pool["means"][arm] for draw, pool in draws.items()} for arm in ("random", "coreset", *arms)
    }
    pairs = [(arm, "random") for arm in losses] + [(first, arm) for first in ("coreset", "cosine") for arm in losses]
    taken = [f"{pool['tournament']['winner']} ({pool['tournament']['outcome']})" for pool in draws.values()]
    return {
        "draws": list(draws),
        "taken": taken,
        "means": {arm: float(np.mean(list(by_draw.values()))) for arm, by_draw in losses.items()},
        "missed": find_missed(losses),
        "intervals": {
            f"{a}_minus_{b}": asdict(compare_losses(losses[a], losses[b])) for a, b in pairs if a != b and a in losses
        },
    }


def find_missed(losses: dict[str, Any]) -> dict[str, Any] | None:
    """
    The share of the best arm's gain on random rows that the coreset misses: (coreset - best) / (random - best).

    From losses by arm and seed. 0 where the coreset is the best itself; `None` where no arm beats random rows beyond
    noise, or there is none beside the coreset to be better.
    """
    if losses.keys() <= {"full", "random", "coreset"}:
        return None
    means = {arm: float(np.mean(list(by_seed.values()))) for arm, by_seed in losses.items()}
    best = min((arm for arm in means if arm not in ("full", "random")), key=means.__getitem__)
    high = compare_losses(losses[best], losses["random"]).high
    if high is None or high >= 0:
        return None
    return {"best": best, "share": (means["coreset"] - means[best]) / (means["random"] - means[best])}


def read_commit() -> str:
    """The commit that is checked out here."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def show_ranked(found: dict[str, Any]) -> None:
    rows = []
    for name, pool in found.items():
        entries = {"random rows": pool} | {f"`{method}`": pool["methods"].get(method) for method in METHODS}
        shown = {by: f"{one[USEFUL]:.2f} / {one[HARMFUL]:.2f}" for by, one in entries.items() if one is not None}
        rows.append({"pool": f"`{name}`", **dict.fromkeys(entries, ""), **shown})
    print_table("Useful / harmful rows among those kept", rows)


def draw_ranked(found: dict[str, Any], path: Path) -> None:
    """A square for each method and pool: useful less harmful rows among those chosen, less the same of the pool."""
    gains = np.full((len(found), len(METHODS)), np.nan)
    for row, pool in enumerate(found.values()):
        for column, name in enumerate(METHODS):
            if (entry := pool["methods"].get(name)) is not None:
                gains[row, column] = entry[USEFUL] - entry[HARMFUL] - (pool[USEFUL] - pool[HARMFUL])
    figure, panel = plt.subplots(figsize=(11.5, 0.45 * len(found) + 2.2), layout="constrained")
    panel.imshow(gains, cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
    panel.set_xticks(range(len(METHODS)), METHODS, rotation=35, ha="right")
    panel.set_yticks(range(len(found)), found)
    for (row, column), gain in np.ndenumerate(gains):
        best = gain == np.nanmax(gains[row]) > 0
        text = "" if np.isnan(gain) else f"{gain:+.2f}"
        panel.text(column, row, text, ha="center", va="center", fontsize=8, weight="bold" if best else None)
    panel.set_title(
        "Useful less harmful rows in what each method keeps, above random rows (bold: the best)", fontsize=10
    )
    figure.savefig(path, dpi=120)


def show_trained(found: dict[str, Any]) -> None:
    arms = list(dict.fromkeys(arm for pool in found.values() for arm in pool["losses"]))
    rows = []
    for name, pool in found.items():
        took = f"{pool['tournament']['winner']} ({pool['tournament']['outcome']})"
        line = {"pool": f"`{name}`", "`auto` took": took, **show_means(pool, arms)}
        line |= show_interval("cosine less random", pool["intervals"].get("cosine_minus_random"))
        rows.append(line | {"commits": ", ".join(dict.fromkeys(pool["commits"].values()))})
    print_table("Test losses", rows)


def show_means(found: dict[str, Any], arms: list[str]) -> dict[str, str]:
    """The mean losses of some arms, and what the coreset misses of the best gain."""
    means = {arm: f"{found['means'][arm]:.3f}" if arm in found["means"] else "" for arm in arms}
    return means | {"missed of the best gain": f"{found['missed']['share']:.2f}" if found.get("missed") else ""}


def show_interval(what: str, interval: dict[str, float] | None) -> dict[str, str]:
    """A difference and half of its interval, where there is one."""
    parts = ((what, "mean", "+.3f"), ("half its interval", "half_width", ".3f"))
    known = interval or {}
    return {name: "" if known.get(key) is None else format(known[key], form) for name, key, form in parts}


def show_draws(found: dict[str, Any]) -> None:
    """Fresh draws of each pool together."""
    arms = list(dict.fromkeys(arm for draws in found.values() for arm in draws["means"]))
    rows = []
    for name, draws in found.items():
        taken = ", ".join(f"{what} {count}" for what, count in Counter(draws["taken"]).items())
        line = {"pool": f"`{name}`", "`auto` took": taken, **show_means(draws, arms)}
        rows.append(line | show_interval("`auto` less random", draws["intervals"]["coreset_minus_random"]))
    print_table("Fresh draws", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--pools", nargs="+", choices=list(POOLS), default=list(POOLS))
    parser.add_argument("--rank", action="store_true", help="Rank the rows of each pool.")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="Those of --rank.")
    parser.add_argument("--train", action="store_true", help="Train targets beside a tournament.")
    parser.add_argument(
        "--arms",
        nargs="*",
        default=["full", "mean", "bm25", "rds", "cosine"],
        help="Those of --train, beside random rows.",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Seeds of the targets.")
    parser.add_argument("--pool_seeds", nargs="+", type=int, default=[0], help="Seeds of the pools.")
    parser.add_argument("--auto_budget", type=float, default=2.0)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="Data outside the project.")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/records")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs/benchmarks/figures")
    args = parser.parse_args()
    for kind, wanted in (("ranked", args.rank), ("trained", args.train)):
        path = args.output / f"pools_{kind}.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"pools": {}}
        for name in args.pools if wanted else []:
            for seed in args.pool_seeds:
                folder = find_pool(name, seed, args.shared)
                before = known["pools"].get(folder.name, {})
                found = (
                    rank_pool(folder, args.methods, before)
                    if kind == "ranked"
                    else train_pool(folder, args.arms, args.seeds, args.auto_budget, before)
                )
                known["pools"][folder.name] = found
                if kind == "trained" and (draws := compare_draws(known["pools"], name)) is not None:
                    known.setdefault("draws", {})[name] = draws
                write_results(path, **known)
        if wanted:
            (show_ranked if kind == "ranked" else show_trained)(known["pools"])
        if wanted and known.get("draws"):
            show_draws(known["draws"])
        if wanted and kind == "ranked":
            draw_ranked(known["pools"], args.figures / "pools_ranked.png")


if __name__ == "__main__":
    main()
