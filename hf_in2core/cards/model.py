"""Cards of models on the Hub: a scorer, and a target that was fine-tuned on a coreset."""

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from hf_in2core.evaluation.arms import FIGURES, explain_means, summarize_arms
from hf_in2core.evaluation.formats import format_number, get_value, is_number, list_objects
from hf_in2core.names import ALL_ARMS, LENGTH_MATCHED, METHODS
from hf_in2core.rows.places import is_hub_id

from .dataset import list_provenance, say_validation
from .metadata import add_tags, join_card, parse_card, replace_section
from .splits import format_command
from .text import Markdown, escape_markdown, format_code, render_template


# What may stand in a snippet as it is: ids, split names with slices, revisions.
_PLAIN = re.compile(r"[\w./:%\[\]=\", +-]+", flags=re.ASCII)
# The arm of the model whose gradients influence is computed from.
REFERENCE = "reference"
_ROWS = {
    "full": "all of the pool, which a coreset is compared with",
    "random": "drawn at random, which a coreset is compared with",
    LENGTH_MATCHED: "drawn at random and as long as those of the coreset, which they are compared with",
    "opponents": "opponents, of the most positive influence: a control that should do worse",
    REFERENCE: "of the pool; this model's gradients are what influence is computed from",
}
_TITLES = {"coreset": "Fine-tuned on a coreset", REFERENCE: "Reference model of a selection"}


def render_scorer_card(repo_id: str, scorer: Mapping[str, Any], existing: str | bytes | None = None) -> str:
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
    existing: str | bytes | None = None,
    *,
    base_model: str,
    dataset_id: str,
    run: Mapping[str, Any],
    results: Mapping[str, Any],
    split: str | None = None,
    dataset_revision: str | None = None,
    test_name: str = "test set",
    lora: bool = True,
    command: str | None = None,
) -> str:
    """
    The card of a model that was fine-tuned on a coreset (or on an arm that a coreset is compared with).

    Args:
        model_name (`str`):
            Name of the model, the second part of its repository id.
        existing (`str`, *optional*):
            The card that is there; its own metadata and text are kept.
        base_model (`str`):
            Model that was fine-tuned: Hub id, or a folder, of which only the name is told.
        dataset_id (`str`):
            Hub id of the dataset that holds the coreset, or a folder, of which only the name is told.
        run (`Mapping`):
            What an entry of `arms` in `results.json` holds, of this model; `test_loss` may be missing. The `arm` says
            what its rows are; `"reference"` is that of the reference model.
        results (`Mapping`):
            `results.json` of the dataset, for the comparison and the verdict; may be empty.
        split (`str`, *optional*):
            Split of the dataset that it was trained on.
        dataset_revision (`str`, *optional*):
            Commit of the dataset.
        test_name (`str`, *optional*, defaults to `"test set"`):
            Name of the rows that judged this model; a Hub id where they have one.
        lora (`bool`, *optional*, defaults to `True`):
            Whether it is an adapter, rather than a whole model.
        command (`str`, *optional*):
            Command that made it, or the comparison that it is of, without folders of one's own machine.

    Returns:
        `str`: the whole card, with evaluation results in the form that the Hub renders.
    """
    metrics = [("loss", "test_loss", "Test loss per labelled token"), ("perplexity", "test_perplexity", "Perplexity")]
    evaluated = [
        EvalResult(
            task_type="text-generation",
            dataset_type=test_name if _has_page(test_name) else "other",
            dataset_name=test_name,
            metric_type=kind,
            metric_name=label,
            metric_value=run[key],
        )
        for kind, key, label in metrics
        if is_number(run.get(key))
    ]
    ours = ModelCardData(eval_results=evaluated or None, model_name=model_name).to_dict()
    data, body = parse_card(existing) if existing is not None else ({}, f"\n# {escape_markdown(model_name)}\n")
    if is_hub_id(base_model):
        data.setdefault("base_model", base_model)
    if _has_page(dataset_id):
        add_tags(data, "datasets", [dataset_id])
    add_tags(data, "tags", ["in2core", "coreset", "sft", "trl"])
    data.setdefault("library_name", "peft" if lora else "transformers")
    data.setdefault("pipeline_tag", "text-generation")
    data |= {key: value for key, value in ours.items() if key == "model-index"}
    arguments = f'"{dataset_id}", split="{split}"'
    arguments += f', revision="{dataset_revision}"' if dataset_revision else ""
    arm = str(run.get("arm"))
    is_of_comparison = arm == REFERENCE or any(entry == run for entry in list_objects(results.get("arms")))
    section = render_template(
        "target_model.md",
        lora=lora,
        title=_TITLES.get(arm, "Fine-tuned beside a coreset" if arm in ALL_ARMS else "Fine-tuned"),
        chosen=_say_rows(arm, results),
        rows=format_number(run.get("rows"), ",.0f"),
        is_of_comparison=is_of_comparison,
        command=format_command(command) if command else None,
        base_model=_link(base_model, ""),
        dataset=_link(dataset_id, "datasets/"),
        dataset_revision=format_code(dataset_revision) if dataset_revision else None,
        split=format_code(split) if split else None,
        load_arguments=Markdown(arguments)
        if split and _has_page(dataset_id) and _PLAIN.fullmatch(arguments)
        else None,
        figures=FIGURES,
        this_run=summarize_arms([run]),
        test_name=test_name if evaluated else None,
        arms=(arms := summarize_arms(results.get("arms"))),
        means=explain_means(arms),
        verdict=get_value(results, "verdict", "text"),
    )
    return join_card(data, replace_section(body, "model", section))


