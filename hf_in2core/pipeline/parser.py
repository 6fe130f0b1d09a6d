"""YAML files and flags into settings: every key is also a flag, and unknown names are errors that suggest one."""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, field, fields, make_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import yaml
from trl import TrlParser
from trl.trainer.model_config import ModelConfig


# Flags that TRL or Transformers know and that mean something else here.
REFUSED = {
    "hub_token": "it would be written in plain text beside the outputs. Set the environment variable HF_TOKEN",
    "push_to_hub": "every trained adapter would be pushed. Use `--hub_id user/repo`, which pushes once, at the end",
    "hub_model_id": "use `--hub_id user/repo`",
    "resume_from_checkpoint": "the same command into the same `--output_dir` resumes",
    "use_peft": "the recipes always train a LoRA adapter",
    "lora_task_type": "the recipes train causal language models",
    "eval_strategy": "the recipes evaluate at the end of each arm, on `--test`",
    "do_train": "it does nothing here",
    "do_eval": "it does nothing here",
    "do_predict": "it does nothing here",
    "local_rank": "`accelerate launch` sets it",
}
# Where our default differs from SFTConfig's.
DEFAULTS = {"save_strategy": "no"}

TRAINING_HELP = """\
Every flag of trl.SFTConfig and hf_in2core.InfluenceConfig is accepted too (learning_rate, num_train_epochs, max_steps,
per_device_train_batch_size, gradient_accumulation_steps, warmup_steps, lr_scheduler_type, max_length,
completion_only_loss, assistant_only_loss, chat_template_path, bf16, gradient_checkpointing, report_to, seed, …;
damping_scale, estimator, loss_reduction, influence_layers, tokens_per_batch, fit_examples, chunk_size,
gradient_store_gb, influence_activation_checkpointing).  Defaults are theirs, but for bf16 (on where the accelerator
has it, off on the CPU) and save_strategy ("no": what is finished is kept anyway).  dtype is that of the frozen weights
(float32 by default); LoRA has r 16, alpha 32, dropout 0.05 on PEFT's default modules (q_proj and v_proj of a Llama;
`all-linear` for all)."""
REFERENCE_HELP = """
They hold for the targets and for the reference model. Where the reference differs, give them a prefix:
--reference_learning_rate 1e-4 --reference_num_train_epochs 1 --reference_lora_r 8 …"""

ConfigType = TypeVar("ConfigType")


class Settings:
    """
    Resolved settings of a run, flat, as `config.yaml` holds them.

    Args:
        arguments (`Any`):
            The recipe's own dataclass, filled.
        values (`dict[str, Any]`):
            Every setting by name; those of the reference model, where they differ, with the prefix `reference_`.
    """

    def __init__(self, arguments: Any, values: dict[str, Any]) -> None:
        self.arguments = arguments
        self.values = values

    def make(self, config_type: type[ConfigType], reference: bool = False, **overrides: Any) -> ConfigType:
        """Fill a configuration class, for the targets or for the reference model."""
        return config_type(**self.select(config_type, reference) | overrides)

    def select(self, config_type: type, reference: bool = False) -> dict[str, Any]:
        """Settings of the fields of a configuration class."""
        names = [item.name for item in fields(config_type) if item.init]  # type: ignore[arg-type]
        selected = {name: self.values[name] for name in names if name in self.values}
        if reference:
            # The recipe's own `reference_adapter` and `reference_fraction` have no counterpart without the prefix.
            selected |= {name: self.values[key] for name in names if (key := f"reference_{name}") in self.values}
        return selected

    def save(self, path: Path) -> None:
        """Write a YAML file that `--config` reads back."""
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(yaml.safe_dump(self.values, sort_keys=False, allow_unicode=True), encoding="utf-8")
        os.replace(temporary, path)


