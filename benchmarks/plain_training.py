"""What the evidence benchmarks share: SFT of a small adapter by a plain loop, gradients kept in memory.

The loop does what TRL's `SFTTrainer` does with the default optimiser (AdamW, linear decay after a warm-up, gradients
clipped at norm 1, mean loss over the labelled tokens of a batch) without its constant cost, so that hundreds of
trainings fit into minutes; `check_against_trl` shows that both end at the same adapter.
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from hf_in2core.engine.batches import TokenBatch, collate, read_token_rows
from hf_in2core.engine.blocks import find_blocks
from hf_in2core.engine.datainf import compute_coefficients, compute_damping, compute_ihvp
from hf_in2core.engine.fit import run_fit_pass
from hf_in2core.engine.losses import compute_row_losses, compute_token_nll
from hf_in2core.engine.passes import Passes
from hf_in2core.engine.scoring import run_score_pass
from hf_in2core.engine.validation import run_per_example_validation_pass
from hf_in2core.rows.preparation import Preparation, prepare_rows
from hf_in2core.rows.sources import load_rows
from hf_in2core.selection.coreset import select_positions


QUICKSTART = Path("runs/quickstart/inputs")
MODELS = Path("runs/benchmarks/models")
MAX_LENGTH = 512


@dataclass
class Schedule:
    """How an adapter is trained."""

    steps: int
    batch_size: int
    learning_rate: float = 3e-3
    warmup_steps: int = 10
    rank: int = 8


def make_quickstart_inputs() -> Path:
    """The quickstart's model and data, generated where the demo has them if they are not there."""
    script = Path(__file__).resolve().parent.parent / "recipes/quickstart/generate.py"
    subprocess.run([sys.executable, str(script), "--output_dir", str(QUICKSTART)], check=True)
    return QUICKSTART


