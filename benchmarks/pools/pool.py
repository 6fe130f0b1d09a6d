"""What every pool is: sets of rows, settings of the run, texts for a model of its own; and how it is written."""

import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from recipes.quickstart.generate import Settings, pretrain_model, train_tokenizer


ROOT = Path(__file__).resolve().parents[2]
# What does not tell the pools apart: 100 steps of 16 rows for every arm, learning rate, LoRA on every linear.
RECIPE = ROOT / "recipes/mixture/in2core.yaml"
USEFUL, HARMFUL, OTHER = "useful", "harmful", "other"


class Pool(NamedTuple):
    """
    Rows by the name of their file, and the settings that differ from those of `RECIPE`.

    A row has `prompt`, `completion`, `id` and `kind`. Where no `model` is given, one is pretrained on the `texts`.
    """

    sets: dict[str, list[dict[str, str]]]
    settings: dict[str, Any]
    model: Path | None = None
    texts: list[str] = []


def make_row(prompt: str, completion: str, kind: str, row_id: str = "") -> dict[str, str]:
    """A row in the form of all files; its kind is for judges, no selector reads it."""
    return {"prompt": prompt, "completion": completion, "id": row_id, "kind": kind}


def shuffle_rows(rows: list[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """The rows in a seeded order, numbered in it: neither place nor id tells what a row is."""
    rows = random.Random(f"{seed}/order").sample(rows, len(rows))
    return [row | {"id": f"pool-{number:04d}"} for number, row in enumerate(rows)]


def normalise(row: dict[str, str]) -> tuple[str, str]:
    """Prompt and completion without what spaces and case add."""
    prompt, completion = (" ".join(row[name].lower().split()) for name in ("prompt", "completion"))
    return prompt, completion


def check_disjoint(sets: dict[str, list[dict[str, str]]]) -> None:
    """Raise if a row of a validation or test set is in the pool, or one of a validation set in a test set."""
    for name, rows in sets.items():
        judges = [other for other in sets if other.startswith("test") or (name == "pool" and other != name)]
        for other in judges if not name.startswith("test") else []:
            theirs = {normalise(row): row["id"] for row in sets[other]}
            for row in rows:
                if normalise(row) in theirs:
                    raise ValueError(
                        f"{name}.jsonl: the row {row['id']!r} is {theirs[normalise(row)]!r} of {other}.jsonl, so that "
                        "the comparison would be judged on rows that it trains on. Leave it out of one of them."
                    )


def write_pool(pool: Pool, folder: Path, seed: int) -> None:
    """
    Write the rows, the model where it is made here, and `in2core.yaml`; the folder appears when all is complete.

    Raises:
        FileExistsError: if there is something in the folder.
        ValueError: if sets share rows.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} is there already and holds something. Remove it, or give another --output_dir."
        )
    check_disjoint(pool.sets)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        unfinished = Path(temporary) / folder.name
        unfinished.mkdir()
        for name, rows in pool.sets.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (unfinished / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        if pool.model is None:
            tokenizer = train_tokenizer(pool.texts)
            pretrain_model(pool.texts, tokenizer, Settings(seed=seed)).save_pretrained(unfinished / "model")
            tokenizer.save_pretrained(unfinished / "model")
        config = yaml.safe_dump(make_config(pool, folder.resolve()), sort_keys=False)
        (unfinished / "in2core.yaml").write_text(config, encoding="utf-8")
        os.replace(unfinished, folder)


def make_config(pool: Pool, folder: Path) -> dict[str, Any]:
    """The settings of `in2core run`, with absolute paths, so that it starts anywhere."""
    named = [name for name in pool.sets if name.startswith("validation")]
    files = [f"{folder / name}.jsonl" for name in named]
    if len(named) > 1:
        files = [f"{name.removeprefix('validation_')}={file}" for name, file in zip(named, files, strict=True)]
    return (
        yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
        | {
            "model_name_or_path": str(pool.model.resolve() if pool.model else folder / "model"),
            "pool": str(folder / "pool.jsonl"),
            "validation": files,
            "test": str(folder / "test.jsonl"),
            # The validation rows are useful ones: the run tells how influence ranks those of the pool.
            "task_column": "kind",
            "output_dir": str(folder / "run"),
            "fractions": [0.25],
        }
        | pool.settings
    )
