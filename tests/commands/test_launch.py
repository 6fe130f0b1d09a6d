"""The pipeline as users start it: the launcher, two processes, Ctrl-C and kill -9, the Hub."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from helpers import ROOT, assert_same
from hub_client import make_env
from loopback_hub import LoopbackHub
from recipe_runs import Inputs, launch, make_rows, read_results, stamp, write_config, write_rows

from hf_in2core import select_coreset


@pytest.mark.slow
def test_launched_like_the_readme_says(inputs: Inputs, finished: Path, tmp_path: Path) -> None:
    config = inputs[1] | {"output_dir": str(tmp_path / "run")}
    answer = launch("recipes/in2core.py", "--config", write_config(tmp_path, config))
    assert "Verdict:" in answer.stdout
    before, now = read_results(finished), read_results(tmp_path)
    for arm, again in zip(before["arms"], now["arms"], strict=True):
        assert again["test_loss"] == pytest.approx(arm["test_loss"], rel=1e-5)


@pytest.mark.slow
def test_two_processes(inputs: Inputs, finished: Path, tmp_path: Path) -> None:
    """Half the batch on each of two processes is the same training, scoring and evaluation."""
    script, setups = tmp_path / "setup.py", tmp_path / "setups.txt"
    script.write_text("import sys; open(sys.argv[1], 'a').write('once ')", encoding="utf-8")
    config = inputs[1] | {
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4,
        "setup_script": f"{script} {setups}",
    }
    answer = launch("recipes/in2core.py", "--config", write_config(tmp_path, config), processes=2)
    results = read_results(tmp_path)
    assert results["machine"]["processes"] == 2
    assert setups.read_text(encoding="utf-8") == "once "
    assert answer.stdout.count("[1/8]") == 1 and answer.stdout.count("Verdict:") == 1
    before = load_from_disk(str(finished / "run" / "scored"))
    scored = load_from_disk(str(tmp_path / "run" / "scored"))
    assert scored["id"][:] == before["id"][:]
    correlation = np.corrcoef(scored["influence"][:], before["influence"][:])[0, 1]
    assert correlation > 0.99
    assert results["base"]["test_loss"] == pytest.approx(read_results(finished)["base"]["test_loss"], rel=1e-6)
    assert [arm["steps"] for arm in results["arms"]] == [arm["steps"] for arm in read_results(finished)["arms"]]
    rerun = launch("recipes/in2core.py", "--config", write_config(tmp_path, config), processes=2)
    assert read_results(tmp_path)["arms"] == results["arms"]
    assert "[8/8]" in rerun.stdout
    # A fitted scorer, each process with its share of the rows.
    flags = ["--scorer", str(tmp_path / "run" / "scorer"), "--pool", config["pool"], "--output_dir", str(tmp_path)]
    answer = launch("recipes/score_influence.py", *flags, processes=2)
    assert answer.stdout.count("has the pool with its influence") == 1
    again = load_from_disk(str(tmp_path / "scored"))
    # Rows stand in other batches there, which moves the last bits; the largest scores are the measure of those.
    assert_same(again["influence"][:], scored["influence"][:], 1e-5)
    assert again["influence_rank"][:] == scored["influence_rank"][:]


@pytest.mark.slow
def test_two_processes_tell_of_shared_rows_once(inputs: Inputs, tmp_path: Path) -> None:
    pool = [json.loads(line) for line in Path(inputs[1]["pool"]).read_text(encoding="utf-8").splitlines()]
    validation = [*make_rows("reverse", 8, seed=3), pool[7] | {"completion": pool[7]["completion"].upper()}]
    config = inputs[1] | {
        "validation": [write_rows(tmp_path / "validation.jsonl", validation)],
        "output_dir": str(tmp_path / "run"),
    }
    found = "1 of 60 rows of the pool are in the validation set too (row 7 of the pool is row 8 of the validation set)"
    flags = ["--config", write_config(tmp_path, config), "--dry_run"]
    with pytest.raises(AssertionError, match=re.escape(found)):
        launch("recipes/in2core.py", *flags, processes=2)
    answer = launch("recipes/in2core.py", *flags, "--allow_overlap", processes=2)
    assert answer.stderr.count(f"warning: {found}") == 1 and answer.stderr.count(f"{found}: influence on itself") == 1


@pytest.mark.slow
def test_weights_sharded_by_the_launcher(inputs: Inputs, tmp_path: Path) -> None:
    """Reference, influence, analyses and targets with base and adapter sharded, as with whole models on as many."""
    settings = {
        "per_device_train_batch_size": 4, "arms": ["full", "random", "coreset"], "budgets": ["steps"],
        "max_steps": 12, "strategy": "cosine", "analyses": ["layers"],
    }  # fmt: skip
    found = {}
    for name, wrapper in {"sharded": ["tests/sharded_on_cpu.py"], "whole": []}.items():
        config = inputs[1] | settings | {"output_dir": str(tmp_path / name / "run")}
        (tmp_path / name).mkdir()
        launch(*wrapper, "recipes/in2core.py", "--config", write_config(tmp_path / name, config), processes=2)
        found[name] = read_results(tmp_path / name)
    sharded, whole = found["sharded"], found["whole"]
    assert sharded["machine"]["processes"] == 2
    assert sharded["base"]["test_loss"] == pytest.approx(whole["base"]["test_loss"], rel=1e-5)
    for arm, expected in zip(sharded["arms"], whole["arms"], strict=True):
        assert arm["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-4)
        assert arm["test_loss"] < 0.97 * sharded["base"]["test_loss"]  # it has learnt
    runs = {name: tmp_path / name / "run" for name in found}
    scored = [load_from_disk(str(run / "scored"))["influence"][:] for run in runs.values()]
    assert_same(scored[0], scored[1], 1e-3)
    layers = [json.loads((run / "analyses" / "layers.json").read_text(encoding="utf-8")) for run in runs.values()]
    assert_same(layers[0]["spearman"], layers[1]["spearman"], 1e-2)


@pytest.mark.slow
def test_processes_that_do_not_find_each_other(inputs: Inputs, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("with GPUs the processes do find each other")
    config = inputs[1] | {"output_dir": str(tmp_path / "run")}
    answer = launch("recipes/in2core.py", "--config", write_config(tmp_path, config), processes=2, use_cpu=False)
    assert answer.returncode != 0 and not (tmp_path / "run").exists()
    assert "set ACCELERATE_USE_CPU=true" in answer.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_interrupted_and_resumed(inputs: Inputs, finished: Path, tmp_path: Path, stop: signal.Signals) -> None:
    config = inputs[1] | {"output_dir": str(tmp_path / "run")}
    command = [sys.executable, "-u", "recipes/in2core.py", "--config", write_config(tmp_path, config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("[3/8]"):
                process.send_signal(stop)
                break
        process.stdout.read()
        said = process.stderr.read()
        code = process.wait()
    if stop == signal.SIGINT:
        assert code == 130
        assert "the same command goes on from there" in said and "Traceback" not in said
    partial = read_results(tmp_path)
    assert not partial["complete"] and "not finished" in partial["verdict"]["text"]
    kept = stamp(tmp_path)
    assert any("random_25-steps-seed0/result.json" in name for name in kept)
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=500)
    now = stamp(tmp_path)
    # The cards tell of the comparison, which is complete only now.
    folders = [name for name in kept if ("arms" in name or "reference" in name) and "README" not in name]
    assert folders and all(now[name] == kept[name] for name in folders)
    for arm, again in zip(read_results(finished)["arms"], read_results(tmp_path)["arms"], strict=True):
        assert again["test_loss"] == pytest.approx(arm["test_loss"], rel=1e-5)


@pytest.mark.slow
def test_published_at_the_end_and_checked_at_the_start(inputs: Inputs, tmp_path: Path) -> None:
    config = inputs[1] | {"output_dir": str(tmp_path / "run"), "budgets": ["epochs"], "arms": ["coreset", "random"]}
    command = [sys.executable, "recipes/in2core.py", "--config", write_config(tmp_path, config), "--hub_id"]
    with LoopbackHub() as hub:
        hub.add_user("hf_writing", "user")
        hub.add_user("hf_reading", "reader", role="read")

        def run(token: str | None, hub_id: str) -> subprocess.CompletedProcess[str]:
            environment = make_env(hub, tmp_path / "home", token)
            return subprocess.run(
                [*command, hub_id], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
            )

        for token, hub_id, told in (("hf_reading", "reader/tiny", "read"), ("hf_writing", "other/tiny", "other")):
            refused = run(token, hub_id)
            assert refused.returncode == 2 and "Traceback" not in refused.stderr
            assert told in refused.stderr.splitlines()[-1]
            assert not (tmp_path / "run").exists()
        published = run("hf_writing", "user/tiny")
        assert published.returncode == 0, published.stderr[-3000:]
        loaded = run_python(
            make_env(hub, tmp_path / "other-home", None),
            "from datasets import load_dataset; from hf_in2core import InfluenceScorer; import json;"
            "coreset = load_dataset('user/tiny', split='coreset_25');"
            "pool = load_dataset('user/tiny', split='train');"
            "print(json.dumps([coreset['id'][:], pool['influence'][:]]))",
        )
        files = hub.repos["dataset", "user/tiny"].files()
    scored = load_from_disk(str(tmp_path / "run" / "scored"))
    assert json.loads(loaded) == [select_coreset(scored, fraction=0.25)["id"][:], scored["influence"][:]]
    assert {"README.md", "results.json", "config.yaml", "scorer/scorer.safetensors"} <= files.keys()
    assert not [name for name in files if name.endswith("training_args.bin")]


def run_python(environment: dict[str, str], code: str) -> str:
    """The last line that a fresh Python process prints."""
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return answer.stdout.splitlines()[-1]
