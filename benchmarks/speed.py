"""Speed of the influence passes: CPU seconds on one thread, as ratios measured side by side in one run.

python benchmarks/speed.py [--quick] [--output_dir benchmarks/results]
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from torch.nn import functional as F
from workload import make_model, make_passes, make_rows, report, time_interleaved

from hf_in2core.batches import collate, plan_batches, read_token_rows
from hf_in2core.blocks import find_blocks, select_blocks
from hf_in2core.fit import run_fit_pass, run_validation_pass
from hf_in2core.losses import compute_token_nll
from hf_in2core.passes import Passes
from hf_in2core.scoring import run_score_pass


def run_plain(model: PeftModel, rows: Dataset, tokens_per_batch: int, full_logits: bool = False) -> None:
    """One ordinary forward and backward over the rows, in the very batches of the influence passes."""
    model.eval()
    token_rows = read_token_rows(rows)
    for indices in plan_batches(token_rows, tokens_per_batch, model.config.vocab_size):
        batch = collate(token_rows, indices)
        if full_logits:
            outputs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            labels = torch.full(batch.input_ids.shape, -100).flatten()
            labels[batch.positions] = batch.targets
            loss = F.cross_entropy(outputs.logits.flatten(0, 1).float(), labels, ignore_index=-100)
        else:
            loss = compute_token_nll(model, batch)[0].mean()
        loss.backward()
        model.zero_grad()


def run_fit_and_score(passes: Passes, rows: Dataset, v: dict[str, torch.Tensor]) -> np.ndarray:
    """The fit pass and the score pass over the rows."""
    fitted = run_fit_pass(passes, rows, v, 0.1, None, 0)
    directions = {name: u.float() for name, u in fitted.ihvp.items()}
    return run_score_pass(passes, rows, directions, cosine=False).influence[:, 0]


def compute_mean_gradients(passes: Passes, rows: Dataset) -> dict[str, torch.Tensor]:
    """`v` with its leading axis."""
    return {name: v[None] for name, v in run_validation_pass(passes, rows, "v", "v").items()}


def run_published(model: PeftModel, train: Dataset, validation: Dataset) -> np.ndarray:
    """DataInf as published: batch size 1, every gradient in memory, loops over examples and tensors."""
    model.eval()
    gradients: list[list[dict[str, torch.Tensor]]] = []
    for rows in (train, validation):
        gradients.append([])
        for row in rows:
            model.zero_grad()
            labels = torch.tensor([row["labels"]])
            model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss.backward()
            found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            gradients[-1].append(found)
    model.zero_grad()
    train_gradients, validation_gradients = gradients
    influence = np.zeros(len(train_gradients))
    for name in train_gradients[0]:
        v = sum(g[name] for g in validation_gradients) / len(validation_gradients)
        damping = sum(torch.mean(g[name] ** 2) for g in train_gradients) / len(train_gradients) / 10
        hvp = torch.zeros_like(train_gradients[0][name])
        for g in train_gradients:
            coefficient = torch.sum(v * g[name]) / (damping + torch.sum(g[name] ** 2))
            hvp += (v - coefficient * g[name]) / (len(train_gradients) * damping)
        for index, g in enumerate(train_gradients):
            influence[index] -= float(torch.sum(hvp * g[name]))
    return influence


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="Small sizes: shows that it runs, not how fast.")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    width, layers, num_rows, repetitions = (64, 4, 24, 1) if args.quick else (512, 8, 64, 5)
    table = []

    # Passes at the floor.
    model = make_model(width, layers, vocab_size=4096)
    rows, held_out = make_rows(num_rows, 4096, 64, 256), make_rows(8, 4096, 64, 256, seed=1)
    every = make_passes(model)
    quarter = make_passes(model, blocks=select_blocks(find_blocks(model, "default"), f"last:{layers // 4}", layers))
    works: dict[str, Callable[[], object]] = {"two plain passes": lambda: [run_plain(model, rows, 4096) for _ in "12"]}
    for name, passes in (("fit + score", every), (f"fit + score, last {layers // 4} of {layers} layers", quarter)):
        v = compute_mean_gradients(passes, held_out)
        works[name] = lambda passes=passes, v=v: run_fit_and_score(passes, rows, v)
    seconds = time_interleaved(works, repetitions)
    targets = [None, "<= 1.10", "<= 0.70"]
    for (name, value), target in zip(seconds.items(), targets, strict=True):
        table.append(
            {"what": name, "CPU s": value, "ratio": value / seconds["two plain passes"], "target": target or ""}
        )

    # The published way.
    model = make_model(64 if args.quick else 256, 4, vocab_size=1024)
    num_train, num_validation = (40, 8) if args.quick else (1000, 100)
    train, held_out = make_rows(num_train, 1024, 32, 128), make_rows(num_validation, 1024, 32, 128, seed=1)
    passes = make_passes(model)
    found: dict[str, np.ndarray] = {}

    def ours() -> None:
        found["ours"] = run_fit_and_score(passes, train, compute_mean_gradients(passes, held_out))

    def published() -> None:
        found["published"] = run_published(model, train, held_out)

    seconds = time_interleaved({"published": published, "ours": ours}, 1 if args.quick else 2)
    error = np.linalg.norm(found["ours"] - found["published"]) / np.linalg.norm(found["published"])
    what = f"DataInf of {len(train)} x {len(held_out)} rows, mean over queries"
    table.append({"what": f"{what}, the published way", "CPU s": seconds["published"], "ratio": 1.0, "target": ""})
    table.append(
        {
            "what": f"{what}, ours (relative difference {error:.0e})",
            "CPU s": seconds["ours"],
            "ratio": seconds["ours"] / seconds["published"],
            "target": "<= 0.10",
        }
    )

    # Prompt-heavy rows.
    vocab_size = 1024 if args.quick else 32_768
    model = make_model(64 if args.quick else 256, 2, vocab_size)
    rows, held_out = (make_rows(n, vocab_size, 200, 256, prompt=0.9, seed=n) for n in (16, 4))
    passes = make_passes(model)
    v = compute_mean_gradients(passes, held_out)
    seconds = time_interleaved(
        {
            "full logits": lambda: [run_plain(model, rows, 4096, full_logits=True) for _ in "12"],
            "fit + score": lambda: run_fit_and_score(passes, rows, v),
        },
        repetitions,
    )
    for name, target in (("full logits", ""), ("fit + score", "<= 0.50")):
        work = name if target else "two plain passes with full logits"
        what = f"90 % prompt, vocabulary {vocab_size:,}: {work}"
        ratio = seconds[name] / seconds["full logits"]
        table.append({"what": what, "CPU s": seconds[name], "ratio": ratio, "target": target})
    report("speed", table, args.output_dir)


if __name__ == "__main__":
    main()
