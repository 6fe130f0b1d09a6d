"""`in2core`: one command for each step, started through accelerate where it computes."""

import difflib
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from hf_in2core import __version__
from hf_in2core.pipeline.arguments import TYPED_VARIABLE


COMMANDS = {
    "run": "everything: reference, influence, coresets, targets, comparison, report",
    "demo": "the same on a model and data made on the spot, offline",
    "train-reference": "train the reference adapter, through which influence is computed",
    "score": "score a pool: the influence of each row on a validation set",
    "select": "select a coreset from a scored pool",
    "sft": "fine-tune a target model on a coreset",
    "evaluate": "judge adapters, or every arm of a run, by loss and by tasks of lm-eval",
    "publish": "publish a run to the Hub",
    "grow": "add rows to a published pool",
    "report": "write the page of a run anew",
}
WITHOUT_LAUNCH = ("select", "publish", "report")
USAGE = """\
usage: in2core COMMAND [--config X.yaml] [flags]

Which training examples earn their place: influence, coresets, and whether they were worth it.

{commands}

`in2core COMMAND --help` shows the flags people need first, `--help-all` every one. Commands that train or score start
through accelerate and take its flags: --num_processes, --config_file, --accelerate_config (cpu, single_gpu, multi_gpu,
fsdp, zero3, or a file)."""


def main(argv: Sequence[str] | None = None) -> None:
    """The console command `in2core`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE.format(commands="\n".join(f"  {name:<16} {told}" for name, told in COMMANDS.items())))
        return
    if argv[0] == "--version":
        print(__version__)
        return
    name, flags = argv[0].replace("_", "-"), argv[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean `{close[0]}`?" if close else f"There are {', '.join(COMMANDS)}."
        print(f"in2core: error: there is no command `{argv[0]}`. {hint}", file=sys.stderr)
        raise SystemExit(2)
    os.environ.setdefault(TYPED_VARIABLE, shlex.join(["in2core", *argv]))
    asks = {"-h", "--help", "--help-all", "--help_all"} & set(flags)
    # A process that a launcher started is one of its own already.
    if asks or name in WITHOUT_LAUNCH or "WORLD_SIZE" in os.environ:
        run_here(name, flags)
    else:
        from .launch import launch

        launch(name, flags)


def run_here(name: str, flags: Sequence[str]) -> None:
    """Run a command in this process."""
    # Of the libraries to each other: nothing that a user could do about.
    warnings.filterwarnings("ignore", message=r"`(is_)?gradient_checkpointing` is deprecated", category=FutureWarning)
    module = import_module(f"hf_in2core.commands.{name.replace('-', '_')}")
    module.PARSER.run(module.main, flags)


def run_script(name: str) -> None:
    """Run a command for a script of `recipes/`, which a user has launched."""
    # Python puts the script's folder first on its path, where evaluate.py would be taken for the `evaluate` library.
    sys.path.append(sys.path.pop(0))
    run_here(name, sys.argv[1:])
