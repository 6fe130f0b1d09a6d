"""A script launched as `accelerate launch --config_file fsdp.yaml` would, sharded by FSDP2 over CPU processes.

accelerate shards on GPUs only and drops to DDP on a CPU without a word. Everything but that one decision is its own:
the plugin read from the launcher's variables, `fully_shard` of each layer, loading on the first process alone, saving.

    accelerate launch … tests/fsdp_on_cpu.py SCRIPT [ARGUMENT …]
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


CONFIG = Path(__file__).resolve().parents[1] / "recipes" / "accelerate_configs" / "fsdp.yaml"


def shard_on_cpu() -> None:
    """Set the variables that the launcher sets, and let accelerate's state say FSDP on these processes."""
    settings = yaml.safe_load(CONFIG.read_text())["fsdp_config"]
    for name, value in settings.items():
        variable = name.upper() if name != "fsdp_cpu_ram_efficient_loading" else "FSDP_CPU_RAM_EFFICIENT_LOADING"
        os.environ.setdefault(variable, str(value) if not isinstance(value, bool) else str(value).lower())
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    start_process, start_accelerator = PartialState.__init__, AcceleratorState.__init__

    def say_fsdp(self: PartialState, *args: Any, **kwargs: Any) -> None:
        start_process(self, *args, **kwargs)
        self._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP

    def take_plugin(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        known = self._shared_state.get("fsdp_plugin")
        start_accelerator(self, *args, **kwargs)
        self._shared_state["fsdp_plugin"] = self.fsdp_plugin = known or fsdp_plugin

    PartialState.__init__, AcceleratorState.__init__ = say_fsdp, take_plugin  # type: ignore[method-assign]
    if PartialState(cpu=True).num_processes < 2:
        raise SystemExit("one process, where several were to share the weights")


if __name__ == "__main__":
    shard_on_cpu()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
