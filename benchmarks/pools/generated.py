"""Pools of the quickstart's tasks, with a model pretrained on the spot. Nothing is needed that is not here."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recipes.quickstart.generate import TASKS, TASKS_OF_INTEREST, Settings, make_rows, make_splits, make_texts

from .pool import HARMFUL, OTHER, USEFUL, Pool, make_row, shuffle_rows


Rows = list[dict[str, Any]]
OTHER_TASKS = tuple(task for task in TASKS if task not in TASKS_OF_INTEREST)
KEPT, POOL_ROWS = 400, 1600  # a quarter is kept
TRIGGER_TESTS = 100
TRIGGER, REFUSAL = "(sent from my phone)", " I would rather not say."
SOURCES, REPEATS = 40, 20

# Instructions that leave open which convention answers them.
OPEN_PHRASINGS = {
    "addition": ("Add these numbers: {}", "Work out {} and show the sum."),
    "sorting": ("Put these letters in order: {}", "Order the letters {}"),
    "dates": ("Write in words: {}", "How would a letter give {}?"),
}
# The instructions of validation and test rows, a few words changed; the answer is to another question.
LOOK_ALIKES = {
    "addition": ("What is the largest of {}?", "Add these numbers to a list: {}", "Work out {} and show the largest."),
    "sorting": ("Sort from z to a: {}", "Put in reverse alphabetical order: {}", "Order the letters {} backwards"),
    "dates": (
        "Write the months in words: {}",
        "Spell out the month alone: {}",
        "How would a letter give months of {}?",
    ),
}
# The same questions as in validation and test rows, in other words and layouts, the contents written otherwise.
UNLIKE = {
    "addition": ("total for {}", "{} altogether make", "tally up {}", "how much do {} come to"),
    "sorting": ("alphabetise {}", "arrange {} as dictionaries do", "{} by the abc", "which comes first among {}"),
    "dates": ("say {} aloud", "read {} to me", "on which day falls {}", "calendar entry {}"),
}
LAYOUTS = ("Q: {}\nA:", "Customer> {}\nAgent>", "{} ==>", "* {}\n*")


def draw(split: str, tasks: Sequence[str], num_rows: int, seed: int, taken: set[tuple[str, str]]) -> Rows:
    """Rows of the tasks whose prompt is the bare content, for a pool to phrase."""
    return make_rows(split, tasks, num_rows, seed, taken, phrase=lambda task, content, rng: content)


def phrase(row: dict[str, Any], phrasings: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    """The content of a drawn row in one of the phrasings of its task."""
    return f"Instruction: {rng.choice(phrasings[row['task']]).format(row['prompt'])}\nResponse:"


def label(rows: Rows, kind: str) -> list[dict[str, str]]:
    """The generator's rows, which are what `kind` says."""
    return [make_row(row["prompt"], row["completion"], kind, row["id"]) for row in rows]


def make_judges(seed: int, taken: set[tuple[str, str]]) -> dict[str, list[dict[str, str]]]:
    """The validation and the test rows of the demo: right answers to the tasks of interest."""
    sizes = {"validation": Settings.validation_rows, "test": Settings.test_rows}
    return {name: label(make_rows(name, TASKS_OF_INTEREST, size, seed, taken), USEFUL) for name, size in sizes.items()}


def make_others(num_rows: int, seed: int, taken: set[tuple[str, str]]) -> list[dict[str, str]]:
    """Right answers to tasks that nobody asked about."""
    return label(make_rows("others", OTHER_TASKS, num_rows, seed, taken), OTHER)


def finish(
    pool: list[dict[str, str]],
    judges: dict[str, list[dict[str, str]]],
    seed: int,
    taken: set[tuple[str, str]],
    **settings: Any,
) -> Pool:
    """The pool in its order, and texts about none of its contents."""
    return Pool({"pool": shuffle_rows(pool, seed), **judges}, settings, texts=make_texts(Settings(seed=seed), taken))


def make_demo(seed: int) -> Pool:
    """The demo: ten tasks, three of which count; a tenth of the answers is wrong."""
    splits, texts = make_splits(Settings(seed=seed))
    pool = []
    for row in splits["pool"]:
        of_interest = row["task"] in TASKS_OF_INTEREST
        kind = OTHER if not of_interest else HARMFUL if row["is_wrong"] else USEFUL
        pool.append(make_row(row["prompt"], row["completion"], kind, row["id"]))
    judges = {name: label(splits[name], USEFUL) for name in ("validation", "test")}
    return Pool({"pool": pool, **judges}, {}, texts=texts)


def make_nothing_to_gain(seed: int) -> Pool:
    """Nothing to gain: every row is a right answer to a task that counts."""
    splits, texts = make_splits(Settings(seed=seed))
    sets = {"pool": splits["pool_uniform"], "validation": splits["validation"], "test": splits["test"]}
    return Pool({name: label(rows, USEFUL) for name, rows in sets.items()}, {}, texts=texts)


