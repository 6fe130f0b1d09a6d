"""What a release uploads: built as `make dist` builds it, and read as the package index reads it."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
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


@pytest.mark.parametrize(
    "tag, repository, passes",
    [("v{version}", "{home}", True), ("v9.9.9", "{home}", False), ("v{version}", "somebody/fork", False)],
)
def test_a_tag_that_does_not_fit_publishes_nothing(
    tag: str, repository: str, passes: bool, dist: Path, description: str, tmp_path: Path
) -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert publish["needs"] == "build" and publish["if"] == "github.ref_type == 'tag'"
    check = next(step["run"] for step in build["steps"] if step.get("if") == publish["if"])
    (tmp_path / "dist").symlink_to(dist)
    (tmp_path / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    found = re.search(r"github\.com/([\w.-]+/[\w.-]+)/blob/v([\d.]+)/", description)
    assert found is not None
    names = {"home": found[1], "version": found[2]}
    env = {"GITHUB_REF_NAME": tag.format(**names), "GITHUB_REPOSITORY": repository.format(**names)}
    shell = ["bash", "-e", "-o", "pipefail", "-c", check]
    assert (subprocess.run(shell, cwd=tmp_path, env=os.environ | env, capture_output=True).returncode == 0) == passes