class RecipeParser:
    """
    Parser of a recipe: YAML gives settings, flags override them, unknown names are errors that suggest the right one.

    Args:
        arguments_type (`type`):
            The recipe's own dataclass.
        description (`str`, *optional*):
            First lines of `--help`.
        model (`bool`, *optional*, defaults to `True`):
            Whether the flags of `trl.ModelConfig` (model, LoRA, quantisation) are accepted.
        training (`bool`, *optional*, defaults to `True`):
            Whether those of `InfluenceConfig` are.
        reference (`bool`, *optional*, defaults to `False`):
            Whether both are accepted with the prefix `reference_` too.
    """

    def __init__(
        self,
        arguments_type: type,
        description: str | None = None,
        model: bool = True,
        training: bool = True,
        reference: bool = False,
    ) -> None:
        self.arguments_type = arguments_type
        self.description = description
        self.training = training
        self.reference = reference
        self.config_types: list[type] = [arguments_type] + ([ModelConfig] if model else [])

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
            self._make_light_parser().print_help()
            raise SystemExit(0)
        if self.training:
            # Imported here: it takes seconds, up to half a minute on a cold machine.
            from hf_in2core import InfluenceConfig

            self.config_types.append(InfluenceConfig)
        self._parser = self._make_full_parser()
        given = self._read_flags(argv)
        config = given.pop("config", None)
        if config is not None:
            given = self._read_yaml(Path(config)) | given
        values = self._defaults | given
        if self.training:
            _resolve_defaults(values, given)
        own = {item.name: values[item.name] for item in fields(self.arguments_type)}
        try:
            return Settings(self.arguments_type(**own), values)
        except ValueError as error:
            self.error(str(error))

    def run(self, main: Callable[[Settings], None]) -> None:
        """Parse the command line and run a recipe on it; Ctrl-C leaves with 130 and says how to go on."""
        try:
            main(self.parse())
        except KeyboardInterrupt:
            if os.environ.get("RANK", "0") == "0":
                print("\nInterrupted. What is finished is kept: the same command goes on from there.", file=sys.stderr)
            raise SystemExit(130) from None
        finally:
            if "accelerate" in sys.modules:
                from accelerate import PartialState

                PartialState().destroy_process_group()

    def error(self, message: str) -> NoReturn:
        """Print a message and leave with 2, as argparse does."""
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        raise SystemExit(2)

    def _make_light_parser(self) -> TrlParser:
        epilog = (TRAINING_HELP if self.training else "") + (REFERENCE_HELP if self.reference else "")
        parser = TrlParser(
            _without(self.config_types, REFUSED),
            description=self.description,
            epilog=epilog or None,
            formatter_class=_HelpFormatter,
        )
        parser.add_argument("--config", metavar="X.yaml", help="File that sets any of these; flags override it.")
        return parser

    def _make_full_parser(self) -> TrlParser:
        config_types = _without(self.config_types, REFUSED)
        self._defaults = {
            item.name: _get_default(item) for config_type in config_types for item in fields(config_type)
        } | (DEFAULTS if self.training else {})
        if self.reference:
            config_types.append(_for_reference(config_types[1:]))
        parser = TrlParser(config_types, allow_abbrev=False, add_help=False)
        parser.add_argument("--config")
        for action in parser._actions:
            # Only what is given comes back, so that it can be laid over the file's values and the defaults.
            action.default, action.required = argparse.SUPPRESS, False
            # TRL's parser wants a word after a flag that may be true, false or unset, such as --bf16.
            if getattr(action.type, "__name__", None) == "string_to_bool":
                action.nargs, action.const = "?", True
        parser.error = self.error  # type: ignore[method-assign]
        return parser

    def _read_flags(self, argv: list[str]) -> dict[str, Any]:
        known, rest = self._parser.parse_known_args(argv)
        for token in rest:
            self._refuse(token.split("=")[0].lstrip("-") if token.startswith("--") else None, token, "flag")
        return {name: _to_plain(value) for name, value in vars(known).items()}

    def _read_yaml(self, path: Path) -> dict[str, Any]:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            self.error(f"--config {path} cannot be read: {error}")
        if not isinstance(content, dict):
            self.error(f"--config {path} holds no `key: value` lines")
        argv: list[str] = []
        values: dict[str, Any] = {}
        for name, value in content.items():
            if name not in {action.dest for action in self._parser._actions} or name == "config":
                self._refuse(str(name), str(name), f"key of {path}")
            default = self._defaults.get(name)
            if value is None or (value == default and name in self._defaults):
                values[name] = None if value is None else default
                continue
            # Parsed like flags, so that both mean the same (YAML reads 1e-4 as text, for one).
            action = next(action for action in self._parser._actions if action.dest == name)
            if action.nargs == "+":
                pairs = [f"{key}={item}" for key, item in value.items()] if isinstance(value, dict) else value
                items = pairs if isinstance(pairs, list) else [pairs]
                if not items:
                    values[name] = []
                    continue
                argv += [f"--{name}", *map(str, items)]
            else:
                argv.append(f"--{name}={json.dumps(value) if isinstance(value, (dict, list)) else value}")
        known, rest = self._parser.parse_known_args(argv)
        if rest:
            self.error(f"{path}: unexpected values {rest}")
        return values | {name: _to_plain(value) for name, value in vars(known).items()}

    def _refuse(self, name: str | None, token: str, what: str) -> NoReturn:
        if name is None:
            self.error(f"unexpected value `{token}`")
        name = name.replace("-", "_")
        reason = REFUSED.get(name.removeprefix("reference_"))
        if reason is not None:
            self.error(f"`{token}` is not accepted: {reason}.")
        names = {action.dest for action in self._parser._actions}
        close = difflib.get_close_matches(name, sorted(names), n=1)
        hint = f"Did you mean `{close[0]}`?" if close else "See --help."
        self.error(f"unknown {what} `{token}`. {hint}")


def _resolve_defaults(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Settle what depends on the machine or on another setting."""
    import torch

    if "dataloader_pin_memory" not in given:
        values["dataloader_pin_memory"] = torch.accelerator.is_available()
    # SFTConfig trains in bf16 by default, which a CPU emulates slowly: on only where an accelerator has it.
    if values["bf16"] is None:
        values["bf16"] = not values["fp16"] and not values["use_cpu"] and _accelerator_has_bf16()
    # Transformers warns of the old name, which SFTConfig still sets by default.
    for prefix in ("", "reference_"):
        old, new = f"{prefix}gradient_checkpointing", f"{prefix}activation_checkpointing"
        if old in values and values.get(new) is None:
            values[new] = values[old]


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
            default: Any = {"default": item.default}
            if item.default is MISSING:
                default = {"default_factory": item.default_factory}
            parts.append((item.name, hints[item.name], field(**default, metadata=item.metadata)))
            seen.add(item.name)
        reduced.append(make_dataclass(config_type.__name__, parts))
    return reduced


def _for_reference(config_types: list[type]) -> type:
    """All fields of several dataclasses with `reference_` before their names and no defaults."""
    parts = [
        (f"reference_{item.name}", get_type_hints(config_type)[item.name], field(default=None))
        for config_type in config_types
        for item in fields(config_type)
    ]
    return make_dataclass("ReferenceConfig", parts)


def _get_default(item: Field) -> Any:
    value = item.default if item.default_factory is MISSING else item.default_factory()
    return _to_plain(value)


def _to_plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _accelerator_has_bf16() -> bool:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.xpu.is_available()


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, and the epilog as it is written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(f"{indent}{line}\n" for line in text.splitlines())