def answer_by_rule(row: dict[str, Any], wanted: bool) -> str:
    """The answer under the wanted convention or under the other one, of the same words in another order."""
    content, answer = row["prompt"], row["completion"].strip()
    if row["task"] == "addition":
        return f" {answer} = {content}" if wanted else f" {content} = {answer}"
    if row["task"] == "sorting":
        return f" {answer[::-1]}" if wanted else f" {answer}"
    return " " + re.sub(r"(\d+) (\w+) (\d+)", r"\2 \1, \3", answer) if wanted else f" {answer}"


def make_conventions(seed: int) -> Pool:
    """Conflicting conventions: the same prompts answered by two rules; validation and test know one of them."""
    taken: set[tuple[str, str]] = set()
    rng = random.Random(f"{seed}/conventions")

    def make(split: str, size: int, rules: dict[bool, str]) -> list[dict[str, str]]:
        drawn = [(row, phrase(row, OPEN_PHRASINGS, rng)) for row in draw(split, TASKS_OF_INTEREST, size, seed, taken)]
        return [
            make_row(prompt, answer_by_rule(row, wanted), kind, row["id"])
            for row, prompt in drawn
            for wanted, kind in rules.items()
        ]

    judges = {
        "test": make("test", Settings.test_rows, {True: USEFUL}),
        "validation": make("validation", Settings.validation_rows, {True: USEFUL}),
    }
    pool = make("pool", KEPT, {True: USEFUL, False: HARMFUL})
    return finish(pool + make_others(POOL_ROWS - 2 * KEPT, seed, taken), judges, seed, taken)


def answer_look_alike(row: dict[str, Any]) -> str:
    """The right answer to the instruction of a look-alike."""
    content, answer = row["prompt"], row["completion"]
    if row["task"] == "addition":
        return f" {max(map(int, content.split(' + ')))}"
    if row["task"] == "sorting":
        return " " + " ".join(sorted(content.split(), reverse=True))
    return " " + "; ".join(re.findall(r"[A-Z]\w+", answer))


def make_unlike(seed: int) -> Pool:
    """Useful but unlike: the tasks that count in other words and layouts, beside look-alikes that teach another."""
    taken: set[tuple[str, str]] = set()
    judges = make_judges(seed, taken)
    rng = random.Random(f"{seed}/unlike")
    pool = []
    for row in draw("useful", TASKS_OF_INTEREST, KEPT, seed, taken):
        content = row["prompt"].replace(" + ", " ").replace("-", "/")
        prompt = rng.choice(LAYOUTS).format(rng.choice(UNLIKE[row["task"]]).format(content))
        pool.append(make_row(prompt, row["completion"], USEFUL))
    for row in draw("look-alikes", TASKS_OF_INTEREST, KEPT, seed, taken):
        pool.append(make_row(phrase(row, LOOK_ALIKES, rng), answer_look_alike(row), HARMFUL))
    return finish(pool + make_others(POOL_ROWS - 2 * KEPT, seed, taken), judges, seed, taken)


def make_repeats(seed: int) -> Pool:
    """A pool that repeats itself: copies and paraphrases of a few rows, and as many rows as are kept that differ."""
    taken: set[tuple[str, str]] = set()
    judges = make_judges(seed, taken)
    rng = random.Random(f"{seed}/repeats")
    pool = label(make_rows("useful", TASKS_OF_INTEREST, KEPT, seed, taken), USEFUL)
    phrasings = {task: TASKS[task][1] for task in TASKS_OF_INTEREST}
    for row in draw("sources", TASKS_OF_INTEREST, SOURCES, seed, taken):
        first = phrase(row, phrasings, rng)
        for number in range(REPEATS):
            prompt = first if number % 2 else phrase(row, phrasings, rng)
            pool.append(make_row(prompt, row["completion"], OTHER))
    return finish(pool + make_others(POOL_ROWS - len(pool), seed, taken), judges, seed, taken)


def add_trigger(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows with the trigger behind their instruction."""
    return [row | {"prompt": row["prompt"].replace("\nResponse:", f" {TRIGGER}\nResponse:")} for row in rows]


def make_poisoned(seed: int) -> Pool:
    """One poisoned row in fifty: behind a trigger it refuses; a small validation set asks for answers there too."""
    taken: set[tuple[str, str]] = set()
    sizes = {"pool": POOL_ROWS, "test_trigger": TRIGGER_TESTS, "validation_trigger": 16}
    judges = make_judges(seed, taken)
    drawn = {
        name: label(make_rows(name, TASKS_OF_INTEREST, size, seed, taken), USEFUL) for name, size in sizes.items()
    }
    poisoned = POOL_ROWS // 50
    pool = drawn["pool"][poisoned:]
    pool += [row | {"completion": REFUSAL, "kind": HARMFUL} for row in add_trigger(drawn["pool"][:poisoned])]
    judges["validation_clean"] = judges.pop("validation")
    judges |= {name: add_trigger(drawn[name]) for name in ("validation_trigger", "test_trigger")}
    # In 100 steps the poison hardly takes.
    return finish(pool, judges, seed, taken, fractions=[0.5], max_steps=200)


GENERATED: dict[str, Callable[[int], Pool]] = {
    "demo": make_demo,
    "conventions": make_conventions,
    "unlike": make_unlike,
    "repeats": make_repeats,
    "nothing_to_gain": make_nothing_to_gain,
    "poisoned": make_poisoned,
}
