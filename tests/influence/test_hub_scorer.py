"""A scorer and a coreset on the Hub, used by a machine that has nothing else.

The real clients talk to the Hub of `loopback_hub.py` from processes of their own.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import helpers
import pytest
from datasets import concatenate_datasets
from hub_client import QUIET, ClientError, HubClient, serve_hub
from loopback_http import Fault
from loopback_hub import LoopbackHub
from recipe_runs import load_command


TOKEN = "hf_" + "S" * 34
PUBLISH = """
import os
import helpers
from datasets import Dataset, concatenate_datasets
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_in2core import InfluenceScorer, push_influence_dataset, select_coreset

api = HfApi()
helpers.make_model().save_pretrained("tiny")
helpers.make_tokenizer().save_pretrained("tiny")
api.create_repo("ada/tiny")
api.upload_folder(folder_path="tiny", repo_id="ada/tiny")
model = helpers.add_trained_adapter(AutoModelForCausalLM.from_pretrained("ada/tiny"))
pool, validation = helpers.make_prompt_completion(23, seed=0), helpers.make_prompt_completion(7, seed=1)
trainer = helpers.make_trainer("run", pool, validation, helpers.torch.float32, model=model)
scored, scorer = trainer.score_influence(), trainer.fit_influence()
url = scorer.push_to_hub("ada/scorer")
assert scorer.push_to_hub("ada/scorer") == url
os.environ["RANK"] = "1"
assert scorer.push_to_hub("ada/scorer-of-another-process") is None
del os.environ["RANK"]
coresets = {"coreset_50": select_coreset(scored, fraction=0.5)}
publication = push_influence_dataset(
    "ada/scored", scored, coresets=coresets, scorer=scorer, validation={"validation": validation}
)
result = [url, publication.commit, scored.to_dict(), coresets["coreset_50"]["id"][:]]
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with serve_hub(TOKEN) as hub:
        yield hub


@pytest.fixture(scope="module")
def publisher(hub, tmp_path_factory) -> Iterator[HubClient]:
    with HubClient(hub, tmp_path_factory.mktemp("home"), TOKEN, HF_HUB_OFFLINE="0", **QUIET) as client:
        yield client


@pytest.fixture(scope="module")
def published(publisher) -> list[Any]:
    return publisher.run(PUBLISH, shared=True)


@pytest.fixture(scope="module")
def elsewhere(hub, published, tmp_path_factory) -> Iterator[HubClient]:
    """A process with an empty HF_HOME, no token and no local files."""
    with HubClient(hub, tmp_path_factory.mktemp("elsewhere"), None, HF_HUB_OFFLINE="0", **QUIET) as client:
        yield client


@pytest.mark.slow
def test_a_scorer_from_the_hub_scores_a_stream_to_the_same_numbers(published, elsewhere) -> None:
    url, _, scored, chosen = published
    streamed = elsewhere.run(
        """
        from datasets import load_dataset
        from hf_in2core import InfluenceScorer
        scorer = InfluenceScorer.from_pretrained("ada/scorer", revision=commit)
        rows = load_dataset("ada/scored", split="train", streaming=True)
        rows = rows.remove_columns(["influence", "influence_rank", "num_loss_tokens"])
        rows = list(rows.map(scorer, batched=True, batch_size=5))
        coreset = load_dataset("ada/scored", split="coreset_50")
        result = [[row[name] for row in rows] for name in ("id", "influence", "num_loss_tokens")] + [coreset["id"][:]]
        """,
        commit=url.rsplit("/", 1)[1],
    )
    assert streamed[0] == scored["id"]
    assert streamed[1] == pytest.approx(scored["influence"], rel=1e-4, abs=1e-6 * max(map(abs, scored["influence"])))
    assert streamed[2] == scored["num_loss_tokens"]
    assert streamed[3] == chosen


def test_the_cards_snippets_run_as_they_are_written(hub, published, elsewhere) -> None:
    card = hub.repos[("dataset", "ada/scored")].files()["README.md"].decode()
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(snippets) == 2
    printed = elsewhere.run(
        """
        import contextlib, io
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            for snippet in snippets:
                exec(snippet, {})
        result = float(out.getvalue())
        """,
        snippets=snippets,
    )
    assert printed == pytest.approx(published[2]["influence"][0], rel=1e-4)
    assert "| Reference model | `ada/tiny` |" in card
    assert hub.repos[("dataset", "ada/scored")].files()["README.md"].decode().count("- ada/tiny") == 1


def test_no_pickle_is_published_and_none_is_needed(hub, published) -> None:
    for key in (("model", "ada/scorer"), ("dataset", "ada/scored")):
        names = set(hub.repos[key].files())
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".ckpt"))], names
    assert "scorer/scorer.safetensors" in names and "scorer/adapter/adapter_model.safetensors" in names


