"""Loads the fixtures of all rooms, which stand in `shared_fixtures.py`."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Where tests run alone: what only hands them to workers need not import the libraries, which takes seconds."""
    if not config.getoption("numprocesses", None) or "PYTEST_XDIST_WORKER" in os.environ:
        config.pluginmanager.import_plugin("shared_fixtures")
