"""Which errors end a command in a sentence, and which with a traceback: those that were not meant to happen."""

import errno
import os
import traceback
from pathlib import Path
from subprocess import CalledProcessError


PACKAGE = Path(__file__).resolve().parents[1]
GO_ON = "What is finished is kept: the same command goes on from there."


def explain(error: Exception) -> str | None:
    """
    What to tell of an error that is no defect of the program.

    Those are the errors that the package raises itself, whose texts are written to be read, and those of the operating
    system and the network.

    Args:
        error (`Exception`): What ended a command.

    Returns:
        `str`: the text; `None` where the traceback tells more.
    """
    text = " ".join(str(error).split()) if isinstance(error, OSError) else str(error).rstrip()
    number = getattr(error, "errno", None)
    place = getattr(error, "filename", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return f"the disk is full ({text}). Free some space, or give an --output_dir on another disk. {GO_ON}"
    if _is_ours(error):
        return text
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason = os.strerror(number)
        return f"{place or text} may not be read or written by you ({reason}). Change that, or give another path."
    if number in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
        return f"{place or text}: {os.strerror(number)}. Give another path, or move what is there."
    if isinstance(error, CalledProcessError):
        return f"{text} What it printed stands above."
    if isinstance(error, OSError):  # of the network too
        return f"{type(error).__name__}: {text}"
    return None


def _is_ours(error: Exception) -> bool:
    """Whether an error was raised by a `raise` of this package, and not within something that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not frames[-1].line:
        return False
    return Path(frames[-1].filename).resolve().is_relative_to(PACKAGE) and frames[-1].line.startswith("raise")
