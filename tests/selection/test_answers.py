"""Whether a coreset has collapsed onto few kinds of answers."""

import numpy as np
import pytest

from hf_in2core.selection.answers import compare_answers


LETTERS = list("ABCD") * 100


def test_rows_of_one_answer_are_told_of_with_the_counts() -> None:
    found = compare_answers(LETTERS, [row for row in range(400) if LETTERS[row] == "C"])
    assert (found.coreset_kinds, found.most_common, found.count, found.pool_count) == (1.0, "C", 100, 100)
    assert found.pool_kinds == pytest.approx(4.0) and 3.8 < found.expected_kinds < 4
    assert found.warning is not None and "100 of its 100 rows answer `C`" in found.warning


def test_mixed_answers_and_free_text_are_not() -> None:
    generator = np.random.default_rng(0)
    assert compare_answers(LETTERS, generator.permutation(400)[:100]).warning is None
    texts = [f"answer {row}" for row in range(400)]
    found = compare_answers(texts, range(40))
    assert found.warning is None and found.coreset_kinds == pytest.approx(40.0)
    # A pool of one answer has nothing to collapse from.
    assert compare_answers(["yes"] * 50, range(10)).warning is None


def test_a_lopsided_pool_is_measured_by_what_random_rows_have() -> None:
    answers = ["no"] * 380 + list("ABCDEFGHIJKLMNOPQRST")
    assert compare_answers(answers, range(100)).coreset_kinds == 1.0
    assert compare_answers(answers, range(380, 400)).coreset_kinds == pytest.approx(20.0)
