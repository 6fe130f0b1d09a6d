"""A Hub with several users, and a process of one of them that has a scored pool to publish."""

from collections.abc import Iterator

import pytest
from hub_client import TOKEN, HubClient
from loopback_hub import LoopbackHub


POOL = """
import numpy as np
from datasets import Dataset

def make_pool(rows=60, seed=0, word="row"):
    generator = np.random.default_rng(seed)
    influence = generator.normal(size=rows)
    return Dataset.from_dict({
        "prompt": [f"{word} {i} " + "x" * int(generator.integers(80)) for i in range(rows)],
        "completion": [f" answer {i}" for i in range(rows)],
        "influence": [None if i % 20 == 7 else float(v) for i, v in enumerate(influence)],
        "num_loss_tokens": [0 if i % 20 == 7 else int(i % 9) + 1 for i in range(rows)],
    })

def make_core(pool, share):
    from hf_in2core import select_coreset
    return select_coreset(pool, fraction=share)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub(multipart_above=20_000) as hub:
        hub.add_user(TOKEN, "ada", orgs=("lab",))
        hub.add_user("hf_" + "R" * 34, "rita", role="read")
        hub.add_user("hf_" + "B" * 34, "bob")
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory) -> Iterator[HubClient]:
    with HubClient(hub, tmp_path_factory.mktemp("home"), TOKEN) as client:
        client.run(POOL + "\nfrom hf_in2core.cards.publish import push_influence_dataset as push", shared=True)
        yield client
