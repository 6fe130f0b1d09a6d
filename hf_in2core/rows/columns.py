"""Raw columns as people have them, mapped to TRL's formats (`messages`, `prompt`/`completion`, `text`)."""

import difflib
import shlex
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from datasets import Dataset, IterableDataset

from .presets import PRESETS, describe_mapped, from_conversations
from .tokens import SIGNS


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)

# Between mappings of which each set takes the first that fits; and that of rows in one of TRL's formats.
OR, AS_IS = "or", "trl"
EXAMPLE = "prompt=question completion=answer"
# Of a preset whose columns have other names.
EXAMPLES = {
    "alpaca": "alpaca input=context output=response",
    "sharegpt": "sharegpt conversations=items",
    "openai": "openai messages=chat",
}
# Everything TRL's preparation reads; any other column is left out of it (a stray `text` beside `prompt` changes what
# TRL does with a row).
FORMAT_COLUMNS = ["input_ids", "labels", "messages", "conversations", "prompt", "completion", "text"]
# What people call columns of these formats, the likelier first; also in other cases and with spaces.
LIKELY_PAIRS = [
    {"messages": "messages"},
    {"prompt": "prompt", "completion": "completion"},
    {"instruction": "instruction", "input": "context", "output": "response"},
    *({"prompt": asked, "completion": said} for asked, said in (("question", "answer"), ("query", "response"))),
    *({"prompt": asked, "completion": said} for asked, said in (("prompt", "response"), ("instruction", "response"))),
    {"prompt": "instruction", "completion": "generation"},
    {"prompt": "input", "completion": "output"},
    {"messages": "conversation"},
    {"text": "text"},
]
EXTRA_COLUMNS = ["completion_mask", "assistant_masks", "tools", "chat_template_kwargs"]


def get_column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Column names of a dataset; of its first row where a stream does not declare them."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset)))


def get_preset(columns: list[str] | None) -> str | None:
    """The preset that a column mapping begins with; `None` for any other mapping and for none."""
    return columns[0] if columns and columns[0] in PRESETS else None


def read_sources(columns: list[str] | None) -> dict[str, str]:
    """Raw column by TRL's column, or a preset's, of a mapping's pairs `target=source`; empty where it has none."""
    pairs = (columns or [])[1:] if get_preset(columns) is not None else columns or []
    return {target: source for target, _, source in (item.partition("=") for item in pairs)}


def resolve_columns(names: Iterable[str], columns: list[str] | None) -> list[str] | None:
    """
    The mapping of one set: of several, divided by `or`, the first that its columns fit; `trl` is none.

    Raises:
        ValueError: if none of several fits.
    """
    ways = _split_ways(columns)
    if len(ways) == 1:
        return ways[0]
    names = list(names)
    for way in ways:
        try:
            check_sources(names, way)
        except ValueError:
            continue
        return way
    raise ValueError(
        f"The dataset's columns ({', '.join(names)}) fit none of `--columns {' '.join(columns or [])}`. Add what "
        "reads them after `or`: a preset, pairs such as `prompt=question completion=answer`, or `trl` for rows in "
        "one of TRL's formats."
    )


def _split_ways(columns: list[str] | None) -> list[list[str] | None]:
    if columns is None:
        return [None]
    ends = [place for place, item in enumerate(columns) if item == OR]
    ways = [columns[start:end] for start, end in zip([0, *(end + 1 for end in ends)], [*ends, None], strict=True)]
    return [None if way == [AS_IS] else way for way in ways]


def check_columns(columns: list[str] | None) -> None:
    """
    Check the form of a column mapping, without data.

    Raises:
        ValueError: if it is neither a preset nor a list of `target=source` with targets that TRL knows, nor several of
            these with `or` between them.
    """
    for way in _split_ways(columns):
        if way is None:
            continue
        preset = get_preset(way)
        known = FORMAT_COLUMNS + EXTRA_COLUMNS if preset is None else _list_preset_columns(preset)
        targets, sources = [], []
        for item in (way or [""]) if preset is None else way[1:]:
            target, equals, source = item.partition("=")
            if not equals or not source or target not in known:
                close = difflib.get_close_matches(item, PRESETS, n=1)
                example = EXAMPLES.get(preset or "", EXAMPLE)
                hint = (
                    f"Did you mean `{close[0]}`?"
                    if close and not preset
                    else f"Write for example `--columns {example}`."
                )
                raise ValueError(
                    f"`columns` has {item!r}, which is neither a preset ({', '.join(PRESETS)}) nor `target=source` "
                    f"with a target among {', '.join(known)}. {hint}"
                )
            targets.append(target)
            sources.append(source)
        for what, names in (("target", targets), ("source", sources)):
            if len(set(names)) != len(names):
                raise ValueError(f"`columns` maps a {what} twice: {way}. Give each target one source of its own.")


