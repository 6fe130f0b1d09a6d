"""Pools of data that lies outside the project: the mixture of real instructions, and the grammar rules."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from .pool import HARMFUL, OTHER, USEFUL, Pool, make_row, shuffle_rows


JUDGES_PER_RULE = 5  # of the ten test rows of a rule; the others select


def read_rows(shared: Path, name: str) -> list[dict[str, str]]:
    """
    Rows of a file of the shared data.

    Raises:
        FileNotFoundError: if it is not there.
    """
    path = shared / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: this pool is made of data that lies outside the project (its origin is in "
            "benchmarks/pools/README.md). Give the folder that holds it as --shared, or take a pool that --list calls "
            "generated."
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_judges(shared: Path, part: str, source: str) -> list[dict[str, str]]:
    """Validation or test rows of one source of the mixture."""
    rows = read_rows(shared, f"mixture/{part}_{source}.jsonl")
    return [make_row(row["prompt"], row["completion"], USEFUL, row["id"]) for row in rows]


def read_mixture(shared: Path, useful: tuple[str, ...], seed: int) -> list[dict[str, str]]:
    """The rows of the mixture in a seeded order; those of the `useful` sources are useful."""
    return shuffle_rows(
        [
            make_row(row["prompt"], row["completion"], USEFUL if row["source"] in useful else OTHER)
            for row in read_rows(shared, "mixture/pool.jsonl")
        ],
        seed,
    )


def make_mixture(seed: int, shared: Path) -> Pool:
    """The mixture: GSM8K, BoolQ, ARC-Easy and Dolly; GSM8K counts."""
    judges = {part: read_judges(shared, part, "gsm8k") for part in ("validation", "test")}
    pool = read_mixture(shared, ("gsm8k",), seed)
    return Pool({"pool": pool, **judges}, {"fractions": [0.25, 0.5]}, shared / "stories260K")


def make_mixture_two_sets(seed: int, shared: Path) -> Pool:
    """The mixture with two validation sets, GSM8K and ARC-Easy; the test set has rows of both."""
    sources = ("gsm8k", "arc_easy")
    sets = {"pool": read_mixture(shared, sources, seed)}
    sets |= {f"validation_{source}": read_judges(shared, "validation", source) for source in sources}
    sets["test"] = [row for source in sources for row in read_judges(shared, "test", source)]
    return Pool(sets, {}, shared / "stories260K")


def make_multiple_choice(seed: int, shared: Path) -> Pool:
    """Multiple choice: the ARC-Easy rows alone, whose answers are one of a few."""
    judges = {part: read_judges(shared, part, "arc_easy") for part in ("validation", "test")}
    pool = [row for row in read_mixture(shared, ("arc_easy",), seed) if row["kind"] == USEFUL]
    return Pool({"pool": pool, **judges}, {}, shared / "llama1M")


def exchange_answers(seed: int, shared: Path, share: float) -> Pool:
    """The grammar rules with a share of each rule's answers exchanged for another rule's; 50 rows select, 50 judge."""
    rng = random.Random(f"{seed}/rules")
    rows = {part: read_rows(shared, f"grammars/{part}.jsonl") for part in ("train", "test")}
    sets: dict[str, list[dict[str, str]]] = {"pool": [], "validation": [], "test": []}
    rules = sorted({row["rule"] for row in rows["train"]})
    for rule in rules:
        ours = {part: [row for row in rows[part] if row["rule"] == rule] for part in rows}
        wrong = set(rng.sample(range(len(ours["train"])), round(share * len(ours["train"]))))
        for number, row in enumerate(ours["train"]):
            given = rng.choice([other for other in rules if other != rule]) if number in wrong else rule
            sets["pool"].append(make_row(row["prompt"], f" {given}", HARMFUL if number in wrong else USEFUL))
        for number, row in enumerate(rng.sample(ours["test"], len(ours["test"]))):
            part = "test" if number < JUDGES_PER_RULE else "validation"
            sets[part].append(make_row(row["prompt"], row["completion"], USEFUL, f"{part}-{len(sets[part]):02d}"))
    sets["pool"] = shuffle_rows(sets["pool"], seed)
    steps = 3 * -(-len(sets["pool"]) // 16)  # three epochs of the whole pool, for whatever part of it
    settings = {"fractions": [1 - share], "max_steps": steps, "reference_num_train_epochs": 3}
    return Pool(sets, settings, shared / "llama1M")


def make_wrong_labels_20(seed: int, shared: Path) -> Pool:
    """Wrong labels: the name of the grammar rule is that of another one in 20 % of the rows."""
    return exchange_answers(seed, shared, 0.2)


def make_wrong_labels_40(seed: int, shared: Path) -> Pool:
    """Wrong labels: the same in 40 % of the rows."""
    return exchange_answers(seed, shared, 0.4)


FROM_SHARED: dict[str, Callable[[int, Path], Pool]] = {
    "mixture": make_mixture,
    "mixture_two_sets": make_mixture_two_sets,
    "wrong_labels_20": make_wrong_labels_20,
    "wrong_labels_40": make_wrong_labels_40,
    "multiple_choice": make_multiple_choice,
}
