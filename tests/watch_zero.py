"""A script under ZeRO-3, watched: what a process holds at each step of a training, and when FSDP2 shards a model.

    accelerate launch … tests/sharded_on_cpu.py tests/watch_zero.py NOTES SCRIPT [ARGUMENT …]

NOTES.<rank>.json then has a list of `["step" or "shard", {…}]`. With STOP_AT=5 in the environment the second process
ends before its sixth step, as if it had been killed.
"""

import gc
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from accelerate.utils import fsdp_utils
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule
from torch.nn import Parameter

from hf_in2core.engine import sharding


NOTES: list[Any] = []


def count(kind: type) -> int:
    gc.collect()
    return sum(isinstance(thing, kind) for thing in gc.get_objects())


def count_bytes() -> int:
    """Of all tensors that live."""
    gc.collect()
    storages = [thing.untyped_storage() for thing in gc.get_objects() if type(thing) in (Tensor, Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def watch() -> None:
    # A weight below this size stays whole, as all of a test's model are.
    DeepSpeedZeroConfig.model_fields["param_persistence_threshold"].default = 0
    DeepSpeedZeroConfig.model_rebuild(force=True)
    step, shard = DeepSpeedEngine.step, fsdp_utils.fsdp2_prepare_model

    def note_step(engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
        parameters = list(engine.module.parameters())
        found = {
            "processes": distributed.get_world_size(),
            "elements": sum(p.ds_numel for p in parameters),
            "held": sum(p.ds_tensor.numel() + p.numel() for p in parameters),
            "trained": sum(p.ds_numel for p in parameters if p.requires_grad),
            "sharded_by_fsdp": count(FSDPModule),
        }
        if os.environ["RANK"] == "1" and os.environ.get("STOP_AT") == str(len(NOTES)):
            os._exit(9)
        NOTES.append(["step", found])
        return step(engine, *args, **kwargs)

    def note_shard(*args: Any, **kwargs: Any) -> Any:
        NOTES.append(["shard", {"bytes": count_bytes()}])
        return shard(*args, **kwargs)

    DeepSpeedEngine.step, sharding.fsdp2_prepare_model = note_step, note_shard  # type: ignore[method-assign]


if __name__ == "__main__":
    watch()
    notes, *sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        Path(f"{notes}.{os.environ['RANK']}.json").write_text(json.dumps(NOTES), encoding="utf-8")
