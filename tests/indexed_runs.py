"""Trainers with a gradient index, and which rows of their pool pass the model."""

import copy
from typing import Any

import torch
from helpers import add_trained_adapter, make_model, make_tokens, make_trainer


POOL, OTHER = make_tokens(40, seed=0), make_tokens(6, seed=7)
# Rows of the pool that two checks of a run look at, each of two rows.
CHECKED = 4


def make(folder, index=None, validation=OTHER, pool=POOL, dtype=torch.float64, budget=1.0, model=None, **options):
    """A trainer of the same adapter, with an index under `index` where one is given."""
    kept: dict[str, Any] = {} if index is None else {"gradient_store_gb": budget, "gradient_store_dir": str(index)}
    model = copy.deepcopy(model) if model is not None else add_trained_adapter(make_model())
    settings = {"chunk_size": 7, "tokens_per_batch": 90, **kept, **options}
    return make_trainer(folder, pool, validation, dtype, model=model, **settings)


def list_index(folder) -> list:
    return sorted(folder.rglob("gradients-*.safetensors"))


class PoolRows:
    """The rows of the pool that pass a trainer's model from now on, found by their tokens in what is embedded."""

    def __init__(self, trainer) -> None:
        self.ids = {tuple(row["input_ids"]) for row in trainer.prepared_pool}
        self.seen: set[tuple[int, ...]] = set()
        self.passed = 0
        trainer.model.get_input_embeddings().register_forward_pre_hook(self.look)

    def look(self, module, inputs) -> None:
        for row in inputs[0].tolist():
            found = [ids for ids in self.ids if tuple(row[: len(ids)]) == ids and not any(row[len(ids) :])]
            self.passed += bool(found)
            self.seen |= set(found)
