"""In2Core for the Hugging Face ecosystem: influence of training examples, and coresets chosen by it."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any


try:
    __version__ = version("hf-in2core")
except PackageNotFoundError:  # a tree on PYTHONPATH that was never installed
    __version__ = "0+uninstalled"

__all__ = [
    "InfluenceConfig",
    "InfluenceScorer",
    "InfluenceTrainer",
    "compare_arms",
    "push_influence_dataset",
    "select_coreset",
]

if TYPE_CHECKING:
    from .cards.publish import push_influence_dataset
    from .influence.config import InfluenceConfig
    from .influence.scorer import InfluenceScorer
    from .influence.trainer import InfluenceTrainer
    from .pipeline.compare import compare_arms
    from .selection.coreset import select_coreset

_MODULES = {
    "InfluenceConfig": "influence.config",
    "InfluenceScorer": "influence.scorer",
    "InfluenceTrainer": "influence.trainer",
    "compare_arms": "pipeline.compare",
    "push_influence_dataset": "cards.publish",
    "select_coreset": "selection.coreset",
}


def __getattr__(name: str) -> Any:
    # TRL takes seconds to import; who only selects or publishes does not wait for it.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
