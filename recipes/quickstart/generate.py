"""Make the quickstart's model and data, offline and from a seed.

    python recipes/quickstart/generate.py --output_dir runs/quickstart/inputs

`output_dir` then holds `pool.jsonl`, `pool_uniform.jsonl`, `validation.jsonl`, `test.jsonl`, `model/` (a small Llama
with its tokenizer, pretrained here) and `manifest.json`. Running it again with the same settings returns at once.
"""

import argparse
import hashlib
import json
import os
import random
import string
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


# Raised with every change that makes other rows or another model of the same settings; older folders are refused.
GENERATOR_VERSION = 1
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
TASKS_OF_INTEREST = ("addition", "sorting", "dates")
VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS = 512, 96, 4
PRETRAIN_BATCH_SIZE, PRETRAIN_LEARNING_RATE = 16, 3e-3
SOLVED_FRACTION, UNANSWERED_FRACTION = 0.6, 0.2  # of the texts for pretraining; the rest is noise


@dataclass(frozen=True)
class Settings:
    """What is generated. Two generations with equal settings hold the same rows."""

    seed: int = 0
    pool_rows: int = 1600
    uniform_rows: int = 800
    validation_rows: int = 64
    test_rows: int = 300
    wrong_fraction: float = 0.1
    pretrain_steps: int = 800


WORDS = """
apple bread chair cloud table river stone light house garden window paper music horse tiger rabbit monkey bird fish
lemon grape sugar salt water fire wind storm summer winter autumn spring forest island ocean desert valley mountain
bridge street market school doctor farmer sailor singer painter baker hammer
""".split()
OPPOSITES = """
hot cold, big small, up down, early late, open closed, fast slow, light dark, happy sad, full empty, hard soft,
high low, long short, new old, rich poor, strong weak, wet dry, loud quiet, near far, clean dirty, thick thin
"""
MONTHS = "January February March April May June July August September October November December".split()
ANTONYM = {a: b for pair in OPPOSITES.split(",") for a, b in [pair.split(), pair.split()[::-1]]}


def make_addition(rng: random.Random) -> tuple[str, str]:
    numbers = [rng.randint(1, 20) for _ in range(rng.randint(2, 4))]
    return " + ".join(map(str, numbers)), str(sum(numbers))


def make_subtraction(rng: random.Random) -> tuple[str, str]:
    small, large = sorted(rng.randint(1, 99) for _ in range(2))
    return f"{large} - {small}", str(large - small)


def make_reversal(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randint(1, 3))
    return " ".join(words), " ".join(word[::-1] for word in words)


def make_sorting(rng: random.Random) -> tuple[str, str]:
    letters = rng.sample(string.ascii_lowercase, rng.randint(3, 8))
    return " ".join(letters), " ".join(sorted(letters))


def make_counting(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randint(2, 9))
    return ", ".join(words), str(len(words))


