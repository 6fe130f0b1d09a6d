"""Kill -9 at any moment: the same call goes on, repeats no chunk that is on the disk, and ends with the same bits."""

import random
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import (
    CHAT_TEMPLATE,
    add_trained_adapter,
    make_model,
    make_prompt_completion,
    make_tokenizer,
    make_trainer,
)
from killed_runs import (
    OPTIONS,
    build,
    count_batches,
    count_state_files,
    kill_after_progress,
    start_two_processes,
    stop,
    wait_for_progress,
)
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from hf_in2core.engine import passes, scoring
from hf_in2core.engine.state import write_tensors
from hf_in2core.engine.validation import run_validation_pass


# tqdm's own lock is shared with forked processes, and one that is killed while it holds it would stop all later ones.
tqdm.set_lock(threading.RLock())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, list[float]]:
    """The folder of a finished run, to be copied, and its scores."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, build(folder).score_influence()["influence"]


@pytest.fixture
def finished_run(finished, tmp_path) -> tuple[Path, list[float]]:
    return Path(shutil.copytree(finished[0], tmp_path / "run")), finished[1]


@pytest.mark.parametrize(
    ("seed", "kills"),
    [(0, 5), pytest.param(1, 25, marks=pytest.mark.slow), pytest.param(2, 25, marks=pytest.mark.slow)],
)
def test_killed_runs_end_with_the_same_bits(tmp_path, seed, kills) -> None:
    expected = build(tmp_path / "whole").score_influence()
    generator = random.Random(seed)
    for _ in range(kills):
        kill_after_progress(tmp_path / "killed", generator)
    resumed = build(tmp_path / "killed").score_influence()
    assert resumed["influence"] == expected["influence"]
    assert resumed["influence_rank"] == expected["influence_rank"]


def test_sums_that_take_long_to_write_are_written_less_often(tmp_path, monkeypatch) -> None:
    """At most a tenth of the time, and in the end always."""
    written: list[int] = []

    def write_slowly(path, tensors, metadata) -> None:
        time.sleep(0.3)
        written.append(int(metadata["next_row"]))
        write_tensors(path, tensors, metadata)

    monkeypatch.setattr(passes, "write_tensors", write_slowly)
    trainer = build(tmp_path)
    job = trainer.make_passes(trainer.blocks, "slow-disk")
    job.folder.mkdir(parents=True)
    run_validation_pass(job, trainer.prepared_pool, "sums", "Sums")
    rows = len(trainer.prepared_pool)
    assert written[0] == OPTIONS["chunk_size"] and written[-1] == rows
    assert len(written) < rows // OPTIONS["chunk_size"] / 2
    # What was written last is whole: nothing runs again.
    batches = count_batches(monkeypatch)
    run_validation_pass(job, trainer.prepared_pool, "sums", "Sums")
    assert not batches


@pytest.mark.slow
def test_two_killed_processes_end_with_the_same_bits(tmp_path) -> None:
    """Either process is killed first, at any moment, and the other a moment later, as a launcher would."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for process in start_two_processes(whole):
        process.join()
    generator = random.Random(3)
    for _ in range(16):
        before = count_state_files(killed)
        processes = start_two_processes(killed)
        wait_for_progress(killed, before, processes)
        time.sleep(generator.uniform(0, 0.05))
        first = generator.randrange(2)
        stop([processes[first]])
        time.sleep(generator.uniform(0, 0.05))
        stop([processes[1 - first]])
    for _ in range(2):  # the last kill may have met a finished run: the same command still answers
        for process in start_two_processes(killed):
            process.join()
            assert process.exitcode == 0
        for rank in (0, 1):
            assert (killed / f"{rank}.json").read_bytes() == (whole / "0.json").read_bytes()


def test_finished_chunks_are_not_repeated(finished_run, monkeypatch) -> None:
    folder, _ = finished_run
    counted = count_batches(monkeypatch)
    build(folder).score_influence()
    assert counted == []
    removed = sorted(folder.rglob("scores-*.safetensors"))[4]
    removed.unlink()
    build(folder).score_influence()
    assert counted == [3]  # the one chunk that was missing


