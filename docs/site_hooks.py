"""How the site is made of what GitHub and `help()` show: links that leave docs/, and docstrings in TRL's style."""

import re
import tomllib
from pathlib import Path
from typing import Any

from griffe import Class, Extension, Function, Object


ROOT = Path(__file__).resolve().parents[1]
DOCUMENTED = {
    name.rpartition(".")[2]: name
    for page in sorted((ROOT / "docs" / "api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
}
LINK = re.compile(r"(\]\()(\.\.?/[^)\s#]+|[^)\s:#]+)([^)]*\))")
REFERENCE = re.compile(r"\[`~?([\w.]+)`\]")
ITEM = re.compile(r"^( +)(\w+(?:, \w+)*) \((.+?)\):(?=\s)", re.MULTILINE)
RETURNED = re.compile(r"^(Returns:\n +)(\[?`[^\n]*?`\]?)(?::(?=\s)|$)", re.MULTILINE)
RAISED = re.compile(r"^Raises:\n(?: +.*(?:\n|$))+", re.MULTILINE)


def find_home() -> str:
    """Where the repository is, by the one setting of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    substitutions = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]
    return next(
        found[0] for each in substitutions if (found := re.search(r"https://.*(?=/blob/)", each["replacement"]))
    )


def on_config(config: Any) -> Any:
    """Link the repository."""
    config.repo_url = find_home()
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links that leave docs/ to the repository."""
    folder = Path(page.file.abs_src_path).parent

    def lead(match: re.Match[str]) -> str:
        path = (folder / match[2]).resolve()
        if not path.exists() or path.is_relative_to(ROOT / "docs"):
            return match[0]
        return f"{match[1]}{find_home()}/blob/main/{path.relative_to(ROOT)}{match[3]}"

    return LINK.sub(lead, markdown)


def translate(docstring: str) -> str:
    """A docstring in TRL's style as one that griffe reads as Google's."""
    text = re.sub(r"^ *> Parameters that .*\n\n?", "", docstring, flags=re.MULTILINE)
    text = re.sub(r"^> \[!(\w+)\]\n", lambda match: f"!!! {match[1].lower()}\n", text, flags=re.MULTILINE)
    text = re.sub(r"^> ", "    ", text, flags=re.MULTILINE)
    text = ITEM.sub(lambda match: f"{match[1]}{match[2].replace(' ', '')} ({name_type(match[3])}):", text)
    text = RETURNED.sub(lambda match: f"{match[1]}{name_type(match[2])}:", text)
    # Griffe takes all before the colon for a type, which is shown as it stands.
    text = RAISED.sub(lambda match: re.sub(r"^( +)`(\w+)`:", r"\1\2:", match[0], flags=re.MULTILINE), text)
    return REFERENCE.sub(refer, text)


def name_type(said: str) -> str:
    """`` `str` or [`~peft.PeftModel`], *optional*, defaults to `None` `` as `str | PeftModel`."""
    said = re.sub(r", \*optional\*.*", "", said)
    said = REFERENCE.sub(lambda match: match[1].rpartition(".")[2], said)
    return said.replace("`", "").replace(" or ", " | ")


def refer(match: re.Match[str]) -> str:
    """A cross-reference as a link, where the name has a page here."""
    name = match[1].rpartition(".")[2]
    return f"[`{name}`][{DOCUMENTED[name]}]" if name in DOCUMENTED else f"`{name}`"


class TrlDocstrings(Extension):
    """Translates every docstring as it is loaded."""

    def on_object(self, *, obj: Object, **_: Any) -> None:  # noqa: D102
        if isinstance(obj, Class | Function) and obj.docstring is not None:
            obj.docstring.value = translate(obj.docstring.value)