def _say_rows(arm: str, results: Mapping[str, Any]) -> str | None:
    """What the rows of an arm are; nothing where that is not known."""
    if arm in METHODS:
        return f"chosen by {METHODS[arm].words}, which the coreset is compared with"
    if arm != "coreset":
        return _ROWS.get(arm)
    how = get_value(results, "choice", "how")
    how = how if isinstance(how, str) else "by influence on a validation set"
    # Of another score the sign of influence chose nothing.
    is_signed = how.startswith(("by influence", "in turn by"))
    sign = " (negative influence = proponent: training on the row lowers the validation loss)"
    return f"chosen {how}{sign if is_signed else ''}"


def add_task_results(text: str, tasks: Mapping[str, Mapping[str, Any]], model_name: str) -> str:
    """
    Put the results of tasks of lm-eval into a model's card: a section of its own, and evaluation results as metadata.

    Args:
        text (`str`):
            The card; everything else in it stays, results of other tasks too.
        tasks (`Mapping[str, Mapping]`):
            From [`~hf_in2core.evaluation.tasks.evaluate_tasks`].
        model_name (`str`):
            Name of the model in the metadata, where they have none.

    Returns:
        `str`: the whole card.

    Raises:
        ValueError: the card's metadata cannot be read, so that writing them back could lose something.
    """
    data, body = parse_card(text)
    kept: list[EvalResult] = []
    if data.get("model-index"):
        try:
            model_name, kept = model_index_to_eval_results(data["model-index"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The `model-index` of the card is not in the Hub's form ({error!r}). Correct README.md first."
            ) from error
    new = [
        EvalResult(
            task_type="text-generation",
            dataset_type="other",
            dataset_name=task,
            dataset_config=task,  # results of one type and configuration would be taken for those of one dataset
            metric_type=metric.split(" ")[0],
            metric_name=f"{metric}, {found['num_fewshot']}-shot",
            metric_value=value,
            verified=False,
        )
        for task, found in tasks.items()
        for metric, value in found["metrics"].items()
    ]
    results = [result for result in kept if result.dataset_name not in tasks] + new
    if results:
        data["model-index"] = eval_results_to_model_index(model_name, results)
    lines = [
        {
            "task": task,
            "metric": metric,
            "value": format_number(value, ".4f"),
            "stderr": format_number(found["stderr"].get(metric), ".4f"),
            "questions": format_number(found["questions"], ",d"),
            "num_fewshot": found["num_fewshot"],
            "limit": "all" if found["limit"] is None else f"{found['limit']:g} per task",
        }
        for task, found in tasks.items()
        for metric, value in found["metrics"].items()
    ]
    cut = sum(found["cut_prompts"] for found in tasks.values())
    versions = sorted({found["lm_eval"] for found in tasks.values()})
    section = render_template("tasks.md", lines=lines, cut=cut, lm_eval=", ".join(versions))
    return join_card(data, replace_section(body, "tasks", section))


def _has_page(name: str) -> bool:
    return "/" in name and is_hub_id(name)


def _link(name: str, kind: str) -> Markdown:
    """A name as a link to its page, where it has one."""
    if not _has_page(name):
        return format_code(name.rstrip("/").split("/")[-1] if name[:1] in "/.~" else name)
    return Markdown(f"[{escape_markdown(name)}](https://huggingface.co/{kind}{name})")
