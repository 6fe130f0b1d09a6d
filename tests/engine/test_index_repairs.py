"""An index that is damaged, half written, shared or of nearly the same model: nothing wrong is read, nothing lost."""

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import add_trained_adapter, assert_same, launch_worker, make_config, make_model
from indexed_runs import CHECKED, POOL, PoolRows, list_index, make
from safetensors import safe_open

from hf_in2core.engine.encoding import decode, encode
from hf_in2core.engine.store import GradientStore, name_temporary
from hf_in2core.evaluation.formats import read_object
from hf_in2core.influence.cosines import make_gradient_dot


ELEMENTS = {"first": 6, "second": 3}


def identify(folder, model, **options) -> str:
    """Fingerprint of the index that a trainer of this model would read."""
    trainer = make(folder, folder / "index", model=model, **options)
    return trainer.make_passes(trainer.blocks, "some run").store.fingerprint


@pytest.fixture
def index(tmp_path):
    """Rows 0 to 8 in two files of an index of two blocks."""
    store = GradientStore(tmp_path, "this", ELEMENTS, torch.float32, kept=True)
    for first, last in ((0, 5), (5, 8)):
        write(store, first, last)
    return store


def write(store, first, last) -> None:
    with store.write(first, last):
        for name, elements in ELEMENTS.items():
            store.keep(name, np.arange(last - first), torch.randn(last - first, elements))


def damage(path, start=-5) -> None:
    content = bytearray(path.read_bytes())
    content[start] ^= 1
    path.write_bytes(bytes(content))


def test_an_index_is_of_a_base_with_its_settings_types_and_buffers(tmp_path) -> None:
    model = add_trained_adapter(make_model())
    expected = identify(tmp_path, model)
    again = copy.deepcopy(model)
    again.config.use_cache, again.config.pad_token_id, again.config.architectures = True, 3, ["Other"]
    assert identify(tmp_path, again) == expected
    rope, buffer = copy.deepcopy(model), copy.deepcopy(model)
    rope.config.rope_parameters = {"rope_theta": 5.0, "rope_type": "default"}
    buffer.get_base_model().model.layers[0].mlp.register_buffer("scales", torch.ones(3))
    others = [identify(tmp_path, rope), identify(tmp_path, buffer), identify(tmp_path, model, dtype=torch.float32)]
    buffer.get_base_model().model.layers[0].mlp.scales += 1
    others.append(identify(tmp_path, buffer))
    assert len({expected, *others}) == 5
    # The values of the weights are the same in both types.
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    assert identify(tmp_path, rounded, dtype=torch.float32) != identify(tmp_path, rounded, dtype=torch.float64)


def test_another_base_is_told_of_where_only_the_hardest_token_counts(tmp_path, caplog) -> None:
    model = add_trained_adapter(make_model(hidden_size=128, num_layers=1))
    options = {"model": model, "pool": POOL.select(range(8)), "loss_reduction": "max"}
    make(tmp_path / "first", tmp_path / "index", **options).fit_influence()
    make(tmp_path / "same", tmp_path / "index", **options).fit_influence()
    assert "does not fit the model" not in caplog.text
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight.flatten()[1::2] += 0.5
    make(tmp_path / "second", tmp_path / "index", **options).fit_influence()
    assert "does not fit the model" in caplog.text


def test_one_row_is_read_from_8_bits() -> None:
    gradients = torch.randn(1, 7)
    data = torch.cat([encode(gradients, torch.int8)] * 2)
    assert_same(decode(data[:1], 7, torch.int8), gradients, 0.02)
    assert torch.equal(decode(data[:1], 7, torch.int8), decode(data, 7, torch.int8)[:1])


def test_adam_steps_are_not_looked_for_in_an_index(tmp_path) -> None:
    args = make_config(tmp_path, gradient_store_gb=1.0, gradient_store_dir=str(tmp_path))
    less = make_gradient_dot(args)
    assert less.estimator == "gradient_dot" and less.gradient_store_dir is None and less.gradient_store_gb == 0
    assert args.gradient_store_dir is not None


def test_an_index_that_was_lost_after_the_fit_is_made_again_and_stores_of_before_go(tmp_path) -> None:
    """And the store that a run kept before it went on with an index goes too."""
    make(tmp_path / "run", gradient_store_gb=1.0, dtype=torch.float32).fit_influence()
    assert list_index(tmp_path / "run")
    make(tmp_path / "run", tmp_path / "index", dtype=torch.float32).fit_influence()
    shutil.rmtree(tmp_path / "index", ignore_errors=True)
    trainer = make(tmp_path / "run", tmp_path / "index", dtype=torch.float32)
    trainer.score_influence()
    store = trainer.make_passes(trainer.blocks, "x").store
    assert store.list_missing(0, len(POOL)) == [] and not list_index(tmp_path / "run")


