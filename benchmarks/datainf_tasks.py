"""DataInf's own task: does influence find the training rows of the same kind as a test row?

    python benchmarks/datainf_tasks.py [--quick] [--data FOLDER --model FOLDER] [--seeds 0 1 2] [--read_at 0 1 5]

`FOLDER` of the data holds `train.jsonl` and `test.jsonl` with `text`, `prompt`, `answer` and the kind in `variation`,
as in the DataInf authors' repository; by default rows and model are made on the spot (ten transformations of random
words). For every test row, the AUC and recall (share of the rows of its kind among as many strongest rows) of its kind
by influence (DataInf, gradient dot, gradient cosine) and by RDS+, with the loss on the whole text and on the answer
alone, at several points of training. Strongest = most negative influence. Means over test rows, then over seeds. The
same command goes on where it stopped.
"""

import argparse
import json
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Found, group, make_parser, print_table, set_up, show
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from plain_training import compute_query_influence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_in2core.engine.batches import iterate_batches, plan_batches, read_token_rows
from hf_in2core.engine.losses import compute_row_losses, compute_token_nll, compute_token_weights
from hf_in2core.evaluation.judge import compute_auc
from hf_in2core.rows.preparation import Preparation, prepare_rows
from hf_in2core.selection.similarities import compute_rds_similarities


WORDS = "the cat sat on a mat and saw red blue green birds fly over old stone walls near slow rivers at dawn".split()
KINDS = {
    "reverse the words": lambda words: words[::-1],
    "capitals": lambda words: [word.upper() for word in words],
    "every other word": lambda words: words[::2],
    "first letters": lambda words: [word[0] for word in words],
    "last letters": lambda words: [word[-1] for word in words],
    "double every word": lambda words: [word + word for word in words],
    "spell backwards": lambda words: [word[::-1] for word in words],
    "sorted": sorted,
    "no vowels": lambda words: ["".join(c for c in word if c not in "aeiou") or "-" for word in words],
    "first word only": lambda words: words[:1],
}


def make_task(rows_per_kind: int, seed: int) -> list[dict[str, str]]:
    """Rows of ten transformations of random sentences."""
    rng = random.Random(seed)
    rows = []
    for kind, transform in KINDS.items():
        for _ in range(rows_per_kind):
            words = rng.sample(WORDS, rng.randint(3, 6))
            rows.append(
                {"prompt": f"{kind}: {' '.join(words)} ->", "answer": " ".join(transform(words)), "variation": kind}
            )
    return rows


def make_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The random tiny Llama and tokenizer of the tests."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    from helpers import make_model as make_tiny_model
    from helpers import make_tokenizer

    return make_tiny_model(), make_tokenizer()


def load_task(folder: Path | None, quick: bool) -> tuple[Dataset, Dataset]:
    """Training and test rows with `prompt`, `completion` and `variation`; checks that there is something to tell."""
    parts = []
    for name, seed in (("train", 0), ("test", 1)):
        if folder is None:
            rows = make_task({"train": 8 if quick else 90, "test": 2 if quick else 10}[name], seed)
        else:
            rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        columns = {
            "prompt": [row["prompt"].rstrip() for row in rows],
            "completion": [f" {row['answer'].strip()}" for row in rows],
            "variation": [row["variation"] for row in rows],
        }
        parts.append(Dataset.from_dict(columns))
    train, test = parts
    kinds = set(train["variation"])
    if len(kinds) < 2:
        raise ValueError(
            f"The training rows have one kind only ({kinds}), so there is nothing to recover. Give several."
        )
    missing = set(test["variation"]) - kinds
    if missing:
        raise ValueError(f"The test rows have kinds that no training row has: {sorted(missing)}. Leave them out.")
    return train, test


def measure(influence: np.ndarray, same: np.ndarray) -> dict[str, float]:
    """Mean AUC and recall over test rows of `[n, Q]` influence; `same[i, q]` marks rows of the query's kind."""
    aucs, recalls = [], []
    for query in range(influence.shape[1]):
        aucs.append(compute_auc(-influence[:, query], same[:, query]))
        count = int(same[:, query].sum())
        strongest = np.argsort(influence[:, query], kind="stable")[:count]
        recalls.append(same[strongest, query].mean())
    return {"auc": float(np.mean([auc for auc in aucs if auc is not None])), "recall": float(np.mean(recalls))}


