"""Rows prepared exactly as TRL's SFT prepares them; the one place that touches TRL's private preparation."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
from accelerate import DistributedType, PartialState
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from hf_in2core.engine.batches import read_token_rows
from hf_in2core.names import POOL

from .checks import NO_TEMPLATE, CheckedRows, check_row, check_rows, describe_kind, refuse_bad_rows
from .columns import apply_columns, check_sources, get_column_names, list_read_columns, map_row, read_template
from .presets import RowError


ROW_COLUMN = "in2core_row"


@dataclass
class Preparation:
    """
    Everything that shapes how a raw row becomes `input_ids` and `labels`.

    Attributes:
        processing_class (`transformers.PreTrainedTokenizerBase`):
            Tokenizer, with its end-of-sequence token set.
        columns (`list[str]`, *optional*):
            Column mapping, see [`columns.apply_columns`].
        completion_only_loss (`bool`):
            Whether only completions carry loss.
        assistant_only_loss (`bool`):
            Whether only assistant turns carry loss.
        chat_template (`str`, *optional*):
            Template that TRL puts in place of the tokenizer's own (for `assistant_only_loss`).
        max_length (`int`, *optional*):
            Rows are cut to this many tokens.
        truncation_mode (`str`):
            Which end is kept.
    """

    processing_class: PreTrainedTokenizerBase = field(repr=False)
    columns: list[str] | None = None
    completion_only_loss: bool = False
    assistant_only_loss: bool = False
    chat_template: str | None = field(default=None, repr=False)
    max_length: int | None = 1024
    truncation_mode: str = "keep_start"

    @classmethod
    def from_args(
        cls, args: SFTConfig, processing_class: PreTrainedTokenizerBase, dataset: Dataset | IterableDataset
    ) -> "Preparation":
        """
        The preparation that `SFTTrainer(args=args, train_dataset=dataset)` would use.

        Args:
            args ([`~trl.SFTConfig`]):
                Training arguments; [`InfluenceConfig`] brings `columns`.
            processing_class (`transformers.PreTrainedTokenizerBase`):
                Tokenizer.
            dataset (`datasets.Dataset` or `datasets.IterableDataset`):
                Raw training rows; the first that is well-formed decides `completion_only_loss`, as in TRL.

        Raises:
            ValueError: if the dataset is empty, its columns fit no format, conversational rows meet a tokenizer
                without a chat template, or a loss mask is asked for that the rows cannot have.
        """
        columns = getattr(args, "columns", None)
        if args.dataset_text_field != "text":
            columns = columns or [f"text={args.dataset_text_field}"]
        first = find_first_row(dataset, columns, processing_class)
        conversational = describe_kind(first) == "a conversation"
        prompt_completion = "prompt" in first and "completion" in first
        if conversational and not processing_class.chat_template:
            raise ValueError(NO_TEMPLATE)
        if args.completion_only_loss and not prompt_completion and "input_ids" not in first:
            raise ValueError(
                f"`completion_only_loss=True` does nothing on rows with the columns {', '.join(first)}: TRL would "
                "train on the whole sequence. Give `prompt` and `completion` columns, use `assistant_only_loss=True` "
                "for `messages`, or leave `completion_only_loss` unset."
            )
        if args.assistant_only_loss and not conversational:
            raise ValueError(
                f"`assistant_only_loss=True` needs conversations, but the rows have the columns {', '.join(first)}. "
                "Use `completion_only_loss` on `prompt`/`completion` rows, or leave it unset."
            )
        if args.completion_only_loss and "input_ids" in first and not {"labels", "completion_mask"} & set(first):
            raise ValueError(
                "`completion_only_loss=True` does nothing on rows of `input_ids` alone: nothing in them says where a "
                "completion begins, and TRL would train on every token. Give `labels` or a `completion_mask` beside "
                "them, or leave `completion_only_loss` unset."
            )
        chat_template = None
        if args.assistant_only_loss and not has_generation_markers(processing_class.chat_template):
            try:
                chat_template = get_training_chat_template(processing_class)
            except ValueError as error:
                raise ValueError(
                    "`assistant_only_loss=True` needs a chat template that marks what the assistant says, and this "
                    "one neither does nor is one of those that TRL knows how to mark. Put `{% generation %}` and "
                    "`{% endgeneration %}` around the assistant's turns, their end included, and give the template by "
                    "`chat_template_path`; or give `prompt` and `completion`, whose loss is on completions."
                ) from error
        return cls(
            processing_class=processing_class,
            columns=columns,
            completion_only_loss=prompt_completion if args.completion_only_loss is None else args.completion_only_loss,
            assistant_only_loss=args.assistant_only_loss,
            chat_template=chat_template,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON-serialisable part; the tokenizer is saved beside it."""
        return {name: value for name, value in vars(self).items() if name != "processing_class"}