def test_the_scorers_card_explains_it_and_its_snippet_runs(hub, published, elsewhere) -> None:
    repo = hub.repos[("model", "ada/scorer")]
    assert len(repo.history()) == 2, "the second push of the same scorer made a commit"
    assert ("model", "ada/scorer-of-another-process") not in hub.repos
    card = repo.files()["README.md"].decode()
    assert "- ada/tiny" in card and "**Negative influence = proponent**" in card
    assert "| Reference model | `ada/tiny` |" in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert elsewhere.run(snippet + "\nresult = scorer.config.base_model") == "ada/tiny"
    assert not [path for path in repo.files() if path.endswith("README.md") and path != "README.md"]


@pytest.mark.slow
def test_a_scorer_pushed_again_from_another_process_makes_no_commit(hub, published, tmp_path) -> None:
    before = len(hub.requests(kind="commit"))
    with HubClient(hub, tmp_path, TOKEN, HF_HUB_OFFLINE="0", PYTHONHASHSEED="7", **QUIET) as client:
        url = client.run(
            """
            from hf_in2core import InfluenceScorer
            result = InfluenceScorer.from_pretrained("ada/scorer").push_to_hub("ada/scorer")
            """
        )
    assert url == published[0]
    assert len(hub.requests(kind="commit")) == before


def test_only_what_a_scorer_consists_of_is_downloaded(hub, published, elsewhere) -> None:
    files = hub.repos[("model", "ada/scorer")].files()
    extra = {"training_args.bin": b"pickle", "adapter/adapter_model.bin": b"pickle", "data/x.parquet": b"rows"}
    hub.add_repo("model", "ada/stuffed", files | extra)
    names = elsewhere.run(
        """
        from pathlib import Path
        from huggingface_hub import constants
        from hf_in2core import InfluenceScorer
        InfluenceScorer.from_pretrained("ada/stuffed")
        cached = next(Path(constants.HF_HUB_CACHE).glob("models--ada--stuffed/snapshots/*"))
        result = [str(path.relative_to(cached)) for path in cached.rglob("*") if path.is_file()]
        """
    )
    assert set(names) < set(files)


def test_what_is_no_scorer_on_the_hub_is_explained(hub, published, elsewhere) -> None:
    for arguments, told in [
        ("'ada/scored'", 'repo_type="dataset", subfolder="scorer"'),
        ("'ada/scored', repo_type='dataset'", "holds no scorer"),
        ("'ada/tiny'", "format_version"),
        ("'no/where'", "can be seen"),
        ("'a/b/c'", "can be seen"),
    ]:
        with pytest.raises(ClientError) as raised:
            elsewhere.run(f"from hf_in2core import InfluenceScorer; InfluenceScorer.from_pretrained({arguments})")
        assert told in raised.value.message, arguments


def test_another_base_model_under_the_same_name_is_noticed(hub, published, elsewhere) -> None:
    original = hub.repos[("model", "ada/tiny")]
    files = original.files()
    name = next(path for path in files if path.endswith(".safetensors"))
    weights = bytearray(files[name])
    weights[-4000:] = weights[-4000:][::-1]
    # A scorer names its base model's commit; one that was fitted without knowing it gets the newest.
    own = hub.repos[("model", "ada/scorer")].files()
    config = json.loads(own["config.json"])
    assert config["base_model_revision"] == original.resolve("main").oid
    config["base_model_revision"] = None
    hub.add_repo("model", "ada/unpinned", own | {"config.json": json.dumps(config).encode()})
    hub.add_repo("model", "ada/tiny", files | {name: bytes(weights)})
    with pytest.raises(ClientError) as raised:
        elsewhere.run("from hf_in2core import InfluenceScorer; InfluenceScorer.from_pretrained('ada/unpinned')")
    assert raised.value.kinds[0] == "ValueError" and "another base model" in raised.value.message
    hub.repos[("model", "ada/tiny")] = original


# Pools grow


GROW = """
from recipe_runs import run_command
run_command("grow", *flags)
"""