def score(model: Any, train: Dataset, test: Dataset) -> dict[str, np.ndarray]:
    """Influence `[n, Q]` of every training row on every test row, by method; negative = proponent."""
    estimators = {"DataInf": "datainf", "gradient dot": "gradient_dot", "gradient cosine": "gradient_cosine"}
    found = {name: compute_query_influence(model, train, test, estimator) for name, estimator in estimators.items()}
    return found | {"RDS+": -compute_rds_similarities(train, test, model).T}


def train_epoch(model: Any, rows: Dataset, optimizer: torch.optim.Optimizer, seed: int, batch_size: int) -> None:
    """One epoch over the rows in a random order."""
    token_rows = read_token_rows(rows)
    order = np.random.default_rng(seed).permutation(len(token_rows))
    model.train()
    for start in range(0, len(order), batch_size):
        picked = token_rows.take(order[start : start + batch_size])
        batches = plan_batches(picked, 10**6)
        for batch in iterate_batches(picked, batches):
            nll = compute_token_nll(model, batch)[0]
            (nll * compute_token_weights(batch, "mean", nll)).sum().div(len(picked)).backward()
        optimizer.step()
        optimizer.zero_grad()


def run(args: argparse.Namespace, seed: int, answer_only: bool) -> list[dict[str, Any]]:
    train_rows, test_rows = load_task(args.data, args.quick)
    if args.model is None:
        model, tokenizer = make_model()
    else:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    preparation = Preparation(tokenizer, completion_only_loss=answer_only, max_length=512)
    train, test = prepare_rows(train_rows, preparation), prepare_rows(test_rows, preparation)
    kinds = [np.array(rows["variation"])[part["row"][:]] for rows, part in ((train_rows, train), (test_rows, test))]
    same = kinds[0][:, None] == kinds[1][None, :]
    torch.manual_seed(seed)
    adapter = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(model, adapter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
    found = []
    for epoch in range(max(args.read_at) + 1):
        if epoch > 0:
            train_epoch(model, train, optimizer, seed * 1000 + epoch, args.batch_size)
        if epoch not in args.read_at:
            continue
        start = time.perf_counter()
        losses = compute_row_losses(model, test)
        for method, influence in score(model, train, test).items():
            row: dict[str, Any] = {"loss on": "answer" if answer_only else "whole text", "epochs": epoch, "seed": seed}
            row |= {"method": method, "test loss": float(losses.nll.sum() / losses.num_loss_tokens.sum())}
            found.append(row | measure(influence, same))
        print(f"{time.perf_counter() - start:.0f} s: {found[-4:]}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = make_parser(__doc__, "Few rows, one seed: shows that it runs.")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--read_at", type=int, nargs="+", default=[0, 1, 5], help="Epochs after which to read.")
    parser.add_argument(
        "--loss_on",
        nargs="+",
        choices=["whole text", "answer"],
        default=["whole text", "answer"],
        help="Tokens with loss.",
    )
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--batch_size", type=int, default=16)
    args = set_up(parser, "--output", "benchmarks/results/datainf_tasks.json")
    if args.quick:
        args.seeds, args.read_at = [0], [0, 1]
    found = Found(args.output, args, ("output", "seeds", "quick", "loss_on"))
    asked = []
    for seed in args.seeds:
        for loss_on in args.loss_on:
            asked += found.take(partial(run, args, seed, loss_on == "answer"), **{"loss on": loss_on, "seed": seed})
    table = []
    for (loss_on, epochs, method), rows in group(asked, "loss on", "epochs", "method").items():
        loss = np.mean([row["test loss"] for row in rows])
        line = {"loss on": loss_on, "epochs": epochs, "test loss": f"{loss:.2f}", "method": method}
        table.append(line | {"AUC": show(row["auc"] for row in rows), "recall": show(row["recall"] for row in rows)})
    print_table("Rows of the same kind as a test row", table)


if __name__ == "__main__":
    main()
