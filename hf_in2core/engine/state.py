"""What a run has computed so far, on disk: written whole or not at all, and never mistaken for another run's."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .batches import read_token_rows
from .blocks import adapter_tensors
from .experts import list_wrappers
from .sharding import gather, reshard


logger = logging.getLogger(__name__)


def hash_json(value: Any) -> str:
    """Hash of a JSON-serialisable value, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def hash_prepared(prepared: Dataset) -> str:
    """Hash of the rows, tokens and labels of a prepared dataset, whatever files they come from."""
    digest = xxhash.xxh3_128()
    for start in range(0, len(prepared), 10_000):
        rows = read_token_rows(prepared, start, min(start + 10_000, len(prepared)))
        for array in (rows.row, rows.lengths, rows.input_ids, rows.labels):
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """Hash of named tensors, every byte of them."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_base_weights(model: nn.Module, adapter_names: set[int]) -> str:
    """
    Hash of the frozen weights of a model: shapes of all tensors and up to 1,024 evenly spaced values of each.

    Args:
        model (`torch.nn.Module`):
            The model with its adapter.
        adapter_names (`set[int]`):
            `id` of every adapter tensor, left out.

    Returns:
        `str`: independent of the names that PEFT gives to wrapped modules.
    """
    digest = hashlib.sha256()
    for tensor in _iterate_weights(model):
        if id(tensor) in adapter_names:
            continue
        _update_with_sample(digest, tensor)
    return digest.hexdigest()


def _update_with_sample(digest: Any, tensor: Tensor) -> None:
    # Whole, one at a time, where it is sharded over processes: all of them get the hash of the whole model.
    flat = gather(tensor).detach().flatten()
    step = max(len(flat) // 1024, 1)
    sample = flat[::step][:1024].cpu()
    sample = sample if sample.dtype == torch.uint8 else sample.double()
    digest.update(str(tuple(tensor.shape)).encode())
    digest.update(sample.numpy().tobytes())


def _iterate_weights(model: nn.Module) -> Iterator[Tensor]:
    """As `model.parameters()`; but PEFT moves the parameters of experts under LoRA in every forward."""
    moved, seen = list_wrappers(model), set()
    for module in model.modules():
        own = list(module.named_parameters(recurse=False))
        for _, tensor in sorted(own) if module in moved else own:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def hash_adapter(model: nn.Module) -> str:
    """Hash of every tensor of the active adapter; of the model's own weights where they are trained themselves."""
    reshard(model)
    if not isinstance(model, PeftModel):
        return hash_base_weights(model, set())
    return hash_tensors({name: gather(tensor) for name, tensor in adapter_tensors(model).items()})


def hash_base(model: nn.Module) -> str:
    """Hash of the model's weights without any adapter that it has loaded."""
    reshard(model)
    if not isinstance(model, PeftModel):
        return hash_base_weights(model, set())
    adapters = (adapter_tensors(model, name) for name in model.peft_config)
    return hash_base_weights(model, {id(tensor) for tensors in adapters for tensor in tensors.values()})


def describe_base(model: nn.Module) -> dict[str, str]:
    """
    What shapes the forward of a base model beside the values of its weights, as hashes.

    Returns:
        `dict[str, str]`: `base_config`, of the settings without those that loading or training writes and no forward
        reads; `base_dtypes`, of the types of all weights; `base_buffers`, of up to 1,024 values of each saved buffer,
        which is where quantised weights lie.
    """
    reshard(model)
    adapters = (adapter_tensors(model, name) for name in model.peft_config) if isinstance(model, PeftModel) else ()
    known = {id(tensor) for tensors in adapters for tensor in tensors.values()}
    dtypes = [str(tensor.dtype) for tensor in _iterate_weights(model) if id(tensor) not in known]
    digest = hashlib.sha256()
    for module in model.modules():
        for name, tensor in module.named_buffers(recurse=False):
            # The others are computed from the settings, some of them anew in each forward.
            if name not in module._non_persistent_buffers_set and id(tensor) not in known:
                _update_with_sample(digest, tensor)
    config = json.loads(json.dumps(_drop_unread(model.config.to_dict()), default=str))  # type: ignore[operator, union-attr]
    return {
        "base_config": hash_json(config),
        "base_dtypes": hash_json(dtypes),
        "base_buffers": digest.hexdigest(),
    }


# Names, where a model came from, and what trainers set to the tokenizer's; the dtype of the weights is their own.
UNREAD_SETTINGS = {
    *("transformers_version", "use_cache", "architectures", "dtype", "torch_dtype"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
}


def _drop_unread(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {
        str(name): _drop_unread(value)
        for name, value in settings.items()
        if name not in UNREAD_SETTINGS and not str(name).startswith("_")
    }


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name, then rename it: a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata=metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_tensors(path: Path, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """
    Read a file of [`write_tensors`] if it belongs to this run.

    Args:
        path (`pathlib.Path`):
            The file.
        fingerprint (`str`):
            Fingerprint that its metadata must carry.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, str]]` or `None`: tensors and metadata; `None`, with a warning that
        names the file, where it is damaged or belongs to another run, and silently where it does not exist.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copied to where torch aligns tensors: products of the same numbers elsewhere can differ in the last bits.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (cannot be iterated)
    except (SafetensorError, OSError, ValueError) as error:
        logger.warning("%s is damaged (%s) and is not used; its part is computed again.", path, error)
        return None
    if metadata.get("fingerprint") != fingerprint:
        logger.warning(
            "%s belongs to another run (fingerprint %s, expected %s) and is not used; its part is computed again.",
            path,
            metadata.get("fingerprint"),
            fingerprint,
        )
        return None
    return tensors, metadata


def open_state(folder: Path, identity: dict[str, Any]) -> None:
    """Make the folder of a run's state, without temporary files that a killed run left, and write what it is of."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "identity.json").write_text(json.dumps(identity, indent=2), encoding="utf-8")
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
