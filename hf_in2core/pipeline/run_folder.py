"""A run's processes and files: who decides, who prints, and writing whole or not at all."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from filelock import FileLock, Timeout
from transformers.integrations import get_reporting_integration_callbacks

from hf_in2core import InfluenceConfig
from hf_in2core.evaluation.formats import read_object
from hf_in2core.files import write_whole
from hf_in2core.progress import without_bars
from hf_in2core.shipped import find_shipped

from .parser import Settings
from .told import note_told
from .zero import shard_beside_zero


# How many processes the user asked `in2core` for.
PROCESSES_VARIABLE = "IN2CORE_PROCESSES"
LOCK_FILE = ".in2core.lock"
# The locks that this process holds: the operating system lets go of them when it ends.
_LOCKS: dict[Path, FileLock] = {}
# What a distributed launch leaves in the environment of a child process that is not part of it.
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def join_processes(settings: Settings) -> None:
    """
    Join the processes of the launch; every command that may have several begins with it.

    Raises:
        ValueError: if the launcher started several, but they would each take themselves for the only one.
    """
    if settings.values.get("output_dir") is not None:
        check_output_dir(Path(settings.values["output_dir"]))
    shard_beside_zero()
    # Training arguments join on the CPU too, which PartialState does only when it is told that there is nothing else.
    args = settings.make(InfluenceConfig)
    try:
        get_reporting_integration_callbacks(args.report_to)
    except ValueError as error:
        raise ValueError(f"--report_to {' '.join(args.report_to or [])} cannot work: {error}") from error
    joined = PartialState().num_processes
    launched = int(os.environ.get(PROCESSES_VARIABLE) or os.environ.get("WORLD_SIZE", "1"))
    if launched != joined:
        raise ValueError(
            f"{launched} processes were launched, but they do not find each other ({joined} in this group) and would "
            "write over one another. On CPUs set ACCELERATE_USE_CPU=true before `accelerate launch --multi_gpu`."
        )


def find_command() -> str:
    """`in2core` where a shell finds this environment's, else its path: the environment need not be active."""
    beside, found = Path(sys.executable).with_name("in2core"), shutil.which("in2core")
    if not beside.exists() or (found is not None and os.path.samefile(found, beside)):
        return "in2core"
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)


def check_output_dir(folder: Path) -> None:
    """
    Check that a folder is one, or can be made, and can be written into.

    Raises:
        ValueError: if it is a file, or one of those above it is.
        PermissionError: if it may not be written into.
    """
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"--output_dir {folder} cannot be a folder: {existing} is a file. Give another one.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"--output_dir {folder} cannot be written: {existing} is not yours. Give another one.")


def lock_folder(folder: Path) -> None:
    """
    Keep a folder for this command until its process ends, however it ends; the main process does so for all.

    Raises:
        ValueError: if another command works in it.
    """

    def lock() -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder.resolve() / LOCK_FILE
        if path not in _LOCKS:
            held = FileLock(path)
            try:
                held.acquire(blocking=False)
            except Timeout:
                return False
            _LOCKS[path] = held
        return True

    if not agree(lock):
        raise ValueError(
            f"{folder} is in use: another in2core command is at work in it, and two would write over each other. Wait "
            "until it ends (one that was killed holds nothing), or give another --output_dir."
        )


@contextmanager
def leaving_nothing(folder: Path) -> Iterator[None]:
    """Trainers make their folder: take it away again where it was not there before, and is empty."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    finally:
        if PartialState().is_main_process:
            for place in new:
                with suppress(OSError):
                    place.rmdir()


def say(message: str) -> None:
    """Print on the main process."""
    PartialState().print(message, flush=True)


def warn(message: str) -> None:
    """Print a warning on the main process, where it does not mix with results."""
    note_told(message)
    PartialState().print(f"warning: {message}", file=sys.stderr, flush=True)


def agree(decide: Callable[[], Any]) -> Any:
    """Let the main process decide, for example from a file; every process gets the same answer."""
    state = PartialState()
    state.wait_for_everyone()
    answer = [decide() if state.is_main_process else None]
    return answer[0] if state.num_processes == 1 else broadcast_object_list(answer)[0]


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_tasks(folder: Path) -> dict[str, dict[str, Any]]:
    """What `in2core evaluate` found for the model in a folder, by task; empty where it was not evaluated."""
    return {
        task: {name: value for name, value in found.items() if name != "identity"}
        for task, found in read_object(folder / "tasks.json").items()
    }


@contextmanager
def written_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when everything in it is written; for all processes."""
    state = PartialState()
    temporary = folder.with_name(f".{folder.name}.tmp")
    if state.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    state.wait_for_everyone()
    yield temporary
    state.wait_for_everyone()
    if state.is_main_process:
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    state.wait_for_everyone()


def save_rows(rows: Dataset, folder: Path) -> None:
    """Save rows as `load_from_disk` reads them. No bar: it lasts a moment, and in a log it is not a line."""
    with without_bars():
        rows.save_to_disk(str(folder))


def run_setup_script(command: str) -> None:
    """Run a Python script with its arguments, in a process of its own, on the main process."""
    script, *arguments = shlex.split(command)
    if not Path(script).is_file():
        try:
            script = str(find_shipped(script))  # the quickstart's, where there is no checkout
        except FileNotFoundError:
            raise FileNotFoundError(
                f"--setup_script names `{script}`, which is not a file, seen from {Path.cwd()}."
            ) from None
    state = PartialState()
    if state.is_main_process:
        # A child that took itself for a rank of this launch would wait for the others.
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
        subprocess.run([sys.executable, script, *arguments], check=True, env=environment)
    state.wait_for_everyone()


@contextmanager
def quiet_loading(repeated: bool = False) -> Iterator[None]:
    """No bars for loading and tokenising outside a terminal, and none at all where every arm does it anew."""
    with nullcontext() if sys.stderr.isatty() and not repeated else without_bars():
        yield
