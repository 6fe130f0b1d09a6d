"""Settings of the recipes: YAML and flags mean the same, what is written replays, and wrong names are answered."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT
from recipe_runs import load_command
from trl import ModelConfig, SFTConfig, get_peft_config

from hf_in2core import InfluenceConfig
from hf_in2core.pipeline.parser import LIBRARY_FLAGS, REFUSED, Settings, make_run_parser


RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
# Those in accelerate_configs/ are the launcher's.
CONFIGS = sorted(path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name != "accelerate_configs")
NEEDED = "--model_name_or_path m --pool p.jsonl --validation v.jsonl --test t.jsonl --output_dir run".split()


def parse(*flags: str, config: dict | None = None, folder: Path | None = None) -> Settings:
    argv = list(flags)
    if config is not None:
        assert folder is not None
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        argv += ["--config", str(path)]
    return make_run_parser().parse(argv)


def parse_error(capsys: pytest.CaptureFixture, *flags: str, **kwargs) -> str:
    with pytest.raises(SystemExit) as left:
        parse(*flags, **kwargs)
    assert left.value.code == 2
    return capsys.readouterr().err


def test_yaml_and_flags_mean_the_same(tmp_path: Path) -> None:
    flags = [*NEEDED[:4], "--validation", "math=a.jsonl", "code=b.jsonl", *NEEDED[6:], "--learning_rate", "1e-4"]
    flags += ["--fractions", "0.25", "0.5", "--columns", "prompt=q", "completion=a", "--bf16", "false"]
    flags += ["--logging_nan_inf_filter", "false", "--max_length", "none", "--reference_max_steps", "-1"]
    flags += ["--lora_target_modules", "q_proj", "v_proj", "--lr_scheduler_type", "cosine", "--use_rslora"]
    config = {
        "model_name_or_path": "m",
        "pool": "p.jsonl",
        "validation": {"math": "a.jsonl", "code": "b.jsonl"},
        "test": "t.jsonl",
        "output_dir": "run",
        # YAML reads this as text.
        "learning_rate": "1e-4",
        "fractions": [0.25, 0.5],
        "columns": {"prompt": "q", "completion": "a"},
        "bf16": False,
        "logging_nan_inf_filter": False,
        "max_length": None,
        "reference_max_steps": -1,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lr_scheduler_type": "cosine",
        "use_rslora": True,
    }
    from_flags, from_yaml = parse(*flags), parse(config=config, folder=tmp_path)
    assert from_flags.values == from_yaml.values
    assert from_flags.values["learning_rate"] == 1e-4
    assert from_flags.values["max_length"] is None
    assert from_flags.arguments.validation == ["math=a.jsonl", "code=b.jsonl"]


def test_flags_override_yaml(tmp_path: Path) -> None:
    config = {"seeds": [0, 1, 2], "learning_rate": 1e-4, "bf16": True}
    settings = parse(*NEEDED, "--seeds", "7", "--learning_rate", "0.5", config=config, folder=tmp_path)
    assert settings.arguments.seeds == [7]
    assert settings.values["learning_rate"] == 0.5
    assert settings.values["bf16"] is True


def test_a_preset_is_the_papers_setting_and_what_is_given_beside_it_holds(tmp_path: Path) -> None:
    plain, preset = parse(*NEEDED), parse(*NEEDED, "--preset", "in2core")
    spelt_out = parse(*NEEDED, "--strategy", "top", "--fit_examples", "all", "--fractions", "0.5")
    assert preset.values == spelt_out.values | {"preset": "in2core"} != plain.values | {"preset": "in2core"}
    assert preset.make(InfluenceConfig, reference=True, bf16=False).fit_examples is None
    # Even the default, where someone writes it down.
    for key in ("strategy", "fractions"):
        default = {key: plain.values[key], "preset": "in2core"}
        settings = parse(*NEEDED, config=default, folder=tmp_path)
        assert settings.values == preset.values | {key: plain.values[key]}
        settings.save(tmp_path / "again.yaml")
        assert make_run_parser().parse(["--config", str(tmp_path / "again.yaml")]).values == settings.values


def test_written_settings_replay(tmp_path: Path) -> None:
    first = parse(*NEEDED, "--reference_learning_rate", "0.1", "--seeds", "3", "4", "--max_length", "none")
    first.save(tmp_path / "config.yaml")
    again = make_run_parser().parse(["--config", str(tmp_path / "config.yaml")])
    assert again.values == first.values
    assert dataclasses.asdict(again.arguments) == dataclasses.asdict(first.arguments)


def test_defaults_are_those_of_trl_but_for_the_stated_ones() -> None:
    values = parse(*NEEDED).values
    different = {
        item.name
        for config_type in (InfluenceConfig, ModelConfig)
        for item in dataclasses.fields(config_type)
        if item.name in values
        and item.default is not dataclasses.MISSING
        and getattr(item.default, "value", item.default) != values[item.name]
    }
    stated = {"bf16", "save_strategy", "activation_checkpointing", "dataloader_pin_memory"}
    stated |= {"use_peft", "learning_rate", "lora_target_modules"}  # for LoRA, which SFTConfig need not train
    machine = {"bf16", "dataloader_pin_memory"}
    assert different - {"output_dir", "model_name_or_path"} - machine == stated - machine
    # Every other field can be set.
    missing = {item.name for item in dataclasses.fields(InfluenceConfig) if item.init} - set(values)
    assert missing <= set(REFUSED)


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        ("run", NEEDED),
        ("train_reference", [*NEEDED[:4], *NEEDED[-2:]]),
        ("sft", [*NEEDED[:2], *NEEDED[-2:], "--dataset_name", "d.jsonl"]),
    ],
)
def test_lora_is_trained_as_trl_advises(command: str, needed: list[str]) -> None:
    """Ten times the learning rate of full fine-tuning, which is SFTConfig's, on every linear layer."""
    settings = load_command(command).PARSER.parse(needed)
    assert settings.make(InfluenceConfig, bf16=False).learning_rate == pytest.approx(10 * SFTConfig.learning_rate)
    config: Any = get_peft_config(settings.make(ModelConfig))
    assert config.target_modules == "all-linear"


