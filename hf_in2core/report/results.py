"""What results.json says, as the report page shows it: the verdict and where the figures come from."""

from typing import Any

from hf_in2core.evaluation.arms import describe_data
from hf_in2core.evaluation.formats import describe_calibration, get_value, is_number, list_objects
from hf_in2core.names import BUDGETS, LIBRARIES, LOSS_REDUCTIONS

from .run import Run


def show_verdict(run: Run) -> dict[str, Any]:
    """The verdict in a sentence, the paragraph, and how to look at it."""
    text, headline = run.get("verdict", "text"), run.get("verdict", "headline")
    text = text if isinstance(text, str) else "The results hold no verdict."
    finished = run.get("complete") is not False
    if not isinstance(headline, str):
        headline = "No verdict" if finished else "The comparison is not finished"
    checks = _list_checks(run)
    is_warning = "WARNING" in text
    good = bool(checks) and all(check["value"] for check in checks) and not is_warning
    return {
        "headline": headline,
        "text": text,
        "kind": "warning" if is_warning else "good" if good else "open",
        "checks": checks,
    }


def _list_checks(run: Run) -> list[dict[str, Any]]:
    """What the headline's fraction does at each budget, and whether selecting pays; if training taught anything."""
    if run.get("verdict", "gain", "clear") is False:
        return [{"label": "training clearly improved the untrained model", "value": False}]
    questions = {"beats_random": "beats random rows beyond noise", "matches_full": "matches the full pool"}
    fraction = run.get("verdict", "fraction")
    entries = list_objects(run.get("verdict", "by_fraction"))
    checks = [
        {"label": f"{label} at {BUDGETS[entry['budget']]}", "value": entry[name]}
        for entry in entries
        if entry.get("fraction") == fraction and entry.get("budget") in list(BUDGETS)
        for name, label in questions.items()
        if isinstance(entry.get(name), bool)
    ]
    runs = run.get("verdict", "cost", "break_even_runs")
    if checks and runs is not None:
        checks.append({"label": "selecting pays", "value": runs != "never"})
    return checks


def show_provenance(run: Run) -> list[tuple[str, str]]:
    """What the figures were made from and with."""
    sets = get_value(run.scorer, "validation_sets")
    machine = run.get("machine")
    machine = machine if isinstance(machine, dict) else {}
    hardware = [machine.get("gpu") or machine.get("cpu"), f"{machine.get('processes', 1)} process(es)"]
    hardware += [f"{machine['cores']} cores"] if machine.get("cores") else []
    libraries = [f"{name} {machine[name]}" for name in machine if name in ("python", *LIBRARIES)]
    revision = get_value(run.scorer, "base_model_revision")
    lines = [
        ("Reference model", run.get("config", "model_name_or_path") or get_value(run.scorer, "base_model")),
        ("Its revision", revision),
        ("Target model", run.get("config", "target_model_name_or_path") or run.get("config", "model_name_or_path")),
        ("Pool", run.get("config", "pool")),
        ("Validation (selects)", _join(run.get("config", "validation"))),
        ("Rows of the validation sets", _join(sets)),
        ("Test (judges)", run.get("config", "test")),
        *((f"Rows: {name}", text) for name, text in describe_data(run.get("data"))),
        ("Estimator", get_value(run.scorer, "estimator") or run.get("selection", "estimator")),
        ("Loss of a row", LOSS_REDUCTIONS.get(str(get_value(run.scorer, "loss_reduction")), "")),
        ("Damping scale", get_value(run.scorer, "damping_scale")),
        ("Layers", (get_value(run.scorer, "influence_layers") or "all") if run.scorer else ""),
        ("Rows the scorer was fitted on", get_value(run.scorer, "num_fit_examples")),
        ("Agreement of two halves of them", get_value(run.scorer, "fit_agreement")),
        ("Agreement with the exact inverse", _show_agreement(get_value(run.scorer, "exact_agreement"))),
        ("Rounding of the gradient index", _show_rounding(run.scorer)),
        ("Agreement of halves of the validation", _join(_show_agreements(run.get("agreement", "agreement")))),
        ("One more step on a row", describe_calibration(run.get("calibration"))),
        ("Machine", ", ".join(str(part) for part in hardware if part) if machine else ""),
        ("Libraries", ", ".join(libraries)),
        ("Command", run.get("command")),
    ]
    return [(label, str(value)) for label, value in lines if value not in (None, "", [])]


def _show_agreement(value: Any) -> str:
    """How far DataInf ranks a sample of the pool as the exact damped inverse does; a low value is the rule."""
    return f"{value:.2f} (Spearman of DataInf's ranking, on a sample of the pool)" if is_number(value) else ""


def _show_rounding(scorer: Any) -> str:
    """What keeping gradients in less than full precision did to their products."""
    error, agreement = get_value(scorer, "store_error"), get_value(scorer, "store_agreement")
    if not is_number(error) or not is_number(agreement):
        return ""
    return f"products of gradients off by {error:.1e} of their norm, Spearman {agreement:.4f} with the exact ones"


def _show_agreements(value: Any) -> dict[str, str]:
    """How far halves of each validation set rank the pool alike."""
    found = value.items() if isinstance(value, dict) else ()
    return {str(name): f"{agreement:.2f} (Spearman)" for name, agreement in found if is_number(agreement)}


def _join(value: Any) -> str:
    """A list or a dictionary in one line."""
    if isinstance(value, dict):
        value = [f"{name}: {item:,}" if isinstance(item, int) else f"{name}: {item}" for name, item in value.items()]
    return ", ".join(str(item) for item in value) if isinstance(value, list) else ""
