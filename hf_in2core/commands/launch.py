"""Starting a command through accelerate, with its flags."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from hf_in2core.pipeline.run_folder import PROCESSES_VARIABLE
from hf_in2core.shipped import find_shipped


# Flags that accelerate has for DeepSpeed and that are settings of the training here.
SETTINGS = ("--gradient_accumulation_steps", "--help", "-h", "-m", "--module", "--no_python")


def launch(name: str, argv: Sequence[str]) -> None:
    """
    Run a command in one process or several, as the flags of `accelerate launch` among its own say.

    Without any, and without a configuration of accelerate's, it takes all accelerators of the machine, or one process
    on the CPU.

    Raises:
        SystemExit: with the exit code of the processes where it is not 0, or with 2 where the flags cannot work.
    """
    parser = launch_command_parser()
    flags, settings = split_flags(resolve_config(list(argv)), parser)
    try:
        given = parser.parse_args([*flags, "--module", "hf_in2core.commands", name, *settings])
        complete(given)
        # No folder of the user's is searched for modules: an evaluate.py there is not the library.
        os.environ["PYTHONSAFEPATH"] = "1"
        # The processes hear Ctrl-C themselves; this one waits for what they say of it.
        signal.signal(signal.SIGINT, lambda *_: None)
        launch_command(given)
    except (ValueError, ImportError) as error:  # of a configuration, or of DeepSpeed that is not installed
        print(f"in2core {name}: error: accelerate cannot launch this: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.returncode if error.returncode > 0 else 128 - error.returncode) from None
    except ChildFailedError as error:  # of several processes, whose own words stand above
        code = error.get_first_failure()[1].exitcode
        raise SystemExit(code if code > 0 else 128 - code) from None


def resolve_config(argv: list[str]) -> list[str]:
    """`--accelerate_config NAME` as `--config_file` with that file: one of ours by its name, or the user's own."""
    flag = "--accelerate_config"
    parts = [part for token in argv for part in (token.split("=", 1) if token.startswith(f"{flag}=") else [token])]
    if flag not in parts[:-1]:
        return parts
    place = parts.index(flag)
    path = Path(parts[place + 1])
    if not path.is_file():
        try:
            path = find_shipped(f"recipes/accelerate_configs/{path}.yaml")
        except FileNotFoundError:
            known = "cpu, single_gpu, multi_gpu, fsdp, zero3"
            print(f"in2core: error: {flag} {path} is neither a file nor one of {known}.", file=sys.stderr)
            raise SystemExit(2) from None
    return [*parts[:place], "--config_file", str(path), *parts[place + 2 :]]


def split_flags(argv: Sequence[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """The flags that are accelerate's, with their values, and the command's own, each in their order."""
    actions = parser._option_string_actions
    launching: list[str] = []
    settings: list[str] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        flag, has_value, _ = token.partition("=")
        action = None if flag in SETTINGS else actions.get(flag)
        (settings if action is None else launching).append(token)
        if action is not None and action.nargs != 0 and not has_value and tokens:
            launching.append(tokens.pop(0))
    return launching, settings


def complete(given: argparse.Namespace) -> None:
    """Settle what accelerate would ask for or take otherwise than it was meant."""
    if given.num_processes is not None:
        # The processes compare it with how many they are: some forms silently start one.
        os.environ[PROCESSES_VARIABLE] = str(given.num_processes)
    if given.config_file is not None or (Path(default_config_file).is_file() and not given.cpu):
        return
    has_accelerator = torch.accelerator.is_available() and not given.cpu
    if given.num_processes is None:
        given.num_processes = torch.accelerator.device_count() if has_accelerator else 1
    given.num_machines = given.num_machines or 1
    given.mixed_precision = given.mixed_precision or "no"  # the trainer's arguments say it: --bf16, --fp16
    given.dynamo_backend = given.dynamo_backend or "no"
    if has_accelerator:
        return
    if given.num_processes > 1:
        # `--cpu --num_processes 2` would be one process: accelerate joins several on CPUs by this form alone.
        given.cpu, given.multi_gpu = False, True
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if given.num_cpu_threads_per_process is None and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        given.num_cpu_threads_per_process = max(cores * given.num_machines // given.num_processes, 1)
