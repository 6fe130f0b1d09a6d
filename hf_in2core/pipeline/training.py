"""What the commands do, one function per stage; `in2core run` and the commands of single stages call the same ones."""

import os
import shutil
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config
from trl.trainer.utils import create_model_from_path

from hf_in2core import InfluenceConfig, InfluenceScorer, InfluenceTrainer
from hf_in2core.engine.losses import compute_row_losses
from hf_in2core.engine.sharding import is_sharded, is_sharding_launch, save_adapter, shard_model
from hf_in2core.evaluation.metrics import TokenAccuracy, TokenPerplexity
from hf_in2core.hub.checks import find_revision
from hf_in2core.influence.config import AUTOCAST_DTYPES, choose_autocast
from hf_in2core.influence.cosines import OPTIMIZER
from hf_in2core.names import NUM_LOSS_TOKENS, REPLAY
from hf_in2core.rows.preparation import Preparation, tokenize_rows
from hf_in2core.rows.scored import add_influence_columns

from .parser import Settings
from .run_folder import lock_folder, quiet_loading, write_json
from .step_bars import StepProgress
from .zero import is_zero_launch, launched_by_zero, let_go


def make_model_kwargs(model_args: ModelConfig, training_args: InfluenceConfig) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`, for a trainer (`model_init_kwargs`) or for our own loading."""
    kwargs: dict[str, Any] = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    given: dict[str, Any] = training_args.model_init_kwargs or {}  # type: ignore[assignment]
    return kwargs | given


def load_model(model_args: ModelConfig, training_args: InfluenceConfig, adapter: str | None = None) -> Any:
    """Load a model as SFTTrainer does; with a trained adapter, or as it was trained itself, or as it is."""
    name = model_args.model_name_or_path or ""
    kwargs = make_model_kwargs(model_args, training_args) | {"trust_remote_code": training_args.trust_remote_code}
    if PartialState().num_processes > 1:
        kwargs["device_map"] = None
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    if adapter is not None and not model_args.use_peft:
        name, adapter, kwargs["revision"] = adapter, None, None
    model = create_model_from_path(name, **kwargs)
    shared_out = is_sharding_launch() or is_zero_launch()
    if quantization is None and not hasattr(model, "hf_device_map") and not shared_out:
        model = model.to(PartialState().device)
    # A loaded model does not tell which revision it is of, and a scorer names its base model's.
    model.config._commit_hash = find_revision(name, kwargs["revision"])
    return model if adapter is None else PeftModel.from_pretrained(model, adapter, is_trainable=True)


def tokenize(rows: Dataset, training_args: InfluenceConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Raw rows as the `input_ids` and `labels` that SFT would make of them, every one and whole."""
    preparation = Preparation.from_args(training_args, tokenizer, rows)
    return tokenize_rows(rows, preparation, training_args.dataset_num_proc)


def make_trainer(
    model_args: ModelConfig,
    training_args: InfluenceConfig,
    tokens: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str | None = None,
) -> Any:
    """A TRL SFTTrainer on rows from [`tokenize`], for a trained adapter or a fresh one, seeded by `training_args`."""
    args = copy(training_args)
    if adapter is not None:
        args.model_init_kwargs = None
        trainer = make_sft_trainer(load_model(model_args, training_args, adapter), args, tokens, tokenizer)
        args.model_init_kwargs = training_args.model_init_kwargs  # of use to who loads the model anew
        return trainer
    args.model_init_kwargs = make_model_kwargs(model_args, training_args)
    options = {"quantization_config": get_quantization_config(model_args), "peft_config": get_peft_config(model_args)}
    return make_sft_trainer(model_args.model_name_or_path or "", args, tokens, tokenizer, **options)


def make_sft_trainer(
    model: Any, args: SFTConfig, tokens: Dataset, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> Any:
    """A TRL SFTTrainer on rows from [`tokenize`], which changes its `args`, with further `options` of TRL's."""
    # The labels say so already, and TRL would look for conversations.
    args.assistant_only_loss = False
    # TRL 1.14 draws the adapter without a seed of its own.
    set_seed(args.seed)
    return SFTTrainer(model=model, args=args, train_dataset=tokens, processing_class=tokenizer, **options)


def make_reference_trainer(
    model_args: ModelConfig,
    influence_args: InfluenceConfig,
    rows: Dataset,
    validation: Dataset | dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
) -> InfluenceTrainer:
    """The same for the reference model; its construction checks everything that influence will need later."""
    influence_args.model_init_kwargs = make_model_kwargs(model_args, influence_args)
    set_seed(influence_args.seed)
    return InfluenceTrainer(
        model=model_args.model_name_or_path or "",
        args=influence_args,
        train_dataset=rows,
        eval_dataset=validation,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def train(trainer: SFTTrainer, label: str, model_args: ModelConfig) -> dict[str, Any]:
    """
    Train, from the last checkpoint where `save_strategy` keeps some; `model_args` are those of the trainer's model.

    Returns:
        `dict`: `rows` and `loss_tokens` trained on, `steps`, `seconds` (of this process's training, without loading).
    """
    strip_callbacks(trainer)
    trainer.add_callback(StepProgress(label))
    checkpoint = None
    folder = trainer.args.output_dir or ""
    if trainer.args.save_strategy != "no" and Path(folder).is_dir():
        checkpoint = get_last_checkpoint(folder)
    if is_zero_launch():
        seconds = _train_by_zero(trainer, model_args, checkpoint)
    else:
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds = time.perf_counter() - started
    return {**count_loss_tokens(trainer.train_dataset), "steps": trainer.state.global_step, "seconds": seconds}


def _train_by_zero(trainer: Any, model_args: ModelConfig, checkpoint: str | None) -> float:
    """
    Train what a trainer has by ZeRO-3; it then has the trained model, loaded anew without DeepSpeed.

    Two copies of the base would not fit: each is freed before the next one is loaded, and the adapter goes from one to
    the next in files.

    Returns:
        `float`: seconds of the training, without loading.
    """
    folder = Path(trainer.args.output_dir or "")
    start, trained = folder / "zero3_start", folder / "zero3_trained"
    save_adapter(trainer.model, start)
    PartialState().wait_for_everyone()
    release(trainer)
    with launched_by_zero(), quiet_loading(repeated=True):
        # Made within, training arguments bring DeepSpeed. The rows are prepared already.
        prepared = {**(trainer.args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        args = replace(trainer.args, dataset_kwargs=prepared)
        inner = make_trainer(model_args, args, trainer.train_dataset, trainer.processing_class, str(start))
        inner.callback_handler.callbacks = trainer.callback_handler.callbacks
        started = time.perf_counter()
        inner.train(resume_from_checkpoint=checkpoint)
        seconds = time.perf_counter() - started
        inner.save_model(str(trained))
        PartialState().wait_for_everyone()
        trainer.state = inner.state
        engine = inner.model_wrapped
        release(inner)
        let_go(engine)
    trainer.args = replace(trainer.args)
    with quiet_loading(repeated=True):
        trainer.model = load_model(model_args, trainer.args, str(trained))
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        shutil.rmtree(start)
        shutil.rmtree(trained)
    return seconds


def strip_callbacks(trainer: SFTTrainer) -> None:
    """Take out the bars and prints of Transformers."""
    for callback in (ProgressCallback, DEFAULT_PROGRESS_CALLBACK, PrinterCallback):
        trainer.remove_callback(callback)


def count_steps(trainer: SFTTrainer) -> int:
    """Optimiser steps that `num_train_epochs` over the trainer's rows take, however many processes there are."""
    args = trainer.args
    per_epoch = max(-(-len(trainer.get_train_dataloader()) // args.gradient_accumulation_steps), 1)
    return int(np.ceil(args.num_train_epochs * per_epoch))


def count_loss_tokens(prepared: Dataset) -> dict[str, int]:
    """Rows of a prepared dataset, packed or not, and the tokens that carry loss (a row's first is never predicted)."""
    columns = [name for name in ("labels", "seq_lengths") if name in prepared.column_names]
    rows = loss_tokens = 0
    for example in prepared.select_columns(columns).with_format(None):
        labels = np.asarray(example["labels"])
        lengths = example.get("seq_lengths") or [len(labels)]
        labels[np.cumsum([0, *lengths[:-1]])] = -100
        rows += len(lengths)
        loss_tokens += int((labels != -100).sum())
    return {"rows": rows, "loss_tokens": loss_tokens}


def make_saving(count: int | None) -> dict[str, Any]:
    """Settings by which a training keeps about `count` checkpoints, evenly, the last at its end; none for `None`."""
    if not count:
        return {}
    # A share of the steps; of one checkpoint alone, that of the end, which is saved whatever the distance.
    steps = {"save_steps": 1 / count if count > 1 else 10**9}
    # Each step's learning rate is logged: it is what a checkpoint weighs.
    return {"save_strategy": "steps", **steps, "save_total_limit": None, "save_only_model": False, "logging_steps": 1}


def move_checkpoints(source: Path, folder: Path) -> None:
    """Move checkpoints of a finished training, what is read of them alone."""
    for checkpoint in source.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        kept = folder / checkpoint.name
        kept.mkdir()
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, TRAINER_STATE_NAME, OPTIMIZER):
            if (checkpoint / name).is_file():
                os.replace(checkpoint / name, kept / name)


def list_checkpoints(run: Path) -> list[str]:
    """The checkpoints of its reference that a run has kept."""
    return sorted(map(str, (run / "reference").glob(f"{PREFIX_CHECKPOINT_DIR}-*")))


def train_and_save(trainer: Any, settings: Settings, label: str) -> dict[str, Any]:
    """Train, write adapter, tokenizer, `config.yaml` and `training.json` into `output_dir`; returns as [`train`]."""
    folder = Path(trainer.args.output_dir or "")
    lock_folder(folder)
    result = train(trainer, label, settings.make(ModelConfig))
    save_adapter(trainer.model, folder)
    if PartialState().is_main_process:
        trainer.processing_class.save_pretrained(str(folder))
        settings.save(folder / REPLAY)
        write_json(folder / "training.json", result)
    return result


def release(trainer: SFTTrainer) -> None:
    """Free a trainer's memory; the caller drops its own name for it."""
    trainer.model = trainer.model_wrapped = None  # type: ignore[assignment]
    trainer.callback_handler.model = None
    if isinstance(trainer, InfluenceTrainer):
        trainer.forget()
    trainer.accelerator.free_memory()


def make_influence_trainer(
    model_args: ModelConfig,
    influence_args: InfluenceConfig,
    adapter: str,
    pool: Dataset,
    validation: Dataset | dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
) -> InfluenceTrainer:
    """An InfluenceTrainer for a trained adapter."""
    with quiet_loading():
        trainer = InfluenceTrainer(
            model=load_model(model_args, influence_args, adapter),
            args=influence_args,
            train_dataset=pool,
            eval_dataset=validation,
            processing_class=tokenizer,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def compute_influence(
    model_args: ModelConfig,
    influence_args: InfluenceConfig,
    adapter: str,
    pool: Dataset,
    validation: Dataset | dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    per_example: bool = False,
    checkpoints: Sequence[str] = (),
) -> tuple[InfluenceScorer, Dataset, float, bool]:
    """
    Influence of the pool on the validation sets through a trained adapter; resumes under `output_dir/influence/`.

    With `per_example` every validation row is a query of its own (column `influence_per_query`). With `checkpoints`
    the scores are averaged over them; the scorer is that of the adapter.

    Returns:
        `tuple`: the scorer, the pool with the columns that it adds, the seconds of this call, and whether they are of
        the last part alone, for it resumed.
    """
    started = time.perf_counter()
    trainer = make_influence_trainer(model_args, influence_args, adapter, pool, validation, tokenizer)
    # What else lies there is of other validation rows, such as those of a tournament.
    states = Path(influence_args.output_dir or "") / "influence"
    begun = {path.parent.name for path in states.glob("*/*.safetensors")}
    scorer = trainer.fit_influence(per_example)
    resumed = trainer.fingerprint in begun
    scored = trainer.score_influence(checkpoints=checkpoints or None)
    return scorer, scored, time.perf_counter() - started, resumed


def find_gathered_order(num_rows: int) -> np.ndarray:
    """
    Where the rows of a set come from when each of `n` processes has every `n`-th one and their results are gathered.

    Dealt out in turn, the rows of a set that is sorted by length are as long on every process.

    Returns:
        `numpy.ndarray` of shape `[rows]`, int64: gathered results are put in order by indexing with it.
    """
    processes = PartialState().num_processes
    gathered = np.concatenate([np.arange(rank, num_rows, processes) for rank in range(processes)])
    return np.argsort(gathered)


def score_with(scorer: InfluenceScorer, pool: Dataset) -> Dataset:
    """
    Score a pool with a fitted scorer, shared out among the processes.

    Returns:
        [`~datasets.Dataset`]: the pool's rows with their influence, rank and number of loss tokens, on every process.
    """
    state = PartialState()
    shard = pool.shard(state.num_processes, state.process_index, contiguous=False)
    scored = shard.map(scorer, batched=True, remove_columns=shard.column_names) if len(shard) else None
    columns = {name: [] if scored is None else scored.with_format(None)[name][:] for name in scorer.column_names}
    if state.num_processes > 1:
        columns = {name: gather_object(values) for name, values in columns.items()}
    order = find_gathered_order(len(pool))
    arrays = {
        name: np.array(values, dtype=np.int64 if name == NUM_LOSS_TOKENS else np.float64)[order]
        for name, values in columns.items()
    }
    return add_influence_columns(pool, arrays)


def compute_losses(
    model: PreTrainedModel,
    prepared: Dataset,
    training_args: InfluenceConfig,
    description: str = "Test set",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Losses of prepared rows, shared out among the processes.

    Returns:
        `tuple`: summed negative log-likelihood (float64), labelled tokens and correct ones (int64), each `[rows]`, on
        every process.
    """
    state = PartialState()
    shard_model(model)
    shard = prepared.shard(state.num_processes, state.process_index, contiguous=False)
    autocast = AUTOCAST_DTYPES[choose_autocast(training_args, model.dtype)]
    rows = []
    if len(shard) or is_sharded(model):
        shown = None if training_args.disable_tqdm else description
        rows = list(
            zip(*compute_row_losses(model, shard, training_args.tokens_per_batch, autocast, shown), strict=True)
        )
    if state.num_processes > 1:
        rows = gather_object(rows)
    nll, tokens, correct = (np.array(values)[find_gathered_order(len(prepared))] for values in zip(*rows, strict=True))
    return nll, tokens, correct


def evaluate_model(model: Any, prepared: Dataset, training_args: InfluenceConfig) -> dict[str, float | None]:
    """
    Loss, perplexity and accuracy per labelled token of prepared rows.

    Returns:
        `dict`: `test_loss` (nats), `test_perplexity`, `test_accuracy`, `test_tokens`; `None` where not finite.
    """
    nll, tokens, correct = compute_losses(model, prepared, training_args)
    loss = TokenPerplexity().compute(nll_sum=nll.tolist(), num_loss_tokens=tokens.tolist())
    accuracy = TokenAccuracy().compute(num_correct=correct.tolist(), num_loss_tokens=tokens.tolist())
    assert loss is not None and accuracy is not None
    values = {
        "test_loss": loss["loss"],
        "test_perplexity": loss["perplexity"],
        "test_accuracy": accuracy["accuracy"],
        "test_tokens": int(tokens.sum()),
    }
    return {name: value if np.isfinite(value) else None for name, value in values.items()}