def test_without_lora_the_learning_rate_is_that_of_full_fine_tuning() -> None:
    def rates(*flags: str) -> list[float]:
        settings = parse(*NEEDED, *flags)
        return [settings.make(InfluenceConfig, which, bf16=False).learning_rate for which in (True, False)]

    full = SFTConfig.learning_rate
    assert rates("--no_use_peft") == pytest.approx([full, full])
    assert rates("--reference_use_peft", "false") == pytest.approx([full, 10 * full])
    assert rates("--no_use_peft", "--reference_use_peft", "true") == pytest.approx([10 * full, full])
    assert rates("--no_use_peft", "--learning_rate", "1e-3") == pytest.approx([1e-3, 1e-3])


def test_settings_of_before_are_read_back(tmp_path: Path) -> None:
    """A run of version 0.1 with TRL's defaults, as its `config.yaml` has them."""
    config = {"learning_rate": SFTConfig.learning_rate, "lora_target_modules": None}
    settings = parse(*NEEDED, config=config, folder=tmp_path)
    assert settings.make(InfluenceConfig, bf16=False).learning_rate == SFTConfig.learning_rate
    assert settings.make(ModelConfig).lora_target_modules is None


def test_bf16_is_off_without_an_accelerator() -> None:
    values = parse(*NEEDED, "--use_cpu").values
    assert values["bf16"] is False
    assert parse(*NEEDED, "--bf16").values["bf16"] is True


def test_reference_prefix_changes_the_reference_alone() -> None:
    flags = [
        "--learning_rate",
        "1e-3",
        "--reference_learning_rate",
        "1e-5",
        "--lora_r",
        "8",
        "--reference_lora_r",
        "2",
    ]
    settings = parse(*NEEDED, *flags, "--warmup_steps", "3", "--reference_fraction", "0.5")
    reference, target = settings.make(InfluenceConfig, reference=True), settings.make(InfluenceConfig)
    assert (reference.learning_rate, target.learning_rate) == (1e-5, 1e-3)
    assert reference.warmup_steps == target.warmup_steps == 3
    assert settings.make(ModelConfig, reference=True).lora_r == 2
    assert settings.make(ModelConfig).lora_r == 8


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--learning_rte", "1"], "unknown flag `--learning_rte`. Did you mean `--learning_rate`?"),
        (["--reference_lerning_rate", "1"], "Did you mean `--reference_learning_rate`?"),
        (["--frac", "0.5"], "unknown flag `--frac`"),
        (["--hub_token", "secret"], "HF_TOKEN"),
        (["--push_to_hub"], "--hub_id"),
        (["--reference_hub_token", "secret"], "HF_TOKEN"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--arms", "coresets"], "invalid choice: 'coresets'"),
        (["--fractions", "0.5", "1.5"], "fraction 1.5 is outside (0, 1]"),
        (["--fractions", "0"], "fraction 0.0 is outside (0, 1]"),
        (["--reference_fraction", "2"], "fraction 2.0 is outside (0, 1]"),
        (["--seeds", "1", "1"], "--seeds has a value twice"),
        (["--config", "missing.yaml"], "missing.yaml cannot be read"),
        (["stray"], "unexpected value `stray`"),
    ],
)
def test_wrong_flags_are_answered(capsys: pytest.CaptureFixture, flags: list[str], told: str) -> None:
    message = parse_error(capsys, *NEEDED, *flags)
    assert told in message
    assert "secret" not in message


def test_missing_settings_are_named_together(capsys: pytest.CaptureFixture) -> None:
    assert "missing: --model_name_or_path, --pool, --validation" in parse_error(
        capsys, "--output_dir", "o", "--test", "t"
    )


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"fractons": [0.5]}, "unknown key of"),
        ({"fractons": [0.5]}, "Did you mean `fractions`?"),
        ({"hub_token": "secret"}, "HF_TOKEN"),
        ({"learning_rate": "fast"}, "invalid float value"),
        ({"seeds": []}, "--seeds is empty"),
    ],
)
def test_wrong_yaml_is_answered(capsys: pytest.CaptureFixture, tmp_path: Path, config: dict, told: str) -> None:
    assert told in parse_error(capsys, *NEEDED, config=config, folder=tmp_path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_yaml_parses(path: Path) -> None:
    settings = make_run_parser().parse(["--config", str(path)])
    settings.make(ModelConfig, reference=True, use_peft=True)
    settings.make(InfluenceConfig, reference=True, bf16=False)
    assert settings.arguments.output_dir.startswith("runs/")


def test_what_help_tells_of_the_libraries_flags_is_so() -> None:
    values = parse(*NEEDED).values
    for flag, told in LIBRARY_FLAGS.items():
        default = re.search(r"\(default: (?:TRL's, )?([\w.-]+)[;)]", told)
        value = values[flag]
        assert default is None or ([default[1]] if isinstance(value, list) else type(value)(default[1])) == value, flag


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_help_is_quick_and_imports_no_torch(recipe: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", str(recipe), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path), "HF_HOME": str(tmp_path)},
        timeout=60,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert "--config" in answer.stdout and (recipe.name == "generate.py" or "default:" in answer.stdout)
    imported = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "datasets", "accelerate", "trl", "numpy"}
    assert time.monotonic() - started < 10
    assert not any(tmp_path.iterdir())
