"""Cards of models on the Hub: a scorer, and a target that was fine-tuned on a coreset."""

import math
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_in2core.card_metadata import add_tags, join_card, parse_card, replace_section
from hf_in2core.card_text import Markdown, escape_markdown, format_code, render_template
from hf_in2core.dataset_card import is_hub_id, list_arms, list_provenance, say_validation


def render_scorer_card(repo_id: str, scorer: Mapping[str, Any], existing: str | None = None) -> str:
    """
    The card of a scorer that is a model repository of its own.

    Args:
        repo_id (`str`):
            Its repository.
        scorer (`Mapping`):
            The scorer's `config.json`.
        existing (`str`, *optional*):
            The card that is there; its own metadata and text are kept.

    Returns:
        `str`: the whole card.
    """
    data, body = parse_card(existing) if existing is not None else ({}, f"\n# {repo_id.split('/')[-1]}\n")
    base_model = str(scorer.get("base_model") or "")
    if is_hub_id(base_model):
        add_tags(data, "base_model", [base_model])
    add_tags(data, "tags", ["in2core", "influence"])
    section = render_template(
        "scorer.md",
        repo_id=Markdown(repo_id),
        validation=say_validation(scorer.get("validation_sets")),
        needs_model=not is_hub_id(base_model),
        provenance=list_provenance(scorer),
    )
    return join_card(data, replace_section(body, "scorer", section))


def render_target_model_card(
    model_name: str,
    *,
    base_model: str,
    dataset_id: str,
    run: Mapping[str, Any],
    results: Mapping[str, Any],
    split: str | None = None,
    dataset_revision: str | None = None,
    test_name: str = "test set",
    existing: str | None = None,
) -> str:
    """
    The card of a model that was fine-tuned on a coreset (or on an arm that a coreset is compared with).

    Args:
        model_name (`str`):
            Name of the model, the second part of its repository id.
        base_model (`str`):
            Hub id of the model that was fine-tuned.
        dataset_id (`str`):
            Hub id of the dataset that holds the coreset, or any name when it is not on the Hub.
        run (`Mapping`):
            This model's entry of `arms` in `results.json`.
        results (`Mapping`):
            `results.json`, for the comparison and the verdict.
        split (`str`, *optional*):
            Split of the dataset that it was trained on.
        dataset_revision (`str`, *optional*):
            Commit of the dataset.
        test_name (`str`, *optional*, defaults to `"test set"`):
            Name of the rows that judged.
        existing (`str`, *optional*):
            The card that is there; its own metadata and text are kept.

    Returns:
        `str`: the whole card, with evaluation results in the form that the Hub renders.
    """
    is_on_hub = "/" in dataset_id and is_hub_id(dataset_id)
    metrics = [("loss", "test_loss", "Test loss per labelled token"), ("perplexity", "test_perplexity", "Perplexity")]
    evaluated = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset_id if is_on_hub else "other",
            dataset_name=test_name,
            dataset_revision=dataset_revision if is_on_hub else None,
            metric_type=kind,
            metric_name=label,
            metric_value=run[key],
        )
        for kind, key, label in metrics
        if isinstance(run.get(key), int | float) and math.isfinite(run[key])
    ]
    ours = ModelCardData(eval_results=evaluated or None, model_name=model_name).to_dict()
    data, body = parse_card(existing) if existing is not None else ({}, f"\n# {escape_markdown(model_name)}\n")
    data.setdefault("base_model", base_model)
    if is_on_hub:
        add_tags(data, "datasets", [dataset_id])
    add_tags(data, "tags", ["in2core", "coreset", "sft", "trl"])
    data |= {key: value for key, value in ours.items() if key == "model-index"}
    section = render_template(
        "target_model.md",
        title=model_name,
        base_model=base_model,
        base_model_link=_link(base_model),
        dataset_id=dataset_id,
        dataset_link=Markdown(dataset_id) if is_on_hub else None,
        dataset_revision=escape_markdown(dataset_revision) if dataset_revision else None,
        split=escape_markdown(split) if split else None,
        trained_on=Markdown(f"the split {format_code(split)}") if split else escape_markdown(str(run.get("arm"))),
        arms=list_arms(other for other in results.get("arms") or [] if other.get("budget") == run.get("budget")),
        this_arm=str(run.get("arm")),
        seed=str(run.get("seed")),
        verdict=(results.get("verdict") or {}).get("text"),
    )
    return join_card(data, replace_section(body, "model", section))


def _link(repo_id: str) -> Markdown:
    return Markdown(re.sub(r"[^\w./-]", "", repo_id, flags=re.ASCII))