def test_the_disk_needs_room_for_missing_rows_alone(index, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2 * index.row_bytes}))
    index.check_disk(10)
    with pytest.raises(ValueError, match=r"gradient store"):
        index.check_disk(11)
    write(index, 2, 7)  # which holds nothing that others do not
    with pytest.raises(ValueError, match=r"gradient store"):
        index.check_disk(11)
    path = index.list_files()[-1][2]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"gradient store"):
        index.check_disk(10)


def test_what_is_whole_tells_no_error_without_being_read(index, caplog) -> None:
    damage(index.list_files()[0][2])
    assert index.read_error() is None and caplog.text == ""


def test_only_what_nobody_writes_any_more_is_swept(index) -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead, own = done.stdout.decode().strip(), name_temporary(index.folder / "identity.json")
    machine = own.name.split(".")[-4]
    names = {
        "own": own.name,
        "dead": f".gradients-1.safetensors.{machine}.{dead}.0a.tmp",
        "elsewhere": f".gradients-1.safetensors.other.{dead}.0a.tmp",
        "left": f".gradients-2.safetensors.other.{dead}.0a.tmp",
        "of others": ".x.tmp",
    }
    for name in names.values():
        (index.folder / name).touch()
    os.utime(index.folder / names["left"], (time.time() - 4000,) * 2)
    index.sweep()
    assert {key for key, name in names.items() if (index.folder / name).exists()} == {"own", "elsewhere", "of others"}
    assert name_temporary(own).name != name_temporary(own).name


def test_a_damaged_file_is_told_of_once_and_goes_when_its_rows_are_in_others(index, caplog) -> None:
    path = index.list_files()[0][2]
    damage(path)
    for _ in range(2):
        assert index.list_missing(0, 8) == [(0, 5)]
    assert caplog.text.count(path.name) == 1 and "removed once they have" in caplog.text
    write(index, 0, 3)
    write(index, 3, 5)
    index.remove_unusable()
    assert not path.exists() and index.list_missing(0, 8) == [] and len(index.list_files()) == 3


def test_a_damaged_file_goes_also_where_chunks_are_others(tmp_path) -> None:
    make(tmp_path / "first", tmp_path / "index").fit_influence()
    damaged = list_index(tmp_path / "index")[1]
    damage(damaged)
    make(tmp_path / "second", tmp_path / "index", chunk_size=5).fit_influence()
    assert not damaged.exists() and len(list_index(tmp_path / "index")) == 7


def test_a_file_of_an_index_without_a_digest_is_damaged(index, caplog) -> None:
    path = index.list_files()[0][2]
    write(replace(index, kept=False), 0, 5)
    with safe_open(path, framework="pt") as file:
        assert "digest" not in file.metadata()
    assert index.list_missing(0, 8) == [(0, 5)] and "it says nothing of its digest" in caplog.text
    assert replace(index, dtype=torch.bfloat16).read_error() is None


def test_an_identity_that_is_no_object_is_nothing(tmp_path) -> None:
    (tmp_path / "identity.json").write_text(json.dumps(["a", "list"]))
    assert read_object(tmp_path / "identity.json") == {}


def test_what_another_run_fills_meanwhile_is_not_filled_again(tmp_path) -> None:
    make(tmp_path / "first", tmp_path / "filled").fit_influence()
    trainer = make(tmp_path / "second", tmp_path / "index")
    rows = PoolRows(trainer)
    folder = trainer.make_passes(trainer.blocks, "x").store.folder

    def fill(module, inputs) -> None:
        for path in list_index(tmp_path / "filled") if (folder / "identity.json").exists() else ():
            shutil.copy2(path, folder)

    trainer.model.get_input_embeddings().register_forward_pre_hook(fill)
    trainer.fit_influence()
    assert len(rows.seen) <= 7 + CHECKED  # the chunk in which the other run came, and the rows of the checks


@pytest.mark.slow
def test_processes_share_what_is_missing(tmp_path) -> None:
    options = {"num_rows": 24, "chunk_size": 40, "dtype": "float64", "gradient_store_gb": 1}
    options["gradient_store_dir"] = str(tmp_path / "index")
    first = launch_worker("influence_worker.py", tmp_path, "first", 2, **options)
    before = list_index(tmp_path / "index")
    before[0].unlink()
    again = launch_worker("influence_worker.py", tmp_path, "again", 2, **options)
    assert len(before) == 2 and len(list_index(tmp_path / "index")) == 3
    assert_same(*([*map(float.fromhex, found[0]["influence"])] for found in (again, first)), 1e-9)
