"""Every row looked at before any work: what cannot be trained on is refused by name, what has no label is counted."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, Value

from hf_in2core.progress import make_bar

from .columns import (
    FORMAT_COLUMNS,
    check_sources,
    get_preset,
    list_read_columns,
    map_row,
    name_columns,
    read_sources,
    read_template,
    resolve_columns,
)
from .doubts import MASKS, UNREAD, Doubts, note_doubts
from .masks import describe_kind, describe_mask
from .media import list_media
from .overlap import hash_content
from .presets import OTHER_CONTENTS, RowError, describe_value, read_tools, read_turns
from .tokens import check_tokens


if TYPE_CHECKING:
    from .preparation import Preparation

logger = logging.getLogger(__name__)

# A role that a template spells out is known too.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment")
ID_COLUMNS = ("id", "_id", "row_id", "uid", "uuid", "example_id", "prompt_id", "conversation_id")
SHOWN_ROWS = 5
NO_TEMPLATE = (
    "The rows are conversations, but the tokenizer has no chat template, so they cannot be turned into tokens. Set "
    "`chat_template_path` to a tokenizer or Jinja file that has one, or give plain `prompt`/`completion` columns."
)


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be trained on: its position, its id where it has one, the raw column and the reason."""

    position: int
    id: Any
    column: str
    reason: str

    def __str__(self) -> str:
        named = f"row {self.position}" if self.id is None else f"row {self.position} (id {self.id!r})"
        return f"{named}: `{self.column}` {self.reason}"


@dataclass
class CheckedRows:
    """
    What [`check_rows`] found in one set.

    Attributes:
        what (`str`): What messages call the set.
        num_rows (`int`): How many rows it has.
        bad (`list[BadRow]`): Malformed rows.
        without_label (`list[int]`): Positions of well-formed rows that no label can be made for: no assistant turn
            under `assistant_only_loss`, or none that is trained on.
        doubts ([`~hf_in2core.rows.doubts.Doubts`]): What SFT would make of its rows without a word.
        format (`str`): The columns of TRL's format that its rows are in.
        mask (`str`): Which tokens carry loss, in words.
        hashes (`list[str]`): [`~hf_in2core.rows.overlap.hash_content`] of each row; empty where it is malformed.
    """

    what: str
    num_rows: int
    bad: list[BadRow] = field(default_factory=list)
    without_label: list[int] = field(default_factory=list)
    doubts: Doubts = field(default_factory=Doubts)
    format: str = ""
    mask: str = ""
    hashes: list[str] = field(default_factory=list)

    def list_good(self) -> np.ndarray:
        """Positions of the rows that are well-formed, ascending."""
        return np.setdiff1d(np.arange(self.num_rows), [row.position for row in self.bad])

    def list_trainable(self) -> np.ndarray:
        """Positions of the rows that can have a label, ascending."""
        return np.setdiff1d(self.list_good(), self.without_label)


def check_rows(dataset: Dataset, preparation: "Preparation", what: str) -> CheckedRows:
    """
    Look at every row of a set as preparation will see it, without tokenising.

    Args:
        dataset ([`~datasets.Dataset`]):
            Raw rows.
        preparation ([`Preparation`]):
            How they will be prepared.
        what (`str`):
            What messages call the set.

    Returns:
        [`CheckedRows`]

    Raises:
        ValueError: if the set lacks columns or fits no format.
    """
    if dataset.format["type"] == "custom":
        raise ValueError(
            f"The {what} is seen through a transform (`with_transform`, `set_transform`), which may give other rows "
            "each time it is read, so that what is scored need not be what was trained on. Make its rows once: "
            "`dataset.with_format(None).map(...)`."
        )
    check_sources(dataset.column_names, preparation.columns)
    columns = resolve_columns(dataset.column_names, preparation.columns)
    found = CheckedRows(what, len(dataset))
    id_column = next((name for name in ID_COLUMNS if name in dataset.column_names), None)
    names = list_read_columns(dataset.column_names, columns)
    preset = get_preset(columns)
    read = dataset.with_format(None).select_columns(names)
    with_media = {} if columns else list_media(dataset)
    ids: Any = dataset.with_format(None).select_columns([id_column]) if id_column is not None else None
    kind: str | None = None
    with make_bar(len(dataset), f"Checking the {what}", brief=True) as bar:
        for position, row in enumerate(read):
            try:
                if position in with_media:
                    raise with_media[position]
                mapped, has_label = check_row(row, preparation)
                this_kind = describe_kind(mapped)
                if kind is not None and this_kind != kind:
                    raise RowError(next(iter(mapped)), f"is {this_kind}, while the rows before it are {kind}")
                kind = kind or this_kind
                if not has_label:
                    found.without_label.append(position)
                note_doubts(found.doubts, name_columns(row, columns), mapped, preset, preparation)
                found.mask = found.mask or describe_mask(mapped, preparation)
                found.format = found.format or "/".join(name for name in mapped if name in FORMAT_COLUMNS)
                found.hashes.append(hash_content(mapped))
            except RowError as error:
                bad_id = ids[position][id_column] if ids is not None else None
                column = read_sources(columns).get(error.column, error.column)
                found.bad.append(BadRow(position, bad_id, column, error.reason))
                found.hashes.append("")
            bar.update()
    _note_columns(found, dataset, preparation, columns)
    return found


