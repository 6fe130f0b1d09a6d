"""Raw columns as people have them, mapped to TRL's formats (`messages`, `prompt`/`completion`, `text`)."""

import logging
from typing import Any, TypeVar

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase


AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)

logger = logging.getLogger(__name__)

# Everything TRL's preparation reads; any other column is left out of it (a stray `text` beside `prompt` changes what
# TRL does with a row).
FORMAT_COLUMNS = ["input_ids", "labels", "messages", "conversations", "prompt", "completion", "text"]
EXTRA_COLUMNS = ["completion_mask", "assistant_masks", "tools", "chat_template_kwargs"]
PRESETS = ["alpaca", "sharegpt"]

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def get_column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Column names of a dataset; of its first row where a stream does not declare them."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset)))


def check_columns(columns: list[str] | None) -> None:
    """
    Check the form of a column mapping, without data.

    Raises:
        ValueError: if it is neither a preset nor a list of `target=source` with targets that TRL knows.
    """
    if columns is None or (len(columns) == 1 and columns[0] in PRESETS):
        return
    targets = []
    for item in columns:
        target, equals, source = item.partition("=")
        if not equals or not source or target not in FORMAT_COLUMNS + EXTRA_COLUMNS:
            raise ValueError(
                f"`columns` has {item!r}, which is neither a preset ({', '.join(PRESETS)}) nor `target=source` with a "
                f"target among {', '.join(FORMAT_COLUMNS + EXTRA_COLUMNS)}. Write for example "
                "`--columns prompt=instruction completion=output`."
            )
        targets.append(target)
    if len(set(targets)) != len(targets):
        raise ValueError(f"`columns` maps a target twice: {columns}. Give each target one source.")


def apply_columns(
    dataset: AnyDataset, columns: list[str] | None, processing_class: PreTrainedTokenizerBase
) -> AnyDataset:
    """
    Map raw rows to the columns that TRL's preparation reads, and to nothing else; rows keep their order.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Raw rows.
        columns (`list[str]` or `None`):
            `None` (rows are in one of TRL's formats already), `["alpaca"]` (`instruction`, `input`, `output`),
            `["sharegpt"]` (`conversations` with `from` and `value`), or `["prompt=instruction", "completion=output"]`.
        processing_class (`transformers.PreTrainedTokenizerBase`):
            Tokenizer: with a chat template the Alpaca preset gives conversational rows, without one Alpaca's own text.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`

    Raises:
        ValueError: if a column is missing, or the columns fit no format or several.
    """
    check_columns(columns)
    names = get_column_names(dataset)
    if columns is None:
        mapped: AnyDataset = dataset
    elif columns == ["alpaca"]:
        _require(names, ["instruction", "output"], "the preset `alpaca`")
        conversational = bool(processing_class.chat_template)
        mapped = dataset.map(_from_alpaca, fn_kwargs={"conversational": conversational}, remove_columns=names)
    elif columns == ["sharegpt"]:
        _require(names, ["conversations"], "the preset `sharegpt`")
        mapped = dataset.map(_from_sharegpt, remove_columns=names)
    else:
        sources = dict(item.split("=", 1) for item in columns)
        _require(names, list(sources.values()), f"`columns={columns}`")
        mapped = dataset.map(_rename, fn_kwargs={"sources": sources}, remove_columns=names)
    return _keep_format_columns(mapped)


def _require(names: list[str], needed: list[str], what: str) -> None:
    missing = [name for name in needed if name not in names]
    if missing:
        raise ValueError(
            f"{what} needs the column(s) {', '.join(missing)}, but the dataset has: {', '.join(names)}. Name the "
            "right columns with `columns`, for example `--columns prompt=question completion=answer`."
        )


def _keep_format_columns(dataset: AnyDataset) -> AnyDataset:
    names = get_column_names(dataset)
    if "input_ids" in names:
        kept = ["input_ids", "labels", "completion_mask", "assistant_masks"]
    elif "messages" in names or "conversations" in names:
        kept = ["messages" if "messages" in names else "conversations", "tools", "chat_template_kwargs"]
    elif "prompt" in names and "completion" in names:
        kept = ["prompt", "completion", "tools", "chat_template_kwargs"]
    elif "prompt" in names and "text" in names:
        raise ValueError(
            f"The dataset has `prompt` and `text` but no `completion` (columns: {', '.join(names)}): TRL would take "
            "the prompt branch and fail. Say which columns are meant: `--columns text=text` for the whole text, or "
            "`--columns prompt=prompt completion=…`."
        )
    elif "text" in names:
        kept = ["text"]
    else:
        raise ValueError(
            f"The dataset's columns ({', '.join(names)}) are in none of TRL's formats. It needs `messages`, "
            "`prompt` and `completion`, or `text`: name them with `columns`, for example "
            "`--columns prompt=question completion=answer`, or use a preset (`alpaca`, `sharegpt`)."
        )
    return dataset.select_columns([name for name in kept if name in names])


def _from_alpaca(row: dict[str, Any], conversational: bool) -> dict[str, Any]:
    instruction, context, output = row["instruction"], row.get("input") or "", row["output"]
    if conversational:
        content = f"{instruction}\n\n{context}" if context else instruction
        return {
            "prompt": [{"role": "user", "content": content}],
            "completion": [{"role": "assistant", "content": output}],
        }
    template = ALPACA_WITH_INPUT if context else ALPACA_WITHOUT_INPUT
    return {"prompt": template.format(instruction=instruction, input=context), "completion": output}


def _from_sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    messages = []
    for turn in row["conversations"]:
        role = SHAREGPT_ROLES.get(turn["from"])
        if role is None:
            raise ValueError(
                f"A conversation has the speaker {turn['from']!r}; the preset `sharegpt` knows "
                f"{', '.join(SHAREGPT_ROLES)}. Rename the speaker, or map the dataset to `messages` yourself."
            )
        messages.append({"role": role, "content": turn["value"]})
    return {"messages": messages}


def _rename(row: dict[str, Any], sources: dict[str, str]) -> dict[str, Any]:
    return {target: row[source] for target, source in sources.items()}
