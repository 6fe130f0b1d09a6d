"""What results.json says, as the report page shows it: verdict, arms and their differences, AUC, cost, provenance."""

from typing import Any

from hf_in2core.evaluation.arms import ARM_COLUMNS, LEVEL, count_seeds, format_arm, summarize_arms
from hf_in2core.names import BUDGETS, LOSS_REDUCTIONS

from .run import Run, get_value, is_number, show_number


OUTCOMES = {"better": "lower loss", "worse": "higher loss", "no worse": "no worse", "inconclusive": "inconclusive"}
LIBRARIES = ("python", "torch", "transformers", "trl", "peft", "datasets", "accelerate")


def show_verdict(run: Run) -> dict[str, Any]:
    """The verdict in a sentence, the paragraph, and how to look at it."""
    text, headline = run.get("verdict", "text"), run.get("verdict", "headline")
    text = text if isinstance(text, str) else "The results hold no verdict."
    finished = run.get("complete") is not False
    if not isinstance(headline, str):
        headline = "No verdict" if finished else "The comparison is not finished"
    beats, matches = run.get("verdict", "beats_random"), run.get("verdict", "matches_full")
    is_warning = "WARNING" in text
    good = beats is True and matches is True and not is_warning
    return {
        "headline": headline,
        "text": text,
        "kind": "warning" if is_warning else "good" if good else "open",
        "checks": [
            {"label": "beats random rows beyond noise", "value": beats},
            {"label": "matches the full pool", "value": matches},
        ]
        if isinstance(beats, bool) and isinstance(matches, bool)
        else [],
    }


def show_arms(run: Run) -> dict[str, Any]:
    """The arms as tables, one for each budget."""
    rows = summarize_arms(run.results)
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    return {
        "columns": ARM_COLUMNS,
        "tables": [
            {
                "budget": BUDGETS.get(budget, budget),
                "rows": [{"arm": row["arm"], "cells": format_arm(row)} for row in rows if row["budget"] == budget],
            }
            for budget in budgets
        ],
        "note": f"Means over {count_seeds(rows)}, ± half of the {LEVEL * 100:g} % Student-t interval.",
    }


def show_comparisons(run: Run) -> list[dict[str, str]]:
    """Differences between arms with their intervals, for every fraction and budget."""
    lines = []
    entries = run.get("verdict", "by_fraction")
    for entry in entries if isinstance(entries, list) else []:
        intervals = get_value(entry, "intervals")
        for name, interval in (intervals if isinstance(intervals, dict) else {}).items():
            mean, low, high = (get_value(interval, key) for key in ("mean", "low", "high"))
            if not is_number(mean):
                continue
            budget = str(get_value(entry, "budget"))
            lines.append(
                {
                    "name": str(name).replace("_", " ").replace(" minus ", " − "),
                    "where": f"{show_number(get_value(entry, 'fraction'), 'g')}, {BUDGETS.get(budget, budget)}",
                    "mean": show_number(mean, "+.3f"),
                    "interval": f"{low:+.3f} to {high:+.3f}" if is_number(low) and is_number(high) else "none",
                    "seeds": show_number(get_value(interval, "n"), ".0f"),
                    "outcome": OUTCOMES.get(str(get_value(interval, "outcome")), "no interval"),
                }
            )
    return lines


def show_auc(run: Run) -> dict[str, Any]:
    """How well scores find the rows that are looked for."""
    auc = run.get("auc")
    auc = auc if isinstance(auc, dict) else {}
    by_kind = {str(kind): scores for kind, scores in auc.items() if isinstance(scores, dict)}
    scores = list(dict.fromkeys(str(score) for found in by_kind.values() for score in found))
    return {
        "scores": scores,
        "lines": [
            {
                "kind": kind,
                "rows": show_number(run.get("auc_rows", kind), ",.0f"),
                "values": [show_number(found.get(score), ".3f") for score in scores],
            }
            for kind, found in by_kind.items()
        ],
    }


def show_cost(run: Run) -> list[tuple[str, str]]:
    """What the run cost, in words."""

    def seconds(value: Any) -> str:
        return f"{show_number(value, ',.1f')} s" if is_number(value) else ""

    trained = {(arm["arm"], arm["fraction"], arm["seed"], arm.get("seconds")) for arm in run.results["arms"]}
    spent = [entry[3] for entry in trained if is_number(entry[3])]
    resumed = " (of the last part alone: the run was resumed)" if run.get("selection", "resumed") is True else ""
    runs = run.get("verdict", "cost", "break_even_runs")
    lines = [
        ("Training the reference", seconds(run.get("selection", "reference_seconds"))),
        ("Computing influence", seconds(run.get("selection", "seconds")) + resumed),
        ("Training and testing the arms", f"{seconds(sum(spent))} for {len(spent)} runs" if spent else ""),
        ("Saved by each target run at equal epochs", seconds(run.get("verdict", "cost", "saving_per_run"))),
        ("Target runs until selecting has paid", show_number(runs, ",") if is_number(runs) else str(runs or "")),
    ]
    return [(label, value) for label, value in lines if value]


def show_provenance(run: Run) -> list[tuple[str, str]]:
    """What the figures were made from and with."""
    sets = get_value(run.scorer, "validation_sets")
    machine = run.get("machine")
    machine = machine if isinstance(machine, dict) else {}
    hardware = [machine.get("gpu") or machine.get("cpu"), f"{machine.get('processes', 1)} process(es)"]
    hardware += [f"{machine['cores']} cores"] if machine.get("cores") else []
    libraries = [f"{name} {machine[name]}" for name in machine if name in LIBRARIES]
    revision = get_value(run.scorer, "base_model_revision")
    lines = [
        ("Reference model", run.get("config", "model_name_or_path") or get_value(run.scorer, "base_model")),
        ("Its revision", revision),
        ("Target model", run.get("config", "target_model_name_or_path") or run.get("config", "model_name_or_path")),
        ("Pool", run.get("config", "pool")),
        ("Validation (selects)", _join(run.get("config", "validation"))),
        ("Rows of the validation sets", _join(sets)),
        ("Test (judges)", run.get("config", "test")),
        ("Estimator", get_value(run.scorer, "estimator") or run.get("selection", "estimator")),
        ("Loss of a row", LOSS_REDUCTIONS.get(str(get_value(run.scorer, "loss_reduction")), "")),
        ("Damping scale", get_value(run.scorer, "damping_scale")),
        ("Layers", (get_value(run.scorer, "influence_layers") or "all") if run.scorer else ""),
        ("Rows the scorer was fitted on", get_value(run.scorer, "num_fit_examples")),
        ("Machine", ", ".join(str(part) for part in hardware if part) if machine else ""),
        ("Libraries", ", ".join(libraries)),
        ("Command", run.get("command")),
    ]
    return [(label, str(value)) for label, value in lines if value not in (None, "", [])]


def _join(value: Any) -> str:
    """A list or a dictionary in one line."""
    if isinstance(value, dict):
        value = [f"{name}: {item:,}" if isinstance(item, int) else f"{name}: {item}" for name, item in value.items()]
    return ", ".join(str(item) for item in value) if isinstance(value, list) else ""
