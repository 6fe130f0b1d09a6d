"""Whether a coreset has collapsed onto few kinds of answers, which the ranking of a multiple-choice pool can do."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from hf_in2core.rows.text import CUT


# Of the kinds that as many random rows have.
MIN_SHARE = 0.5
NUM_DRAWS = 20
LONGEST_ANSWER = 60


@dataclass(frozen=True)
class Answers:
    """
    What [`compare_answers`] returns.

    Attributes:
        pool_kinds, coreset_kinds (`float`): How many equally frequent answers would be as mixed as those of the pool
            and of the coreset: the exponential of their entropy, 1 = all alike.
        expected_kinds (`float`): The same of as many random rows, the mean over 20 draws.
        most_common (`str`): The most frequent answer of the coreset.
        count, pool_count (`int`): Rows of the coreset and of the pool that have it.
        warning (`str` or `None`): In words, with the counts, if the coreset has less than half of the expected kinds.
    """

    pool_kinds: float
    coreset_kinds: float
    expected_kinds: float
    most_common: str
    count: int
    pool_count: int
    warning: str | None


def compare_answers(answers: Sequence[Hashable], kept: Sequence[int] | np.ndarray, seed: int = 0) -> Answers:
    """
    Compare how mixed the answers of a coreset are with those of as many random rows.

    Args:
        answers (`Sequence[Hashable]`):
            What each row of the pool answers, such as its completion.
        kept (`Sequence[int]` or `numpy.ndarray`):
            Positions of the coreset's rows, at least one.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random draws.

    Returns:
        [`Answers`]
    """
    _, codes = np.unique([str(answer) for answer in answers], return_inverse=True)
    kept = np.asarray(kept)
    generator = np.random.default_rng(seed)
    draws = [_count_kinds(codes[generator.permutation(len(codes))[: len(kept)]]) for _ in range(NUM_DRAWS)]
    expected, kinds = float(np.mean(draws)), _count_kinds(codes[kept])
    code, count = Counter(codes[kept].tolist()).most_common(1)[0]
    pool_count = int((codes == code).sum())
    answer = " ".join(str(answers[int(np.flatnonzero(codes == code)[0])]).split())
    shown = answer if len(answer) <= LONGEST_ANSWER else answer[:LONGEST_ANSWER] + CUT
    warning = (
        f"The coreset has collapsed onto few answers: {count:,} of its {len(kept):,} rows answer `{shown}` (of the "
        f"pool's {len(codes):,} rows {pool_count:,} do), as mixed as {kinds:.1f} equally frequent answers, where as "
        f"many random rows have {expected:.1f}. Let validation rows choose in turn (--strategy round_robin_rows or "
        "cosine), or choose within each answer (--group_column, with the column of the answers)."
    )
    return Answers(
        pool_kinds=_count_kinds(codes),
        coreset_kinds=kinds,
        expected_kinds=expected,
        most_common=shown,
        count=count,
        pool_count=pool_count,
        warning=warning if kinds < MIN_SHARE * expected else None,
    )


def _count_kinds(codes: np.ndarray) -> float:
    """The exponential of the entropy of some codes."""
    shares = np.unique(codes, return_counts=True)[1] / len(codes)
    return float(np.exp(-(shares * np.log(shares)).sum()))
