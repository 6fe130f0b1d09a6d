"""Speed of the influence passes: CPU seconds on one thread, as ratios measured side by side in one run.

python benchmarks/speed.py [--quick] [--output_dir benchmarks/results]
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import make_parser, report, set_up
from datasets import Dataset
from peft import PeftModel
from scipy.stats import spearmanr
from torch.nn import functional as F
from workload import (
    compute_mean_gradients,
    fit_directions,
    make_model,
    make_passes,
    make_rows,
    make_topics,
    make_trainer,
    measure_error,
    run_fit_and_score,
    storing,
    time_interleaved,
)

from hf_in2core.engine.batches import collate, plan_batches, read_token_rows
from hf_in2core.engine.blocks import find_blocks, select_blocks
from hf_in2core.engine.losses import compute_token_nll, compute_token_weights, frozen_eval_mode
from hf_in2core.engine.passes import Passes
from hf_in2core.engine.scoring import run_score_pass


def run_plain(
    model: PeftModel,
    rows: Dataset,
    tokens_per_batch: int,
    full_logits: bool = False,
    autocast: torch.dtype | None = None,
) -> None:
    """One ordinary forward and backward over the rows, in the very batches of the influence passes."""
    model.eval()
    token_rows = read_token_rows(rows)
    for indices in plan_batches(token_rows, tokens_per_batch):
        batch = collate(token_rows, indices).to(model.device)
        if full_logits:
            outputs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            labels = torch.full(batch.input_ids.shape, -100).flatten()
            labels[batch.positions] = batch.targets
            loss = F.cross_entropy(outputs.logits.flatten(0, 1).float(), labels, ignore_index=-100)
        else:
            loss = compute_token_nll(model, batch, autocast)[0].mean()
        loss.backward()
        model.zero_grad()


def collect_gradients(
    model: PeftModel, rows: Dataset, autocast: torch.dtype | None = None
) -> list[dict[str, torch.Tensor]]:
    """Gradients the published way: batch size 1, full logits, every gradient in memory."""
    model.eval()
    gradients = []
    for row in rows:
        model.zero_grad()
        labels = torch.tensor([row["labels"]], device=model.device)
        with torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None):
            loss = model(input_ids=torch.tensor([row["input_ids"]], device=model.device), labels=labels).loss
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return gradients


def run_published(
    model: PeftModel, train: Dataset, validation: Dataset, mean: bool, autocast: torch.dtype | None = None
) -> np.ndarray:
    """
    DataInf as published: batch size 1, every gradient in memory, loops over examples and tensors; `[n]`.

    With `mean`, one validation gradient, the mean (as the published code does for classification). Without, one after
    the other (as it does for generated text, with the damping computed again for each), and then the mean of the
    influences.
    """
    train_gradients = collect_gradients(model, train, autocast)
    validation_gradients = collect_gradients(model, validation, autocast)
    if mean:
        count = len(validation_gradients)
        validation_gradients = [
            {name: sum(g[name] for g in validation_gradients) / count for name in train_gradients[0]}
        ]
    influence = np.zeros(len(train_gradients))
    for v in validation_gradients:
        hvp = {}
        for name in v:
            damping = sum(torch.mean(g[name] ** 2) for g in train_gradients) / len(train_gradients) / 10
            hvp[name] = torch.zeros_like(v[name])
            for g in train_gradients:
                coefficient = torch.sum(v[name] * g[name]) / (damping + torch.sum(g[name] ** 2))
                hvp[name] += (v[name] - coefficient * g[name]) / (len(train_gradients) * damping)
        for index, g in enumerate(train_gradients):
            influence[index] -= float(sum(torch.sum(hvp[name] * g[name]) for name in v)) / len(validation_gradients)
    return influence


def run_ours(passes: Passes, train: Dataset, validation: Dataset) -> np.ndarray:
    """Ours on the mean of the validation rows; `[n]`."""
    return run_fit_and_score(passes, train, compute_mean_gradients(passes, validation))[:, 0]


def run_ours_with_store(passes: Passes, train: Dataset, validation: Dataset) -> np.ndarray:
    with storing(passes) as kept:
        return run_ours(kept, train, validation)


@torch.no_grad()
def run_central_difference(passes: Passes, rows: Dataset, u: dict[str, torch.Tensor]) -> np.ndarray:
    """Influence without a backward: half the difference of the losses a step along `u` and a step against it."""
    token_rows = read_token_rows(rows)
    norm = torch.sqrt(sum(value.square().sum() for value in u.values()))
    adapter = torch.sqrt(sum(block.tensor.square().sum() for block in passes.blocks.values()))
    step = float(0.01 * adapter / norm)
    influence = np.zeros(len(token_rows))
    with frozen_eval_mode(passes.model):
        for sign in (1, -2, 1):  # to the plus side, to the minus side, back
            for name, block in passes.blocks.items():
                block.tensor.add_(u[name][0].view_as(block.tensor), alpha=sign * step)
            if sign == 1 and influence.any():
                break
            for indices in plan_batches(token_rows, passes.tokens_per_batch):
                batch = collate(token_rows, indices)
                nll, _ = compute_token_nll(passes.model, batch, passes.autocast)
                losses = torch.zeros(len(indices), dtype=torch.float64)
                losses.index_add_(0, batch.row_of_target, (nll * compute_token_weights(batch, "mean", nll)).double())
                influence[indices] -= np.sign(sign) * losses.numpy() / (2 * step)
    return influence


def time_trainer(num_rows: int, folder: Path, repetitions: int) -> list[dict[str, object]]:
    """Fit and score by the trainer, its checks and files included, against two plain passes over the pool."""
    pool, held_out = (make_topics(rows, 1024, 80, seed) for rows, seed in ((num_rows, 0), (num_rows // 40, 1)))
    trainer = make_trainer(folder, make_model(256, 4, vocab_size=1024), pool, held_out)
    told: dict[str, str] = {}

    def score(name: str, fit_examples: str | None) -> None:
        trainer.forget()
        trainer.args.fit_examples = fit_examples
        shutil.rmtree(folder / "influence", ignore_errors=True)
        trainer.score_influence()
        config = trainer.fit_influence().config
        agreement = "" if config.fit_agreement is None else f", halves agree by {config.fit_agreement:.4f}"
        told[name] = f"{config.num_fit_examples} rows fitted{agreement}"

    works: dict[str, Callable[[], object]] = {
        "two plain passes": lambda: [run_plain(trainer.model, trainer.prepared_pool, 2048) for _ in "12"],
        "fit + score, exact": partial(score, "fit + score, exact", None),
        "fit + score, auto": partial(score, "fit + score, auto", "auto"),
    }
    seconds = time_interleaved(works, repetitions)
    plain = seconds["two plain passes"]
    targets = {"fit + score, exact": "<= 1.10", "fit + score, auto": "<= 0.65"}
    return [
        {"what": f"by the trainer, {num_rows} rows: {name}", "CPU s": value, "ratio": value / plain}
        | {"told": told.get(name, ""), "target": targets.get(name, "")}
        for name, value in seconds.items()
    ]


def profile_passes(works: dict[str, Callable[[], object]]) -> list[dict[str, object]]:
    """Self CPU seconds of the operations that take most of them, side by side."""
    found: dict[str, dict[str, float]] = {}
    for name, work in works.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            work()
        found[name] = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    keys = {key for seconds in found.values() for key in seconds}
    largest = sorted(keys, key=lambda key: -max(seconds.get(key, 0.0) for seconds in found.values()))[:10]
    rows = [{"operation": key, **{name: seconds.get(key, 0.0) for name, seconds in found.items()}} for key in largest]
    rest = {
        name: sum(seconds.values()) - sum(seconds.get(key, 0.0) for key in largest) for name, seconds in found.items()
    }
    return [
        *rows,
        {"operation": "all others", **rest},
        {"operation": "sum", **{n: sum(s.values()) for n, s in found.items()}},
    ]


def main() -> None:
    parser = make_parser(__doc__, "Small sizes: shows that it runs, not how fast.")
    parser.add_argument("--trainer_only", action="store_true", help="Only the times of the trainer.")
    args = set_up(parser)
    with tempfile.TemporaryDirectory() as folder:
        by_trainer = time_trainer(1000 if args.quick else 2000, Path(folder), 1)
    report("speed_trainer", by_trainer, args.output_dir)
    if args.trainer_only:
        return
    width, layers, num_rows, repetitions = (64, 4, 24, 1) if args.quick else (512, 8, 64, 3)
    table: list[dict[str, object]] = []

    def add(what: str, seconds: float, base: float, target: str = "") -> None:
        table.append({"what": what, "CPU s": seconds, "ratio": seconds / base, "target": target})

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
    for (name, value), target in zip(seconds.items(), ("", "<= 1.10", "<= 0.70"), strict=True):
        add(name, value, seconds["two plain passes"], target)

    # Where the score pass spends its time, and scores without any backward.
    u = fit_directions(every, rows, compute_mean_gradients(every, held_out))
    scores: dict[str, np.ndarray] = {}

    def score() -> None:
        scores["backward"] = run_score_pass(every, rows, u, cosine=False).influence[:, 0]

    def difference() -> None:
        scores["difference"] = run_central_difference(every, rows, u)

    seconds = time_interleaved({"score pass": score, "central difference": difference}, 1 if args.quick else 3)
    error = measure_error(scores["difference"], scores["backward"])
    rank = spearmanr(scores["difference"], scores["backward"]).statistic
    alone = seconds["score pass"]
    add("score pass alone", alone, alone)
    what, agreement = "scores by a central difference of two forward passes", f"Spearman {rank:.4f}"
    add(what, seconds["central difference"], alone, f"relative error {error:.0e}, {agreement}")
    half = make_model(64 if args.quick else 256, 4, vocab_size=4096)
    for name, parameter in half.named_parameters():
        parameter.data = parameter.data if "lora" in name else parameter.data.bfloat16()
    in_half = make_passes(half, autocast=torch.bfloat16)
    u_half = fit_directions(in_half, rows, compute_mean_gradients(in_half, held_out))
    exact = run_score_pass(in_half, rows, u_half, cosine=False).influence[:, 0]
    found = run_central_difference(in_half, rows, u_half)
    error, rank = measure_error(found, exact), spearmanr(found, exact).statistic
    what = f"the same with a bfloat16 base of width {half.config.hidden_size}: relative error {error:.0e}, "
    table.append({"what": f"{what}Spearman {rank:.2f}"})
    profile = profile_passes({"plain pass, s": lambda: run_plain(model, rows, 4096), "score pass, s": score})

    # The published way.
    model = make_model(64 if args.quick else 256, 4, vocab_size=1024)
    num_train, num_validation = (40, 8) if args.quick else (1000, 100)
    train, held_out = make_rows(num_train, 1024, 32, 128), make_rows(num_validation, 1024, 32, 128, seed=1)
    passes = make_passes(model, 1024)
    influence: dict[str, np.ndarray] = {}
    runs: dict[str, Callable[[], np.ndarray]] = {
        "the published way, queries one by one": lambda: run_published(model, train, held_out, mean=False),
        "the published way, one mean query": lambda: run_published(model, train, held_out, mean=True),
        "ours": lambda: run_ours(passes, train, held_out),
        "ours, with a gradient store": lambda: run_ours_with_store(passes, train, held_out),
    }

    def keep(name: str) -> None:
        influence[name] = runs[name]()

    # The loops over queries take minutes: once, and not before the others have warmed up.
    slow = "the published way, queries one by one"
    seconds = time_interleaved({name: partial(keep, name) for name in runs if name != slow}, 1 if args.quick else 2)
    start = time.process_time()
    keep(slow)
    seconds[slow] = time.process_time() - start
    for name in runs:
        what = f"DataInf of {len(train)} x {len(held_out)} rows, mean over queries: {name}"
        if name != slow:
            what += f" (relative difference {measure_error(influence[name], influence[slow]):.0e})"
        add(what, seconds[name], seconds[slow], "<= 0.10" if name.startswith("ours") else "")

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
        add(f"90 % prompt, vocabulary {vocab_size:,}: {work}", seconds[name], seconds["full logits"], target)
    report("speed", table, args.output_dir)
    report("speed_profile", profile, args.output_dir)


if __name__ == "__main__":
    main()
