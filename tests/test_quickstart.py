"""The quickstart's generator: rows that are what the README says, a model that loads and learned to stop."""

import json
import re
import shutil
from collections import Counter
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.quickstart import generate
from recipes.quickstart.generate import Settings, main, make_splits


WRITTEN = ["pool", "pool_uniform", "validation", "test"]
SMALL = ["--pool_rows", "50", "--uniform_rows", "9", "--validation_rows", "7", "--test_rows", "12"]


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def solve(prompt: str) -> str:
    """The right answer, worked out from the instruction alone and by other means than the generator's."""
    text = prompt.removeprefix("Instruction: ").removesuffix("\nResponse:")
    words = re.findall(r"[a-z]+", text.rsplit(": ", 1)[-1])
    if dates := re.findall(r"\d{4}-\d{2}-\d{2}", text):
        return "; ".join(f"{(day := date.fromisoformat(d)).day} {day:%B %Y}" for d in dates)
    if "+" in text or " - " in text:
        return str(eval(re.sub(r"[^\d+-]", "", text)))
    if text.startswith(("Sort", "Put in alphabetical", "Order")):
        return " ".join(sorted(word for word in words if len(word) == 1))
    raise AssertionError(f"not a task of interest: {prompt}")


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    return make_splits(Settings(pretrain_steps=30))[0]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "inputs"
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    main(["--output_dir", str(folder), *SMALL, "--pretrain_steps", "60"])
    assert torch.equal(torch.rand(3), expected), "the caller's random state is not left alone"
    return folder


def test_sizes_and_columns(splits):
    assert {name: len(splits[name]) for name in WRITTEN} == {
        "pool": 1600,
        "pool_uniform": 800,
        "validation": 64,
        "test": 300,
    }
    for name in WRITTEN:
        for row in splits[name]:
            assert set(row) == {"prompt", "completion", "id", "task", "is_wrong"}
            assert re.fullmatch(r"Instruction: .+\nResponse:", row["prompt"])
            assert re.fullmatch(r" \S.*", row["completion"])
    ids = [row["id"] for name in WRITTEN for row in splits[name]]
    assert len(set(ids)) == len(ids)


def test_tasks_of_each_split(splits):
    assert set(Counter(row["task"] for row in splits["pool"]).values()) == {160}
    assert len(generate.TASKS) == 10
    for name in ("validation", "test", "pool_uniform"):
        counts = Counter(row["task"] for row in splits[name])
        assert set(counts) == set(generate.TASKS_OF_INTEREST)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_no_content_occurs_twice_however_it_is_phrased():
    splits, texts = make_splits(Settings(pretrain_steps=100))
    # The content is what the phrasings share: strip the words of the templates and compare what is left.
    phrasings = {
        task: [template.split("{}") for template in templates] for task, (_, templates) in generate.TASKS.items()
    }

    def find_content(row: dict) -> tuple[str, str]:
        text = row["prompt"].removeprefix("Instruction: ").removesuffix("\nResponse:")
        (content,) = {
            text[len(before) : len(text) - len(after)]
            for before, after in phrasings[row["task"]]
            if text.startswith(before) and text.endswith(after)
        }
        return row["task"], content

    contents = [find_content(row) for name in WRITTEN for row in splits[name]]
    assert len(contents) == len(set(contents)) == 2764
    in_texts = {found.groups() for text in texts if (found := re.match(r"Exercise in (\w+): (.*)\n", text))}
    assert len(in_texts) > 500
    assert not in_texts & set(contents)
    assert not {row["prompt"].split("\n")[0].removeprefix("Instruction: ") for row in splits["pool"]} & set(texts)


def test_answers_are_right_unless_marked_wrong(splits):
    for name in ("validation", "test", "pool_uniform"):
        assert not any(row["is_wrong"] for row in splits[name])
    interest = [row for name in WRITTEN for row in splits[name] if row["task"] in generate.TASKS_OF_INTEREST]
    for row in interest:
        assert (row["completion"] != f" {solve(row['prompt'])}") == row["is_wrong"], row


def test_stated_share_of_each_task_is_wrong_and_looks_like_its_task(splits):
    wrong = [row for row in splits["pool"] if row["is_wrong"]]
    assert set(Counter(row["task"] for row in wrong).values()) == {16}
    for row in wrong:
        if row["task"] == "dates":
            for part in row["completion"].split("; "):
                datetime.strptime(part.strip(), "%d %B %Y")
        if row["task"] == "capitals":
            assert row["completion"].isupper()


def test_lengths_vary_within_every_task(splits):
    for task in generate.TASKS:
        assert len({len(row["prompt"]) for row in splits["pool"] if row["task"] == task}) > 5


def test_rows_depend_on_the_seed_alone():
    small = dict(pool_rows=40, uniform_rows=6, validation_rows=6, test_rows=6, pretrain_steps=5)
    first, again, other = (make_splits(Settings(seed=seed, **small)) for seed in (0, 0, 1))
    assert first == again
    assert not {row["prompt"] for row in first[0]["test"]} & {row["prompt"] for row in other[0]["test"]}


