"""YAML files and flags into settings: every key is also a flag, and unknown names are errors that suggest one."""

import argparse
import difflib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import yaml

from hf_in2core.files import write_whole

from .arguments import PRESETS, In2CoreArguments
from .defaults import DEFAULTS, resolve_defaults
from .refusals import explain
from .told import telling_once


# Flags that TRL or Transformers know and that mean something else here.
REFUSED = {
    "hub_token": "it would be written in plain text beside the outputs. Set the environment variable HF_TOKEN",
    "push_to_hub": "every trained adapter would be pushed. Use `--hub_id user/repo`, which pushes once, at the end",
    "hub_model_id": "use `--hub_id user/repo`",
    "resume_from_checkpoint": "the same command into the same `--output_dir` resumes",
    "lora_task_type": "causal language models are trained",
    "eval_strategy": "each arm is evaluated at its end, on `--test`",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "it does nothing here"),
    "local_rank": "the launcher sets it",
}
GROUPS = ("data", "reference", "influence", "selection", "targets", "output")
# The flags of SFTConfig, ModelConfig and InfluenceConfig that people need first, told without importing them.
LIBRARY_FLAGS = {
    "estimator": "How: `datainf`, `gradient_dot` or `gradient_cosine` (default: datainf).",
    "fit_examples": "Rows to fit on: `auto` (a sample whose halves agree), a number or `all` (default: auto).",
    "tokens_per_batch": "Tokens in a batch of the influence passes (default: what the device holds).",
    "learning_rate": "Learning rate (default: 2e-4, as TRL advises for LoRA; without it a tenth of that).",
    "num_train_epochs": "Epochs (default: 3).",
    "max_steps": "Optimiser steps, instead of epochs.",
    "per_device_train_batch_size": "Rows in a batch of a process (default: 8).",
    "per_device_eval_batch_size": "Questions of --tasks in a batch of a process (default: 8).",
    "max_length": "Tokens that rows are cut to (default: 1024).",
    "use_peft": "LoRA (default: True); `--no_use_peft` trains the model's own weights, up to about a billion.",
    "lora_r": "Rank of the LoRA adapter (default: 16).",
    "lora_target_modules": "Its modules (default: all-linear; every linear layer but the output head).",
}
TRAINING = (
    *("learning_rate", "num_train_epochs", "per_device_train_batch_size"),
    *("use_peft", "lora_r", "lora_target_modules"),
)
MORE_HELP = "--help-all also shows every flag of {}."
REFERENCE_HELP = """
They hold for the targets and for the reference model. Where the reference differs, give them a prefix:
--reference_learning_rate 1e-4 --reference_num_train_epochs 1 --reference_lora_r 8 …"""

ConfigType = TypeVar("ConfigType")


@dataclass
class Settings:
    """
    Resolved settings of a run, flat, as `config.yaml` holds them.

    Attributes:
        arguments (`Any`):
            The command's own dataclass, filled.
        values (`dict[str, Any]`):
            Every setting by name; those of the reference model, where they differ, with the prefix `reference_`.
    """

    arguments: Any
    values: dict[str, Any]

    def make(self, config_type: type[ConfigType], reference: bool = False, **overrides: Any) -> ConfigType:
        """Fill a configuration class, for the targets or for the reference model."""
        try:
            return config_type(**self.select(config_type, reference) | overrides)
        except (ValueError, ImportError) as error:  # those of TRL and Transformers are about what was given, too
            raise ValueError(f"These settings cannot work: {error}") from error

    def select(self, config_type: type, reference: bool = False) -> dict[str, Any]:
        """Settings of the fields of a configuration class."""
        names = [item.name for item in fields(config_type) if item.init]  # type: ignore[arg-type]
        selected = {name: self.values[name] for name in names if name in self.values}
        if reference:
            # The command's own `reference_adapter` and `reference_fraction` have no counterpart without the prefix.
            selected |= {name: self.values[key] for name in names if (key := f"reference_{name}") in self.values}
        return selected

    def save(self, path: Path) -> None:
        """Write a YAML file that `--config` reads back."""
        write_whole(path, yaml.safe_dump(self.values, sort_keys=False, allow_unicode=True))


