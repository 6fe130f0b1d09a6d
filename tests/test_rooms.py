"""The rooms of the package: who may look at whom, no circle inside any of them, and modules short enough to read."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from helpers import ROOT


PACKAGE = ROOT / "hf_in2core"
LONGEST_MODULE = 400
# From the ground up: a room may import those that stand on lower floors, and nothing beside it or above.
FLOORS = [
    {"names", "progress", "notebook", "shipped", "files"},
    {"engine"},
    {"rows"},
    {"selection", "evaluation", "hub"},
    {"cards"},
    {"influence"},
    {"analysis", "report"},
    {"pipeline"},
    {"commands"},
]
# These read what a run or the Hub holds, as data: nothing of models or rows.
ON_THE_GROUND = {"hub", "evaluation"}
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def list_modules(root: Path) -> dict[str, ast.Module]:
    """Every module of a package by its dotted name, `hf_in2core.` left out."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        modules[name] = parse(path)
    return modules


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def add_line(modules: dict[str, ast.Module], module: str, line: str) -> dict[str, ast.Module]:
    return modules | {module: ast.Module([*modules[module].body, *ast.parse(line).body], [])}


def list_imports(module: str, tree: ast.Module, modules: dict[str, ast.Module], at_once: bool) -> Iterator[str]:
    """The modules of the package that a module imports: all of them, or those that it imports when it is imported."""
    package = module.rpartition(".")[0] if module in modules and "." in module else module
    nodes = list(iterate(tree.body)) if at_once else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join(["hf_in2core", *above, *([source] if source else [])])
            names = [source, *(f"{source}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            short = name.removeprefix("hf_in2core.")
            if name.startswith("hf_in2core.") and short in modules:
                yield short


def iterate(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported; not those of `if TYPE_CHECKING`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for name in ("body", "orelse", "handlers", "finalbody"):
            yield from iterate(getattr(node, name, []))


def find_wrong_arrows(modules: dict[str, ast.Module]) -> list[str]:
    wrong = []
    for module, tree in modules.items():
        room = module.split(".")[0]
        for imported in list_imports(module, tree, modules, at_once=False):
            other = imported.split(".")[0]
            floor = 1 if room in ON_THE_GROUND else FLOOR_OF.get(room, len(FLOORS))
            if room and other != room and FLOOR_OF[other] >= floor:
                wrong.append(f"{module} imports {imported}")
    return sorted(set(wrong))


def find_circle(modules: dict[str, ast.Module]) -> list[str]:
    arrows = {name: set(list_imports(name, tree, modules, at_once=True)) - {name} for name, tree in modules.items()}
    finished: set[str] = set()

    def follow(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in finished:
            return []
        for imported in sorted(arrows[name]):
            if circle := follow(imported, [*path, name]):
                return circle
        finished.add(name)
        return []

    return next((circle for name in arrows if (circle := follow(name, []))), [])


def test_every_room_has_its_floor() -> None:
    found = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert found - {"__init__"} == set(FLOOR_OF)


def test_imports_go_down() -> None:
    modules = list_modules(PACKAGE)
    assert sum(len(set(list_imports(name, tree, modules, at_once=False))) for name, tree in modules.items()) > 200
    assert find_wrong_arrows(modules) == []


def test_no_module_waits_for_itself() -> None:
    assert find_circle(list_modules(PACKAGE)) == []


@pytest.mark.parametrize(
    "module, line, wrong",
    [
        ("engine.fit", "from hf_in2core.influence.config import InfluenceConfig", "influence.config"),
        ("engine.fit", "from ..influence import config", "influence.config"),
        ("rows.sources", "def f():\n    import hf_in2core.hub.commits", "hub.commits"),
        ("selection.coreset", "from hf_in2core import hub", "hub"),
        ("evaluation.judge", "from hf_in2core.rows.text import render_row", "rows.text"),
    ],
)
def test_an_arrow_that_goes_up_is_found(module: str, line: str, wrong: str) -> None:
    modules = add_line(list_modules(PACKAGE), module, line)
    assert f"{module} imports {wrong}" in find_wrong_arrows(modules)


def test_a_circle_is_found() -> None:
    modules = add_line(list_modules(PACKAGE), "engine.datainf", "from .fit import fit_directions")
    assert {"engine.datainf", "engine.fit"} <= set(find_circle(modules))


def test_the_map_of_the_rooms_names_what_is_there() -> None:
    """Every module and function that CONTRIBUTING.md names in a room's line stands in that room."""
    lines = re.findall(r"^\| (`.*?) \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = {room.strip("`/"): re.findall(r"`(\w+)`", told) for room, told in lines if room.strip("`/") in FLOOR_OF}
    assert set(named) == set(FLOOR_OF) - FLOORS[0]
    for room, names in named.items():
        sources = {path.stem: path.read_text(encoding="utf-8") for path in (PACKAGE / room).glob("*.py")}
        defined = set(re.findall(r"^(?:def|class) (\w+)", "\n".join(sources.values()), re.MULTILINE))
        assert set(names) <= sources.keys() | defined, room


def test_no_module_is_too_long() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    lines |= {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "recipes").rglob("*.py")}
    assert {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > LONGEST_MODULE} == {}


def test_nothing_in_the_package_imports_what_stands_outside() -> None:
    outside = r"^\s*(from|import) (recipes|benchmarks|tests|unittest\.mock)\b"
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(outside, path.read_text(encoding="utf-8"), re.MULTILINE), path


def test_no_test_imports_another() -> None:
    """What tests share stands in modules of its own: `helpers.py` and those beside it."""
    imports = r"^\s*(?:from|import) (?:tests\.)?(?:[\w.]+\.)?(conftest|test_\w+)\b"
    files = sorted((ROOT / "tests").rglob("*.py"))
    # Each folder may have a `conftest.py`, of which pytest reads every one.
    names = [path.name for path in files if path.name != "conftest.py"]
    assert len(set(names)) == len(names), "pytest takes one of two modules of the same name"
    for path in files:
        assert not re.findall(imports, path.read_text(encoding="utf-8"), re.MULTILINE), path