def find_first_row(
    dataset: Dataset | IterableDataset, columns: list[str] | None, processing_class: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """
    The first row that shows the format of a set, mapped; the very first where none does.

    Raises:
        ValueError: if there are no rows, or the set lacks columns or fits no format.
    """
    names = get_column_names(dataset) if _has_rows(dataset) else []
    check_sources(names, columns)
    first: dict[str, Any] | None = None
    for row in dataset.with_format(None).select_columns(list_read_columns(names, columns)):
        try:
            mapped = map_row(row, columns, read_template(processing_class))
        except RowError:
            continue
        first = mapped if first is None else first
        read = [mapped[name] for name in ("messages", "prompt", "completion", "text", "input_ids") if name in mapped]
        if all(isinstance(value, str | list) and value for value in read):
            return mapped
    if first is None:
        refuse_bad_rows([check_rows(dataset, Preparation(processing_class, columns), POOL)])
    return first or {}


def _has_rows(dataset: Dataset | IterableDataset) -> bool:
    for _ in dataset.take(1) if isinstance(dataset, IterableDataset) else range(len(dataset)):
        return True
    raise ValueError("The dataset is empty: it has no rows. Check its source or the split's name.")


def add_row_column(dataset: Dataset) -> Dataset:
    """Number the rows, so that the ones preparation drops or moves can be told."""
    if ROW_COLUMN in dataset.column_names:
        raise ValueError(f"The dataset has a column named `{ROW_COLUMN}`, which is reserved. Rename it.")
    return dataset.add_column(ROW_COLUMN, np.arange(len(dataset), dtype=np.int64))


def map_trainable(dataset: Dataset, preparation: Preparation, checked: CheckedRows) -> Dataset:
    """
    Apply the column mapping and number the rows, without tokenising them; rows that no label can be made for are out.

    Raises:
        ValueError: if no row is left.
    """
    mapped = add_row_column(apply_columns(dataset, preparation.columns, preparation.processing_class))
    if len(checked.without_label) == len(dataset):
        raise ValueError(
            f"No row of the {checked.what} ({len(dataset)} rows) can carry a loss token: none has a turn that is "
            "trained on. Check roles and masks (`assistant_only_loss`, `weight`)."
        )
    return mapped.select(checked.list_trainable()) if checked.without_label else mapped


def prepare_mapped(dataset: Any, preparation: Preparation, num_proc: int | None = None) -> Any:
    """
    Hand rows to TRL's own preparation, unpacked and in order.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Rows in one of TRL's formats, with the column `in2core_row`.
        preparation ([`Preparation`]):
            How to prepare them.
        num_proc (`int`, *optional*):
            Processes that a [`~datasets.Dataset`] is shared out among.

    Returns:
        The same kind of dataset with `input_ids` and `labels`; rows left without a label by truncation are missing.
    """
    # Of whatever fields a TRL reads, those not named here have their defaults.
    settings = {field.name: field.default for field in fields(SFTConfig)} | {
        "dataset_num_proc": num_proc,
        "dataset_text_field": "text",
        "assistant_only_loss": preparation.assistant_only_loss,
        "max_length": preparation.max_length,
        "truncation_mode": preparation.truncation_mode,
        "shuffle_dataset": False,
    }
    trainer: Any = SimpleNamespace(
        _tokenizer=preparation.processing_class,
        chat_template=preparation.chat_template,
        completion_only_loss=preparation.completion_only_loss,
    )
    args: Any = SimpleNamespace(**settings)
    with _without_barriers() if isinstance(dataset, IterableDataset) else nullcontext():
        return SFTTrainer._prepare_dataset(
            trainer, dataset, preparation.processing_class, args, False, None, "influence"
        )


@contextmanager
def _without_barriers() -> Iterator[None]:
    """
    Let no process wait for the others.

    TRL lets the main process prepare first, behind a barrier of accelerate's. Inside a `map` over a stream every
    process is on its own batch, so a barrier there would wait for ever.
    """
    state = PartialState()
    kept = state.distributed_type
    state.distributed_type = DistributedType.NO
    try:
        yield
    finally:
        state.distributed_type = kept


def prepare_rows(dataset: Dataset, preparation: Preparation) -> Dataset:
    """
    Turn raw rows into the tokens and labels that SFT trains on.

    Args:
        dataset (`datasets.Dataset`):
            Raw rows, with at least one row.
        preparation ([`Preparation`]):
            How to prepare them.

    Returns:
        `datasets.Dataset` with `row` (int64, position in `dataset`), `input_ids` and `labels` (-100 where a token
        carries no loss), in the order of `dataset`; rows without a label are missing.

    Raises:
        ValueError: if rows are malformed, naming them.
    """
    checked = check_rows(dataset, preparation, "dataset")
    refuse_bad_rows([checked])
    if len(checked.without_label) == len(dataset):
        return make_token_rows([])
    return keep_token_columns(prepare_mapped(map_trainable(dataset, preparation, checked), preparation))


def tokenize_rows(dataset: Dataset, preparation: Preparation, num_proc: int | None = None) -> Dataset:
    """
    Turn raw rows into tokens and labels once, for several trainings: SFT cuts, drops and packs them as raw ones.

    Args:
        dataset (`datasets.Dataset`):
            Raw rows, with at least one row.
        preparation ([`Preparation`]):
            How to prepare them; its `max_length` is left to SFT.
        num_proc (`int`, *optional*):
            Processes that the rows are shared out among.

    Returns:
        `datasets.Dataset` with `input_ids` and `labels` of every row, in the order of `dataset`.
    """
    checked = check_rows(dataset, preparation, "dataset")
    refuse_bad_rows([checked])
    trainable = checked.list_trainable()
    mapped = apply_columns(dataset, preparation.columns, preparation.processing_class).select(trainable)
    tokens = prepare_mapped(mapped, replace(preparation, max_length=None), num_proc)
    tokens = tokens.select_columns(["input_ids", "labels"])
    if not checked.without_label:
        return tokens
    # SFT leaves rows without a label out by itself, but refuses to make some.
    end = preparation.processing_class.eos_token_id
    empty = [{"input_ids": [end], "labels": [-100]}] * len(checked.without_label)
    together = datasets.concatenate_datasets([tokens, Dataset.from_list(empty, features=tokens.features)])
    return together.select(np.argsort(np.concatenate([trainable, checked.without_label]), kind="stable"))


def keep_token_columns(prepared: Dataset) -> Dataset:
    """Keep `row`, `input_ids` and `labels` of a prepared dataset, sorted by row, without rows that carry no loss."""
    prepared = prepared.select_columns([ROW_COLUMN, "input_ids", "labels"]).rename_column(ROW_COLUMN, "row")
    rows = prepared.with_format("numpy")["row"][:]
    if not np.all(np.diff(rows) > 0):
        prepared = prepared.sort("row")
    # TRL drops rows without any label; a label on the first token alone has nothing to predict it either.
    chunks = range(0, len(prepared), 10_000)
    counts = [read_token_rows(prepared, start, min(start + 10_000, len(prepared))).num_loss_tokens for start in chunks]
    empty = np.concatenate([np.zeros(0, dtype=np.int64), *counts]) == 0
    return prepared.select(np.flatnonzero(~empty)) if empty.any() else prepared


def prepare_batch(batch: dict[str, list], preparation: Preparation) -> tuple[Dataset, dict[int, str]]:
    """
    Prepare one batch of raw rows, as `Dataset.map(..., batched=True)` passes it, without touching the cache.

    Each row is prepared by itself. Streams are used because a `Dataset.map` would pickle the tokenizer to hash it, for
    every batch anew; and made into a dataset again, the columns would get the Arrow types of this batch alone, and a
    row its neighbours' keys. TRL takes the first row of what it prepares for all of them, so conversations and plain
    texts are prepared apart.

    Returns:
        `tuple`: a `datasets.Dataset` as from [`prepare_rows`], whose `row` is the position in the batch, and why other
        rows cannot be scored, by position: they are malformed, or no label can be made for them.

    Raises:
        ValueError: if the batch lacks columns or fits no format.
    """
    check_sources(batch, preparation.columns)
    kinds: dict[str, list[dict[str, Any]]] = {}
    refused: dict[int, str] = {}
    position = -1
    for position, values in enumerate(zip(*batch.values(), strict=True)):
        try:
            row, has_label = check_row(dict(zip(batch, values, strict=True)), preparation)
        except RowError as error:
            refused[position] = str(error)
            continue
        if has_label:
            kinds.setdefault(describe_kind(row), []).append(row | {ROW_COLUMN: position})
        else:
            refused[position] = "no token of it carries loss"
    prepared = [row for rows in kinds.values() for row in _prepare_stream(rows, preparation)]
    left = set(range(position + 1)) - refused.keys() - {row["row"] for row in prepared}
    refused |= dict.fromkeys(left, f"no loss token is left at max_length={preparation.max_length}")
    return make_token_rows(sorted(prepared, key=lambda row: row["row"])), refused


def _prepare_stream(rows: list[dict[str, Any]], preparation: Preparation) -> Iterator[dict[str, Any]]:
    stream = IterableDataset.from_generator(lambda: iter(rows))
    for row in prepare_mapped(stream, preparation):
        yield {"row": row[ROW_COLUMN], "input_ids": row["input_ids"], "labels": row["labels"]}


def make_token_rows(rows: list[dict[str, Any]]) -> Dataset:
    """Prepared rows as a dataset."""
    features = datasets.Features(
        {
            "row": datasets.Value("int64"),
            "input_ids": datasets.List(datasets.Value("int64")),
            "labels": datasets.List(datasets.Value("int64")),
        }
    )
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)
