"""What makes two rows the same, and which rows of a set are in another one, or nearly so."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_array

from hf_in2core.progress import make_bar

from .hashes import find_shared_rows, hash_value
from .presets import OTHER_CONTENTS


if TYPE_CHECKING:
    from .checks import CheckedRows

# A near-copy holds this share of the other row's runs of words.
NEAR = 0.6
RUN = 3
# Runs of shorter rows recur by chance.
SHORTEST = 8
# What is written without spaces between its words counts by the character.
_WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+")
_CHUNK = 1024


@dataclass(frozen=True)
class Overlap:
    """
    Rows of a set that are in another one too.

    Attributes:
        what, other (`str`): What messages call the two sets.
        rows (`numpy.ndarray`): Positions in the first set, ascending.
        num_rows (`int`): How many rows the first set has.
        first_in_other (`int`): Where the first of them is in the other set.
    """

    what: str
    other: str
    rows: np.ndarray
    num_rows: int
    first_in_other: int

    def __str__(self) -> str:
        return (
            f"{len(self.rows):,} of {self.num_rows:,} rows of the {self.what} are in the {self.other} too (row "
            f"{self.rows[0]} of the {self.what} is row {self.first_in_other} of the {self.other})"
        )


def hash_content(row: Mapping[str, Any]) -> str:
    """
    Hash of what a row says, which is equal for rows that count as the same.

    Two rows are the same if their prompt and completion, or their texts, are after Unicode's NFKC, case folding, and
    with every run of white space as one space. Conversations are the same if their turns have the same roles and say
    the same (content, also in parts, and tool calls or reasoning), however they are divided into prompt and
    completion; tools and settings of the template do not count. Rows that are tokens are the same if their
    `input_ids` are.

    Args:
        row (`Mapping[str, Any]`):
            From [`~hf_in2core.rows.columns.map_row`].

    Returns:
        `str`: 32 hexadecimal digits.
    """
    return hash_value(_read_content(row))


def _read_content(row: Mapping[str, Any]) -> list[Any]:
    if "input_ids" in row:
        return list(row["input_ids"])
    content: list[Any] = []
    for name in ("messages", "prompt", "completion", "text"):
        value = row.get(name)
        if isinstance(value, list):
            content += [_read_turn(turn) for turn in value]
        elif value is not None:
            content.append(_normalize(value))
    return content


def _read_turn(turn: Mapping[str, Any]) -> list[Any]:
    content = turn.get("content")
    if isinstance(content, list):
        content = " ".join(str(part.get("text", "")) for part in content)
    others = {name: turn[name] for name in OTHER_CONTENTS if turn.get(name)}
    return [_normalize(turn.get("role")), _normalize(content or ""), *([_normalize(others)] if others else [])]


def _normalize(value: Any) -> Any:
    if isinstance(value, str):
        # Folding can undo the composition that it needs.
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", value).casefold())
        return " ".join(folded.split())
    if isinstance(value, Mapping):
        return {key: _normalize(item) for key, item in value.items()}
    return [_normalize(item) for item in value] if isinstance(value, list) else value


def find_overlap(checked: "CheckedRows", other: "CheckedRows") -> Overlap | None:
    """Which well-formed rows of a set are in another one too, as [`hash_content`] has it; `None` if none is."""
    good, others = checked.list_good(), other.list_good()
    hashes, other_hashes = ([found.hashes[row] for row in rows] for found, rows in ((checked, good), (other, others)))
    shared = good[find_shared_rows(hashes, other_hashes)]
    if len(shared) == 0:
        return None
    first = int(others[other_hashes.index(checked.hashes[shared[0]])])
    return Overlap(checked.what, other.what, shared, checked.num_rows, first)


def list_words(row: Mapping[str, Any]) -> list[Any]:
    """The words (or tokens) of a row of [`~hf_in2core.rows.columns.map_row`], without case and punctuation."""
    if "input_ids" in row:
        return list(row["input_ids"])
    return _WORD.findall(" ".join(_list_texts(_read_content(row))))


def _list_texts(value: Any) -> Iterable[str]:
    if isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _list_texts(item)
    elif value is not None:
        yield str(value)


def find_near_copies(
    pool: Iterable[Sequence[Any]], num_rows: int, others: Sequence[Sequence[Any]]
) -> dict[int, tuple[int, float]]:
    """
    Find rows that the pool nearly holds: a row of it has 60 % of their runs of three words.

    A run weighs the less the more rows of the pool have it (`log((2 + rows) / (1 + rows with it))`), so that a
    template makes no copies. Exact, by one sparse product; what is kept of the pool are the runs that others have too.

    Args:
        pool (`Iterable[Sequence]`):
            Words of each row, from [`list_words`].
        num_rows (`int`):
            How many rows it has.
        others (`Sequence[Sequence]`):
            Words of the rows that should not be in it. Those of fewer than eight words are never found.

    Returns:
        `dict[int, tuple[int, float]]`: by position in `others`, ascending, the position of the pool's nearest row
        (the first of equals) and the share of the runs that it has, in [0.6, 1].
    """
    known: dict[tuple[Any, ...], int] = {}
    wanted = [[known.setdefault(run, len(known)) for run in _list_runs(words)] for words in others]
    held: list[list[int]] = []
    if not known:
        return {}
    with make_bar(num_rows, "Looking for near-copies", brief=True) as bar:
        for words in pool:
            held.append([known[run] for run in _list_runs(words) if run in known])
            bar.update()
    in_pool, in_others = _make_matrix(held, len(known)), _make_matrix(wanted, len(known))
    rarity = np.log((2 + num_rows) / (1 + in_pool.sum(axis=0)))
    weighted = in_others.multiply(rarity).tocsr()
    totals = weighted.sum(axis=1)
    nearest: dict[int, tuple[int, float]] = {}
    for start in range(0, num_rows, _CHUNK):
        shares = (in_pool[start : start + _CHUNK] @ weighted.T).tocoo()
        # Rounding must not hang on the order in which a sum was made.
        values = np.round(shares.data / totals[shares.col], 6)
        for place in np.flatnonzero(values >= NEAR):
            row, other, share = start + int(shares.row[place]), int(shares.col[place]), float(values[place])
            best = nearest.get(other)
            if best is None or (-share, row) < (-best[1], best[0]):
                nearest[other] = (row, share)
    return dict(sorted(nearest.items()))


def _list_runs(words: Sequence[Any]) -> set[tuple[Any, ...]]:
    return set(zip(*(words[start:] for start in range(RUN)), strict=False)) if len(words) >= SHORTEST else set()


def _make_matrix(rows: list[list[int]], width: int) -> csr_array:
    ends = np.cumsum([0, *map(len, rows)])
    indices = np.fromiter((index for row in rows for index in row), dtype=np.int64, count=ends[-1])
    return csr_array((np.ones(len(indices)), indices, ends), shape=(len(rows), width))
