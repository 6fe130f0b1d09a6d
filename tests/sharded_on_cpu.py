"""A script launched as `accelerate launch --config_file fsdp.yaml` (or zero3.yaml) would, sharded over CPU processes.

accelerate shards on GPUs only and drops to DDP on a CPU without a word; for DeepSpeed it finds no backend there.
Everything but these decisions is its own: the plugins read from the launcher's variables, `fully_shard` of each layer
or DeepSpeed's engine, loading on the first process alone, saving.

    accelerate launch … tests/sharded_on_cpu.py SCRIPT [ARGUMENT …]
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from hf_in2core.pipeline.zero import say_fsdp


def is_set(variable: str) -> bool:
    return os.environ.get(variable) == "true"


def shard_on_cpu() -> None:
    """Let accelerate's state say FSDP or DeepSpeed on these processes, as the launcher's variables do on GPUs."""
    if not is_set("ACCELERATE_USE_DEEPSPEED"):
        say_fsdp()
    os.environ |= {"ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"}  # by accelerate's there is neither
    start_process, start_accelerator = PartialState.__init__, AcceleratorState.__init__

    def say_sharded(self: PartialState, cpu: bool = False, **kwargs: Any) -> None:
        start_process(self, **kwargs)
        if is_set("ACCELERATE_USE_FSDP"):
            self._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP

    def take_plugin(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        known = self._shared_state.get("fsdp_plugin")
        start_accelerator(self, *args, **kwargs)
        self._shared_state["fsdp_plugin"] = self.fsdp_plugin = known or fsdp_plugin

    def find_gloo(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_CPU

    PartialState.__init__, AcceleratorState.__init__ = say_sharded, take_plugin  # type: ignore[method-assign]
    PartialState._prepare_backend = find_gloo  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    shard_on_cpu()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    if PartialState().num_processes < 2:
        raise SystemExit("one process, where several were to share the weights")
