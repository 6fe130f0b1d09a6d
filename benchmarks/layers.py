"""Which layers suffice: rank correlation with the influence through all layers against gradient memory and time.

    python benchmarks/layers.py [--quick] [--pilot_rows 512] [--timed_rows 128] [flags of recipes/in2core.py]

By default on the data that the quickstart generates; `--config recipes/mixture/in2core.yaml` takes real rows. One
reference for each of `--seeds`, trained under `output_dir` or found there. Every set of layers is judged on the whole
pool: Spearman's correlation of its influence with that of all layers, and the rows that both keep at a quarter of the
pool. `select_layers` chooses from a pilot sample and is judged on the whole pool too. Writes `layers.json` and
`layers.png` into `output_dir` and prints the tables.
"""

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import drawing, group, make_parser, parse_run, print_table, show, write_results
from fidelity import share_kept
from references import REFERENCE_QUICK, make_trainer, train_references

from hf_in2core import InfluenceTrainer
from hf_in2core.analysis.layers import (
    LayerScores,
    choose_layers,
    compute_layer_scores,
    fit_rows,
    grow_layers,
    list_layer_sets,
)
from hf_in2core.engine.batches import CPU_TOKENS
from hf_in2core.engine.passes import Passes
from hf_in2core.engine.scoring import run_score_pass
from hf_in2core.evaluation.intervals import compute_confidence_interval, compute_rank_correlation


COLOURS = {"first": "#CC79A7", "last": "#0072B2", "middle": "#009E73", "spread": "#E69F00", "greedy": "#000000"}
MAX_EXHAUSTIVE_LAYERS = 12


def list_sets(scores: LayerScores) -> dict[tuple[str, int], list[int]]:
    """Every set of layers that is compared, by how it is made and how many layers it has; `best` by trying all."""
    greedy = grow_layers(scores, 1.0)
    everything = scores.compute_influence()
    sets: dict[tuple[str, int], list[int]] = {}
    for count in range(1, len(scores.layers)):
        sets |= {(name, count): layers for name, layers in list_layer_sets(scores.layers, count).items()}
        sets["greedy", count] = sorted(greedy[count - 1])
        if len(scores.layers) <= MAX_EXHAUSTIVE_LAYERS:
            sets["best", count] = list(
                max(
                    itertools.combinations(scores.layers, count),
                    key=lambda layers: correlate(scores.compute_influence(layers), everything),
                )
            )
    return sets


def correlate(first: np.ndarray, second: np.ndarray) -> float:
    return compute_rank_correlation(first, second).estimate or 0.0


def time_passes(trainer: InfluenceTrainer, layers: list[int] | None, rows: int) -> float:
    """CPU seconds of validation, fit and score pass over the first rows of the pool through some layers."""
    trainer.args.influence_layers = layers
    blocks = trainer.blocks
    trainer.args.influence_layers = None
    passes = Passes(trainer.model, blocks, trainer.args.loss_reduction, CPU_TOKENS, show_progress=False)
    pool = trainer.prepared_pool.select(range(min(rows, len(trainer.prepared_pool))))
    start = time.process_time()
    run_score_pass(passes, pool, fit_rows(trainer, passes, pool), cosine=False)
    return time.process_time() - start


