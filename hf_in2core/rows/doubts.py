"""What SFT would train on, or leave out, without a word, and few people mean: counted in a set, and told."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .presets import OTHER_CONTENTS, find_silent_mark, read_tools


if TYPE_CHECKING:
    from .checks import CheckedRows
    from .preparation import Preparation

# Rows that are rendered once more to see whether the template reads something, of each kind.
PROBED_ROWS = 200
REASONING = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")
PARTS = "in contents that are lists parts of the type"
# Every other role answers: some templates call the assistant by another name.
ASKING = ("system", "developer", "user", "tool", "function", "ipython", "environment")
UNREAD = ("system", "history", "tools", "functions")
MASKS = ("completion_mask", "loss_mask")


@dataclass
class Doubts:
    """
    What is doubtful in the rows of one set.

    Attributes:
        silent_turns (`int`): Assistant turns marked as not trained on that carry loss, because SFT has no mask for a
            single turn.
        silent_mark (`str`): How the first of them is marked.
        other_turns (`int`): Turns in completions that are not the assistant's and carry loss.
        unanswered (`int`): Conversations without an assistant turn of which every token carries loss.
        empty (`int`): Rows with nothing but the end to learn.
        quoted (`int`): Rows whose tool calls have arguments that are JSON as text, which the template quotes again.
        coded (`int`): Rows whose contents are lists of parts, which the template writes as code.
        begun (`int`): Texts that begin with the token that the tokenizer puts before every text.
        undesired (`int`): Rows whose column `label` is false, as that of KTO's bad answers.
        with_media (`int`): Rows read by a preset that have pictures, sound or films in columns beside.
        mask (`str`): A column of masks that is not read.
        unread (`list[str]`): Columns that say something in other formats, and are not read in this one.
        had (`Counter`): Rows by what they have that a template may leave out.
        probed (`Counter`): Rows by it that were rendered without it.
        read (`set[str]`): What of it the template reads.
    """

    silent_turns: int = 0
    silent_mark: str = ""
    other_turns: int = 0
    unanswered: int = 0
    empty: int = 0
    quoted: int = 0
    coded: int = 0
    begun: int = 0
    undesired: int = 0
    with_media: int = 0
    mask: str = ""
    unread: list[str] = field(default_factory=list)
    had: Counter[str] = field(default_factory=Counter)
    probed: Counter[str] = field(default_factory=Counter)
    read: set[str] = field(default_factory=set)


def note_doubts(
    doubts: Doubts, raw: Mapping[str, Any], mapped: Mapping[str, Any], preset: str | None, preparation: "Preparation"
) -> None:
    """
    Add what is doubtful in a row that can be trained on.

    Args:
        doubts ([`Doubts`]): Those of the rows before it.
        raw, mapped (`Mapping[str, Any]`): The row as it was given, and as preparation sees it.
        preset (`str`, *optional*): The preset that it was read by.
        preparation ([`Preparation`]): How it will be prepared.
    """
    answer = mapped.get("completion", mapped.get("text"))
    if isinstance(answer, str):
        doubts.empty += not answer.strip()
        first = preparation.processing_class.bos_token
        text = mapped.get("prompt", answer)
        if (
            first
            and text.startswith(first)
            and preparation.processing_class(text)["input_ids"][:2] == 2 * [preparation.processing_class.bos_token_id]
        ):
            doubts.begun += 1
    if isinstance(mapped.get("messages"), list):
        turns = learnt = mapped["messages"]
        masked = preparation.assistant_only_loss
        doubts.unanswered += not masked and all(turn.get("role") in ASKING for turn in turns)
    elif isinstance(answer, list):
        turns, masked = mapped["prompt"] + answer, preparation.assistant_only_loss
        learnt = answer if preparation.completion_only_loss else turns
        if preparation.completion_only_loss and not masked:
            doubts.other_turns += sum(turn.get("role") != "assistant" for turn in answer)
        doubts.empty += bool(answer) and not any(map(_says_something, answer))
    else:
        return
    if preset == "openai":
        learnt = raw["messages"][len(mapped["prompt"]) :]
    elif preset == "sharegpt":
        given = raw["conversations"]
        learnt = [marked | {"role": turn["role"]} for turn, marked in zip(turns[-len(given) :], given, strict=True)]
    marks = [mark for turn in learnt if turn.get("role") == "assistant" and (mark := find_silent_mark(turn))]
    doubts.silent_turns += len(marks)
    doubts.silent_mark = doubts.silent_mark or next(iter(marks), "")
    _probe(doubts, turns, mapped, preparation)


def _says_something(turn: Mapping[str, Any]) -> bool:
    content = turn.get("content")
    said = content.strip() if isinstance(content, str) else content
    return bool(said) or any(turn.get(name) for name in OTHER_CONTENTS)


def _probe(
    doubts: Doubts, turns: list[Mapping[str, Any]], mapped: Mapping[str, Any], preparation: "Preparation"
) -> None:
    """Render a row without what it has that no row before it has shown to be read: the same text means left out."""
    changes = _list_changes(turns, mapped)
    doubts.had.update(changes.keys())
    wanted = [what for what in changes if what not in doubts.read and doubts.probed[what] < PROBED_ROWS]
    arguments = [text for turn in turns for text in _list_argument_texts(turn)]
    parts = [str(turn["content"]) for turn in turns if isinstance(turn.get("content"), list)]
    if doubts.probed["written"] >= PROBED_ROWS and not doubts.quoted and not doubts.coded:
        arguments, parts = [], []  # a template writes them alike in every row
    doubts.probed["written"] += bool(arguments or parts)
    if not wanted and not arguments and not parts:
        return
    tools = read_tools(mapped)
    rendered = _render(turns, tools, mapped, preparation)
    doubts.quoted += rendered is not None and any(json.dumps(text) in rendered for text in arguments)
    doubts.coded += rendered is not None and any(text in rendered for text in parts)
    for what in wanted:
        doubts.probed[what] += 1
        changed, kept = changes[what](turns, tools)
        if _render(changed, kept, mapped, preparation) != rendered:
            doubts.read.add(what)


def _list_changes(turns: list[Mapping[str, Any]], mapped: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """What a template may leave out of a conversation, by its name, and how to take each out or change it."""
    changes: dict[str, Callable[..., Any]] = {}
    for role in {turn["role"] for turn in turns if isinstance(turn.get("content"), str) and turn["content"].strip()}:
        changes[f"turns of the role `{role}`"] = lambda turns, tools, role=role: (
            [
                turn | {"content": turn["content"] + "x"}
                if turn["role"] == role and isinstance(turn.get("content"), str)
                else turn
                for turn in turns
            ],
            tools,
        )
    kinds = {_get_kind(part) for turn in turns if isinstance(turn.get("content"), list) for part in turn["content"]}
    for kind in kinds:
        changes[f"{PARTS} `{kind}`"] = lambda turns, tools, kind=kind: (
            [
                turn | {"content": [part for part in turn["content"] if _get_kind(part) != kind]}
                if isinstance(turn.get("content"), list)
                else turn
                for turn in turns
            ],
            tools,
        )
    for names in (REASONING, CALLS, ("refusal",)):
        if found := [name for name in names if any(turn.get(name) for turn in turns)]:
            changes[f"`{found[0]}`"] = lambda turns, tools, names=names: (
                [{key: value for key, value in turn.items() if key not in names} for turn in turns],
                tools,
            )
    if read_tools(mapped):
        changes["`tools`"] = lambda turns, tools: (turns, None)
    return changes


def _get_kind(part: Any) -> str:
    """The type of a part of a content; one that is a string is text."""
    return str(part.get("type")) if isinstance(part, Mapping) else "text"


def _list_argument_texts(turn: Mapping[str, Any]) -> list[str]:
    calls = turn.get("tool_calls")
    functions = (
        [call.get("function") for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else []
    )
    found = [function.get("arguments") for function in functions if isinstance(function, Mapping)]
    return [text for text in found if isinstance(text, str) and '"' in text]


def _render(turns: Any, tools: Any, mapped: Mapping[str, Any], preparation: "Preparation") -> str | None:
    """What the template makes of a conversation; `None` where it refuses it."""
    try:
        rendered = preparation.processing_class.apply_chat_template(
            turns,
            tools=tools,
            chat_template=preparation.chat_template,
            tokenize=False,
            **mapped.get("chat_template_kwargs", {}),
        )
    except Exception:  # a template may raise anything
        return None
    return str(rendered)


def say_doubts(checked: "CheckedRows") -> list[str]:
    """What to know of a set that was checked, in sentences; none where nothing is doubtful."""
    doubts, what, said = checked.doubts, checked.what, []
    if doubts.silent_turns:
        said.append(
            f"{doubts.silent_turns} assistant turns of the {what} have {doubts.silent_mark}, but carry loss all the "
            "same: "
            + (
                "they stand after a turn that is trained on, and SFT has no mask for a single turn."
                if checked.format == "prompt/completion"
                else "SFT does not read that. The preset `--columns openai` does, on `messages`, where SFT has a mask "
                "for it."
            )
        )
    if doubts.other_turns:
        said.append(
            f"{doubts.other_turns} turns in the completions of the {what} are not the assistant's (the user's, "
            "tools'), but carry loss, because it is on whole completions. For the assistant's turns alone add "
            "`--assistant_only_loss`."
        )
    if doubts.unanswered:
        said.append(
            f"{doubts.unanswered} conversations of the {what} have no assistant turn, and every token of them carries "
            "loss: what is learnt is to ask. Take them out, or use `--assistant_only_loss`, which leaves them out."
        )
    counted = (
        (
            doubts.empty,
            "have nothing to learn but the end: an empty answer or text. Take them out unless that is meant.",
        ),
        (
            doubts.with_media,
            "have pictures, sound or films, which are not read: only text can be trained on here. Take out those "
            "whose text is not complete without.",
        ),
    )
    said += [f"{number} rows of the {what} {told}" for number, told in counted if number]
    if doubts.begun:
        said.append(
            f"{doubts.begun} texts of the {what} begin with the token that the tokenizer puts before every text, so "
            "that they begin with two. Take it off the rows."
        )
    for name in doubts.unread:
        said.append(
            f"The column `{name}` of the {what} is not empty, and not read: rows of {checked.format} have none. "
            "Write it into the rows, or read them by a preset that has it (`alpaca`, `sharegpt`)."
        )
    if doubts.undesired:
        said.append(
            f"{doubts.undesired} rows of the {what} have a `label` that is false. In files for KTO those are bad "
            "answers, and SFT trains on them like on the others. Take them out if that is what they are."
        )
    if doubts.mask:
        said.append(
            f"The column `{doubts.mask}` of the {what} is not read, and every token carries loss. "
            + (
                "With `--completion_only_loss true` it is."
                if doubts.mask == "completion_mask"
                else "Make it `completion_mask`, and add `--completion_only_loss true`."
            )
        )
    if doubts.quoted:
        said.append(
            f"The tool calls of {doubts.quoted} rows of the {what} have arguments that are JSON as text, which the "
            "chat template quotes once more. Make them objects; `--columns openai` does."
        )
    if doubts.coded:
        said.append(
            f"The contents of {doubts.coded} rows of the {what} are lists of parts, which the chat template writes as "
            "code, `[{'type': …`, and so they are trained on. Give those contents as text."
        )
    left = {name: number for name, number in doubts.had.items() if name not in doubts.read}
    for name, number in sorted(left.items()):
        said.append(
            f"The chat template leaves out {name}, which {number} rows of the {what} have: nothing of that is seen or "
            "trained on. "
            + (
                "Give those contents as text."
                if name.startswith(PARTS)
                else "Give a template that reads it (`--chat_template_path`), or write it into the contents of turns."
            )
        )
    return said
