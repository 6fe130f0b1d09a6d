"""Files that are there whole or not at all, whenever a process ends."""

import os
from pathlib import Path


def write_whole(path: Path, text: str, errors: str = "strict") -> None:
    """
    Write text in UTF-8 under a temporary name, then rename it: a reader sees all of it or what was there before.

    Args:
        path (`pathlib.Path`):
            The file.
        text (`str`):
            What it is to hold.
        errors (`str`, *optional*, defaults to `"strict"`):
            What becomes of what no encoding can hold (half of a surrogate pair): `"replace"` makes a question mark.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", errors=errors)
    os.replace(temporary, path)
