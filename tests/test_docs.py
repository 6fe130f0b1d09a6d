"""README and guides: every command and snippet in them runs and every link is right."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser
from doc_runs import DOCUMENTS, TOKEN, Block, Place, read_blocks, read_commands, shorten, shorten_python
from helpers import ROOT
from hub_client import QUIET, ClientError, HubClient
from loopback_hub import LoopbackHub
from recipe_runs import load_command

from hf_in2core.commands.launch import resolve_config, split_flags


GUIDES = sorted((ROOT / "docs").glob("*.md"))
EXECUTED, SHOWN = {"bash", "python"}, {"yaml", "json"}


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with LoopbackHub() as hub:
        place = Place(tmp_path_factory.mktemp("docs"), hub)
        for block in read_blocks(ROOT / "docs" / "quick_start.md"):
            place.write_files(block)
        yield place


@pytest.fixture(scope="module")
def reader(place: Place) -> Iterator[HubClient]:
    """A Python process in the project's folder, which runs the snippets of one document after another."""
    with HubClient(place.hub, place.project.parent / "home", TOKEN, ACCELERATE_USE_CPU="true", **QUIET) as client:
        client.run("import os; os.chdir(folder); scopes = {}", shared=True, folder=str(place.project))
        yield client


@pytest.fixture(scope="module")
def mine(place: Place) -> None:
    """A finished run in `runs/my_run`, which several guides take for granted."""
    place.run_once(shorten("in2core run --config my_run.yaml"))


def run_block(block: Block, document: Path, place: Place, reader: HubClient) -> None:
    if block.language == "bash":
        for command in read_commands(block):
            place.run_once(shorten(expand_make(command, place)))
    elif block.language == "python":
        where = f"{name_of(document)}, line {block.line}"
        code = "exec(compile(snippet, where, 'exec'), scopes.setdefault(document, {}))"
        try:
            reader.run(code, snippet=shorten_python(block.text), where=where, document=str(document))
        except ClientError as error:
            pytest.fail(f"{where}: {error}")


def expand_make(command: str, place: Place) -> str:
    """`make demo` as what make would run, which can be made short; the tests themselves are not run again."""
    target = re.fullmatch(r"make (\w+)", command)
    if target is None or target[1] == "install":
        return command
    commands = place.run_bash(f"{command} --dry-run").replace("\\\n", " ").strip()
    assert commands
    return "true" if target[1] == "test" and "-m pytest" in commands else commands


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_command_and_snippet_runs(document: Path, place: Place, reader: HubClient, mine: None) -> None:
    blocks = read_blocks(document)
    for block in blocks:
        run_block(block, document, place, reader)


@pytest.mark.slow
def test_the_space_arrives_whole(place: Place) -> None:
    """What its README says to type puts every file of its folder where the Hub looks for them."""
    folder = ROOT / "recipes" / "space"
    for block in read_blocks(folder / "README.md"):
        for command in read_commands(block):
            place.run_once(command)
    files = place.hub.repos["space", "user/in2core-explorer"].files()
    own = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert {name: data for name, data in files.items() if name != ".gitattributes"} == own


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_block_is_one_that_is_run_or_shown(document: Path) -> None:
    for block in read_blocks(document):
        assert block.language in EXECUTED | SHOWN, f"{name_of(document)}, line {block.line}: {block.language!r}"
        if block.language == "python":
            ast.parse(block.text)


def find_commands() -> list[Any]:
    found = []
    for document in DOCUMENTS:
        for block in read_blocks(document):
            for command in read_commands(block) if block.language == "bash" else []:
                if match := re.match(r"in2core ([\w-]+) (.*)", command):
                    found.append(pytest.param(match[1], match[2], id=f"{name_of(document)}:{block.line}:{match[1]}"))
    return found


@pytest.mark.parametrize("name, flags", find_commands())
def test_every_flag_of_a_command_exists(name: str, flags: str, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    yaml = next(block for block in read_blocks(ROOT / "docs" / "quick_start.md") if block.language == "yaml")
    (tmp_path / "my_run.yaml").write_text(yaml.text, encoding="utf-8")
    # As a run writes it.
    (tmp_path / "runs" / "my_run").mkdir(parents=True)
    (tmp_path / "runs" / "my_run" / "sft.yaml").write_text("model_name_or_path: my_model\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    settings = split_flags(resolve_config(flags.split()), launch_command_parser())[1]
    load_command(name.replace("-", "_")).PARSER.parse(settings)


LINKING = sorted(
    {*DOCUMENTS, *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")}
)


@pytest.mark.parametrize("document", LINKING, ids=name_of)
def test_every_link_leads_somewhere(document: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (document.parent / path) if path else document
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                target
            )


def test_every_guide_is_listed() -> None:
    listed = re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(path.name for path in GUIDES if path.name != "README.md")


# --- the notebook ---

TOUR = ROOT / "notebooks" / "tour.ipynb"
# A cell as a notebook runs it: a value in its last line is shown, which must work.
RUN_CELL = """
import ast

tree = ast.parse(cell)
last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
exec(compile(tree, name, "exec"), scopes.setdefault(name, {}))
if last is not None:
    value = eval(compile(ast.Expression(last.value), name, "eval"), scopes[name])
    getattr(value, "_repr_html_", value.__repr__)()
"""


def read_cells(kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(place: Place, reader: HubClient) -> None:
    for number, cell in enumerate(read_cells("code")):
        try:
            reader.run(RUN_CELL, cell="".join(cell["source"]), name="tour.ipynb")
        except ClientError as error:
            pytest.fail(f"code cell {number}: {error}")
    assert "In2Core report" in (place.project / "runs" / "tour" / "run" / "report.html").read_text(encoding="utf-8")


def test_the_notebook_has_the_outputs_of_one_run_from_top_to_bottom() -> None:
    notebook = json.loads(TOUR.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for number, cell in enumerate(read_cells("code"), 1):
        ast.parse("".join(cell["source"]))
        assert cell["execution_count"] == number
        # Bars and warnings are of the machine that ran it, and so are its folders.
        assert all(output.get("name") != "stderr" for output in cell["outputs"])
        assert not re.search(r"/(home|work|tmp|root|Users)/", json.dumps(cell["outputs"]))
    assert "Verdict: " in json.dumps(read_cells("code")[-2]["outputs"])


def test_links_of_the_notebook_lead_somewhere() -> None:
    for cell in read_cells("markdown"):
        for target in re.findall(r"\]\(([^)#\s]+)\)", "".join(cell["source"])):
            assert (TOUR.parent / target).exists(), target