def make_sized_model(inputs: Path, hidden_size: int, num_layers: int, seed: int = 0) -> Path:
    """Another size of the quickstart's model, pretrained as its generator does, on the same texts."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes/quickstart"))
    from generate import Settings, make_splits, pretrain_model

    folder = MODELS / f"hidden-{hidden_size}-layers-{num_layers}-seed-{seed}"
    if not (folder / "tokenizer.json").is_file():
        texts = make_splits(Settings())[1]
        tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
        pretrain_model(texts, tokenizer, Settings(seed=seed), hidden_size, num_layers).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def find_sources(args: argparse.Namespace, model: str, data: tuple[str, ...]) -> Path | None:
    """
    Set `args.<model>` and the sources of the `data` to a small sibling of the quickstart's model and to its rows,
    unless they are given; returns the quickstart's folder if it is used.

    Raises:
        ValueError: if some are given and others are not.
    """
    given = [name for name in (model, *data) if getattr(args, name) is not None]
    if len(given) == 1 + len(data):
        return None
    if given:
        flags = ", ".join(f"--{name}" for name in (model, *data))
        raise ValueError(
            f"Only {', '.join(f'--{name}' for name in given)} given: give all of {flags}, or none of them."
        )
    inputs = make_quickstart_inputs()
    setattr(args, model, make_sized_model(inputs, hidden_size=48, num_layers=2))
    for name in data:
        setattr(args, name, str(inputs / f"{name}.jsonl"))
    return inputs


def add_selection_flags(parser: argparse.ArgumentParser, fraction: float, steps: int, reference_steps: int) -> None:
    """Flags of the benchmarks that score a pool by a reference and train targets on what they keep, three seeds."""
    parser.add_argument("--pool")
    parser.add_argument("--validation")
    parser.add_argument("--test")
    parser.add_argument("--fraction", type=float, default=fraction)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--reference_steps", type=int, default=reference_steps)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])


def prepare_source(source: str, name: str, model: str | Path) -> Dataset:
    """Rows with prompt and completion of a file, a folder or the Hub, as the tokens of a model, one for one."""
    return prepare_every_row(load_rows(source, name), name, model)


def prepare_every_row(rows: Dataset, name: str, model: str | Path) -> Dataset:
    """
    The same of rows in memory.

    Raises:
        ValueError: if some carry no loss, since what TRL leaves out would shift the positions of the others.
    """
    preparation = Preparation(AutoTokenizer.from_pretrained(model), completion_only_loss=True, max_length=MAX_LENGTH)
    prepared = prepare_rows(rows.select_columns(["prompt", "completion"]), preparation)
    if len(prepared) < len(rows):
        raise ValueError(
            f"{len(rows) - len(prepared)} of {len(rows)} rows of the {name} carry no loss within {MAX_LENGTH} tokens. "
            "Leave them out first."
        )
    return prepared


def load_adapter(model: str | Path, rank: int, seed: int) -> PeftModel:
    """A base model with a fresh LoRA adapter on every linear, seeded."""
    base = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    return get_peft_model(base, config)


def plan_steps(num_rows: int, schedule: Schedule, seed: int) -> list[np.ndarray]:
    """Rows of each step: a fresh random order for every epoch, cut into batches; the last of an epoch may be short."""
    generator = np.random.default_rng(seed)
    batches: list[np.ndarray] = []
    while len(batches) < schedule.steps:
        order = generator.permutation(num_rows)
        batches += [order[start : start + schedule.batch_size] for start in range(0, num_rows, schedule.batch_size)]
    return batches[: schedule.steps]


def train_adapter(model: PeftModel, batches: list[TokenBatch | None], schedule: Schedule) -> None:
    """Train the adapter in place, one step per batch; a batch without rows (`None`) has a zero gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, schedule.warmup_steps, schedule.steps)
    model.train()
    for parameter in parameters:
        # Not `None`, with which the optimiser would leave a step without rows out, its momentum too.
        parameter.grad = torch.zeros_like(parameter)
    for batch in batches:
        optimizer.zero_grad(set_to_none=False)
        if batch is not None:
            compute_token_nll(model, batch)[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
    model.zero_grad()
    model.eval()


def make_batches(prepared: Dataset, steps: list[np.ndarray]) -> list[TokenBatch | None]:
    """Collated batches of the rows of each step."""
    token_rows = read_token_rows(prepared)
    return [collate(token_rows, rows) if len(rows) else None for rows in steps]


def train_on(
    model_path: str | Path, prepared: Dataset, positions: np.ndarray, schedule: Schedule, seed: int
) -> PeftModel:
    """A fresh adapter trained on the rows at `positions`, seeded."""
    model = load_adapter(model_path, schedule.rank, seed)
    steps = plan_steps(len(positions), schedule, seed)
    train_adapter(model, make_batches(prepared, [positions[rows] for rows in steps]), schedule)
    return model


def keep_gradients(model: PeftModel, prepared: Dataset) -> dict[str, np.ndarray]:
    """Per-example gradients of the mean token loss, float64 `[n, d]` per block."""
    passes = Passes(model, find_blocks(model, "default"), "mean", 4096, show_progress=False)
    gradients = run_per_example_validation_pass(passes, prepared, "queries")
    return {name: value.flatten(1).double().numpy() for name, value in gradients.items()}


def compute_influence(
    g: dict[str, np.ndarray], v: dict[str, np.ndarray], damping_scale: float
) -> dict[str, np.ndarray]:
    """
    Influence `[n, Q]` by estimator, from the gradients per block of rows `[n, d]` and of validation rows `[Q, d]`.

    DataInf and the dot are linear in the validation gradient: their mean over single rows is the influence on the mean
    loss. The cosine's mean over single rows is not the cosine with the mean gradient.
    """
    num_rows, num_queries = len(next(iter(g.values()))), len(next(iter(v.values())))
    datainf, dots = np.zeros((num_rows, num_queries)), np.zeros((num_rows, num_queries))
    row_norms, query_norms = np.zeros(num_rows), np.zeros(num_queries)
    for name in g:
        rows, queries = torch.from_numpy(g[name]), torch.from_numpy(v[name])
        square_norms, products = rows.square().sum(1), rows @ queries.T
        damping = compute_damping(float(square_norms.mean()), rows.shape[1], damping_scale)
        if damping > 0:
            weighted = compute_coefficients(products, square_norms, damping)[0].T @ rows
            datainf -= (rows @ compute_ihvp(queries, weighted, num_rows, damping).T).numpy()
        dots -= products.numpy()
        row_norms += square_norms.numpy()
        query_norms += queries.square().sum(1).numpy()
    lengths = np.sqrt(row_norms)[:, None]
    cosines = dots / lengths / np.sqrt(query_norms)
    return {
        "DataInf": datainf,
        "DataInf / norm": datainf / lengths,
        "gradient dot": dots,
        "gradient cosine": cosines,
    }


def compute_query_influence(
    model: PeftModel,
    pool: Dataset,
    validation: Dataset,
    estimator: str = "datainf",
    damping_scale: float = 0.1,
    loss_reduction: str = "mean",
    with_mean: bool = False,
) -> np.ndarray:
    """
    Influence of every row on every validation row, float64 `[n, Q]`, by the library's own passes.

    `with_mean` adds a last column, the influence on the mean validation loss, which for a cosine is not the mean.
    """
    blocks = find_blocks(model, "default")
    passes = Passes(model, blocks, loss_reduction, 4096, chunk_size=10**6, show_progress=False)
    directions = run_per_example_validation_pass(passes, validation, "queries")
    if with_mean:
        directions = {name: torch.cat([value, value.mean(0, keepdim=True)]) for name, value in directions.items()}
    if estimator == "datainf":
        fitted = run_fit_pass(passes, pool, directions, damping_scale, None, 0)
        directions = {name: value.float() for name, value in fitted.ihvp.items()}
    return run_score_pass(passes, pool, directions, cosine=estimator == "gradient_cosine").influence


def select_rows(influence: np.ndarray, strategy: str, **options: Any) -> np.ndarray:
    """Positions of the rows that a strategy of [`select_coreset`] keeps, of `[n, Q]` influence."""
    columns = {"influence": influence.mean(1), "influence_per_query": list(influence)}
    return select_positions(Dataset.from_dict(columns), strategy=strategy, order="original", **options)


def compute_test_loss(model: PeftModel, prepared: Dataset) -> float:
    """Mean negative log-likelihood per labelled token, nats."""
    losses = compute_row_losses(model, prepared)
    return float(losses.nll.sum() / losses.num_loss_tokens.sum())


def check_against_trl(model_path: str | Path, prepared: Dataset, schedule: Schedule, seed: int = 0) -> float:
    """Largest difference between the adapters of this loop and of TRL's trainer, relative to the largest weight."""
    from trl import SFTConfig, SFTTrainer

    steps = plan_steps(len(prepared), schedule, seed)
    ours = load_adapter(model_path, schedule.rank, seed)
    train_adapter(ours, make_batches(prepared, steps), schedule)
    theirs = load_adapter(model_path, schedule.rank, seed)
    # The same rows in the same places: every epoch written out, taken in order.
    rows = prepared.select(np.concatenate(steps)).select_columns(["input_ids", "labels"])
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder,
            max_steps=schedule.steps,
            per_device_train_batch_size=schedule.batch_size,
            learning_rate=schedule.learning_rate,
            warmup_steps=schedule.warmup_steps,
            lr_scheduler_type="linear",
            train_sampling_strategy="sequential",
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        SFTTrainer(
            model=theirs, args=args, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(model_path)
        ).train()
    pairs = [
        (p, q)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)
        if p.requires_grad or q.requires_grad
    ]
    largest = max(float(p.detach().abs().max()) for p, _ in pairs)
    return max(float((p - q).detach().abs().max()) for p, q in pairs) / largest