def _list_preset_columns(preset: str) -> list[str]:
    return [*PRESETS[preset].needed, *PRESETS[preset].optional]


def list_format_columns(names: Iterable[str]) -> list[str]:
    """
    Of a row's columns those that TRL's preparation should see.

    Raises:
        ValueError: if they fit no format, or several.
    """
    names = list(names)
    if "input_ids" in names:
        kept = ["input_ids", "labels", "completion_mask", "assistant_masks"]
    elif "messages" in names and {"prompt", "completion"} <= set(names):
        raise ValueError(
            "The dataset has `messages` beside `prompt` and `completion`: TRL would train on the completions, and "
            "which of them is meant is a guess. Say it: `--columns messages=messages`, or `--columns prompt=prompt "
            "completion=completion`."
        )
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
            f"The dataset's columns ({', '.join(names)}) are in none of TRL's formats: `messages`, `prompt` and "
            f"`completion`, or `text`. {_find_remedy(names)}"
        )
    return [name for name in kept if name in names]


def _find_remedy(names: list[str]) -> str:
    """What to do about columns that fit no format: the mapping that they seem to want, where there is one."""
    spelled = {name.strip().lower(): name for name in names}
    if "chosen" in names:
        asked = next((name for name in ("prompt", "question", "query", "instruction", "input") if name in names), None)
        asked_for = f"`--columns prompt={asked} completion=chosen`, or " if asked else ""
        text = "" if asked else ", or `--columns text=chosen` where it is a whole text"
        return (
            f"They are pairs of preferences, and SFT trains on one answer: {asked_for}`--columns messages=chosen` "
            f"where `chosen` is a whole conversation{text}."
        )
    if "segments" in names:
        return (
            "Axolotl's segments have a mask of their own, which SFT has not: give `prompt` and `completion`, or "
            "tokens as `input_ids` and `labels`."
        )
    for name, preset in PRESETS.items():
        # `openai` reads what is in TRL's own format too.
        if set(preset.needed) <= spelled.keys() and "messages" not in preset.needed:
            read = [new for new in _list_preset_columns(name) if spelled.get(new, new) != new]
            return (
                f"They are those of a preset: `--columns {_write_columns(name, {new: spelled[new] for new in read})}`."
            )
    for way in LIKELY_PAIRS:
        if all(old in spelled for old in way.values()):
            named = "alpaca" if "output" in way else ""
            pairs = {new: spelled[old] for new, old in way.items() if not named or new != spelled[old]}
            return f"If it is these, say so: `--columns {_write_columns(named, pairs)}`."
    pictures = " It has pictures, but only text can be trained on here." if {"image", "images"} & set(names) else ""
    return (
        "Name them with `columns`, for example `--columns prompt=question completion=answer`, or use a preset "
        f"({', '.join(PRESETS)}).{pictures}"
    )


def _write_columns(preset: str, sources: Mapping[str, str]) -> str:
    """A preset, and pairs after it, as one types them."""
    return shlex.join([*[preset] * bool(preset), *(f"{target}={source}" for target, source in sources.items())])


def list_read_columns(names: Iterable[str], columns: list[str] | None) -> list[str]:
    """Of a set's columns those that its mapping may read, so that no other is decoded."""
    names = list(names)
    columns = resolve_columns(names, columns)
    if (preset := get_preset(columns)) is not None:
        sources = read_sources(columns)
        read = {sources.get(name, name) for name in _list_preset_columns(preset)}
    else:
        read = set(read_sources(columns).values() or list_format_columns(names))
        read |= set(SIGNS) if "input_ids" in (read_sources(columns) or read) else set()
    return [name for name in names if name in read]


def _advise(names: list[str], missing: list[str], columns: list[str] | None) -> str:
    """What to do where a mapping reads columns that are not there."""
    near = [(name, difflib.get_close_matches(name, names, n=1)) for name in missing]
    if all(found for _, found in near):
        return " ".join(f"Did you mean `{found[0]}` for `{name}`?" for name, found in near)
    try:
        list_format_columns(names)
    except ValueError:
        example = EXAMPLES.get(get_preset(columns) or "", EXAMPLE)
        return f"Name the right columns with `columns`, for example `--columns {example}`."
    return (
        "It is in one of TRL's formats already: where only some of the sets need `columns`, add `or trl` "
        f"(`--columns {' '.join(columns or [])} {OR} {AS_IS}`); where none does, leave it out."
    )


