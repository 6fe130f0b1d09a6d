"""Which tokens of a row carry loss, and whether they are the same in what is trained on, selects and judges."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .checks import CheckedRows
    from .preparation import Preparation


def describe_kind(mapped: Mapping[str, Any]) -> str:
    """Which kind of rows a mapped row is of; TRL takes the first of a set for all of them."""
    if "input_ids" in mapped:
        return "tokens"
    values = (mapped.get("messages"), mapped.get("prompt"))
    return "a conversation" if any(isinstance(value, list) for value in values) else "plain text"


def describe_mask(mapped: Mapping[str, Any], preparation: "Preparation") -> str:
    """Which tokens of a mapped row carry loss, in words."""
    if "labels" in mapped:
        return "its own labels"
    is_split = "prompt" in mapped or "completion_mask" in mapped
    is_turns = describe_kind(mapped) == "a conversation" or "assistant_masks" in mapped
    assistant = (preparation.assistant_only_loss and is_turns) or "assistant_masks" in mapped
    completion = preparation.completion_only_loss and is_split
    if assistant:
        return "assistant turns of the completion" if completion else "assistant turns"
    return "completions" if completion else "every token"


def compare_masks(pool: "CheckedRows", others: Iterable["CheckedRows"], is_chosen: bool) -> list[str]:
    """
    Hold every set to one rule: what carries loss in the pool's rows carries loss in those that select and that judge.

    Args:
        pool ([`CheckedRows`]): The pool.
        others (`Iterable[CheckedRows]`): Validation and test sets, checked with the pool's preparation.
        is_chosen (`bool`): Whether the user has said by `completion_only_loss` which tokens carry loss.

    Returns:
        `list[str]`: what the user should know, in sentences.

    Raises:
        ValueError: if a set cannot be masked as the pool is.
    """
    said = []
    for other in others:
        if not pool.mask or not other.mask:
            continue
        if "its own labels" in (pool.mask, other.mask):
            if other.mask != pool.mask:
                remedy = (
                    " With `--completion_only_loss true` it is on their completions."
                    if other.mask == "every token" and other.format == "prompt/completion"
                    else ""
                )
                said.append(
                    f"What carries loss: {pool.mask} in the {pool.what}, {other.mask} in the {other.what}. Check that "
                    f"they mean the same.{remedy}"
                )
        elif other.mask != pool.mask:
            raise ValueError(
                f"Loss is on {pool.mask} in the {pool.what} (`{pool.format}`), but would be on {other.mask} in the "
                f"{other.what} (`{other.format}`): what selects and judges would not be what is trained on. Bring "
                "both into one format, or let every token of both carry loss: `--completion_only_loss false`."
            )
        elif other.format != pool.format and not is_chosen and "every token" in other.mask:
            said.append(
                f"Loss is on every token of the {other.what} (`{other.format}`), its prompts included, because it is "
                f"in the {pool.what} (`{pool.format}`). For answers alone give both as `prompt` and `completion`, or "
                "use `assistant_only_loss`."
            )
    return said
