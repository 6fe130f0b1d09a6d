"""Fixtures of all rooms: tiny models, rows, and runs of the pipeline; nothing is downloaded."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# First: it sets what the libraries read from the environment when they are imported.
from helpers import make_model, make_prompt_completion, make_tokenizer


# isort: split
import pytest
import torch
from datasets import Dataset
from hub_client import POOL, TOKEN, HubClient
from loopback_hub import LoopbackHub
from recipe_runs import make_inputs, run_command, write_config
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a model and data, and the settings of a recipe's run on them; nobody writes into it."""
    folder = tmp_path_factory.mktemp("recipe-inputs")
    return folder, make_inputs(folder)


@pytest.fixture(scope="session")
def finished(inputs: tuple[Path, dict[str, Any]]) -> Path:
    """The same folder with a finished run of the pipeline; nobody writes into it."""
    folder, config = inputs
    run_command("run", "--config", write_config(folder, config), pictures=True)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, headless, through Playwright; both are optional."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="needs Playwright: pip install -c constraints.txt -e '.[browser]'"
    )
    with sync_api.sync_playwright() as playwright:
        installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:
            launched = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium (apt-get install chromium, or playwright install chromium): {str(error)[:200]}")
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    """A Hub of several users; tests of another one have a fixture of their own."""
    with LoopbackHub(multipart_above=20_000) as hub:
        hub.add_user(TOKEN, "ada", orgs=("lab",))
        hub.add_user("hf_" + "R" * 34, "rita", role="read")
        hub.add_user("hf_" + "B" * 34, "bob")
        yield hub


@pytest.fixture(scope="module")
def client(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubClient]:
    """A process of ada's that has a scored pool to publish."""
    with HubClient(hub, tmp_path_factory.mktemp("home"), TOKEN) as client:
        client.run(POOL + "\nfrom hf_in2core.cards.publish import push_influence_dataset as push", shared=True)
        yield client


@pytest.fixture
def pool() -> Dataset:
    return make_prompt_completion(23, seed=0)


@pytest.fixture
def validation() -> Dataset:
    return make_prompt_completion(7, seed=1)


@pytest.fixture
def exact_damping(monkeypatch) -> None:
    """A second fit pass takes the exact damping from the first, whatever the bound on the pilot's error says."""
    monkeypatch.setattr("hf_in2core.engine.fit.MAX_INNER_DAMPING_ERROR", {torch.float64: 0.0, torch.float32: 0.0})


@pytest.fixture(autouse=True)
def no_command_left() -> Iterator[None]:
    """What `in2core` leaves in the environment for the processes that it launches is of one test alone."""
    yield
    for name in ("IN2CORE_PROCESSES", "IN2CORE_TYPED"):
        os.environ.pop(name, None)
