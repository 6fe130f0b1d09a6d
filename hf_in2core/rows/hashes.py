"""Identity of rows, tokenizers and templates, and rows that several sets share."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_in2core.engine.batches import read_token_rows

from .columns import get_preset, list_read_columns, map_row, name_columns, resolve_columns
from .presets import is_read_anew


if TYPE_CHECKING:
    from .preparation import Preparation

# Settings that do not change the tokens of a row before it is cut.
CUTTING = ("max_length", "truncation_mode")
# Of the presets; raised when they read rows otherwise, which `is_read_anew` then has to tell.
READING = 2


def hash_rows(dataset: Dataset) -> list[str]:
    """
    Hash the content of each row.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows; all columns count. For what is trained on alone, pass what [`columns.apply_columns`] returns.

    Returns:
        `list[str]`: 32 hexadecimal digits per row. Columns that are null count like columns that are not there, since
        one file may have a column that another lacks.
    """
    return [hash_value(row) for row in dataset.with_format(None)]


def hash_set(dataset: Dataset, columns: list[str] | None, templates: Iterable[str]) -> str:
    """
    Identity of a set: what its rows hold and, of those that version 0.2.0 read otherwise, how they are read.

    Args:
        dataset ([`~datasets.Dataset`]): Raw rows that can be trained on.
        columns (`list[str]`, *optional*): Column mapping as of [`columns.apply_columns`].
        templates (`Iterable[str]`): Chat templates of the models that read it, as of [`columns.read_template`].

    Returns:
        `str`: 32 hexadecimal digits.
    """
    hashes = hash_rows(dataset)
    columns = resolve_columns(dataset.column_names, columns)
    if (preset := get_preset(columns)) in ("sharegpt", "openai"):
        templates = set(templates)
        read = dataset.with_format(None).select_columns(list_read_columns(dataset.column_names, columns))
        for position, row in enumerate(read):
            named = name_columns(row, columns)
            if any(is_read_anew(named, map_row(row, columns, template), preset) for template in templates):
                hashes[position] = hash_value([hashes[position], READING])
    return hash_value(hashes)


def hash_value(value: Any) -> str:
    """Hash of a value that JSON can hold, 32 hexadecimal digits; the order of keys does not matter."""
    return xxhash.xxh3_128_hexdigest(json.dumps(_drop_nulls(value), sort_keys=True, default=str).encode())


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value


def find_shared_rows(hashes: list[str], others: Iterable[str]) -> np.ndarray:
    """
    Find the rows that also occur in other sets.

    Args:
        hashes (`list[str]`):
            From [`hash_rows`], the rows to look at.
        others (`Iterable[str]`):
            From [`hash_rows`], the rows of the other sets.

    Returns:
        `numpy.ndarray` of shape `[rows]`, bool.
    """
    known = set(others)
    return np.fromiter((value in known for value in hashes), dtype=bool, count=len(hashes))


def find_shared_tokens(prepared: Dataset, others: Iterable[Dataset]) -> np.ndarray:
    """
    Which prepared rows also stand in other datasets, judged by their tokens and labels.

    Args:
        prepared (`datasets.Dataset`):
            Rows from [`prepare_rows`].
        others (`Iterable[datasets.Dataset]`):
            Other prepared rows, such as validation sets.

    Returns:
        `numpy.ndarray` of shape `[n]`, bool.
    """

    def list_keys(dataset: Dataset) -> Iterator[bytes]:
        for start in range(0, len(dataset), 10_000):
            rows = read_token_rows(dataset, start, min(start + 10_000, len(dataset)))
            for first, last in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
                tokens = np.concatenate([rows.input_ids[first:last], rows.labels[first:last]])
                yield hashlib.sha256(tokens.tobytes()).digest()

    known = {key for dataset in others for key in list_keys(dataset)}
    return np.fromiter((key in known for key in list_keys(prepared)), dtype=bool, count=len(prepared))


def hash_tokenizer(processing_class: PreTrainedTokenizerBase) -> str:
    """Hash of what a tokenizer does: its vocabulary and rules, special tokens, end-of-sequence token."""
    backend = getattr(processing_class, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else processing_class.get_vocab()
    # State of the last call, not identity.
    rules = {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}
    identity = json.dumps([rules, processing_class.eos_token, processing_class.bos_token], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()


def hash_tokenization(preparation: "Preparation") -> str:
    """Hash of all that shapes what [`tokenize_rows`] returns: equal ones give equal tokens and labels."""
    shaping = {name: value for name, value in preparation.to_dict().items() if name not in CUTTING}
    identity = [shaping, hash_tokenizer(preparation.processing_class), hash_template(preparation)]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def hash_template(preparation: "Preparation") -> str:
    """Hash of the chat template that preparation applies; of the empty string where there is none."""
    template: Any = preparation.chat_template or preparation.processing_class.chat_template or ""
    if isinstance(template, dict):  # several by name; loaded, they may stand in another order
        template = {name: template[name] for name in sorted(template)}
    return hashlib.sha256(str(template).encode()).hexdigest()
