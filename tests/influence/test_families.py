"""docs/families.md says what comes out of each family now."""

import pytest
from families import FAMILIES, PAGE, make_line


LINES = [
    line
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| `") and "model_type" not in line
]


def test_the_page_has_every_family() -> None:
    assert [line.split("`")[1] for line in LINES] == sorted(FAMILIES) and len(LINES) >= 40


@pytest.mark.slow
@pytest.mark.usefixtures("exact_damping")
@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split("`")[1])
def test_a_family_is_as_the_page_says(line: str) -> None:
    assert make_line(line.split("`")[1]) == line
