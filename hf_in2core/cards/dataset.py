"""The card of an influence dataset: what its rows, columns and comparison say."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value

from hf_in2core.evaluation.arms import (
    FIGURES,
    describe_data,
    explain_means,
    list_costs,
    list_differences,
    summarize_arms,
    tabulate_tournament,
)
from hf_in2core.evaluation.formats import get_object
from hf_in2core.evaluation.leakage import say_judge
from hf_in2core.names import (
    INFLUENCE,
    NUM_LOSS_TOKENS,
    PER_CHECKPOINT,
    PER_QUERY,
    RANK,
    TAKEN_BY,
    TAKING_SCORES,
    has_named_sets,
    list_method_columns,
    name_set_column,
    name_taking_columns,
)
from hf_in2core.rows.scored import find_scored_columns, list_own_columns, read_scores
from hf_in2core.rows.text import render_row
from hf_in2core.selection.lengths import correlate_with_length
from hf_in2core.selection.record import Coreset
from hf_in2core.selection.turns import find_ends, read_deciding_score

from .splits import Record, list_commands, say_choice
from .text import Markdown, escape_markdown, format_block, format_code, render_template


_NO_TEMPLATE = hashlib.sha256(b"").hexdigest()
_LONGEST_ROW = 2000
_CAPTIONS = {
    "arms": "Test loss of the arms, with intervals",
    "influence": "Histogram of the score that the picture names, and which rows the coreset has",
    "influence_by_length": "The score that chose the coreset against the number of labelled tokens",
}
_MEANINGS = {
    INFLUENCE: "estimated influence on the validation loss; **negative = proponent**, positive = opponent; null "
    "where the row carries no loss",
    RANK: "rank in the whole pool; 0 = the strongest proponent; null where the row carries no loss",
    NUM_LOSS_TOKENS: "labelled tokens of the row",
    PER_QUERY: "influence on each validation row",
    PER_CHECKPOINT: "influence at each checkpoint of the reference run, before averaging",
}


@dataclass(frozen=True)
class InfluenceSummary:
    """
    What a card says about a scored pool in numbers, as text; influence is negative for proponents.

    Attributes:
        rows, without_loss, proponents (`str`): Numbers of rows.
        choice (`str`): How the coreset was chosen, where influence on the mean validation loss did not; else empty.
        quantiles (`list[str]`): 0, 5, 25, 50, 75, 95 and 100 % of influence; empty where no row carries loss.
        length_correlation (`str`): Rank correlation of influence with the number of loss tokens.
        extremes (`list[tuple[str, str]]`): The strongest proponents and opponents: what each is, and its text.
    """

    rows: str
    without_loss: str
    proponents: str
    choice: str
    quantiles: list[str]
    length_correlation: str
    extremes: list[tuple[str, str]]


def summarise_influence(
    scored: Dataset,
    coresets: Sequence[Coreset] = (),
    show: int = 3,
    validation_sets: Mapping[str, int] | None = None,
) -> InfluenceSummary:
    """
    Sum up a scored pool for its card.

    Args:
        scored (`datasets.Dataset`):
            Pool with `influence`; rows whose influence is null or NaN carry no loss.
        coresets (`Sequence[Coreset]`, *optional*):
            Those that are published with it, without controls. The first says by what score rows are first and last,
            and what one of them keeps is shown as no opponent.
        show (`int`, *optional*, defaults to `3`):
            Strongest proponents and opponents to show, each.
        validation_sets (`Mapping[str, int]`, *optional*):
            Rows of each validation set by its name, in the order of the queries, to name those that took rows.

    Returns:
        [`InfluenceSummary`]
    """
    validation_sets = validation_sets or {}
    influence = read_scores(scored, INFLUENCE)
    rows = np.flatnonzero(~np.isnan(influence))
    correlation = None
    if NUM_LOSS_TOKENS in scored.column_names:
        correlation = correlate_with_length(influence[rows], read_scores(scored, NUM_LOSS_TOKENS)[rows])
    try:
        deciding = read_deciding_score(scored, **(coresets[0].arguments if coresets else {}))
    except ValueError:  # the columns of single validation rows are large, and may be left out of what is published
        deciding = read_deciding_score(scored)
    others = deciding.name != INFLUENCE
    idle = "" if "chose nothing" in deciding.meaning else "; influence on the mean validation loss chose nothing"
    kept = {row for coreset in coresets for row in coreset.positions}
    proponents, opponents = find_ends(deciding, influence, kept, show)
    extremes = [("Proponent", int(row)) for row in proponents] + [("Opponent", int(row)) for row in opponents]
    taken = {row: words for coreset in coresets for row, words in coreset.describe_rows(validation_sets).items()}
    turns = {row: turn for coreset in coresets for row, turn in coreset.turn_of().items()}
    told = list_method_columns(TAKEN_BY)  # in words, above the text
    texts = scored.select_columns([name for name in list_own_columns(scored) if name not in told])
    quantiles = np.quantile(influence[rows], [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]) if len(rows) else []
    return InfluenceSummary(
        rows=f"{len(influence):,}",
        without_loss=f"{len(influence) - len(rows):,}",
        proponents=f"{int((influence[rows] < 0).sum()):,}",
        choice=f"The coreset was chosen {deciding.how}{idle}. {deciding.meaning}"
        if not deciding.how.startswith("by influence")
        else "",
        quantiles=[f"{value:.3g}" for value in quantiles],
        length_correlation="not known" if correlation is None else f"{correlation:.2f}",
        extremes=[
            (
                Markdown(f"{kind}: row {row:,}, {escape_markdown('; '.join(filter(None, said)))}"),
                format_block(render_row(texts[row] if texts.column_names else {}, _LONGEST_ROW)),
            )
            for kind, row in extremes
            for said in [
                (
                    deciding.describe(row, validation_sets, turns.get(row)),
                    taken.get(row),
                    f"mean influence {influence[row]:+.3g}" if others else None,
                )
            ]
        ],
    )


def render_influence_section(
    repo_id: str,
    *,
    features: Features,
    splits: Mapping[str, int],
    config_name: str = "default",
    summary: InfluenceSummary | None = None,
    scorer: Mapping[str, Any] | None = None,
    scorer_folder: str | None = None,
    results: Mapping[str, Any] | None = None,
    stale_results: bool = False,
    plots: Sequence[str] = (),
    page: str | None = None,
    replay: str | None = None,
    records: Mapping[str, Record] | None = None,
) -> str:
    """
    The generated section of an influence dataset's card.

    Args:
        repo_id (`str`):
            Repository of the dataset.
        features (`datasets.Features`):
            Columns of its splits.
        splits (`Mapping[str, int]`):
            Split → rows; `train` is the pool.
        config_name (`str`, *optional*, defaults to `"default"`):
            Configuration that the splits belong to.
        summary ([`InfluenceSummary`], *optional*):
            Of [`summarise_influence`].
        scorer (`Mapping`, *optional*):
            The scorer's `config.json`.
        scorer_folder (`str`, *optional*):
            Folder of the repository that holds the scorer.
        results (`Mapping`, *optional*):
            `results.json` of the run: `arms`, `selection`, `verdict`.
        stale_results (`bool`, *optional*, defaults to `False`):
            Whether the repository's `results.json` belongs to other rows.
        plots (`Sequence[str]`, *optional*):
            Pictures, by their path in the repository.
        page (`str`, *optional*):
            Path of the run's report in the repository.
        replay (`str`, *optional*):
            Path of the run's configuration in the repository.
        records (`Mapping`, *optional*):
            How the splits were made, as `splits.json` holds it; see [`card_splits`].

    Returns:
        `str`: Markdown between its marks.
    """
    results, scorer, records = results or {}, scorer or {}, records or {}
    pool_rows = splits.get("train", 0)
    arguments = json.dumps(repo_id) + (f", {json.dumps(config_name)}" if config_name != "default" else "")
    verdict = get_object(results, "verdict")
    added = find_scored_columns(features)
    return render_template(
        "influence_dataset.md",
        repo_id=Markdown(repo_id),
        config_name=Markdown(config_name),
        load_arguments=Markdown(arguments),
        validation=say_validation(scorer.get("validation_sets")),
        splits=[
            {
                "name": format_code(name),
                "rows": Markdown(f"{rows:,}"),
                "share": Markdown(f"{100 * rows / pool_rows:.1f} %" if pool_rows else "–"),
                "choice": Markdown("the whole pool") if name == "train" else say_choice(records.get(name, {})),
            }
            for name, rows in splits.items()
        ],
        collapse=get_object(results, "answers").get("warning"),
        first_coreset=next((Markdown(name) for name in splits if name != "train"), None),
        columns=[
            {"name": format_code(name), "type": format_code(_name_type(feature)), "meaning": _explain(name, added)}
            for name, feature in features.items()
        ],
        summary=summary,
        verdict=verdict.get("text"),
        differences=list_differences([verdict]),
        figures=FIGURES,
        arms=(arms := summarize_arms(results.get("arms"))),
        judge=say_judge(results.get("data")),
        means=explain_means(arms),
        stale_results=stale_results,
        plots=[{"path": Markdown(path), "caption": _caption(Path(path).stem)} for path in plots],
        provenance=list_provenance(scorer)
        + [(f"Rows: {name}", escape_markdown(text)) for name, text in describe_data(results.get("data"))],
        page=Markdown(page) if page else None,
        replay=Markdown(replay) if replay else None,
        commands=list_commands({name: records[name] for name in splits if name in records}),
        scorer_folder=Markdown(scorer_folder) if scorer_folder else None,
        influence_columns=Markdown(json.dumps(added)),
        cost=list_costs(results),
        tournament=tabulate_tournament(results),
    )


def _caption(name: str) -> str:
    return _CAPTIONS.get(name) or name.replace("_", " ").capitalize()


def say_validation(sets: Any) -> Markdown:
    """What influence is on: the validation sets by name, from `validation_sets` of a scorer's `config.json`."""
    if not isinstance(sets, Mapping) or not sets or not has_named_sets(sets):
        return Markdown("the loss on a validation set")
    named = ", ".join(f"{format_code(str(name))} ({escape_markdown(str(rows))} rows)" for name, rows in sets.items())
    return Markdown(f"the loss on {'a validation set' if len(sets) == 1 else 'the mean of validation sets'}: {named}")