def test_a_published_pool_grows_without_a_refit(hub, published, publisher, tmp_path) -> None:
    hub.add_repo("dataset", "ada/grown", hub.repos[("dataset", "ada/scored")].files())
    repo = hub.repos[("dataset", "ada/grown")]
    more = helpers.make_prompt_completion(9, seed=5)
    old = helpers.make_prompt_completion(23, seed=0).select([2, 3])
    concatenate_datasets([more, old]).to_json(tmp_path / "more.jsonl")
    flags = ["--hub_id", "ada/grown", "--rows", str(tmp_path / "more.jsonl")]
    publisher.run(GROW, flags=flags)
    title = repo.history()[0].title
    assert re.fullmatch(r"Add 9 rows \(rank correlation with a refit on a sample: -?[01]\.\d{3}\)", title)
    assert "was fitted on another pool (23 rows) than the one it scores (32 rows)" in publisher.output
    assert "9 of 11 rows are not in ada/grown yet" in publisher.output
    loaded, expected = publisher.run(
        """
        from datasets import load_dataset
        splits = load_dataset("ada/grown")
        more = helpers.make_prompt_completion(9, seed=5).map(scorer, batched=True)
        influence = scored["influence"][:] + more["influence"][:]
        result = [{name: rows.to_dict() for name, rows in splits.items()}, influence]
        """
    )
    pool = loaded["train"]
    assert pool["influence"] == pytest.approx(expected, rel=1e-4, abs=1e-6 * max(map(abs, expected)))
    order = sorted(range(32), key=lambda row: pool["influence"][row])
    assert [pool["influence_rank"][row] for row in order] == list(range(32))
    assert loaded["coreset_50"]["id"] == [pool["id"][row] for row in order[:16]]
    card = repo.files()["README.md"].decode()
    assert "| `train` | 32 |" in card and "| `coreset_50` | 16 |" in card
    # Once more: nothing is added a second time.
    publisher.run(GROW, flags=flags)
    assert "ada/grown holds all of it already" in publisher.output
    assert len(repo.history()) == 2


def test_rows_that_do_not_fit_are_refused_before_they_are_scored(hub, published, publisher, tmp_path) -> None:
    hub.add_repo("dataset", "ada/mixed", hub.repos[("dataset", "ada/scored")].files())
    repo, path = hub.repos[("dataset", "ada/mixed")], tmp_path / "more.jsonl"
    good = list(helpers.make_prompt_completion(3, seed=8))
    flags = ["--hub_id", "ada/mixed", "--rows", str(path)]
    for rows, told in [
        (
            [*good, good[0] | {"prompt": None}],
            "1 of 4 rows of the rows to add:\n  - row 3 (id '8-0'): `prompt` is null",
        ),
        ([row | {"id": number} for number, row in enumerate(good)], "Column `id` holds string in the first pool"),
    ]:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(ClientError) as raised:
            publisher.run(GROW, flags=flags)
        assert told in raised.value.message and len(repo.history()) == 1
        assert "score_with" not in raised.value.message  # nothing was scored
    path.write_text("".join(json.dumps(row) + "\n" for row in [*good, good[0] | {"prompt": None}]))
    publisher.run(GROW, flags=[*flags, "--bad_rows", "drop"])
    assert repo.history()[0].title.startswith("Add 3 rows") and "are dropped, the first: row 3" in publisher.output


def test_a_grown_pools_coresets_are_chosen_as_they_were() -> None:
    choose_splits = load_command("grow").choose_splits
    turns = {"strategy": "round_robin_rows", "column": "influence", "fraction": 0.5}
    records = {"train": {"command": "make.py"}, "coreset_50": turns | {"command": "make.py"}, "gone": turns}
    published = ["train", "coreset_50", "coreset_25", "random_25", "by_hand"]
    by_name = {
        "coreset_25": {"strategy": "top", "fraction": 0.25},
        "random_25": {"strategy": "random", "fraction": 0.25},
    }
    assert choose_splits(published, None, records) == {"coreset_50": turns, **by_name}
    assert choose_splits(published, [0.5, 0.1], records) == {"coreset_50": turns, "coreset_10": {"fraction": 0.1}}


@pytest.mark.slow
def test_two_repositories_of_one_scorer_combine(hub, published, publisher) -> None:
    hub.add_repo("dataset", "ada/left", hub.repos[("dataset", "ada/scored")].files())
    publisher.run(
        """
        other = helpers.make_prompt_completion(6, seed=11).map(scorer, batched=True)
        rank = Dataset.from_dict({"influence_rank": list(range(6))})
        other = concatenate_datasets([other, rank], axis=1).select_columns(scored.column_names)
        push_influence_dataset("ada/right", other, scorer=scorer)
        """
    )
    publisher.run(GROW, flags=["--hub_id", "ada/left", "--combine", "ada/right"])
    left = publisher.run("from datasets import load_dataset; result = load_dataset('ada/left')['train'].to_dict()")
    assert left["id"] == [*published[2]["id"], *[f"11-{row}" for row in range(6)]]
    assert sorted(left["influence_rank"]) == list(range(29))
    metadata = hub.repos[("dataset", "ada/left")].files()["README.md"].decode().split("---")[1]
    assert "- ada/right" in metadata
    # Another scorer's numbers do not compare.
    files = hub.repos[("dataset", "ada/right")].files()
    hub.add_repo("dataset", "ada/foreign", files | {"scorer/scorer.safetensors": b"another"})
    with pytest.raises(ClientError) as raised:
        publisher.run(GROW, flags=["--hub_id", "ada/left", "--combine", "ada/foreign"])
    assert "scored by another scorer" in raised.value.message and "--rows ada/foreign:train" in raised.value.message


