"""Publishing: one commit that explains itself, loads elsewhere and keeps what was there.

The real clients talk to the Hub of `loopback_hub.py` from processes of their own.
"""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from datasets import Dataset
from helpers import ROOT
from hub_client import PUSH, TOKEN, ClientError, HubClient, get_repo, make_env
from loopback_hub import Repo


def read_card(repo: Repo, revision: str = "main") -> tuple[dict, str]:
    _, header, body = repo.files(revision)["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(header), body


# One commit that loads


def test_a_publication_is_one_commit_and_loads_elsewhere(hub, client, tmp_path) -> None:
    published = client.run(PUSH, repo_id="ada/one")
    repo = get_repo(hub, "ada/one")
    assert [commit.title for commit in repo.history()] == ["Publish influence", "initial commit"]
    assert published["commit"] == repo.resolve("main").oid
    assert set(published["changed"]) == set(repo.files()) - {".gitattributes"}
    metadata, body = read_card(repo)
    assert [c["path"] for c in metadata["configs"][0]["data_files"]] == ["data/train-*", "data/coreset_50-*"]
    assert {"in2core", "influence", "coreset"} <= set(metadata["tags"])
    # A machine that has nothing: an empty HF_HOME and no token.
    with HubClient(hub, tmp_path / "elsewhere", None) as reader:
        snippets = re.findall(r"```python\n(.*?)```", body, flags=re.DOTALL)
        assert len(snippets) == 1  # no scorer was published, so none is shown
        loaded = reader.run(
            snippets[0]
            + "\nresult = [pool.to_dict(), coreset.to_dict(), strongest.to_dict()]"
            + "\nresult += [[str(v) for v in load_dataset(repo_id).keys()]]",
            repo_id="ada/one",
        )
    expected = client.run("pool = make_pool(); result = [pool.to_dict(), make_core(pool, 0.5).to_dict()]")
    assert loaded[0] == expected[0]
    assert loaded[1] == expected[1]
    scores = sorted(value for value in expected[0]["influence"] if value is not None)
    assert loaded[2]["influence"] == scores[:3]
    assert loaded[3] == ["train", "coreset_50"]


def test_publishing_the_same_again_changes_nothing(hub, client) -> None:
    client.run(PUSH, repo_id="ada/same")
    before = len(hub.requests(kind="upload"))
    again = client.run(PUSH, repo_id="ada/same")
    assert again["changed"] == []
    assert len(get_repo(hub, "ada/same").history()) == 2
    # The same rows, selected out of a larger table and read back from disk.
    other = client.run(
        """
        from datasets import concatenate_datasets, load_from_disk
        pool = make_pool()
        twice = concatenate_datasets([pool.select(range(30)), pool.select(range(30, 60)), pool])
        twice.select(range(60)).save_to_disk("saved")
        pool = load_from_disk("saved").with_format("numpy")
        result = vars(push(repo_id, pool, coresets={"coreset_50": make_core(pool, 0.5)}))["changed"]
        """,
        repo_id="ada/same",
    )
    assert other == []
    assert len(hub.requests(kind="upload")) == before


def test_a_new_coreset_keeps_everything_that_was_there(hub, client) -> None:
    client.run(PUSH, repo_id="ada/grow")
    repo = get_repo(hub, "ada/grow")
    written = repo.files()["README.md"].decode()
    own = written.replace("# grow\n", "# grow, by Ada\n\nWritten by hand, {{ kept }}.\n").replace(
        "tags:\n", "license: mit\nmy_key:\n  nested: [1, 2]\ntags:\n- mine\n"
    )
    client.run(
        """
        from huggingface_hub import upload_file
        for path, data in {"README.md": card.encode(), "notes/x.csv": b"a,b"}.items():
            upload_file(path_or_fileobj=data, path_in_repo=path, repo_id=repo_id, repo_type="dataset")
        """,
        repo_id="ada/grow",
        card=own + "\nAfterword.\n",
    )
    changed = client.run(
        """
        pool = make_pool()
        result = vars(push(repo_id, pool, coresets={"coreset_25": make_core(pool, 0.25)}))["changed"]
        """,
        repo_id="ada/grow",
    )
    assert sorted(changed) == ["README.md", "data/coreset_25-00000-of-00001.parquet", "splits.json"]
    metadata, body = read_card(repo)
    assert metadata["my_key"] == {"nested": [1, 2]} and metadata["license"] == "mit" and "mine" in metadata["tags"]
    assert "Written by hand, {{ kept }}." in body and body.endswith("\nAfterword.\n")
    assert body.count("in2core:begin") == 1
    assert repo.files()["notes/x.csv"] == b"a,b"
    for split in ("train", "coreset_50", "coreset_25"):
        assert f"`{split}`" in body
    loaded = client.run(
        "from datasets import load_dataset; result = load_dataset(repo_id).num_rows", repo_id="ada/grow"
    )
    assert loaded == {"train": 60, "coreset_50": 28, "coreset_25": 14}


def test_a_grown_pool_replaces_its_shards_and_readers_of_the_old_commit_are_unharmed(hub, client, tmp_path) -> None:
    code = """
    pool = make_pool(rows)
    result = vars(push(repo_id, pool, max_shard_size=size))["commit"]
    """
    old = client.run(code, repo_id="ada/shards", rows=400, size="10KB")
    repo = get_repo(hub, "ada/shards")
    shards = [path for path in repo.files() if path.endswith(".parquet")]
    assert len(shards) > 2
    new = client.run(code, repo_id="ada/shards", rows=450, size="500MB")
    assert [path for path in repo.files() if path.endswith(".parquet")] == ["data/train-00000-of-00001.parquet"]
    with HubClient(hub, tmp_path / "reader", TOKEN) as reader:
        rows = reader.run(
            """
            from datasets import load_dataset
            result = [load_dataset(repo_id, split="train", revision=r).num_rows for r in revisions]
            """,
            repo_id="ada/shards",
            revisions=[old, new, "main"],
        )
    assert rows == [400, 450, 450]


def test_configurations_and_validation_sets_stand_side_by_side(hub, client) -> None:
    client.run(PUSH, repo_id="ada/configs")
    rows = client.run(
        """
        from datasets import Dataset, load_dataset
        pool = make_pool(30, seed=1).rename_column("prompt", "question")
        questions = Dataset.from_dict({"q": ["a", "b"]})
        push(repo_id, pool, config_name="math", validation={"gsm8k": questions, "other": questions.select([0])})
        first = load_dataset(repo_id, split="train")
        second = load_dataset(repo_id, "math", split="train")
        sets = load_dataset(repo_id, "math-validation")
        result = [first.column_names[0], second.column_names[0], len(second), sets.num_rows]
        """,
        repo_id="ada/configs",
    )
    assert rows == ["prompt", "question", 30, {"gsm8k": 2, "other": 1}]
    _, body = read_card(get_repo(hub, "ada/configs"))
    assert body.count("<!-- in2core:begin default -->") == body.count("<!-- in2core:begin math -->") == 1
    assert 'load_dataset("ada/configs", "math", split="train")' in body


def test_scorer_report_and_source_are_published_along(hub, client, tmp_path) -> None:
    hub.add_repo("dataset", "ada/source", {"README.md": b"---\nlicense: mit\nlanguage: [no, en]\n---\n# Source\n"})
    run = tmp_path / "run"
    (run / "scorer" / "adapter").mkdir(parents=True)
    (run / "scorer" / "config.json").write_text(
        json.dumps({"base_model": "ada/tiny", "validation_sets": {"gsm8k": 5}})
    )
    (run / "scorer" / "scorer.safetensors").write_bytes(b"\x08" + b"\0" * 30_000)  # several parts of an upload
    for name in ("training_args.bin", "adapter/optimizer.pt", ".hidden"):
        (run / "scorer" / name).write_bytes(b"never")
    results = {"arms": [], "selection": {"seconds": 2.0}, "verdict": {"text": "It did not beat random rows."}}
    (run / "results.json").write_text(json.dumps(results))
    (run / "config.yaml").write_text("pool: ada/source\n")
    (run / "influence_histogram.png").write_bytes(b"\x89PNG")
    (run / "report.html").write_text("<!doctype html>")
    code = """
    result = vars(push("ada/full", make_pool(), scorer=run + "/scorer", report=run, source_datasets=["ada/source"]))
    """
    client.run(code, run=str(run))
    repo = get_repo(hub, "ada/full")
    assert len(repo.history()) == 2
    assert set(repo.files()) - {".gitattributes"} == {
        "README.md",
        "data/train-00000-of-00001.parquet",
        "scorer/config.json",
        "scorer/scorer.safetensors",
        "results.json",
        "config.yaml",
        "report.html",
        "plots/influence_histogram.png",
    }
    metadata, body = read_card(repo)
    assert metadata["license"] == "mit" and metadata["language"] == ["no", "en"]
    assert metadata["source_datasets"] == ["ada/source"] and metadata["base_model"] == ["ada/tiny"]
    assert "> It did not beat random rows." in body
    assert "![Influence histogram](plots/influence_histogram.png)" in body
    assert "--config config.yaml" in body and "`gsm8k` (5 rows)" in body
    # Published again without the run's folder: what it said of these rows still holds ...
    client.run('push("ada/full", make_pool())')
    assert "> It did not beat random rows." in read_card(repo)[1]
    # ... but it says nothing of other rows.
    client.run('push("ada/full", make_pool(seed=1))')
    assert "> It did not beat random rows." not in read_card(repo)[1]
    assert "was published with other rows than these" in read_card(repo)[1]


def test_branches_pull_requests_privacy_and_short_names(hub, client) -> None:
    code = """
    publication = push(repo_id, make_pool(), **options)
    result = vars(publication)
    """
    on_branch = client.run(code, repo_id="ada/branch", options={"revision": "draft"})
    repo = get_repo(hub, "ada/branch")
    assert repo.resolve("draft").oid == on_branch["commit"] and "README.md" not in repo.files("main")
    opened = client.run(code, repo_id="ada/branch", options={"create_pr": True})
    again = client.run(code, repo_id="ada/branch", options={"create_pr": True})
    assert opened["pr_url"] == again["pr_url"] == f"{hub.endpoint}/datasets/ada/branch/discussions/1"
    assert len(repo.pulls) == 1 and "README.md" not in repo.files("main")
    assert "README.md" in repo.files("refs/pr/1")
    client.run(code, repo_id="hidden", options={"private": True})
    assert get_repo(hub, "ada/hidden").private
    client.run(code, repo_id="lab/shared", options={"private": True})
    assert get_repo(hub, "lab/shared").private
    with pytest.raises(ClientError) as raised:
        client.run(code, repo_id="ada/branch", options={"private": True})
    assert "ada/branch is public" in raised.value.message


def test_only_the_first_process_of_a_launch_publishes(hub, client) -> None:
    code = """
    import os
    os.environ["RANK"] = rank
    try:
        published = push("ada/ranks", make_pool())
    finally:
        del os.environ["RANK"]
    result = published is None
    """
    before = len(hub.log)
    assert client.run(code, rank="1") is True
    assert len(hub.log) == before
    assert client.run(code, rank="0") is False


# The recipe


@pytest.mark.slow
def test_the_recipe_publishes_a_run_folder_once(hub, tmp_path) -> None:
    run = tmp_path / "run"
    generator = np.random.default_rng(0)
    scores = generator.normal(size=40)
    columns = {"prompt": [f"p{i}" for i in range(40)], "influence": scores.tolist(), "num_loss_tokens": [3] * 40}
    columns["influence_rank"] = np.argsort(np.argsort(scores)).tolist()
    Dataset.from_dict(columns).save_to_disk(run / "scored")
    arms = [{"arm": "coreset", "fraction": f, "seed": 0, "budget": "steps", "test_loss": 2.0} for f in (0.25, 0.5)]
    mine = {
        "validation": [f"math={tmp_path}/data/math.jsonl"],
        "setup_script": f"{tmp_path}/make.py --to {tmp_path}/data",
    }
    results = {"arms": arms, "verdict": {"text": "Nothing is proven."}, "config": mine}
    command = f"in2core run --test {tmp_path}/data/test.jsonl --output_dir={run}"
    (run / "results.json").write_text(json.dumps(results | {"command": command}))
    (run / "config.yaml").write_text(yaml.safe_dump({"pool": "ada/rows:train", "hub_id": "ada/other", **mine}))
    (run / "report.html").write_text(f"<p>{tmp_path}/data/math.jsonl</p>")
    hub.add_repo("dataset", "ada/rows", {"README.md": b"---\nlicense: apache-2.0\n---\n"})

    def publish(*flags: str) -> str:
        command = [sys.executable, str(ROOT / "recipes" / "publish.py"), "--run", str(run), *flags]
        env = make_env(hub, tmp_path / "home", TOKEN)
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        return (done.stdout if done.returncode == 0 else "failed: ") + done.stderr

    assert "published: " in publish("--hub_id", "ada/recipe", "--random_controls")
    repo = get_repo(hub, "ada/recipe")
    metadata, body = read_card(repo)
    splits = {split["name"]: split["num_examples"] for split in metadata["dataset_info"]["splits"]}
    assert splits == {"train": 40, "coreset_25": 10, "coreset_50": 20, "random_25": 10, "random_50": 20}
    assert metadata["license"] == "apache-2.0" and "> Nothing is proven." in body
    # The names of files are told, and nobody's folders.
    files = repo.files()
    assert [name for name, content in files.items() if str(tmp_path).encode() in content] == []
    assert yaml.safe_load(files["config.yaml"])["validation"] == ["math=math.jsonl"]
    assert json.loads(files["results.json"])["command"] == "in2core run --test test.jsonl --output_dir=run"
    assert files["report.html"] == b"<p>math.jsonl</p>" and "--test test.jsonl" in body
    assert "nothing new to publish" in publish("--hub_id", "ada/recipe", "--random_controls")
    assert len(repo.history()) == 2
    failed = publish("--hub_id", "somebody/else")
    assert failed.startswith("failed") and "ada cannot create" in failed and "Traceback" not in failed
