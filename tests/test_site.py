"""The site of `make docs`: every public object has a page, whose docstring is rendered, and nothing leads nowhere."""

import html
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

import hf_in2core
from hf_in2core.commands.main import main


API = ROOT / "docs" / "api"
PAGES = {
    page.name: re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    for page in sorted(API.glob("*.md"))
}
DOCUMENTED = [name for names in PAGES.values() for name in names]


@pytest.mark.parametrize("name", hf_in2core.__all__)
def test_every_public_object_has_a_page_of_its_own(name: str) -> None:
    page = next((page for page, names in PAGES.items() if names == [f"hf_in2core.{name}"]), None)
    assert page is not None and f"| [`{name}`]({page}) |" in (API / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_is_documented_exists(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert getattr(importlib.import_module(module), attribute).__doc__


def test_every_knob_exists(capsys: pytest.CaptureFixture[str]) -> None:
    flags = set(re.findall(r"--\w\w+", (API / "README.md").read_text(encoding="utf-8")))
    for command in ("run", "select"):
        with pytest.raises(SystemExit):
            main([command, "--help-all"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert len(flags) > 10 and flags - {"--help", "--reference_"} <= known


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="needs MkDocs: pip install -c constraints.txt -e '.[docs]', or make docs")
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr
    return folder


def build(config: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(folder),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def read_page(path: Path) -> str:
    """The words of a page, without navigation and code blocks."""
    article = path.read_text(encoding="utf-8").partition("<article")[2].partition("</article")[0]
    article = re.sub(r"<pre.*?</pre>", " ", article, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", article)))


@pytest.mark.slow
def test_docstrings_are_rendered(site: Path) -> None:
    pages = {page.stem: read_page(page) for page in (site / "api").glob("*.html")}
    anchors = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    for name in DOCUMENTED:
        assert f'id="{name}"' in anchors
    for name, text in pages.items():  # what TRL's style has and griffe does not know
        assert not re.search(r"\*optional\*|`|> \[!|> Parameters", text), name
    # A type, a default and a description each, and a name that is documented here is a link.
    assert re.search(r"damping_scale \(float, default: 0.1 ?\) – Damping of each block", pages["influence_config"])
    assert re.search(r"model \(str \| PreTrainedModel \| PeftModel\) – Reference model", pages["influence_trainer"])
    trainer = (site / "api" / "influence_trainer.html").read_text(encoding="utf-8")
    assert 'href="influence_config.html#hf_in2core.InfluenceConfig"' in trainer


@pytest.mark.slow
def test_links_that_leave_the_documents_lead_to_the_repository(site: Path) -> None:
    targets = re.findall(r'href="(https://[^"]+/blob/main/[^"]+)"', (site / "index.html").read_text(encoding="utf-8"))
    paths = {target.partition("/blob/main/")[2] for target in targets}
    assert paths == {"README.md", "notebooks/tour.ipynb"} and all((ROOT / path).exists() for path in paths)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["[x](nowhere.md)", "[x](hub.md#nowhere)", "[x](../nowhere.py)"])
def test_a_link_that_leads_nowhere_is_an_error(wrong: str, site: Path, tmp_path: Path) -> None:
    """The same checks on two pages, without the reference, which takes most of the time."""
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    validation = settings[settings.index("validation:") : settings.index("markdown_extensions:")]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Start\n\n{wrong}\n")
    (tmp_path / "docs" / "hub.md").write_text("# Hub\n")
    hooks = f"hooks: [{ROOT / 'docs' / 'site_hooks.py'}]"
    (tmp_path / "mkdocs.yml").write_text(f"site_name: x\n{hooks}\n{validation}")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0 and "nowhere" in done.stderr