def check_sources(names: Iterable[str], columns: list[str] | None) -> None:
    """
    Check that rows have the columns that a mapping reads, and that what they become is one of TRL's formats.

    Raises:
        ValueError: if a column is missing, or the columns fit no format or several.
    """
    check_columns(columns)
    names = list(names)
    columns = resolve_columns(names, columns)
    preset = get_preset(columns)
    sources = read_sources(columns)
    needed = [sources.get(name, name) for name in PRESETS[preset].needed] if preset else []
    needed += [source for source in sources.values() if source not in needed]
    missing = [name for name in needed if name not in names]
    if missing:
        raise ValueError(
            f"{f'The preset `{preset}`' if preset else f'`columns={columns}`'} needs the column(s) "
            f"{', '.join(missing)}, but the dataset has: {', '.join(names)}. {_advise(names, missing, columns)}"
        )
    if preset is None:
        list_format_columns(sources or names)


def read_template(processing_class: "PreTrainedTokenizerBase") -> str:
    """The chat template of a tokenizer, of several by name the default one; empty where it has none."""
    template: Any = processing_class.chat_template or ""
    return template if isinstance(template, str) else template.get("default") or str(template)


def map_row(row: Mapping[str, Any], columns: list[str] | None, template: str) -> dict[str, Any]:
    """
    A raw row as the columns that TRL's preparation reads, and nothing else; a function of the row alone.

    Args:
        row (`Mapping[str, Any]`):
            Raw values by column, which [`check_sources`] has checked.
        columns (`list[str]`, *optional*):
            As of [`apply_columns`].
        template (`str`):
            The tokenizer's chat template, as of [`read_template`]; empty where it has none.

    Raises:
        RowError: if a cell is not what its preset needs.
    """
    columns = resolve_columns(row, columns)
    if (preset := get_preset(columns)) is not None:
        return PRESETS[preset].read(name_columns(row, columns), template)
    sources = read_sources(columns)
    mapped = {target: row[source] for target, source in sources.items()} if sources else row
    kept = {name: mapped[name] for name in list_format_columns(mapped)}
    return from_conversations(kept) if "conversations" in kept else kept


def name_columns(row: Mapping[str, Any], columns: list[str] | None) -> Mapping[str, Any]:
    """A row of one set with the names that a preset reads; what is read by another name is not read by its own too."""
    sources = read_sources(columns) if get_preset(columns) is not None else {}
    left = {name: value for name, value in row.items() if name not in sources.values()}
    return {**left, **{target: row[source] for target, source in sources.items()}} if sources else row


def apply_columns(
    dataset: AnyDataset, columns: list[str] | None, processing_class: "PreTrainedTokenizerBase"
) -> AnyDataset:
    """
    Map raw rows to the columns that TRL's preparation reads, and to nothing else; rows keep their order.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Raw rows.
        columns (`list[str]` or `None`):
            `None` (rows are in one of TRL's formats already), `["alpaca"]` (`instruction`, `input`, `output`),
            `["sharegpt"]` (`conversations` with `from` and `value`), `["openai"]` (`messages` with `weight`), or
            `["prompt=instruction", "completion=output"]`; after a preset, pairs rename what it reads
            (`["alpaca", "input=context", "output=response"]`). Several with `"or"` between them are for sets of
            different formats, each of which is read by the first that fits; `"trl"` is for rows in TRL's formats.
        processing_class (`transformers.PreTrainedTokenizerBase`):
            Tokenizer: with a chat template the Alpaca preset gives conversational rows, without one Alpaca's own text.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: columns keep their types.

    Raises:
        ValueError: if a column is missing, or the columns fit no format or several.
        RowError: if a cell is not what a preset needs; [`checks.check_rows`] finds all of these.
    """
    names = get_column_names(dataset)
    check_sources(names, columns)
    columns = resolve_columns(names, columns)
    template = read_template(processing_class)
    settings: dict[str, Any] = {"columns": columns, "template": template}
    if isinstance(dataset, IterableDataset):
        return dataset.map(map_row, fn_kwargs=settings, remove_columns=names)
    dataset, preset, sources = dataset.with_format(None), get_preset(columns), read_sources(columns)
    if sources and preset is None:
        dataset = dataset.select_columns(list(sources.values()))
        dataset = dataset.rename_columns({source: target for target, source in sources.items()})
    kept = dataset.column_names if preset else list_format_columns(dataset.column_names)
    if preset is None and "conversations" not in kept:
        return dataset.select_columns(kept)
    return dataset.map(
        map_row,
        fn_kwargs=settings | {"columns": columns if preset else None},
        remove_columns=dataset.column_names,
        features=describe_mapped(name_columns(dataset.features, columns if preset else None), preset, template),
    )