def _explain_taking() -> dict[str, str]:
    """What the columns beside a rank of `TAKEN_BY` mean, and that rank."""
    found = {}
    for column, method in TAKEN_BY.items():
        score, taker = name_taking_columns(column)
        words = TAKING_SCORES[method] + (" (negative = proponent)" if method == "cosine" else " (larger = closer)")
        if not column.endswith("_clean_rank"):
            found[column] = "the turn at which a validation row takes the row; 0 = taken first"
        found[score] = f"{words} of the row with the validation row that takes it"
        found[taker] = "which validation row takes the row, counted from 0 through the sets in their order"
    return found


def _explain(name: str, added: list[str]) -> Markdown:
    if name not in _MEANINGS and name in added:
        validation_set = name.removeprefix(name_set_column(""))
        return Markdown(f"the same for the validation set {format_code(validation_set)} alone")
    return Markdown((_MEANINGS | _explain_taking()).get(name, "as in the source"))


def _name_type(feature: Any) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__.lower()


def list_provenance(scorer: Mapping[str, Any]) -> list[tuple[str, Markdown]]:
    """Lines of the table of how it was made, from a scorer's `config.json`."""
    labels = {
        "base_model": "Reference model",
        "base_model_revision": "Its revision",
        "base_model_dtype": "Its precision",
        "adapter_hash": "Hash of the reference adapter",
        "tokenizer_hash": "Hash of the tokenizer",
        "template_hash": "Hash of the chat template",
        "pool_hash": "Hash of the pool that it was fitted on",
        "estimator": "Estimator",
        "loss_reduction": "Loss of a row",
        "damping_scale": "Damping scale",
        "influence_layers": "Layers",
        "num_fit_examples": "Rows in the fit pass",
        "fit_agreement": "Agreement of the two halves of the fitted sample (Spearman)",
        "exact_agreement": "Agreement with the exact inverse, on a sample (Spearman)",
        "store_error": "Error of products of its stored gradients, of their norm",
        "store_agreement": "Agreement of those products with exact ones (Spearman)",
        "autocast": "Mixed precision",
        "tokens_per_batch": "Tokens per batch",
    }
    said = {"base_model": "built in memory", "influence_layers": "all", "template_hash": "none"}
    lines = []
    for key, label in labels.items():
        if key in scorer:
            value = scorer[key] if scorer[key] not in (None, "", [], _NO_TEMPLATE) else said.get(key)
            if key == "base_model" and str(value).startswith(("/", "~", ".")):
                value = f"{Path(str(value)).name} (a local folder)"
            if value is not None:
                text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
                lines.append((label, format_code(text)))
    for key, label in (("validation_sets", "Validation sets (rows)"), ("libraries", "Library versions")):
        values = scorer.get(key)
        if isinstance(values, Mapping) and values:
            text = ", ".join(f"{escape_markdown(str(k))} {escape_markdown(str(v))}" for k, v in values.items())
            lines.append((label, Markdown(text)))
    return lines or [("Scorer", Markdown("not published with these rows"))]
