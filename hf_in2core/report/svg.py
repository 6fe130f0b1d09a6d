"""A matplotlib figure as SVG that stands in a page: its colours follow the page's theme, and no style leaks out."""

import io
import re
import warnings
from typing import TYPE_CHECKING
from xml.etree import ElementTree


if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_DROPPED = ("metadata", "style")
_FONT_SIZE = re.compile(r"(\d+(?:\.\d+)?)px")


def render_svg(figure: "Figure", label: str, name: str) -> str:
    """
    Render a figure for a page whose content security policy forbids inline styles.

    Every style becomes attributes, which rules of the page override by colour: `[fill="#000000"]` is text and axes.

    Args:
        figure (`matplotlib.figure.Figure`): What to render.
        label (`str`): What it shows, read out to those who do not see it.
        name (`str`): Name of the figure, part of the ids in it; unique in a page.

    Returns:
        `str`: an `<svg>` element; the same for the same figure.
    """
    from matplotlib import rc_context

    file = io.BytesIO()
    # Letters stay text, so a browser's fonts have what matplotlib's own font lacks.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for parent in root.iter():
        for child in list(parent):
            if child.tag.removeprefix(_SVG) in _DROPPED:
                parent.remove(child)
    text = ElementTree.tostring(root, encoding="unicode")
    # A marker's shape has the colours of the place where it was drawn first; every use of it has its own.
    for shape in root.iterfind(f".//{_SVG}defs/{_SVG}path"):
        if f'href="#{shape.get("id")}"' in text:
            shape.attrib.pop("style", None)
    referenced = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', text))
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if _LINK in element.attrib:
            element.set("href", element.attrib.pop(_LINK))
        if element.get("id") not in referenced:
            element.attrib.pop("id", None)
        _spread_style(element)
    root.attrib = {
        "viewBox": root.get("viewBox", ""),
        "width": root.get("width", "").removesuffix("pt"),
        "role": "img",
        "aria-label": label,
    }
    return ElementTree.tostring(root, encoding="unicode")


def _spread_style(element: ElementTree.Element) -> None:
    """Turn the declarations of a style attribute into attributes of their own."""
    for declaration in element.attrib.pop("style", "").split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":
            size = _FONT_SIZE.search(value)
            name, value = "font-size", size.group(1) if size else "10"
        if name and name != "font-family":
            element.set(name, value)
