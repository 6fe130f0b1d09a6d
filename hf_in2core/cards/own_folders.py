"""Folders of one's own machine in what is published: nobody else has them, and they tell who ran it where."""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any


def list_own_folders(settings: Mapping[str, Any], command: str = "") -> list[str]:
    """
    The absolute folders that settings and a command name, each with its last slash, the longest first.

    Args:
        settings (`Mapping[str, Any]`):
            Those of a run; values may be lists, `name=path` and commands with flags.
        command (`str`, *optional*):
            Shell commands, one a line.
    """
    words = [*_list_words(settings.values()), *_list_words(command.splitlines())]
    paths = [PurePosixPath(word.rpartition("=")[2]) for word in words]
    folders = {f"{path.parent}/" for path in paths if path.is_absolute() and len(path.parts) > 2}
    return sorted(folders, key=lambda folder: (-len(folder), folder))


def hide_own_folders(text: str, folders: Iterable[str]) -> str:
    """A text without these folders: of their files the name is left."""
    for folder in folders:
        text = text.replace(folder, "")
    return text


def write_without(path: Path, folders: Iterable[str], copy: Path) -> Path:
    """A text file, or a copy of it without these folders where it names one."""
    text = path.read_text(encoding="utf-8")
    hidden = hide_own_folders(text, folders)
    if hidden == text:
        return path
    copy.write_text(hidden, encoding="utf-8")
    return copy


def _list_words(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            try:
                yield from shlex.split(value)
            except ValueError:  # an apostrophe of a text
                yield from value.split()
        elif isinstance(value, Mapping):
            yield from _list_words(value.values())
        elif isinstance(value, list | tuple):
            yield from _list_words(value)