@dataclass
class RecipeParser:
    """
    Parser of a command: YAML gives settings, flags override them, unknown names are errors that suggest the right one.

    Attributes:
        name (`str`):
            The command, for its messages.
        arguments_type (`type`):
            Its own dataclass, of fields made by [`arguments.flag`].
        description (`str`, *optional*):
            First lines of `--help`.
        model (`bool`, *optional*, defaults to `True`):
            Whether the flags of `trl.ModelConfig` (model, LoRA, quantisation) are accepted.
        training (`bool`, *optional*, defaults to `True`):
            Whether those of `InfluenceConfig` are.
        reference (`bool`, *optional*, defaults to `False`):
            Whether both are accepted with the prefix `reference_` too.
        shown (`Mapping[str, Sequence[str]]`, *optional*):
            Group → which of `LIBRARY_FLAGS` the command's `--help` shows in it.
        config (`Path`, *optional*):
            YAML file that is read where `--config` names none.
    """

    name: str
    arguments_type: type
    description: str | None = None
    model: bool = True
    training: bool = True
    reference: bool = False
    shown: Mapping[str, Sequence[str]] = field(default_factory=dict)
    config: Path | None = None

    def parse(self, argv: Iterable[str] | None = None) -> Settings:
        """
        Read flags and the YAML file they name.

        Args:
            argv (`Iterable[str]`, *optional*):
                Flags; those of the command line by default.

        Returns:
            [`Settings`]

        Raises:
            SystemExit: after `--help` (0) or on a name or value that cannot be (2), with a message.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        if "-h" in argv or "--help" in argv:
            self._print_help()
            raise SystemExit(0)
        if argv and not argv[0].startswith("-") and "run" in {item.name for item in fields(self.arguments_type)}:
            argv = ["--run", *argv]  # the folder that a command is about needs no flag
        self._parser = self._make_parser()
        if "--help-all" in argv or "--help_all" in argv:
            self._parser.print_help()
            raise SystemExit(0)
        known, argv = self._config_parser().parse_known_args(argv)
        path = known.config or self.config
        from_file = [] if path is None else self._read_yaml(Path(path))
        given, rest = self._parser.parse_known_args([*from_file, *argv])
        for token in rest:
            self._refuse(token.split("=")[0].lstrip("-") if token.startswith("--") else None, token, "flag")
        preset = PRESETS.get(getattr(given, "preset", ""), {})
        values = self._defaults | preset | {name: _to_plain(value) for name, value in vars(given).items()}
        if self.training:
            resolve_defaults(values)
        own = {item.name: values[item.name] for item in fields(self.arguments_type)}
        try:
            return Settings(self.arguments_type(**own), values)
        except ValueError as error:
            self.error(str(error))

    def run(self, main: Callable[[Settings], None], argv: Iterable[str] | None = None) -> None:
        """Parse the command line and run a command on it; what a user can mend ends without a traceback."""
        try:
            with telling_once():
                main(self.parse(argv))
        except KeyboardInterrupt:
            if os.environ.get("RANK", "0") == "0":
                print("\nInterrupted. What is finished is kept: the same command goes on from there.", file=sys.stderr)
            raise SystemExit(130) from None
        except Exception as error:
            rank = os.environ.get("RANK", "0")
            if rank != "0":
                # What all processes refuse the main one tells, and its end ends the others, whatever they then miss.
                time.sleep(5)
            message = explain(error)
            if message is None:
                raise
            if rank != "0":
                print(f"in2core {self.name}: error in process {rank}: {message}", file=sys.stderr)
                raise SystemExit(2) from None
            self.error(message)
        finally:
            if "accelerate" in sys.modules:
                from accelerate import PartialState

                PartialState().destroy_process_group()

    def error(self, message: str) -> NoReturn:
        """Print a message, once for all processes, and leave with 2, as argparse does."""
        if os.environ.get("RANK", "0") == "0":
            print(f"in2core {self.name}: error: {message}", file=sys.stderr)
        raise SystemExit(2)

    def _config_parser(self) -> argparse.ArgumentParser:
        parser: Any = argparse.ArgumentParser(prog=f"in2core {self.name}", add_help=False, allow_abbrev=False)
        parser.add_argument("--config", metavar="X.yaml", help="File that sets any of these; flags override it.")
        parser.error = self.error
        return parser

    def _print_help(self) -> None:
        """What people need first, by group; imports nothing to be quick."""
        parser = self._config_parser()
        parser.usage = f"in2core {self.name} [--config X.yaml] [flags]"
        parser.description, parser.formatter_class = self.description, argparse.RawDescriptionHelpFormatter
        for name in GROUPS:
            group = parser.add_argument_group(name)
            for item in fields(self.arguments_type):
                if item.metadata["group"] != name or not item.metadata["first"]:
                    continue
                default = _get_default(item)
                told = f" (default: {_show(default)})" if default not in (None, False, []) else ""
                choices = item.metadata.get("choices")
                group.add_argument(
                    f"--{item.name}",
                    help=(item.metadata["help"] + told).replace("%", "%%"),
                    metavar="{" + ",".join(choices) + "}" if choices else "",
                )
            for flag in self.shown.get(name, ()):
                group.add_argument(f"--{flag}", help=LIBRARY_FLAGS[flag], metavar="")
        rest = ["this command"]
        rest += ["trl.SFTConfig and hf_in2core.InfluenceConfig"] * self.training + ["trl.ModelConfig"] * self.model
        parser.epilog = MORE_HELP.format(", ".join(rest)) + REFERENCE_HELP * self.reference
        parser.print_help()

    def _make_parser(self) -> Any:
        from trl import TrlParser

        config_types = [self.arguments_type]
        if self.model:
            from trl.trainer.model_config import ModelConfig

            config_types.append(ModelConfig)
        if self.training:
            # Imported here: it takes seconds, up to half a minute on a cold machine.
            from hf_in2core import InfluenceConfig

            config_types.append(InfluenceConfig)
        reduced = _without(config_types, REFUSED)
        self._defaults = {item.name: _get_default(item) for config_type in reduced for item in fields(config_type)}
        if self.reference:
            reduced.append(_for_reference(reduced[1:]))
        parser: Any = TrlParser(
            reduced,
            prog=f"in2core {self.name}",
            description=self.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        for action in parser._actions:
            # Only what is given comes back, over the defaults: argparse would read text among these as flags.
            action.default = argparse.SUPPRESS
            # TRL's parser wants a word after a flag that may be true, false or unset, such as --bf16.
            if getattr(action.type, "__name__", None) == "string_to_bool":
                action.nargs, action.const = "?", True
        parser.error = self.error
        return parser

    def _read_yaml(self, path: Path) -> list[str]:
        """The flags that a file's keys stand for, so that both mean the same (YAML reads 1e-4 as text, for one)."""
        if not path.exists():
            from hf_in2core.rows.places import describe_missing

            self.error(f"--config {path} cannot be read: {describe_missing(str(path))}")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            mark = getattr(error, "problem_mark", None)
            where = "" if mark is None else f", line {mark.line + 1}"
            tab = "it has a tab, and YAML is indented with spaces" if "'\\t'" in str(error) else None
            self.error(f"--config {path}{where} cannot be read: {tab or error}")
        if not isinstance(content, dict):
            self.error(f"--config {path} holds no `key: value` lines")
        # A flag that is true by default has a second action, `--no_…`, after its own.
        actions = {action.dest: action for action in reversed(self._parser._actions)}
        argv: list[str] = []
        for name, value in content.items():
            if name not in actions:
                self._refuse(str(name), str(name), f"key of {path}")
            if isinstance(value, dict) and actions[name].nargs == "+":
                value = [f"{key}={item}" for key, item in value.items()]
            if value is None or value == []:  # which no flag can say
                self._parser.set_defaults(**{name: value})
            elif value == self._defaults.get(name) and not any(name in preset for preset in PRESETS.values()):
                continue
            elif actions[name].nargs == "+":
                argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
            else:
                argv.append(f"--{name}={json.dumps(value) if isinstance(value, dict | list) else value}")
        return argv

    def _refuse(self, name: str | None, token: str, what: str) -> NoReturn:
        if name is None:
            hint = ""
            if Path(token).is_dir():
                hint = " A folder is given by the flag that reads it; see --help."
            elif Path(token).exists():
                hint = " Several files of rows are given as the folder that they lie in."
            self.error(f"unexpected value `{token}`.{hint}")
        name = name.replace("-", "_")
        reason = REFUSED.get(name.removeprefix("reference_"))
        if reason is not None:
            self.error(f"`{token}` is not accepted: {reason}.")
        close = difflib.get_close_matches(name, sorted(action.dest for action in self._parser._actions), n=1)
        dashes = "--" if token.startswith("--") else ""
        hint = f"Did you mean `{dashes}{close[0]}`?" if close else "See --help."
        self.error(f"unknown {what} `{token}`. {hint}")