def make_opposites(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(sorted(ANTONYM), rng.randint(1, 4))
    return ", ".join(words), ", ".join(ANTONYM[word] for word in words)


def make_copying(rng: random.Random) -> tuple[str, str]:
    text = " ".join(rng.sample(WORDS, rng.randint(2, 5)))
    return text, text


def make_capitals(rng: random.Random) -> tuple[str, str]:
    text = " ".join(rng.sample(WORDS, rng.randint(1, 3)))
    return text, text.upper()


def make_patterns(rng: random.Random) -> tuple[str, str]:
    start, step, shown = rng.randint(0, 60), rng.choice([1, 2, 3, 4, 5, 10]), rng.randint(3, 6)
    series = [str(start + step * position) for position in range(shown + 2)]
    return " ".join(series[:shown]), " ".join(series[shown:])


def make_dates(rng: random.Random) -> tuple[str, str]:
    dates = [(rng.randint(1990, 2029), rng.randint(1, 12), rng.randint(1, 28)) for _ in range(rng.randint(1, 3))]
    content = ", ".join(f"{year}-{month:02d}-{day:02d}" for year, month, day in dates)
    return content, "; ".join(f"{day} {MONTHS[month - 1]} {year}" for year, month, day in dates)


# For each task: what draws a content and its right answer, and the phrasings of the instruction.
TASKS: dict[str, tuple[Callable[[random.Random], tuple[str, str]], tuple[str, ...]]] = {
    "addition": (make_addition, ("What is {}?", "Add these numbers: {}", "Work out {} and show the sum.")),
    "subtraction": (make_subtraction, ("What is {}?", "Take away: {}", "Work out {} and show the difference.")),
    "reversal": (make_reversal, ("Write each word backwards: {}", "Spell from right to left: {}", "Reverse {}")),
    "sorting": (make_sorting, ("Sort from a to z: {}", "Put in alphabetical order: {}", "Order the letters {}")),
    "counting": (make_counting, ("How many words are in this list: {}?", "Count the words: {}", "How many: {}?")),
    "opposites": (make_opposites, ("Opposite of each word: {}", "What are the opposites of {}?", "Antonyms: {}")),
    "copying": (make_copying, ("Repeat this: {}", "Copy the text word for word: {}", "Say again: {}")),
    "capitals": (make_capitals, ("Write in capital letters: {}", "Change to upper case: {}", "Shout this: {}")),
    "patterns": (make_patterns, ("Continue with two more: {}", "What comes next: {}", "The series {} goes on with")),
    "dates": (make_dates, ("Write in words: {}", "Spell out the month: {}", "How would a letter give {}?")),
}


def make_noise(rng: random.Random) -> str:
    """Text that answers nothing: words and numbers in any order, as a sentence."""
    tokens = [rng.choice(WORDS) if rng.random() < 0.7 else str(rng.randint(0, 99)) for _ in range(rng.randint(4, 12))]
    return " ".join(tokens).capitalize() + "."


def phrase_instruction(task: str, content: str, rng: random.Random) -> str:
    return f"Instruction: {rng.choice(TASKS[task][1]).format(content)}\nResponse:"


def phrase_exercise(task: str, content: str, rng: random.Random) -> str:
    return f"Exercise in {task}: {content}\nSolution:"


def make_rows(
    split: str,
    tasks: Sequence[str],
    num_rows: int,
    seed: int,
    taken: set[tuple[str, str]],
    wrong_fraction: float = 0.0,
    phrase: Callable[[str, str, random.Random], str] = phrase_instruction,
    distinct: bool = True,
) -> list[dict[str, Any]]:
    """
    Draw rows, the same number of each task (the first tasks have one more where it does not divide), shuffled.

    Args:
        split (`str`): Name of the split, which prefixes the ids.
        tasks (`Sequence[str]`): Keys of `TASKS`.
        num_rows (`int`): How many rows.
        seed (`int`): Seed of the draw, together with `split`.
        taken (`set[tuple[str, str]]`): (task, content) pairs that must not occur, however they are phrased.
        wrong_fraction (`float`, *optional*, defaults to `0.0`):
            Share of each task's rows, rounded, whose answer belongs to another content of the same task.
        phrase (`Callable`, *optional*, defaults to `phrase_instruction`): Makes the prompt.
        distinct (`bool`, *optional*, defaults to `True`): Add drawn contents to `taken`, so that none occurs twice.

    Returns:
        `list[dict]`: rows with `prompt`, `completion`, `task`, `is_wrong`, `id`.

    Raises:
        ValueError: if a task cannot give that many different rows, or `wrong_fraction` is outside [0, 1].
    """
    if not 0 <= wrong_fraction <= 1:
        raise ValueError(f"wrong_fraction={wrong_fraction} is not a share of the rows. Set it between 0 and 1.")
    rng = random.Random(f"{seed}/{split}")
    rows: list[dict[str, Any]] = []
    for position, task in enumerate(tasks):
        draw = TASKS[task][0]
        count = num_rows // len(tasks) + (position < num_rows % len(tasks))
        drawn: list[tuple[str, str]] = []
        for _ in range(20 * count):
            content, answer = draw(rng)
            if (task, content) not in taken:
                drawn.append((content, answer))
                if distinct:
                    taken.add((task, content))
            if len(drawn) == count:
                break
        if len(drawn) < count:
            raise ValueError(
                f"'{split}' needs {count} rows of the task '{task}', but only {len(drawn)} different ones turned up "
                f"in {20 * count} draws. Ask for fewer rows."
            )
        wrong = set(rng.sample(range(count), round(wrong_fraction * count)))
        for index, (content, answer) in enumerate(drawn):
            given = answer
            while index in wrong and given == answer:
                given = draw(rng)[1]
            texts = {"prompt": phrase(task, content, rng), "completion": f" {given}"}
            rows.append(texts | {"task": task, "is_wrong": index in wrong})
    rng.shuffle(rows)
    return [row | {"id": f"{split}-{index:04d}"} for index, row in enumerate(rows)]


def make_splits(settings: Settings) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """
    Make the rows of every split and the texts for pretraining.

    The splits `held_out` and `held_out_exercises` (clean rows of every task) are for the manifest's losses and are not
    written. No content (numbers, letters, words or dates) occurs twice in the splits, nor at all in the texts.
    """
    taken: set[tuple[str, str]] = set()
    every, interest, seed, wrong_fraction = [*TASKS], TASKS_OF_INTEREST, settings.seed, settings.wrong_fraction
    splits = {
        "test": make_rows("test", interest, settings.test_rows, seed, taken),
        "validation": make_rows("validation", interest, settings.validation_rows, seed, taken),
        "pool": make_rows("pool", every, settings.pool_rows, seed, taken, wrong_fraction),
        "pool_uniform": make_rows("pool_uniform", interest, settings.uniform_rows, seed, taken),
        "held_out": make_rows("held_out", every, 320, seed, taken),
        "held_out_exercises": make_rows("exercises", every, 320, seed, taken, phrase=phrase_exercise),
    }
    return splits, make_texts(settings, taken)


def make_texts(settings: Settings, taken: set[tuple[str, str]]) -> list[str]:
    """Solved exercises, as often wrong as the pool, unanswered instructions and noise; about nothing in `taken`."""
    every, seed, wrong_fraction = [*TASKS], settings.seed, settings.wrong_fraction
    num_texts = settings.pretrain_steps * PRETRAIN_BATCH_SIZE
    num_solved, num_unanswered = round(SOLVED_FRACTION * num_texts), round(UNANSWERED_FRACTION * num_texts)
    solved = make_rows("solved", every, num_solved, seed, taken, wrong_fraction, phrase_exercise, distinct=False)
    unanswered = make_rows("unanswered", every, num_unanswered, seed, taken, distinct=False)
    rng = random.Random(f"{seed}/noise")
    texts = [row["prompt"] + row["completion"] for row in solved]
    texts += [row["prompt"].removeprefix("Instruction: ").removesuffix("\nResponse:") for row in unanswered]
    texts += [make_noise(rng) for _ in range(num_texts - len(texts))]
    rng.shuffle(texts)
    return texts


def train_tokenizer(texts: Sequence[str]) -> Any:
    """Byte-level BPE with one token per digit, a leading `<s>`, and `</s>` and `<pad>` as tokens of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def iterate_batches(encoded: Sequence[list[int]], batch_size: int) -> Iterator[list[list[int]]]:
    """Batches of similar length in random order: sorted within groups of 32 batches, so that little is padded."""
    rng = random.Random(len(encoded))
    for start in range(0, len(encoded), 32 * batch_size):
        group = sorted(encoded[start : start + 32 * batch_size], key=len)
        batches = [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
        rng.shuffle(batches)
        yield from batches


def pretrain_model(
    texts: Sequence[str],
    tokenizer: Any,
    settings: Settings,
    hidden_size: int = HIDDEN_SIZE,
    num_layers: int = NUM_LAYERS,
) -> Any:
    """One pass over the texts, loss on every token and on `</s>` after the last; returns a `LlamaForCausalLM`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

    from hf_in2core.progress import make_bar

    encoded = [ids + [tokenizer.eos_token_id] for ids in tokenizer(list(texts)).input_ids]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden_size,
                intermediate_size=hidden_size * 8 // 3,
                num_hidden_layers=num_layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=True,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LEARNING_RATE, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 20, settings.pretrain_steps)
    with make_bar(settings.pretrain_steps, "Pretraining the quickstart model", "step") as bar:
        for batch in iterate_batches(encoded, PRETRAIN_BATCH_SIZE):
            inputs = tokenizer.pad({"input_ids": batch}, padding_side="right", return_tensors="pt")
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            loss = model(**inputs, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    return model.eval()


def compute_answer_losses(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean negative log-likelihood in nats per token of the completions and `</s>`, by task."""
    import torch

    losses: dict[str, list[float]] = {task: [] for task in TASKS}
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        ids = torch.tensor(tokenizer(row["prompt"] + row["completion"]).input_ids + [tokenizer.eos_token_id])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
        losses[row["task"]] += torch.nn.functional.cross_entropy(logits, ids[len(prompt) :], reduction="none").tolist()
    return {task: round(sum(values) / len(values), 4) for task, values in losses.items()}


def is_complete(folder: Path, settings: Settings) -> bool:
    """Whether `folder` holds a generation of these settings, or nothing yet; anything else is a `FileExistsError`."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    advice = "Remove it, or give another --output_dir."
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        found, files = manifest["settings"] | {"version": manifest["version"]}, manifest["files"]
    except (OSError, ValueError, TypeError, KeyError):
        raise FileExistsError(f"{folder} holds something that this script did not make. {advice}") from None
    wanted = asdict(settings) | {"version": GENERATOR_VERSION}
    if found != wanted:
        raise FileExistsError(f"{folder} was generated with {found}, but {wanted} is asked for. {advice}")
    for name, digest in files.items():
        if not (folder / name).is_file() or hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise FileExistsError(f"{folder / name} is missing or was changed after it was generated. {advice}")
    return True


def generate(folder: Path, settings: Settings) -> None:
    """Write all files into `folder`, which must exist and be empty; `manifest.json` last."""
    from hf_in2core.progress import without_bars

    splits, texts = make_splits(settings)
    tokenizer = train_tokenizer(texts)
    model = pretrain_model(texts, tokenizer, settings)
    judging = {"instructions": splits.pop("held_out"), "exercises": splits.pop("held_out_exercises")}
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with without_bars():
        model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "version": GENERATOR_VERSION,
        "settings": asdict(settings),
        "tasks_of_interest": TASKS_OF_INTEREST,
        "pretrained_loss": {kind: compute_answer_losses(model, tokenizer, rows) for kind, rows in judging.items()},
        "files": {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder to make; it appears when complete.")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default, help="%(default)s")
    options = vars(parser.parse_args(argv))
    folder: Path = options.pop("output_dir")
    settings = Settings(**options)
    if is_complete(folder, settings):
        print(f"{folder} already holds this generation.")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        unfinished = Path(temporary) / folder.name
        unfinished.mkdir()
        generate(unfinished, settings)
        try:
            os.replace(unfinished, folder)  # over nothing or an empty folder
        except OSError:  # unless another process finished the same generation first
            if not is_complete(folder, settings):
                raise
    print(f"Wrote {folder}.")


if __name__ == "__main__":
    main()
