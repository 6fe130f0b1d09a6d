"""Rows as the engine gets them: as tokens. How texts become tokens is asserted in tests/rows and tests/influence."""

import pytest
from datasets import Dataset
from helpers import make_tokens


@pytest.fixture
def pool() -> Dataset:
    return make_tokens(23, seed=0)


@pytest.fixture
def validation() -> Dataset:
    return make_tokens(7, seed=1)
