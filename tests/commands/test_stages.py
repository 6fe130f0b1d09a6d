"""The stage recipes, one after the other, do what the pipeline does."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset, load_from_disk
from peft import PeftModel
from recipe_runs import read_results, run_command
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_in2core import InfluenceConfig, InfluenceTrainer, select_coreset
from hf_in2core.pipeline.arguments import TYPED_VARIABLE
from hf_in2core.rows.sources import load_rows


def test_stage_recipes_do_what_the_pipeline_does(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yaml.safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))
    model = ["--model_name_or_path", config["model_name_or_path"]]
    lora = ["--lora_r", "4", "--lora_dropout", "0", "--lora_target_modules", "all-linear"]
    training = [*lora, "--learning_rate", "3e-3", "--num_train_epochs", "1", "--per_device_train_batch_size", "8"]
    training += ["--activation_checkpointing", "false"]
    reference, scored, coreset, target = (
        str(tmp_path / name) for name in ("reference", "influence", "core", "target")
    )

    run_command("train_reference", *model, *training, "--pool", config["pool"], "--output_dir", reference)
    run_command(
        "score_influence", *model, "--reference_adapter", reference, "--pool", config["pool"],
        "--validation", config["validation"][0], "--output_dir", scored, "--activation_checkpointing", "false",
    )  # fmt: skip
    rows = load_from_disk(f"{scored}/scored")
    before = load_from_disk(str(finished / "run" / "scored"))
    assert rows["influence"][:] == pytest.approx(before["influence"][:], rel=1e-4)

    run_command("select", "--scored", f"{scored}/scored", "--fraction", "0.25", "--output", coreset)
    assert load_from_disk(coreset)["id"][:] == select_coreset(before, fraction=0.25)["id"][:]
    run_command("select", "--scored", f"{scored}/scored", "--size", "3", "--output", f"{coreset}.jsonl")
    assert len(Path(f"{coreset}.jsonl").read_text(encoding="utf-8").splitlines()) == 3

    pool_order = ["--scored", f"{scored}/scored", "--fraction", "0.25", "--order", "original", "--output", coreset]
    run_command("select", *pool_order)
    sft = ["sft", *model, *training, "--dataset_name", coreset, "--output_dir", target, "--seed", "0"]
    monkeypatch.setenv(TYPED_VARIABLE, shlex.join(["in2core", *sft]))
    run_command(*sft)
    run_command(
        "evaluate", *model, "--adapters", target, "--test", config["test"], "--output_dir", f"{target}-evaluation"
    )
    base, adapter = json.loads(Path(f"{target}-evaluation/evaluation.json").read_text(encoding="utf-8"))
    results = read_results(finished)
    arm = next(arm for arm in results["arms"] if (arm["arm"], arm["budget"]) == ("coreset", "epochs"))
    assert base["test_loss"] == pytest.approx(results["base"]["test_loss"], rel=1e-6)
    assert adapter["test_loss"] == pytest.approx(arm["test_loss"], rel=1e-5)
    assert "test_loss" in capsys.readouterr().out

    # PEFT's form of a card is left nowhere, and ours names no folder of this machine.
    assert not Path(reference, "README.md").exists()
    card = Path(target, "README.md").read_text(encoding="utf-8")
    assert "in2core sft" in card.split("### How it was made")[1].split("###")[0] and str(tmp_path) not in card
    Path(target, "README.md").unlink()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_in2core.pipeline.training.evaluate_model", stop)
    with pytest.raises(KeyboardInterrupt):
        run_command(*sft, "--test", config["test"])
    assert "has not been judged" in Path(target, "README.md").read_text(encoding="utf-8")

    # The fitted scorer alone scores another pool, here the same one.
    run_command("score", "--scorer", f"{scored}/scorer", "--pool", config["pool"], "--output_dir", target)
    again = load_from_disk(f"{target}/scored")
    assert again["influence"][:] == pytest.approx(rows["influence"][:], rel=1e-5)
    assert again["influence_rank"][:] == rows["influence_rank"][:]


def test_another_validation_set_is_scored_from_the_index_of_the_first(finished: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))
    index = tmp_path / "index"
    flags = ["--model_name_or_path", config["model_name_or_path"], "--activation_checkpointing", "false"]
    flags += ["--reference_adapter", str(finished / "run" / "reference"), "--pool", config["pool"]]
    keep = ["--gradient_store_dir", str(index), "--gradient_store_gb", "1"]

    def score(name: str, validation: str, *more: str) -> Dataset:
        run_command("score", *flags, "--validation", validation, "--output_dir", str(tmp_path / name), *more)
        return load_from_disk(str(tmp_path / name / "scored"))

    score("first", config["validation"][0], *keep)
    files = {path: path.stat().st_mtime_ns for path in index.rglob("gradients-*")}
    assert files
    # Rows of another kind, and every one of them a query.
    anew, indexed = (
        score(name, config["test"], "--methods", "turns", "cosine", *more)
        for name, more in (("anew", []), ("indexed", keep))
    )
    for name in ("influence", "influence_per_query"):
        np.testing.assert_allclose(indexed[name][:], anew[name][:], rtol=1e-4, atol=1e-6)
    assert {path: path.stat().st_mtime_ns for path in index.rglob("gradients-*")} == files
    assert indexed["cosine_rank"][:] == anew["cosine_rank"][:]
    with pytest.raises(ValueError, match="8 bits"):
        score("small", config["test"], "--gradient_store_dir", str(index), "--gradient_store_gb", "0.000001")


def test_a_scorer_of_single_validation_rows_keeps_its_column(finished: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))
    base = AutoModelForCausalLM.from_pretrained(finished / "model")
    trainer = InfluenceTrainer(
        model=PeftModel.from_pretrained(base, finished / "run" / "reference", is_trainable=True),
        args=InfluenceConfig(output_dir=str(tmp_path / "fit"), bf16=False, activation_checkpointing=False),
        train_dataset=load_rows(config["pool"]),
        eval_dataset=load_rows(config["validation"][0]),
        processing_class=AutoTokenizer.from_pretrained(finished / "model"),
    )
    trainer.fit_influence(per_example=True).save_pretrained(tmp_path / "scorer")
    expected = trainer.score_influence()
    flags = ["--scorer", str(tmp_path / "scorer"), "--pool", config["pool"], "--output_dir", str(tmp_path / "scored")]
    run_command("score", *flags)
    scored = load_from_disk(str(tmp_path / "scored" / "scored"))
    np.testing.assert_allclose(scored["influence_per_query"][:], expected["influence_per_query"][:], rtol=1e-5)
    assert scored.features == expected.features
