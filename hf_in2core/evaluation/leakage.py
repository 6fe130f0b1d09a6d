"""What the sets of a run have in common, in words, from `data` of results.json: whether the test set is a judge."""

from collections.abc import Mapping
from typing import Any

from hf_in2core.names import POOL

from .formats import get_object, get_value, is_number, list_objects


def _list_shared(data: Any) -> list[tuple[str, str, float]] | None:
    """Set, other set and rows of the first that are in the other, of every pair; `None` if none was compared."""
    pairs = [
        (str(name), str(other), count)
        for name, facts in (data.items() if isinstance(data, Mapping) else ())
        for other, count in get_object(facts, "shared").items()
        if is_number(count)
    ]
    return pairs or None


def _say_pairs(data: Any, pairs: list[tuple[str, str, float]]) -> str:
    said = []
    for name, other, count in pairs:
        rows = get_value(data, name, "rows")
        of = f"{count:,.0f} of {rows:,.0f}" if is_number(rows) else f"{count:,.0f}"
        said.append(f"{of} rows of the {name if name == 'pool' else f'{name} set'} are in the {other} set too")
    return ", ".join(said)


def say_shared(data: Any) -> str:
    """The warning that a verdict begins with where sets share rows; empty where they do not."""
    found = [pair for pair in _list_shared(data) or [] if pair[2] > 0]
    if not found:
        return ""
    return (
        f"WARNING: sets that should have no row in common share some: {_say_pairs(data, found)}. "
        "What was measured on them says little of other rows."
    )


def say_judge(data: Any) -> str:
    """What the arms are judged on: a test set that is known to be apart from the other sets, or what it shares."""
    pairs = _list_shared(data)
    if pairs is None:
        return "the test set"
    found = [pair for pair in pairs if pair[1] == "test" and pair[2] > 0]
    if not found:
        # What the rows were chosen by is not known to every comparison.
        selected = any(name != POOL and other == "test" for name, other, _ in pairs)
        known = "which neither trained nor selected anything" if selected else "of which no row is in the pool"
        return f"the test set, {known}"
    return f"the test set, which is not apart from what trained and selected: {_say_pairs(data, found)}"


def describe_shared(facts: Any) -> list[str]:
    """What one set shares with others, in parts of a sentence that begins with its rows."""
    parts = [
        f"{count:,.0f} of them in the {other} set too"
        for other, count in get_object(facts, "shared").items()
        if is_number(count) and count > 0
    ]
    near = get_value(facts, "near_copies", "rows")
    return parts + ([f"{near:,.0f} with a near-copy in the pool"] if is_number(near) and near > 0 else [])


def list_near_copies(data: Any) -> list[dict[str, Any]]:
    """Sets that have near-copies in the pool, with `name`, `count` in words and `pairs`, for the page."""
    found = []
    for name, facts in data.items() if isinstance(data, Mapping) else ():
        count, rows = get_value(facts, "near_copies", "rows"), get_value(facts, "rows")
        if not is_number(count) or count <= 0:
            continue
        pairs = [
            {key: str(pair.get(key)) for key in ("row", "pool_row", "text", "pool_text")}
            | {"share": f"{pair['share']:.0%}".replace("%", " %") if is_number(pair.get("share")) else ""}
            for pair in list_objects(get_value(facts, "near_copies", "pairs"))
        ]
        of = f"{count:,.0f} of {rows:,.0f}" if is_number(rows) else f"{count:,.0f}"
        found.append({"name": str(name), "count": of, "pairs": pairs})
    return found
