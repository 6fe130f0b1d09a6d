"""Rows that are tokens already: what is wrong with them, and with masks and labels beside them."""

from collections.abc import Mapping
from operator import ge
from typing import Any

from .presets import RowError, describe_value


# What tokenised rows may have beside what preparation reads, and what says whether they can be read as they are.
SIGNS = ("attention_mask", "position_ids", "seq_lengths")
NO_LOSS = -100


def check_tokens(mapped: Mapping[str, Any], raw: Mapping[str, Any], num_tokens: int) -> None:
    """
    Check a row of tokens.

    Args:
        mapped (`Mapping[str, Any]`): What preparation reads of it.
        raw (`Mapping[str, Any]`): All of it.
        num_tokens (`int`): Size of the tokenizer's vocabulary.

    Raises:
        RowError: if it has tokens, masks or labels that cannot be, or is padded or packed: SFT would take the padding
            for text, and several documents for one.
    """
    tokens = mapped["input_ids"]
    if not isinstance(tokens, list) or not set(map(type, tokens)) <= {int}:
        raise RowError("input_ids", f"is {describe_value(tokens)}, not a list of token ids")
    if tokens and not 0 <= min(tokens) <= max(tokens) < num_tokens:
        wrong = min(tokens) if min(tokens) < 0 else max(tokens)
        raise RowError("input_ids", f"has the token {wrong}, but the tokenizer's are 0 to {num_tokens - 1}")
    for name in set(mapped) - {"input_ids"}:
        values = mapped[name]
        if not isinstance(values, list) or len(values) != len(tokens) or None in values:
            length = f"{len(values)} values" if isinstance(values, list) else describe_value(values)
            raise RowError(name, f"has {length} for {len(tokens)} tokens")
        if name != "labels" and not all(map((0, 1).__contains__, values)):
            wrong = next(value for value in values if value not in (0, 1))
            raise RowError(name, f"has {describe_value(wrong)}, where a mask has 0 or 1")
    _check_labels(mapped.get("labels", []), tokens)
    _check_signs(raw, len(tokens))


def _check_labels(labels: list[Any], tokens: list[int]) -> None:
    if set(map(type, labels)) <= {int}:
        others = {label for label, token in zip(labels, tokens, strict=False) if label != token}
        if others <= {NO_LOSS}:
            return
    for place, (label, token) in enumerate(zip(labels, tokens, strict=False)):
        if type(label) is int and label in (NO_LOSS, token):
            continue
        if type(label) is not int:
            raise RowError("labels", f"has {describe_value(label)} at {place}; a label is a token id, or {NO_LOSS}")
        raise RowError(
            "labels",
            f"has {label} at {place}, where `input_ids` has {token}: a label is its own token, unshifted "
            f"(Transformers shifts it), or {NO_LOSS} where there is no loss",
        )


def _check_signs(raw: Mapping[str, Any], num_tokens: int) -> None:
    attended, positions, lengths = (raw.get(name) for name in SIGNS)
    if isinstance(attended, list) and not all(attended):
        raise RowError(
            "attention_mask",
            f"is 0 for {num_tokens - sum(map(bool, attended))} of {num_tokens} tokens: take padding off",
        )
    packed = isinstance(lengths, list) and len(lengths) > 1
    if isinstance(positions, list):
        packed = packed or any(map(ge, positions, positions[1:]))
    if packed:
        name = "seq_lengths" if isinstance(lengths, list) and len(lengths) > 1 else "position_ids"
        raise RowError(name, "shows several documents packed into one row; give each a row of its own")