def _note_columns(found: CheckedRows, dataset: Dataset, preparation: "Preparation", columns: list[str] | None) -> None:
    """Add what columns beside those that are read say of a set."""
    names = dataset.column_names
    if found.format == "prompt/completion" and dataset.features.get("label") == Value("bool"):
        found.doubts.undesired = dataset.with_format(None)["label"][:].count(False)
    if get_preset(columns) is not None:
        found.doubts.with_media = len(list_media(dataset))
    if columns is None and "input_ids" not in names:
        read = list_read_columns(names, None)
        found.doubts.unread = [
            name for name in UNREAD if name in names and name not in read and _is_used(dataset, name)
        ]
    if found.format == "input_ids" and not preparation.completion_only_loss:
        found.doubts.mask = next((name for name in MASKS if name in names), "")


def _is_used(dataset: Dataset, column: str) -> bool:
    """Whether a column of few meanings says anything in any row."""
    values = dataset.with_format(None).select_columns([column])
    return any(row[column] not in (None, [], {}) and str(row[column]).strip() not in ("", "[]") for row in values)


def check_row(row: Mapping[str, Any], preparation: "Preparation") -> tuple[dict[str, Any], bool]:
    """
    Check one raw row, whose columns [`columns.check_sources`] has checked.

    Args:
        row (`Mapping[str, Any]`):
            Raw values by column.
        preparation ([`Preparation`]):
            How it will be prepared.

    Returns:
        `tuple`: the row as TRL's preparation will see it, and whether it can have a label.

    Raises:
        RowError: if it cannot be trained on.
    """
    mapped = map_row(row, preparation.columns, read_template(preparation.processing_class))
    if "input_ids" in mapped:
        check_tokens(mapped, row, len(preparation.processing_class))
        return mapped, True
    if "text" in mapped:
        _check_text(mapped["text"], "text")
        return mapped, True
    if "messages" in mapped:
        sources = read_sources(resolve_columns(row, preparation.columns))
        raw = next((sources[name] for name in ("messages", "conversations") if name in sources), "messages")
        raw = "conversations" if raw not in row and "conversations" in row else raw
        _check_turns(read_turns({raw: mapped["messages"]}, raw), raw, preparation)
        return mapped, _check_template(mapped, raw, mapped["messages"], preparation)
    prompt, completion = mapped["prompt"], mapped["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        _check_text(prompt, "prompt")
        _check_text(completion, "completion")
        return mapped, True
    names = ("prompt", "completion")
    if get_preset(resolve_columns(row, preparation.columns)) == "openai":
        names = ("messages", "messages")
        _check_turns(prompt + completion, "messages", preparation)
        if not completion:
            return mapped, False
    else:
        for name in names:
            if not isinstance(mapped[name], str | list):
                raise RowError(name, f"is {describe_value(mapped[name])}, neither text nor a list of turns")
        if isinstance(prompt, str) or isinstance(completion, str):
            raise RowError(
                "completion", f"is {describe_value(completion)}, while `prompt` is {describe_value(prompt)}"
            )
        for name in names:
            _check_turns(read_turns(mapped, name), name, preparation)
    _check_template(mapped, names[0], prompt, preparation, add_generation_prompt=True)
    return mapped, _check_template(mapped, names[1], prompt + completion, preparation)


def _check_text(value: Any, column: str) -> None:
    if not isinstance(value, str):
        raise RowError(column, f"is {describe_value(value)}, not text")
    _check_unicode(value, column)


def _check_unicode(value: str, column: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(column, f"has half a character (a lone surrogate) at {error.start}") from None


def _check_turns(turns: list[Mapping[str, Any]], column: str, preparation: "Preparation") -> None:
    if not turns:
        raise RowError(column, "is an empty conversation")
    for number, turn in enumerate(turns):
        role = turn.get("role")
        if not isinstance(role, str):
            hint = ""
            if "from" in turn and "value" in turn:
                hint = f"; rows with `from` and `value` are read by `--columns sharegpt{_rename(column)}`"
            raise RowError(column, f"has no role in turn {number}{hint}")
        if role not in ROLES and not _spells_out(preparation, role):
            hint = ""
            if role in ("human", "gpt"):
                hint = f"; rows of `human` and `gpt` are read by `--columns sharegpt{_rename(column)}`"
            raise RowError(column, f"has the unknown role {role!r} in turn {number}{hint}")
        content = turn.get("content")
        if isinstance(content, list):
            for part in content:
                _check_part(part, column, number)
        elif content is None:
            if all(turn.get(name) is None for name in OTHER_CONTENTS):
                raise RowError(column, f"has no content in turn {number} ({role})")
        elif not isinstance(content, str):
            raise RowError(column, f"has {describe_value(content)} as the content of turn {number} ({role}), not text")
        else:
            _check_unicode(content, column)


def _rename(column: str) -> str:
    return "" if column == "conversations" else f" conversations={column}"


def _spells_out(preparation: "Preparation", role: str) -> bool:
    """Whether the chat template names a role."""
    template = str(preparation.chat_template or preparation.processing_class.chat_template or "")
    return f"'{role}'" in template or f'"{role}"' in template


def _check_part(part: Any, column: str, number: int) -> None:
    if isinstance(part, str):
        return
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind is None:
        raise RowError(column, f"has {describe_value(part)} as a part of turn {number}, not an object with a type")
    if kind in ("image", "image_url", "audio", "input_audio", "video"):
        raise RowError(column, f"has a part of type {kind!r} in turn {number}; only text can be trained on here")
    if kind == "text" and not isinstance(part.get("text"), str):
        raise RowError(column, f"has {describe_value(part.get('text'))} as the text of a part of turn {number}")


def _check_template(
    mapped: Mapping[str, Any],
    column: str,
    turns: list[Any],
    preparation: "Preparation",
    add_generation_prompt: bool = False,
) -> bool:
    """Whether a conversation can have a label, by what the template makes of it; refuses what the template refuses."""
    settings = mapped.get("chat_template_kwargs", {})
    if not isinstance(settings, Mapping):
        raise RowError(
            "chat_template_kwargs", f"is {describe_value(settings)}; every row needs an object, if only an empty one"
        )
    tools = read_tools(mapped)
    masked = preparation.assistant_only_loss and not add_generation_prompt
    if masked and not any(turn.get("role") == "assistant" for turn in turns):
        masked = False
        is_trained = False
    else:
        is_trained = True
    tokenizer = preparation.processing_class
    if not tokenizer.chat_template and not preparation.chat_template:
        raise ValueError(NO_TEMPLATE)
    # Only a mask needs the tokens: TRL refuses a row in which no token is an assistant's.
    options: dict[str, Any] = {"return_dict": True, "return_assistant_tokens_mask": True} if masked else {}
    try:
        rendered: Any = tokenizer.apply_chat_template(
            turns,
            tools=tools,
            chat_template=preparation.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=masked,
            **options,
            **settings,
        )
    except Exception as error:  # a template may raise anything: Jinja's errors, and those of filters and of Python
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RowError(column, f"is refused by the chat template: {reason[:200]}") from error
    return 1 in rendered["assistant_masks"] if masked else is_trained


def refuse_bad_rows(sets: Iterable[CheckedRows]) -> None:
    """
    Refuse sets with malformed rows.

    Raises:
        ValueError: naming the first rows of each set by position, id, column and reason, and how many there are.
    """
    found = [checked for checked in sets if checked.bad]
    if not found:
        return
    lines = []
    for checked in found:
        shown = "".join(f"\n  - {row}" for row in checked.bad[:SHOWN_ROWS])
        left = len(checked.bad) - SHOWN_ROWS
        more = f"\n  … and {left} more" if left > 0 else ""
        lines.append(f"{len(checked.bad)} of {checked.num_rows} rows of the {checked.what}:{shown}{more}")
    raise ValueError(
        f"Rows that cannot be trained on, {'; '.join(lines)}\nMend or remove them. The commands go on without "
        "them with `--bad_rows drop`; in Python `hf_in2core.rows.checks.check_rows(...).list_good()` "
        "gives the positions to select."
    )


def warn_of_unscored(reasons: Mapping[int, str], num_rows: int) -> None:
    """Tell of the first row of a batch that gets no influence."""
    first = min(reasons)
    logger.warning(
        "Row %d of a batch of %d gets no influence (NaN): %s. Others like it are not announced: "
        "`hf_in2core.rows.scored.count_unscored` counts them after scoring, `hf_in2core.rows.checks.check_rows` names "
        "them with the reason.",
        first,
        num_rows,
        reasons[first],
    )
