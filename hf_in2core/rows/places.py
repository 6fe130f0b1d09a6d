"""Folders, files and Hub ids as users type them: what is there, and what lies near a name that is not."""

import difflib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants


HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", flags=re.ASCII)
SHOWN_NAMES = 6


def is_hub_id(source: str) -> bool:
    """Whether a name can be that of a repository on the Hub, by its form."""
    return HUB_ID.fullmatch(source) is not None


def describe_missing(source: str) -> str:
    """
    What to say of a path that leads nowhere: the first part of it that is not there, and the names beside it.

    Returns:
        `str`: a sentence without its subject, such as "there is no such file or folder, seen from …".
    """
    path = Path(source).expanduser()
    missing = path.absolute()
    while not missing.parent.exists():
        missing = missing.parent
    told = f"there is no such file or folder, seen from {Path.cwd()}"
    if missing != path.absolute() and not is_hub_id(source):
        told += f" (there is no {missing})"
    if not missing.parent.is_dir():
        return f"{told}: {missing.parent} is a file."
    names = sorted(entry.name for entry in missing.parent.iterdir() if not entry.name.startswith("."))
    close = difflib.get_close_matches(missing.name, names, n=1)
    if close:
        found = missing.parent / close[0] / path.absolute().relative_to(missing)
        # As the user would type it: relative where the name was.
        return f"{told}. Did you mean `{found if Path(source).is_absolute() else os.path.relpath(found)}`?"
    if is_hub_id(source):
        return f"{told}."
    if not names:
        return f"{told}. {missing.parent} is empty."
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return f"{told}. {missing.parent} has {', '.join(names[:SHOWN_NAMES])}{more}."


@contextmanager
def named_place(what: str, source: str, needed: str, remedy: str) -> Iterator[None]:
    """
    Load something from a folder or from the Hub; where that fails, say what is wrong with the name.

    Args:
        what (`str`): What is loaded, in words, such as `model`.
        source (`str`): Folder or Hub id, as it was typed.
        needed (`str`): File that makes a folder one of these, such as `config.json`.
        remedy (`str`): What to give instead.

    Raises:
        FileNotFoundError: if there is no such folder or repository.
        ValueError: if there is one, and it does not hold what is needed or cannot be read.
    """
    subject = f"The {what} `{source}` cannot be loaded"
    path = Path(source).expanduser()
    if path.is_file():
        raise ValueError(f"{subject}: it is a file. {remedy}")
    if path.is_dir() and not (path / needed).is_file():
        names = sorted(entry.name for entry in path.iterdir())
        more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
        holds = f"it holds {', '.join(names[:SHOWN_NAMES])}{more}" if names else "it is empty"
        raise ValueError(f"{subject}: the folder has no {needed} ({holds}). {remedy}")
    if not path.exists() and not is_hub_id(source):
        raise FileNotFoundError(f"{subject}: {describe_missing(source)} {remedy}")
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if path.is_dir():
            raise ValueError(f"{subject} ({type(error).__name__}: {reason}). {remedy}") from error
        if constants.HF_HUB_OFFLINE:
            reason = "it is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub."
        raise FileNotFoundError(f"{subject}: {describe_missing(source)} As a Hub id: {reason} {remedy}") from error