def test_interrupted_by_the_user_it_resumes(tmp_path, monkeypatch) -> None:
    expected = build(tmp_path / "whole").score_influence()
    write_tensors, writes = passes.write_tensors, []

    def interrupting(path, tensors, metadata):
        write_tensors(path, tensors, metadata)
        writes.append(path)
        if len(writes) == 9:
            raise KeyboardInterrupt

    for module in (passes, scoring):
        monkeypatch.setattr(module, "write_tensors", interrupting)
    trainer = build(tmp_path / "interrupted")
    with pytest.raises(KeyboardInterrupt):
        trainer.score_influence()
    # The same object goes on too: the interrupted pass has put the model back.
    assert trainer.score_influence()["influence"] == expected["influence"]


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_damaged_state_is_named_and_not_used(finished_run, caplog, damage) -> None:
    folder, expected = finished_run
    paths = [*sorted(folder.rglob("scores-*.safetensors"))[:2], next(folder.rglob("fitted.safetensors"))]
    for path in paths:
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-7])
        elif damage == "empty":
            path.write_bytes(b"")
        else:
            tensors = {name: tensor + 1 for name, tensor in load_file(path).items()}
            save_file(tensors, path, metadata={"fingerprint": "another", "start": "0", "end": "3"})
    assert build(folder).score_influence()["influence"] == expected
    for path in paths:
        assert path.name in caplog.text


@pytest.mark.parametrize("name", ["validation-*", "fit-*"])
def test_damaged_sums_are_named_and_not_used(finished_run, caplog, name) -> None:
    folder, expected = finished_run
    for path in [*folder.rglob("fitted.safetensors"), *folder.rglob("scores-*.safetensors")]:
        path.unlink()
    (path,) = folder.rglob(name)
    path.write_bytes(path.read_bytes()[:-7])
    assert build(folder).score_influence()["influence"] == expected
    assert path.name in caplog.text


def test_a_changed_template_never_reuses_scores(tmp_path) -> None:
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": " sat on a mat"}]
    rows = Dataset.from_list(
        [{"messages": messages[:1] + [{**messages[1], "content": " sat" * n}]} for n in (1, 2, 3)]
    )
    found: list[list[float]] = []
    for template in (CHAT_TEMPLATE, CHAT_TEMPLATE.replace("<|", "<s><|")):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        fresh, reused = (
            make_trainer(
                folder, rows, rows, torch.float32, model=add_trained_adapter(make_model()), tokenizer=tokenizer
            ).score_influence()["influence"]
            for folder in (tmp_path / f"fresh-{len(found)}", tmp_path / "run")
        )
        assert reused == fresh
        found.append(reused)
    assert found[0] != found[1]


@pytest.mark.parametrize(
    "change",
    [
        {"damping_scale": 0.2},
        {"loss_reduction": "sum"},
        {"loss_reduction": "max"},
        {"estimator": "gradient_dot"},
        {"influence_layers": [0]},
        {"max_length": 12},
        {"fit_examples": 20},
    ],
)
def test_changed_settings_never_reuse_scores(finished_run, tmp_path, change) -> None:
    folder, _ = finished_run
    fresh = build(tmp_path / "fresh", **change).score_influence()
    reused = build(folder, **change).score_influence()
    assert reused["influence"] == fresh["influence"]


def test_changed_adapter_or_rows_never_reuse_scores(finished_run) -> None:
    folder, before = finished_run
    first = build(folder)
    with torch.no_grad():
        for name, parameter in first.model.named_parameters():
            if "lora_A" in name:
                parameter.mul_(1.3)
    assert first.score_influence()["influence"] != before
    pool = make_prompt_completion(40, seed=0).map(
        lambda row, i: {"completion": " cat"} if i == 7 else row, with_indices=True
    )
    assert build(folder, pool).score_influence()["influence"] != before
