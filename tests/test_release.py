"""What a release uploads: built as `make dist` builds it, and read as the package index reads it."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from helpers import ROOT
from markdown_it import MarkdownIt


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, and the wheel that is built from it alone."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def description(dist: Path) -> str:
    """The long description, which is the same in both."""
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
    with tarfile.open(next(dist.glob("*.tar.gz"))) as source:
        file = source.extractfile(
            next(name for name in source.getnames() if name.count("/") == 1 and "PKG-INFO" in name)
        )
        assert file is not None and Parser().parsestr(file.read().decode()).get_payload() == metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    return str(metadata.get_payload())


def list_targets(text: str) -> list[str]:
    """Where links and pictures lead, by a parser of Markdown."""
    inline = [child for token in MarkdownIt().parse(text) for child in token.children or []]
    return [
        str(token.attrs.get("href") or token.attrs.get("src"))
        for token in inline
        if token.type in ("link_open", "image")
    ]


def test_links_and_pictures_work_away_from_the_repository(description: str) -> None:
    home = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+/blob/v[\d.]+/([^?#]+)(\?raw=true)?(#.*)?")
    here = [target.partition("#")[0] for target in list_targets((ROOT / "README.md").read_text(encoding="utf-8"))]
    there = list_targets(description)
    matches = [match for target in there if (match := home.fullmatch(target))]
    assert [match[1] for match in matches] == [path for path in here if "://" not in path]
    assert all(target.startswith("https://") for target in there)
    assert len(matches) > 5 and len({match[0].partition("/blob/")[0] for match in matches}) == 1
    for match in matches:
        assert (ROOT / match[1]).exists()
        assert bool(match[2]) == match[1].endswith(".png"), match[0]


def test_the_package_index_can_show_it(dist: Path) -> None:
    pytest.importorskip("twine", reason="needs twine: pip install -c constraints.txt -e '.[dist]'")
    files = [str(path) for path in dist.iterdir()]
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
