"""Names that stand in data: columns, sets, files, arms, budgets, strategies, and what a coreset is called."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple


# --- columns that scoring adds ---

INFLUENCE, RANK, NUM_LOSS_TOKENS = "influence", "influence_rank", "num_loss_tokens"
PER_QUERY, PER_CHECKPOINT = "influence_per_query", "influence_per_checkpoint"
# By these the methods of a comparison rank, beside influence.
LOSS, IFD, LESS = "loss", "ifd", "less"
COSINE_RANK, RDS_RANK, BM25_RANK, ENCODER_RANK = "cosine_rank", "rds_rank", "bm25_rank", "encoder_rank"
COSINE_CLEAN_RANK, RDS_CLEAN_RANK, FUSED_RANK = "cosine_clean_rank", "rds_clean_rank", "fused_rank"
# `influence_<name>` of a validation set cannot have these.
RESERVED_SET_NAMES = ("rank", "per_query", "per_checkpoint", "")

# --- sets of rows ---

POOL = "pool"
# The name of a validation set that was given none.
VALIDATION = "validation"

# --- files of a run and of its repository ---

RESULTS, REPLAY = "results.json", "config.yaml"

# --- arms of a comparison ---

ARMS = ("full", "coreset", "random", "opponents")
# In the order in which a headline prefers them.
BUDGETS = {"steps": "equal steps", "epochs": "equal epochs"}


class Method(NamedTuple):
    """A way to choose rows: the column that ranks them, the strategy of `select_coreset`, and what that is."""

    column: str
    strategy: str
    words: str


# Each is an arm, and a strategy of the coreset. Influence in words is that on the validation loss.
METHODS = {
    "mean": Method(INFLUENCE, "top", "influence on the mean"),
    "turns": Method(INFLUENCE, "round_robin_rows", "influence on single validation rows, in turn"),
    "cosine": Method(COSINE_RANK, "top", "influence over the norm of the row's gradient, validation rows in turn"),
    "rds": Method(RDS_RANK, "top", "RDS+: hidden states of the untrained reference, validation rows in turn"),
    "bm25": Method(BM25_RANK, "top", "BM25: shared words, validation rows in turn"),
    "encoder": Method(ENCODER_RANK, "top", "meaning by a sentence encoder, validation rows in turn"),
    "loss": Method(LOSS, "top", "lowest loss under the reference"),
    "high_loss": Method(LOSS, "bottom", "highest loss under the reference"),
    "ifd": Method(IFD, "top", "lowest IFD: the prompt helps most"),
    "cosine_clean": Method(COSINE_CLEAN_RANK, "top", "as cosine, the quarter of highest loss last"),
    "rds_clean": Method(RDS_CLEAN_RANK, "top", "as rds, the quarter of highest loss last"),
    "fused": Method(FUSED_RANK, "top", "the ranks of cosine and rds fused"),
    "less": Method(LESS, "top", "LESS: cosine with Adam's step on the row, over checkpoints of the reference"),
}
# Ranks that are turns in which validation rows took the rows, or come of such: by whose score, which two columns keep.
TAKEN_BY = {
    COSINE_RANK: "cosine",
    COSINE_CLEAN_RANK: "cosine",
    RDS_RANK: "rds",
    RDS_CLEAN_RANK: "rds",
    BM25_RANK: "bm25",
    ENCODER_RANK: "encoder",
}
# That score in words. Cosines are those of influence, negative for proponents; similarities are large for close rows.
TAKING_SCORES = {"cosine": "cosine", "rds": "similarity", "bm25": "BM25 score", "encoder": "similarity"}
# Those of `--strategy auto`, the cheapest and most different first: what the budget has no runs for is left out.
CANDIDATES = ("cosine", "bm25", "cosine_clean", "rds", "rds_clean", "turns", "fused", "loss", "mean")
# From what costs least to what costs most: words, hidden states, losses of a reference, its gradients.
COSTS = ("bm25", "rds", "loss", "ifd", "rds_clean", "mean", "turns", "cosine", "cosine_clean", "fused")
AUTO = "auto"
# Random rows that are as long as those of the coreset.
LENGTH_MATCHED = "length_matched"
ALL_ARMS = (*ARMS, LENGTH_MATCHED, *METHODS)

# --- how rows are chosen ---

STRATEGIES = ("top", "bottom", "random", "round_robin", "round_robin_rows", "greedy")
# How many rows each group gets, where rows are chosen within groups.
GROUP_QUOTAS = ("proportional", "equal")
# Columns of groups that are made where they are asked for, and what they are clusters of.
ANSWER_CLUSTER, ROW_CLUSTER = "answer_cluster", "row_cluster"
CLUSTERS = {ANSWER_CLUSTER: "answers", ROW_CLUSTER: "rows"}
# These read the influence on every validation row.
STRATEGIES_BY_ROW = ("round_robin_rows", "greedy")

# How the losses of a row's labelled tokens become the row's loss; see losses.compute_token_weights.
LOSS_REDUCTIONS = {
    "mean": "mean over its labelled tokens",
    "sum": "sum over its labelled tokens",
    "sqrt": "sum over its labelled tokens, divided by the square root of their number",
    "max": "its hardest labelled token alone",
}

# What results hang on, with its version in every record.
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")


def has_named_sets(validation_sets: Iterable[str]) -> bool:
    """Whether each validation set gets a column of its own; a single one without a name does not."""
    return list(validation_sets) != [VALIDATION]


def name_set_column(validation_set: str) -> str:
    """The column of the influence on one validation set."""
    return f"{INFLUENCE}_{validation_set}"


def list_score_columns(validation_sets: Iterable[str]) -> list[str]:
    """The columns with one score per row, in float64: `influence`, and that of each named validation set."""
    sets = list(validation_sets)
    return [INFLUENCE, *map(name_set_column, sets if has_named_sets(sets) else [])]


def list_added_columns(
    validation_sets: Iterable[str], per_query: bool = False, per_checkpoint: bool = False
) -> list[str]:
    """All columns that scoring a pool adds."""
    names = [*list_score_columns(validation_sets), RANK, NUM_LOSS_TOKENS]
    return names + [PER_QUERY] * per_query + [PER_CHECKPOINT] * per_checkpoint


def name_taking_columns(column: str) -> tuple[str, ...]:
    """Beside a rank of `TAKEN_BY`: by what score each row was taken, and by which validation row; else none."""
    method = TAKEN_BY.get(column)
    return () if method is None else (f"{method}_score", f"{method}_taker")


def list_method_columns(columns: Iterable[str]) -> list[str]:
    """All columns that the making of some columns of `METHODS` adds."""
    return list(dict.fromkeys(name for column in columns for name in (column, *name_taking_columns(column))))


def list_set_columns(columns: Sequence[str]) -> list[str]:
    """Of the columns of a scored dataset those with the influence on one named validation set."""
    others = (RANK, PER_QUERY, PER_CHECKPOINT)
    return [name for name in columns if name.startswith(f"{INFLUENCE}_") and name not in others]


def name_coreset(fraction: float, arm: str = "coreset") -> str:
    """
    The one name of the rows that an arm keeps of a pool: of their record, folder, split and arm.

    `coreset_25` for a quarter, `random_12.5` for an eighth at random; `full` has no share in its name.
    """
    return arm if arm == "full" else f"{arm}_{100 * fraction:g}"


def parse_coreset(name: str) -> tuple[str, float | None]:
    """
    The arm and the fraction that a name says; no fraction where it names none in (0, 1].

    `("coreset", 0.25)` for `coreset_25`, `("full", 1.0)` for `full`, `("by_hand", None)` for `by_hand`.
    """
    arm, _, percent = name.rpartition("_")
    if arm and re.fullmatch(r"\d+(\.\d+)?", percent) and 0 < float(percent) <= 100:
        return arm, float(percent) / 100
    return name, 1.0 if name == "full" else None


def get_prefix(config_name: str) -> str:
    """Where a repository keeps what is published beside the rows of a configuration."""
    return "" if config_name == "default" else f"{config_name}/"


def name_validation_config(config_name: str) -> str:
    """The configuration of a repository with the validation sets of another one's pool."""
    return VALIDATION if config_name == "default" else f"{config_name}-{VALIDATION}"


def describe_set(validation_set: str) -> str:
    """A validation set in words, for `the … set`: `validation math`; `validation` where it was given no name."""
    return VALIDATION if validation_set == VALIDATION else f"{VALIDATION} {validation_set}"
