"""The configs under `recipes/accelerate_configs`: accelerate takes each, and each means what its name says."""

import os
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from helpers import ROOT


FOLDER = ROOT / "recipes" / "accelerate_configs"
EXPECTED = {
    "cpu.yaml": (DistributedType.NO, True),
    "single_gpu.yaml": (DistributedType.NO, False),
    "multi_gpu.yaml": (DistributedType.MULTI_GPU, False),
    "fsdp.yaml": (DistributedType.FSDP, False),
    "zero3.yaml": (DistributedType.DEEPSPEED, False),
}


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_every_config_is_listed_here():
    assert {path.name for path in FOLDER.rglob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_what_is_meant(name):
    config = load_config_from_file(str(FOLDER / name))  # refuses unknown keys
    assert (DistributedType(config.distributed_type), config.use_cpu) == EXPECTED[name]
    assert config.num_machines == 1
    assert (config.num_processes > 1) == (name in ("multi_gpu.yaml", "fsdp.yaml", "zero3.yaml"))


@pytest.mark.slow
def test_fsdp_reaches_the_launched_process(tmp_path):
    # One process, so that neither GPUs nor a rendezvous are needed: what counts is what the script is told.
    script = tmp_path / "script.py"
    script.write_text("import os; print({k: v for k, v in os.environ.items() if 'FSDP' in k or 'MIXED' in k})")
    done = launch("--config_file", str(FOLDER / "fsdp.yaml"), "--num_processes", "1", str(script))
    assert done.returncode == 0, done.stderr
    for part in (
        "'ACCELERATE_USE_FSDP': 'true'",
        "'FSDP_VERSION': '2'",
        "'FSDP_AUTO_WRAP_POLICY': 'TRANSFORMER_BASED_WRAP'",
        "'FSDP_RESHARD_AFTER_FORWARD': 'true'",
        "'ACCELERATE_MIXED_PRECISION': 'bf16'",
    ):
        assert part in done.stdout


@pytest.mark.slow
def test_cpu_config_launches_a_script_without_warnings(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from accelerate import PartialState; state = PartialState(); print(state.device, state.num_processes)"
    )
    done = launch("--config_file", str(FOLDER / "cpu.yaml"), str(script))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cpu", "1"]
    assert "defaults used instead" not in done.stderr