def test_rows_added_by_somebody_meanwhile_are_not_lost(hub, published, publisher) -> None:
    repo = hub.add_repo("dataset", "ada/busy", hub.repos[("dataset", "ada/scored")].files())
    first = repo.resolve("main").oid
    repo.commit("refs/heads/main", first, "somebody's rows", "", "bob", repo.resolve("main").tree)
    code = "push_influence_dataset('ada/busy', scored.select(range(9)), parent_commit=parent)"
    with pytest.raises(ClientError) as raised:
        publisher.run(code, parent=first)
    assert raised.value.kinds[0] == "PublicationError" and "newer commit" in raised.value.message
    # The same when they come between the look at the branch and the commit.
    second = repo.resolve("main").oid
    overtake = lambda hub: repo.commit("refs/heads/main", second, "more rows", "", "bob", repo.resolve("main").tree)  # noqa: E731
    hub.faults.append(Fault("call", "commit", owner="ada", call=overtake))
    with pytest.raises(ClientError) as raised:
        publisher.run(code, parent=second)
    assert raised.value.kinds[0] == "PublicationError"
    assert [commit.title for commit in repo.history()] == ["more rows", "somebody's rows", "initial commit"]
    # When the answer to our own commit is lost, the newer commit is ours.
    hub.faults.append(Fault("lost", "commit", owner="ada"))
    publisher.run(code, parent=repo.resolve("main").oid)
    assert [commit.title for commit in repo.history()][:2] == ["Publish influence", "more rows"]


# The round trip


def test_a_coreset_is_fine_tuned_on_straight_from_the_hub(hub, published, elsewhere) -> None:
    """On the machine that had nothing: fresh HF_HOME, no token, no local file."""
    files = {"results.json": json.dumps({"verdict": {"text": "At equal steps it beat random rows."}}).encode()}
    hub.add_repo("dataset", "ada/compared", hub.repos[("dataset", "ada/scored")].files() | files)
    elsewhere.run(
        """
        from datasets import load_dataset
        from recipe_runs import run_command
        load_dataset("ada/scored", "validation", split="validation").to_json("test.jsonl")
        flags = ["--model_name_or_path", "ada/tiny", "--dataset_name", "ada/compared", "--split", "coreset_50"]
        flags += ["--output_dir", "target", "--max_steps", "2", "--test", "test.jsonl"]
        run_command("sft", *flags, "--use_cpu", "true", "--report_to", "none")
        """
    )
    assert f"{len(published[3])} rows, 2 steps" in elsewhere.output
    target = elsewhere.output_path.parent / "target"
    assert (target / "adapter_model.safetensors").is_file() and not (target / "training_args.bin").exists()
    card = (target / "README.md").read_text()
    commit = hub.repos[("dataset", "ada/compared")].resolve("main").oid
    assert f'load_dataset("ada/compared", split="coreset_50", revision="{commit}")' in card
    assert "base_model: ada/tiny" in card and "> At equal steps it beat random rows." in card
    assert "model-index" in card and "More Information Needed" not in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert elsewhere.run(snippet + "\nresult = coreset['id'][:]") == published[3]


def test_a_target_is_published_with_its_card(hub, published, publisher) -> None:
    tune = """
    from recipe_runs import run_command
    flags = ["--model_name_or_path", "ada/tiny", "--dataset_name", "ada/scored:coreset_50", "--output_dir", "tuned"]
    flags += ["--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1", "--use_cpu", "true"]
    run_command("sft", *flags, "--report_to", "none", "--hub_id", repo_id)
    """
    with pytest.raises(ClientError) as raised:
        publisher.run(tune, repo_id="bob/target")
    assert "ada cannot create" in raised.value.message
    assert not (publisher.output_path.parent / "tuned").exists(), "it was refused after training"
    publisher.run(tune, repo_id="ada/target")
    repo = hub.repos[("model", "ada/target")]
    assert [commit.title for commit in repo.history()] == ["Publish model", "initial commit"]
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "config.yaml"} <= set(repo.files())
    assert not [path for path in repo.files() if "/" in path or path.endswith((".bin", ".pt"))]
    assert "has not been judged" in repo.files()["README.md"].decode()