def test_too_many_rows_and_impossible_share_are_named():
    with pytest.raises(ValueError, match=r"'pool' needs \d+ rows of the task 'patterns'.*Ask for fewer"):
        make_splits(Settings(pool_rows=40_000, pretrain_steps=1))
    with pytest.raises(ValueError, match=r"wrong_fraction=10\.0 .*between 0 and 1"):
        make_splits(Settings(wrong_fraction=10.0, pretrain_steps=1))


def test_folder_holds_what_the_manifest_lists(generated):
    manifest = json.loads((generated / "manifest.json").read_text())
    on_disk = {str(path.relative_to(generated)) for path in generated.rglob("*") if path.is_file()}
    assert on_disk == set(manifest["files"]) | {"manifest.json"}
    assert [len(read_rows(generated / f"{name}.jsonl")) for name in WRITTEN] == [50, 9, 7, 12]
    assert list(generated.parent.iterdir()) == [generated]  # nothing temporary is left


def test_model_and_tokenizer_load_and_were_trained_on_every_special_token(generated):
    model = AutoModelForCausalLM.from_pretrained(generated / "model")
    tokenizer = AutoTokenizer.from_pretrained(generated / "model")
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert len(set(special)) == 3
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)

    with torch.random.fork_rng():
        torch.manual_seed(Settings().seed)
        untrained = type(model)(model.config)
    moved = (model.get_output_embeddings().weight - untrained.get_output_embeddings().weight).norm(dim=1)
    assert (moved[special] > 0.01).all()


def test_pretraining_already_teaches_the_end_token(generated):
    model = AutoModelForCausalLM.from_pretrained(generated / "model")
    tokenizer = AutoTokenizer.from_pretrained(generated / "model")
    probabilities = []
    for row in read_rows(generated / "test.jsonl"):
        inputs = tokenizer(row["prompt"] + row["completion"], return_tensors="pt")
        with torch.no_grad():
            probabilities.append(model(**inputs).logits[0, -1].softmax(-1)[tokenizer.eos_token_id].item())
    assert sum(probabilities) / len(probabilities) > 10 / len(tokenizer)  # ten times an even guess


def test_text_survives_the_tokenizer_and_the_prompt_is_a_prefix(generated):
    tokenizer = AutoTokenizer.from_pretrained(generated / "model")
    for row in read_rows(generated / "pool.jsonl"):
        prompt, whole = (tokenizer(text).input_ids for text in (row["prompt"], row["prompt"] + row["completion"]))
        assert whole[: len(prompt)] == prompt
        assert whole[0] == tokenizer.bos_token_id
        ended = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token).input_ids
        assert ended == [*whole, tokenizer.eos_token_id]
        assert tokenizer.decode(ended, skip_special_tokens=True) == row["prompt"] + row["completion"]


def test_second_run_returns_at_once_and_leaves_the_files_alone(generated, capsys):
    before = {path: path.stat().st_mtime_ns for path in generated.rglob("*")}
    main(["--output_dir", str(generated), *SMALL, "--pretrain_steps", "60"])
    assert "already holds" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in generated.rglob("*")}


@pytest.mark.slow
def test_same_settings_give_the_same_bytes(generated, tmp_path):
    main(["--output_dir", str(tmp_path / "again"), *SMALL, "--pretrain_steps", "60"])
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (generated / "manifest.json").read_bytes()


def test_a_folder_of_anything_else_is_refused_and_kept(generated, tmp_path):
    with pytest.raises(FileExistsError, match=r"was generated with .*'seed': 0.* but .*'seed': 5"):
        main(["--output_dir", str(generated), *SMALL, "--pretrain_steps", "60", "--seed", "5"])

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="did not make"):
        main(["--output_dir", str(mine)])
    assert (mine / "thesis.txt").read_text() == "mine"


def test_a_changed_file_is_noticed(generated, tmp_path):
    folder = shutil.copytree(generated, tmp_path / "inputs")
    (folder / "test.jsonl").write_text("{}\n")
    with pytest.raises(FileExistsError, match=r"test\.jsonl is missing or was changed"):
        main(["--output_dir", str(folder), *SMALL, "--pretrain_steps", "60"])


def test_an_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupt)  # as Ctrl-C does in the middle of pretraining
    with pytest.raises(KeyboardInterrupt):
        main(["--output_dir", str(tmp_path / "inputs"), *SMALL, "--pretrain_steps", "2"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_pretrained_model_knows_something_and_not_everything(tmp_path):
    folder = tmp_path / "inputs"
    main(["--output_dir", str(folder)])
    losses = json.loads((folder / "manifest.json").read_text())["pretrained_loss"]
    even = torch.log(torch.tensor(512.0)).item()
    for task in generate.TASKS:
        assert 0.3 < losses["exercises"][task] < 0.6 * even
        assert losses["exercises"][task] < losses["instructions"][task]

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = read_rows(folder / "test.jsonl")[:20]
    for row in rows:  # it stops by itself, which a model without a trained end token cannot
        inputs = tokenizer(row["prompt"], return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=80, do_sample=False)
        assert output[0, -1] == tokenizer.eos_token_id
