"""hf_in2core beside Kronfluence, dattri, dattri-LLM and Bergson: one adapter, one set of rows; CPU seconds, agreement.

The peers want a virtual environment of their own (never the project's), made from the repository root by:

    python3.11 -m venv /tmp/peers-venv
    /tmp/peers-venv/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    /tmp/peers-venv/bin/pip install --no-deps -r benchmarks/peers-requirements.txt
    export OMP_NUM_THREADS=1 TQDM_DISABLE=1 PYTHONPATH=.
    /tmp/peers-venv/bin/python benchmarks/peers.py [--quick] [--output_dir benchmarks/results]

`--no-deps`, because Kronfluence and Bergson ask for torchvision and torchaudio, which nothing here uses.

One process and one thread; the works take turns, so that a slow minute meets all of them; medians; one repetition is
not counted. The time is of the libraries' work alone: models, datasets and imports are ready before. All scores are
turned to our sign (negative = proponent), and every loss is the mean over the labelled tokens of a row.

What each peer is given, meant to be fast where it lets its user choose (batch sizes were not searched):

- Rows come sorted by length, longest first, so that batches of fixed size pad as little as batches by token budget.
- Kronfluence: batches of 32 rows, all queries in one batch (so training rows are passed once per score), our own loss
  (logits at labelled positions only), empirical Fisher (no sampling of labels), no progress bars, a fresh folder every
  time. Its mean over the queries: `aggregate_query_gradients`.
- dattri: all training rows in one batch when scoring (its test gradients are computed and preconditioned again for
  every training batch), batches of 32 rows when caching, all queries in one batch. One damping for all tensors, the
  mean of ours, because its default of 0 gives NaN. Its attention runs row by row under `vmap`, which was still faster
  than eager attention. Its mean over the queries: the mean of the columns of its matrix (with one averaged query it
  would go through the training rows one by one, since it takes them in batches as large as the batch of queries).
- dattri-LLM: its live attributors on batches of 32 rows, all queries in one batch, our own loss (logits at labelled
  positions only), its forward without the weight gradients of hooked layers (`invasive_linear_io`), factors or whole
  gradients as its cost rule says (`capture_style="auto"`). EK-FAC passes the model once and keeps the captures in
  memory (`gradient_cache_residency`); its damping is a tenth of the mean eigenvalue, as Kronfluence's. Its mean over
  the queries: the mean of the columns of its matrix.
- Bergson: gradients of the queries in memory, rows scored as they stream by, the same token budget as ours. Of
  the model only the first norm weight is trainable (Bergson wants one such tensor, by default all embeddings), so that
  autograd computes next to nothing beside what Bergson's hooks do.
"""

import logging
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from bergson import CollectorComputer, IndexConfig, InMemoryCollector, PreprocessConfig, Scorer
from bergson.data import allocate_batches
from bergson.score.score_writer import InMemorySequenceScoreWriter
from bergson.utils.worker_utils import extract_peft_target_modules
from common import make_parser, report, set_up
from datasets import Dataset
from dattri.algorithm.influence_function import IFAttributorDataInf
from dattri.task import AttributionTask
from dattri_llm import AttributionArguments, EKFACAttributor, HookManagerConfig, TracInAttributor
from dattri_llm import AttributionTask as LLMTask
from kronfluence import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model
from kronfluence.utils.dataset import DataLoaderKwargs
from peft import PeftModel
from scipy.stats import spearmanr
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader
from workload import (
    compute_mean_gradients,
    make_model,
    make_passes,
    make_rows,
    measure_error,
    run_fit_and_score,
    storing,
    time_interleaved,
)

from hf_in2core.engine.batches import TokenBatch, collate, read_token_rows
from hf_in2core.engine.datainf import compute_ihvp
from hf_in2core.engine.fit import run_fit_pass
from hf_in2core.engine.gradients import GradientRecorder
from hf_in2core.engine.losses import compute_token_nll, compute_token_weights
from hf_in2core.engine.passes import Passes, run_batches
from hf_in2core.engine.reductions import FitDirections, compute_fit_terms
from hf_in2core.engine.scoring import run_score_pass
from hf_in2core.engine.validation import run_per_example_validation_pass


BATCH_SIZE = 32
TOKENS_PER_BATCH = 4096


# hf_in2core


def compute_queries(passes: Passes, queries: Dataset, mean: bool) -> dict[str, Tensor]:
    """Gradients of the queries, `[Q, out, in]` per block, or their mean, `[1, out, in]`."""
    if not mean:
        return run_per_example_validation_pass(passes, queries, "queries")
    return compute_mean_gradients(passes, queries)


def run_datainf(passes: Passes, train: Dataset, queries: Dataset, mean: bool) -> np.ndarray:
    """Our DataInf, `[n, Q]` or `[n, 1]`."""
    return run_fit_and_score(passes, train, compute_queries(passes, queries, mean))


