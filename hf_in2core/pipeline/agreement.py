"""Whether halves of the validation rows would have chosen alike: by their mean influence, or each row in turn."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from datasets import Dataset

from hf_in2core.analysis.agreement import measure_agreement
from hf_in2core.engine.halves import say_disagreement
from hf_in2core.names import FUSED_RANK, INFLUENCE, PER_QUERY, TAKEN_BY, VALIDATION, describe_set
from hf_in2core.rows.scored import read_query_scores
from hf_in2core.selection.taking import find_overlap, measure_halves, read_overlap, say_overlap


def find_agreement(scored: Dataset, selection: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """
    How far halves of the validation sets rank the pool alike, as the fit or the influence on single rows tells.

    Args:
        scored ([`~datasets.Dataset`]): The scored pool.
        selection (`Mapping[str, Any]`): That of `results.json`.
        arguments (`Mapping[str, Any]`): Those of [`select_coreset`] that chose the coreset; empty where none leaves
            rows out.

    Returns:
        `dict`: `agreement` of the mean influence by set (`validation` for all together where each row was a query),
        empty where nothing was measured; `in_turn`, where validation rows took rows in turn, in a sentence, whether or
        not it was measured; and `warning`, what to do where what chose the coreset does not agree.
    """
    found = dict(selection.get("validation_agreement") or {})
    if PER_QUERY in scored.column_names:
        with suppress(ValueError):  # too few rows to say anything
            found = {VALIDATION: measure_agreement(scored).agreement}
    strategy, column = arguments.get("strategy", "top"), arguments.get("column", INFLUENCE)
    if strategy == "top" and column == INFLUENCE:
        said = [say_disagreement(value, f"{describe_set(name)} set") for name, value in found.items()]
        return {"agreement": found, "warning": " ".join(text for text in said if text is not None) or None}
    by_rows = strategy in ("round_robin_rows", "greedy")
    if not by_rows and not (strategy == "top" and column in {*TAKEN_BY, FUSED_RANK}):
        return {"agreement": found, "warning": None}
    fraction = float(arguments.get("fraction") or 1.0)
    if strategy == "round_robin_rows":
        scores = read_query_scores(scored)
        overlap = find_overlap(measure_halves(scores[:, ~np.isnan(scores).any(axis=0)]), fraction)
    else:
        overlap = None if by_rows else read_overlap(scored, column, fraction)
    told, warning = say_overlap(overlap, fraction)
    return {"agreement": found, "in_turn": told, "warning": warning}