def make_run_parser(description: str | None = None, name: str = "run", config: Path | None = None) -> RecipeParser:
    """The parser of `in2core run`, by which a run's `config.yaml` is read again too; of the demo with its `config`."""
    shown = {"influence": ("estimator",), "targets": TRAINING}
    return RecipeParser(name, In2CoreArguments, description, reference=True, shown=shown, config=config)


def _without(config_types: list[type], refused: Iterable[str]) -> list[Any]:
    """The same fields as new dataclasses, each name once (the first class has it), without the refused names."""
    seen = set(refused)
    reduced = []
    for config_type in config_types:
        hints = get_type_hints(config_type)
        parts: list[tuple[str, Any, Any]] = []
        for item in fields(config_type):
            if not item.init or item.name in seen:
                continue
            default: Any = {"default": DEFAULTS.get(item.name, item.default)}
            if isinstance(default["default"], list):
                default = {"default_factory": default["default"].copy}
            elif item.default is MISSING:
                default = {"default_factory": item.default_factory}
            known = {key: item.metadata[key] for key in ("help", "choices", "aliases") if key in item.metadata}
            parts.append((item.name, hints[item.name], field(**default, metadata=known)))
            seen.add(item.name)
        reduced.append(make_dataclass(config_type.__name__, parts))
    return reduced


def _for_reference(config_types: list[type]) -> type:
    """All fields of several dataclasses with `reference_` before their names and no defaults."""
    parts = []
    for config_type in config_types:
        hints = get_type_hints(config_type)  # once a class: for 250 fields it takes milliseconds
        parts += [(f"reference_{item.name}", hints[item.name], field(default=None)) for item in fields(config_type)]
    return make_dataclass("ReferenceConfig", parts)


def _get_default(item: Any) -> Any:
    return _to_plain(item.default if item.default_factory is MISSING else item.default_factory())


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _to_plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