def run_datainf_with_store(passes: Passes, train: Dataset, queries: Dataset, mean: bool) -> np.ndarray:
    """The same with the gradients of the fit pass kept on disk (`gradient_store_gb`), float32."""
    with storing(passes) as kept:
        return run_datainf(kept, train, queries, mean)


def run_gradient_dot(passes: Passes, train: Dataset, queries: Dataset, mean: bool) -> np.ndarray:
    """Our gradient dot, `[n, Q]` or `[n, 1]`."""
    v = {name: value.float() for name, value in compute_queries(passes, queries, mean).items()}
    return run_score_pass(passes, train, v, cosine=False).influence


def compute_mean_damping(passes: Passes, train: Dataset, queries: Dataset) -> float:
    """Mean over the blocks of the damping that DataInf finds."""
    fitted = run_fit_pass(passes, train, compute_mean_gradients(passes, queries), 0.1, None, 0)
    return float(np.mean(list(fitted.damping.values())))


def run_datainf_with_damping(passes: Passes, train: Dataset, queries: Dataset, damping: float) -> np.ndarray:
    """Our DataInf with one given damping in every block, as dattri has it."""
    v = compute_queries(passes, queries, mean=False)
    sums = {name: torch.zeros_like(value).double() for name, value in v.items()}
    directions = FitDirections(v, dict.fromkeys(v, damping))
    with GradientRecorder(passes.model, passes.blocks) as recorder:

        def step(batch: TokenBatch) -> None:
            for name, value in compute_fit_terms(recorder, batch, "mean", directions)[0].items():
                sums[name] += value[: len(sums[name])].view_as(sums[name])

        run_batches(passes, read_token_rows(train), step)
    ihvp = {name: compute_ihvp(v[name].double(), sums[name], len(train), damping).float() for name in v}
    return run_score_pass(passes, train, ihvp, cosine=False).influence


# Kronfluence


class LanguageModeling(Task):
    """Loss and measurement are the per-row loss of hf_in2core, logits at labelled positions only."""

    def __init__(self, tracked_modules: list[str]) -> None:
        self.tracked_modules = tracked_modules

    def compute_train_loss(self, batch: dict[str, Tensor], model: torch.nn.Module, sample: bool = False) -> Tensor:
        assert not sample, "the empirical Fisher takes the labels of the rows"
        unnumbered = np.full(len(batch["input_ids"]), -1)
        token_batch = TokenBatch(indices=unnumbered, rows=unnumbered, **batch)
        nll, _ = compute_token_nll(model, token_batch)
        return (nll * compute_token_weights(token_batch, "mean", nll)).sum()

    def compute_measurement(self, batch: dict[str, Tensor], model: torch.nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.tracked_modules

    def get_attention_mask(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["attention_mask"]


def prepare_kronfluence(model: PeftModel) -> tuple[PeftModel, Task]:
    """The model with Kronfluence's modules in it, and the task."""
    task = LanguageModeling(
        [name for name, _ in model.named_modules() if name.endswith((".lora_A.default", ".lora_B.default"))]
    )
    return prepare_model(model, task), task


def run_kronfluence(
    model: PeftModel, task: Task, train: Dataset, queries: Dataset, mean: bool, strategy: str
) -> np.ndarray:
    """Kronfluence's factors and pairwise scores, `[n, Q]` or `[n, 1]`."""
    # One list of rows for both datasets, because the collate function is one for both.
    all_rows = read_token_rows(Dataset.from_list([*train, *queries]))

    def make_batch(indices: list[int]) -> dict[str, Tensor]:
        batch = collate(all_rows, np.array(indices))
        return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}

    train_indices, query_indices = range(len(train)), range(len(train), len(all_rows))
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("peers", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=make_batch))
        analyzer.fit_all_factors(
            factors_name="factors",
            dataset=train_indices,
            per_device_batch_size=BATCH_SIZE,
            factor_args=FactorArguments(strategy=strategy, use_empirical_fisher=True),
        )
        analyzer.compute_pairwise_scores(
            scores_name="scores",
            factors_name="factors",
            query_dataset=query_indices,
            train_dataset=train_indices,
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=BATCH_SIZE,
            score_args=ScoreArguments(damping_factor=None, aggregate_query_gradients=mean),
        )
        scores = analyzer.load_pairwise_scores("scores")["all_modules"].T.double().numpy()
    return -scores / len(queries) if mean else -scores


# dattri


