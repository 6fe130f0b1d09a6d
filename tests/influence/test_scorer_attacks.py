"""A scorer's folder from a stranger: refused with a reason, and nothing in it is ever run."""

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import add_trained_adapter, make_model, make_prompt_completion, make_tokenizer, make_trainer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_in2core import InfluenceScorer


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    make_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    model = add_trained_adapter(AutoModelForCausalLM.from_pretrained(folder / "base"))
    pool, validation = make_prompt_completion(12, seed=0), make_prompt_completion(4, seed=1)
    trainer = make_trainer(folder / "run", pool, validation, torch.float32, model=model)
    trainer.fit_influence().save_pretrained(folder / "scorer")
    return folder / "scorer"


@pytest.fixture
def folder(honest, tmp_path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "scorer"))


class Marked:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.marker,)


def refuse(folder: Path, *kinds: type[Exception]) -> str:
    with pytest.raises(kinds or ValueError) as raised:
        InfluenceScorer.from_pretrained(folder)
    return str(raised.value)


# Configuration


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format_version": 99}, "Upgrade"),
        ({"format_version": "1"}, "no `format_version`"),
        ({"surprise": 1}, "unknown keys"),
        ({"estimator": "evil"}, "estimator"),
        ({"estimator": ["datainf"]}, "estimator"),
        ({"loss_reduction": None}, "loss_reduction"),
        ({"loss_reduction": ["mean"]}, "loss_reduction"),
        ({"autocast": "int8"}, "autocast"),
        ({"autocast": []}, "autocast"),
        ({"base_model_dtype": "load"}, "base_model_dtype"),
        ({"base_model": 5}, "base_model"),
        ({"base_model_revision": {}}, "base_model_revision"),
        ({"tokens_per_batch": 0}, "tokens_per_batch"),
        ({"tokens_per_batch": True}, "tokens_per_batch"),
        ({"validation_sets": {}}, "validation_sets"),
        ({"validation_sets": {"validation": -4}}, "validation_sets"),
        ({"validation_sets": {"a": 2, "b": 2}}, "2 validation sets"),
        ({"per_example": True}, "4 validation rows"),
        ({"preparation": {"trust_remote_code": True}}, "preparation"),
        ({"damping_scale": 3.0}, "not of the same scorer"),
        ({"pool_hash": "0" * 32}, "not of the same scorer"),
        ({"base_model": "/nowhere/at/all"}, "not on this machine"),
    ],
)
def test_a_configuration_that_no_scorer_has_is_refused(folder, change, told) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert told in refuse(folder)


def test_a_base_with_code_of_its_own_is_not_run_and_the_way_round_is_told(folder, tmp_path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}))
    (base / "own.py").write_text("raise SystemExit('code of a model was run')")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"base_model": str(base)}))
    assert "from_pretrained(..., model=model)" in refuse(folder)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", "[1]", "\ud800".encode("utf-8", "surrogatepass")])
def test_a_configuration_that_is_no_json_object_is_refused(folder, text) -> None:
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "config.json" in refuse(folder)


# Directions


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "scorer.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def first(tensors: dict[str, torch.Tensor]) -> str:
    return next(iter(tensors))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.update({first(t): t[first(t)].half()}), "float32"),
        (lambda t: t.update({first(t): t[first(t)].long()}), "float32"),
        (lambda t: t.update({first(t): t[first(t)] * float("nan")}), "not a finite"),
        (lambda t: t.update({first(t): t[first(t)] + float("inf")}), "not a finite"),
        (lambda t: t.update({first(t): t[first(t)].mT}), "shape"),
        (lambda t: t.update({first(t): t[first(t)][0]}), "matrices"),
        (lambda t: t.update({first(t): torch.cat([t[first(t)]] * 2)}), "matrices"),
        (lambda t: t.update({first(t): torch.zeros(())}), "matrices"),
        (lambda t: t.update({"base_model.model.lm_head": torch.zeros(1, 2, 2)}), "does not have"),
        (lambda t: t.clear(), "no tensor"),
        (lambda t: t.pop(first(t)), "not of the same scorer"),
        (lambda t: t.update({first(t): -t[first(t)]}), "not of the same scorer"),
    ],
)
def test_directions_that_are_not_the_scorers_are_refused(folder, change, told) -> None:
    rewrite(folder, change)
    assert told in refuse(folder)


def make_header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 1 << 40) + b"{" * 1000,
        struct.pack("<Q", 99_000_000) + b"{" * 1000,
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        make_header(a={"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}) + b"\0" * 8,
        make_header(a={"dtype": "F32", "shape": [1 << 50], "data_offsets": [0, 1 << 52]}) + b"\0" * 8,
        make_header(a={"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}) + b"\0" * 8,
        make_header(a={"dtype": "EVIL", "shape": [2], "data_offsets": [0, 8]}) + b"\0" * 8,
    ],
)
@pytest.mark.parametrize("name", ["scorer.safetensors", "adapter/adapter_model.safetensors"])
def test_a_damaged_or_hostile_safetensors_file_is_refused(folder, data, name) -> None:
    (folder / name).write_bytes(data)
    refuse(folder)


def test_a_missing_file_is_named(folder) -> None:
    for name in ("scorer.safetensors", "adapter/adapter_model.safetensors"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        assert name.split("/")[-1] in refuse(folder, FileNotFoundError)
        (folder / name).write_bytes(kept)


# Code


def test_no_pickle_is_loaded(folder, tmp_path) -> None:
    marker = tmp_path / "ran"
    bomb = pickle.dumps(Marked(marker))
    pickle.loads(bomb)
    assert marker.exists(), "the bomb works"
    marker.unlink()
    (folder / "scorer.safetensors").rename(folder / "kept")
    (folder / "scorer.safetensors").write_bytes(bomb)
    refuse(folder)
    (folder / "kept").rename(folder / "scorer.safetensors")
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    for name in ("adapter/adapter_model.bin", "adapter/training_args.bin", "training_args.bin"):
        (folder / name).write_bytes(bomb)
    assert "safetensors" in refuse(folder, FileNotFoundError)
    assert not marker.exists()


def test_an_adapter_that_does_not_fit_is_refused(folder) -> None:
    path = folder / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    for change in ({"r": 7}, {"peft_type": "EVIL"}, {"target_modules": ["nothing"]}, {"auto_mapping": {"x": "os"}}):
        path.write_text(json.dumps(config | change))
        if "auto_mapping" in change:
            InfluenceScorer.from_pretrained(folder)  # ignored: the scorer names its base model itself
        else:
            assert "adapter" in refuse(folder)


def test_code_in_the_tokenizers_or_the_base_models_folder_is_not_run(folder, tmp_path) -> None:
    marker = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    code += "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
    code += "class C(LlamaConfig): model_type = 'evil'\nclass M(LlamaForCausalLM): config_class = C\n"
    code += "class T(PreTrainedTokenizerFast): pass\n"
    path = folder / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": [None, "evil.T"]}}
    settings["tokenizer_class"] = "T"
    path.write_text(json.dumps(settings))
    (folder / "tokenizer" / "evil.py").write_text(code)
    refuse(folder, Exception)
    assert not marker.exists()

    base = Path(shutil.copytree(json.loads((folder / "config.json").read_text())["base_model"], tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text(code)
    scorer = json.loads((folder / "config.json").read_text()) | {"base_model": str(base)}
    (folder / "config.json").write_text(json.dumps(scorer))
    refuse(folder, Exception)
    assert not marker.exists()