def measure_reference(
    trainer: InfluenceTrainer, seed: int, pilot_rows: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], LayerScores]:
    """Every set of layers, and the choices from a pilot sample, judged on the whole pool."""
    scores = compute_layer_scores(trainer)
    everything = scores.compute_influence()

    def judge(layers: list[int]) -> dict[str, Any]:
        influence = scores.compute_influence(layers)
        return {
            "layers": layers,
            "memory": scores.measure_memory(layers),
            "spearman": correlate(influence, everything),
            "kept": share_kept(influence, everything, max(len(influence) // 4, 1)),
        }

    sets = [
        {"seed": seed, "chosen": name, "count": count} | judge(layers)
        for (name, count), layers in list_sets(scores).items()
    ]
    pilot = compute_layer_scores(trainer, pilot_rows, seed)
    choices = []
    for count in range(1, len(scores.layers)):
        budget = max(scores.measure_memory(layers) for layers in list_layer_sets(scores.layers, count).values())
        choice = choose_layers(pilot, budget=budget, seed=seed)
        choices.append(
            {
                "seed": seed,
                "budget": budget,
                "pilot": choice.spearman,
                "held_out": choice.held_out_spearman,
                "overlap": choice.overlap,
            }
            | judge(choice.layers)
        )
    return sets, choices, scores


def summarise(results: dict[str, Any]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The two tables: sets of layers, and choices under a budget."""
    groups = group(results["sets"], "count", "chosen")
    tables: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for (count, name), found in sorted(groups.items(), key=lambda item: item[0][0]):
        seconds = results["seconds"].get(f"{name} {count}")
        memory = float(np.mean([row["memory"] for row in found]))
        tables[0].append(
            {
                "layers": str(count),
                "chosen": name,
                "which": "; ".join(dict.fromkeys(" ".join(map(str, row["layers"])) for row in found)),
                "memory": f"{memory:.0%}",
                "s": f"{1 / memory:.2f}",
                "CPU time": "" if seconds is None else f"{seconds / results['seconds']['all']:.2f}",
                "Spearman": show([row["spearman"] for row in found]),
                "rows kept in common": show([row["kept"] for row in found]),
            }
        )
    choices = [row | {"budget": round(row["budget"], 3)} for row in results["choices"]]
    for (budget,), found in group(choices, "budget").items():
        tables[1].append(
            {
                "budget": f"{budget:.0%}",
                "chosen": "; ".join(" ".join(map(str, row["layers"])) for row in found),
                "Spearman, pilot": show([row["pilot"] for row in found]),
                "other half": show([row["held_out"] for row in found]),
                "overlap": show([row["overlap"] for row in found]),
                "Spearman, whole pool": show([row["spearman"] for row in found]),
                "rows kept in common": show([row["kept"] for row in found]),
            }
        )
    return tables


def plot(results: dict[str, Any], path: Path) -> None:
    """Spearman against the share of gradient memory, a line for each way of choosing; bars are 95 % intervals."""
    with drawing(path, 6.4, 4) as figure:
        axes = figure.subplots()
        for shift, (name, colour) in enumerate(COLOURS.items()):
            rows = [row for row in results["sets"] if row["chosen"] == name]
            counts = sorted({row["count"] for row in rows})
            groups = [[row for row in rows if row["count"] == count] for count in counts]
            found = [compute_confidence_interval([row["spearman"] for row in group]) for group in groups]
            memory = [100 * float(np.mean([row["memory"] for row in group])) + 0.6 * (shift - 2) for group in groups]
            axes.errorbar(
                memory,
                [interval.mean for interval in found],
                yerr=[interval.half_width or 0 for interval in found],
                label=name,
                color=colour,
                marker="o",
                markersize=4,
                capsize=3,
                linewidth=1.2,
            )
        axes.set_xlabel("Gradient memory, % of all layers")
        axes.set_ylabel("Spearman with all layers")
        axes.legend(frameon=False, title="layers chosen")
        axes.set_title("bars: 95 % interval over references of different seeds", fontsize=10)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--pilot_rows", type=int, default=512)
    parser.add_argument("--timed_rows", type=int, default=128, help="Rows of the pool that the passes are timed on.")
    args, settings = parse_run(parser, "references", REFERENCE_QUICK)
    results: dict[str, Any] = {"sets": [], "choices": [], "seconds": {}}
    for seed, job, adapter in train_references(settings):
        trainer = make_trainer(job, adapter)
        sets, choices, scores = measure_reference(trainer, seed, args.pilot_rows)
        results["sets"] += sets
        results["choices"] += choices
        if not results["seconds"]:
            timed = {"all": None} | {
                f"{name} {count}": layers
                for count in range(1, len(scores.layers))
                for name, layers in list_layer_sets(scores.layers, count).items()
            }
            rows = 16 if args.quick else args.timed_rows
            time_passes(trainer, None, rows)  # warms up
            results["seconds"] = {name: time_passes(trainer, layers, rows) for name, layers in timed.items()}
        print(f"Seed {seed} measured.", flush=True)
    folder = Path(settings.arguments.output_dir or "")
    write_results(folder / "layers.json", **results)
    for title, table in zip(("Sets of layers", "Choices from a pilot"), summarise(results), strict=True):
        print_table(title, table)
    plot(results, folder / "layers.png")


if __name__ == "__main__":
    main()