def prepare_dattri(model: PeftModel) -> AttributionTask:
    """The attribution task: the per-row loss as a function of the adapter."""
    model.eval()

    def compute_loss(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        input_ids, labels = data
        # Right padding in a causal model needs no attention mask.
        logits = functional_call(model, params, args=(), kwargs={"input_ids": input_ids, "use_cache": False}).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    return AttributionTask(compute_loss, model, model.state_dict())


def make_padded_loader(rows: Dataset, batch_size: int) -> DataLoader:
    """Batches of input ids and labels, padded to the longest row of each."""
    columns = [(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in rows]

    def pad(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        return tuple(
            torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=padding)
            for column, padding in zip(zip(*batch, strict=True), (0, -100), strict=True)
        )

    return DataLoader(columns, batch_size=batch_size, collate_fn=pad)


def run_dattri(task: AttributionTask, train: Dataset, queries: Dataset, mean: bool, damping: float) -> np.ndarray:
    """dattri's DataInf with one damping, `[n, Q]` or `[n, 1]`."""
    attributor = IFAttributorDataInf(task=task, regularization=damping)
    attributor.cache(make_padded_loader(train, BATCH_SIZE))
    scores = attributor.attribute(make_padded_loader(train, len(train)), make_padded_loader(queries, len(queries)))
    scores = -scores.detach().double().numpy()
    return scores.mean(1, keepdims=True) if mean else scores


# dattri-LLM


def run_dattri_llm(model: PeftModel, train: Dataset, queries: Dataset, mean: bool, ekfac: bool) -> np.ndarray:
    """dattri-LLM's gradient dot or EK-FAC, `[n, Q]` or `[n, 1]`."""
    all_rows = read_token_rows(Dataset.from_list([*train, *queries]))

    def compute_loss(model: torch.nn.Module, indices: Tensor) -> Tensor:
        batch = collate(all_rows, indices.numpy())
        nll, _ = compute_token_nll(model, batch)
        return (nll * compute_token_weights(batch, "mean", nll)).sum()

    hooks = HookManagerConfig(invasive_linear_io=["lora_[AB]"], capture_style="auto")
    with tempfile.TemporaryDirectory() as folder:
        arguments = AttributionArguments(
            folder,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=len(queries),
            use_cpu=True,
        )
        attributor = (EKFACAttributor if ekfac else TracInAttributor)(arguments, task=LLMTask(compute_loss, model))
        options = {"gradient_cache_residency": "memory", "damping": 0.1, "relative_damping": True} if ekfac else {}
        rows = range(len(train)), range(len(train), len(all_rows))
        _, scores = attributor.attribute(*rows, hook_config=hooks, **options).agnostic_matrix()
    scores = -scores.double().numpy()
    return scores.mean(1, keepdims=True) if mean else scores


# Bergson


def prepare_bergson(model: PeftModel) -> PeftModel:
    """The model with one small weight at the bottom trainable, so that the backward reaches every hook for little."""
    model.eval().requires_grad_(False)
    model.get_submodule("base_model.model.model.layers.0.input_layernorm").requires_grad_(True)
    return model


def run_bergson(model: PeftModel, train: Dataset, queries: Dataset, mean: bool) -> np.ndarray:
    """Bergson's gradient dot, `[n, Q]` or `[n, 1]`."""
    target_modules = extract_peft_target_modules(model)
    with tempfile.TemporaryDirectory() as folder:
        config = IndexConfig(run_path=folder, loss_reduction="mean", token_batch_size=TOKENS_PER_BATCH)
        config.partial_run_path.mkdir()

        def collect(rows: Dataset, preprocess: PreprocessConfig, scorer: Scorer | None) -> InMemoryCollector:
            collector = InMemoryCollector(
                model=model.base_model,
                target_modules=target_modules,
                data=rows,
                cfg=config,
                preprocess_cfg=preprocess,
                scorer=scorer,
            )
            batches = allocate_batches(rows["length"][:], TOKENS_PER_BATCH)
            CollectorComputer(model, rows, collector=collector, batches=batches, cfg=config).run_with_collector_hooks()
            return collector

        gradients = collect(queries, PreprocessConfig(aggregation="mean" if mean else "none"), None).gradients
        writer = InMemorySequenceScoreWriter(len(train), 1 if mean else len(queries))
        scorer = Scorer(gradients, list(gradients), writer, torch.device("cpu"), torch.float32)
        collect(train, PreprocessConfig(), scorer)
    return -writer.scores.double().numpy()


# The table


def relative_difference(found: np.ndarray, expected: np.ndarray) -> str:
    """The error in words."""
    return f"{measure_error(found, expected):.0e} relative to ours"


def mean_spearman(found: np.ndarray, expected: np.ndarray) -> str:
    """Rank correlation of the training rows, mean over the queries."""
    values = [spearmanr(a, b).statistic for a, b in zip(found.T, expected.T, strict=True)]
    return f"Spearman {np.mean(values):.2f} with our DataInf"


def sort_by_length(rows: Dataset) -> Dataset:
    """The rows with their lengths (which Bergson asks for), longest first."""
    rows = rows.map(lambda row: {"length": len(row["input_ids"])})
    return rows.sort("length", reverse=True)


def compare(mean: bool, quick: bool) -> list[dict[str, object]]:
    """The rows of the table for the matrix, or for the mean over the queries."""
    width, num_train, num_queries, repetitions = (64, 24, 4, 1) if quick else (128, 200, 32, 3)
    vocab_size = 1024
    train = sort_by_length(make_rows(num_train, vocab_size, 32, 128))
    queries = sort_by_length(make_rows(num_queries, vocab_size, 32, 128, seed=1))
    make = partial(make_model, width, 4, vocab_size)
    passes = make_passes(make(), TOKENS_PER_BATCH)
    damping = compute_mean_damping(passes, train, queries)
    kronfluence = prepare_kronfluence(make())
    dattri = prepare_dattri(make())
    dattri_llm = make().eval()
    bergson = prepare_bergson(make())

    runs: dict[str, Callable[[], np.ndarray]] = {
        "ours, DataInf": partial(run_datainf, passes, train, queries, mean),
        "ours, DataInf with store": partial(run_datainf_with_store, passes, train, queries, mean),
        "ours, gradient dot": partial(run_gradient_dot, passes, train, queries, mean),
        "Kronfluence 1.0.1, EK-FAC": partial(run_kronfluence, *kronfluence, train, queries, mean, "ekfac"),
        "Kronfluence 1.0.1, identity": partial(run_kronfluence, *kronfluence, train, queries, mean, "identity"),
        "dattri 0.3.0, DataInf": partial(run_dattri, dattri, train, queries, mean, damping),
        "dattri-LLM 0.1.0, EK-FAC": partial(run_dattri_llm, dattri_llm, train, queries, mean, True),
        "dattri-LLM 0.1.0, gradient dot": partial(run_dattri_llm, dattri_llm, train, queries, mean, False),
        "Bergson 2.5.1, gradient dot": partial(run_bergson, bergson, train, queries, mean),
    }
    scores: dict[str, np.ndarray] = {}

    def keep(name: str) -> None:
        start = time.process_time()
        scores[name] = runs[name]()
        print(f"{name}: {time.process_time() - start:.2f} CPU s", file=sys.stderr, flush=True)

    seconds = time_interleaved({name: partial(keep, name) for name in runs}, repetitions)
    at_their_damping = run_datainf_with_damping(passes, train, queries, damping)
    at_their_damping = at_their_damping.mean(1, keepdims=True) if mean else at_their_damping
    ekfacs = ("Kronfluence 1.0.1, EK-FAC", "dattri-LLM 0.1.0, EK-FAC")
    expected = {name: mean_spearman(scores[name], scores["ours, DataInf"]) for name in ekfacs} | {
        "dattri 0.3.0, DataInf": relative_difference(scores["dattri 0.3.0, DataInf"], at_their_damping)
        + " at its one damping",
    }
    for name in ("Kronfluence 1.0.1, identity", "dattri-LLM 0.1.0, gradient dot", "Bergson 2.5.1, gradient dot"):
        expected[name] = relative_difference(scores[name], scores["ours, gradient dot"]) + " gradient dot"
    expected["ours, DataInf with store"] = relative_difference(
        scores["ours, DataInf with store"], scores["ours, DataInf"]
    )
    targets = {"Bergson 2.5.1, gradient dot": "<= 2.2, with store <= 1.2"}
    if not mean:
        targets |= {"Kronfluence 1.0.1, EK-FAC": "<= 0.33", "dattri 0.3.0, DataInf": "<= 0.20"}
    leaves_out = {
        "Kronfluence 1.0.1, identity": "curvature",
        "dattri 0.3.0, DataInf": "a damping per tensor",
        "dattri-LLM 0.1.0, gradient dot": "curvature",
        "Bergson 2.5.1, gradient dot": "curvature",
        "ours, gradient dot": "curvature",
    }
    what = f"{num_train} rows x " + (f"the mean of {num_queries} queries" if mean else f"{num_queries} queries")
    return [
        {
            "what": what,
            "by": name,
            "CPU s": seconds[name],
            "our DataInf / it": seconds["ours, DataInf"] / seconds[name],
            "with store / it": seconds["ours, DataInf with store"] / seconds[name],
            "target": targets.get(name, ""),
            "agreement": expected.get(name, ""),
            "leaves out": leaves_out.get(name, ""),
        }
        for name in runs
    ]


def main() -> None:
    parser = make_parser(__doc__, "Small sizes: shows that it runs, not how fast.")
    args = set_up(parser)
    logging.disable(logging.WARNING)  # the peers name every module they track, at every call
    report("peers", [row for mean in (False, True) for row in compare(mean, args.quick)], args.output_dir)


if __name__ == "__main__":
    main()
