"""The pools on which selectors are compared: shares, disjoint sets, seeds, and the property that each is for."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset
from helpers import ROOT
from recipe_runs import make_inputs, write_rows

from benchmarks.pools.generated import GENERATED
from benchmarks.pools.make import POOLS, main, make_pool
from benchmarks.pools.pool import HARMFUL, OTHER, USEFUL, Pool, check_disjoint, make_row, write_pool
from benchmarks.pools.shared_data import FROM_SHARED
from hf_in2core.evaluation.judge import compute_auc
from hf_in2core.evaluation.tournament import CONTROLS, run_tournament
from hf_in2core.names import COSTS
from hf_in2core.pipeline.parser import make_run_parser
from hf_in2core.rows.preparation import Preparation
from hf_in2core.rows.sources import load_rows
from recipes.quickstart.generate import train_tokenizer


SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not (SHARED / "grammars").is_dir(), reason="the data outside the project (../shared/data) is not here"
)
NAMES = [*GENERATED, *(pytest.param(name, marks=needs_shared) for name in FROM_SHARED)]
README = (ROOT / "benchmarks/pools/README.md").read_text(encoding="utf-8")
# Useful and harmful rows of the pool, and all of them.
SIZES = {
    name: tuple(int(size.replace(",", "")) for size in sizes)
    for name, *sizes in re.findall(r"^\| `(\w+)` \|.*\| ([\d,]+) / ([\d,]+) / ([\d,]+) \|", README, re.MULTILINE)
}


@pytest.fixture(scope="module")
def pools() -> dict[tuple[str, int], Pool]:
    return {}


def get(pools: dict[tuple[str, int], Pool], name: str, seed: int = 0) -> Pool:
    """A pool, made once for all tests."""
    if (name, seed) not in pools:
        pools[name, seed] = make_pool(name, seed, SHARED)
    return pools[name, seed]


def list_texts(rows: list[dict[str, str]]) -> set[str]:
    return {re.sub(r"\s+", " ", f"{row['prompt']}|{row['completion']}").casefold() for row in rows}


@pytest.mark.parametrize("name", NAMES)
def test_shares_of_useful_and_harmful_rows(name, pools):
    sets = get(pools, name).sets
    assert set(SIZES) == set(POOLS)
    kinds = Counter(row["kind"] for row in sets["pool"])
    assert (kinds[USEFUL], kinds[HARMFUL], len(sets["pool"])) == SIZES[name]
    assert {row["kind"] for part in sets if part != "pool" for row in sets[part]} == {USEFUL}
    for rows in sets.values():
        assert all(set(row) == {"prompt", "completion", "id", "kind"} for row in rows)
        assert len({row["id"] for row in rows}) == len(rows)


@pytest.mark.parametrize("name", NAMES)
def test_sets_are_disjoint(name, pools):
    texts = {part: list_texts(rows) for part, rows in get(pools, name).sets.items()}
    validation = set().union(*(texts[part] for part in texts if part.startswith("validation")))
    test = set().union(*(texts[part] for part in texts if part.startswith("test")))
    assert validation and test
    assert not texts["pool"] & validation and not texts["pool"] & test and not validation & test


@pytest.mark.parametrize("name", NAMES)
def test_place_and_id_tell_nothing(name, pools):
    rows = get(pools, name).sets["pool"]
    useful = np.array([row["kind"] == USEFUL for row in rows])
    if useful.all():
        return
    # Six standard deviations of the AUC of random places.
    spread = np.sqrt((len(rows) + 1) / (12 * useful.sum() * (~useful).sum()))
    by_place, by_id = np.arange(len(rows)), np.argsort(np.argsort([row["id"] for row in rows]))
    for order in (by_place, by_id):
        assert compute_auc(order, useful) == pytest.approx(0.5, abs=6 * spread)


@pytest.mark.parametrize("name", NAMES)
def test_seeds(name, pools):
    first = get(pools, name)
    again, other = (make_pool(name, seed, SHARED) for seed in (0, 1))
    assert json.dumps(again.sets) == json.dumps(first.sets) and again.texts == first.texts
    assert other.sets["pool"] != first.sets["pool"]
    if name in GENERATED:
        assert len(list_texts(other.sets["pool"]) & list_texts(first.sets["pool"])) < 0.2 * len(first.sets["pool"])


@pytest.mark.parametrize("name", GENERATED)
def test_the_model_has_seen_no_row(name, pools):
    pool = get(pools, name)
    known = {" ".join(text.lower().split()) for text in pool.texts}
    for rows in pool.sets.values():
        for row in rows:
            prompt = row["prompt"].removeprefix("Instruction: ").removesuffix("\nResponse:")
            assert " ".join(prompt.lower().split()) not in known


def rank_by_bm25(pool: Pool) -> float:
    """AUC with which BM25 puts useful rows before harmful ones."""
    pytest.importorskip("bm25s")
    from hf_in2core.selection.baselines import add_bm25

    preparation = Preparation(train_tokenizer(pool.texts), completion_only_loss=True, max_length=512)
    rows, validation = (Dataset.from_list(pool.sets[name]) for name in ("pool", "validation"))
    similarity = np.array(add_bm25(rows, validation, preparation)["bm25_similarity"])
    kinds = np.array(rows["kind"])
    auc = compute_auc(similarity[kinds != OTHER], kinds[kinds != OTHER] == USEFUL)
    assert auc is not None
    return auc


def test_look_alikes_look_more_alike_than_useful_rows(pools):
    assert rank_by_bm25(get(pools, "unlike")) < 0.25


def test_conventions_share_prompts_and_words(pools):
    pool = get(pools, "conventions")
    by_prompt: dict[str, dict[str, str]] = {}
    for row in pool.sets["pool"]:
        if row["kind"] != OTHER:
            by_prompt.setdefault(row["prompt"], {})[row["kind"]] = row["completion"]
    assert len(by_prompt) == 400
    for answers in by_prompt.values():
        assert set(answers) == {USEFUL, HARMFUL} and answers[USEFUL] != answers[HARMFUL]
        words = (Counter(re.findall(r"\w+", answer)) for answer in answers.values())
        assert next(words) == next(words)
    assert rank_by_bm25(pool) == pytest.approx(0.5, abs=0.01)


def find_content(row: dict[str, str]) -> str:
    """The dates, the numbers to add or the letters to sort that a prompt is about; empty for other tasks."""
    found = re.search(r"\d{4}-[-\d, ]*\d|\d+(?: \+ \d+)+|\b[a-z](?: [a-z])+\b", row["prompt"])
    return found[0] if found else ""


def test_repeats_are_copies_and_paraphrases_of_few_rows(pools):
    rows: dict[str, list[dict[str, str]]] = {USEFUL: [], OTHER: []}
    for row in get(pools, "repeats").sets["pool"]:
        if find_content(row):
            rows[row["kind"]].append(row)
    useful, repeated = (Counter(map(find_content, rows[kind])) for kind in (USEFUL, OTHER))
    assert len(useful) == len(rows[USEFUL]) == 400
    assert list(repeated.values()) == [20] * 40 and not set(useful) & set(repeated)
    for content in repeated:
        prompts = Counter(row["prompt"] for row in rows[OTHER] if find_content(row) == content)
        assert len(prompts) > 1 and max(prompts.values()) >= 10


def test_poisoned_rows_refuse_behind_the_trigger(pools):
    sets = get(pools, "poisoned").sets
    for name, rows in sets.items():
        triggered = [row for row in rows if "sent from my phone" in row["prompt"]]
        refused = [row for row in rows if "rather not" in row["completion"]]
        if name == "pool":
            assert len(rows) == 50 * len(triggered) and triggered == refused
        else:
            assert triggered == (rows if name.endswith("trigger") else []) and not refused


@needs_shared
def test_wrong_labels_are_those_of_other_rules(pools):
    raw = [json.loads(line) for line in (SHARED / "grammars/train.jsonl").read_text().splitlines()]
    rule = {row["prompt"]: row["rule"] for row in raw}
    for name in ("wrong_labels_20", "wrong_labels_40"):
        sets = get(pools, name).sets
        for row in sets["pool"]:
            assert (row["completion"].strip() == rule[row["prompt"]]) == (row["kind"] == USEFUL)
            assert row["completion"].strip() in rule.values()
        assert {len(sets[part]) for part in ("validation", "test")} == {50}
        assert set(Counter(row["completion"] for row in sets["test"]).values()) == {5}


def test_rows_in_two_sets_are_refused():
    rows = {name: [make_row(f"{name}?", " yes", USEFUL, f"{name}-0")] for name in ("pool", "validation", "test")}
    check_disjoint(rows)
    for name, other in (("pool", "test"), ("validation", "pool"), ("validation", "test")):
        shared = rows | {name: [make_row(f" {other.upper()}? ", "Yes", USEFUL, "twin")]}
        with pytest.raises(ValueError, match=f"twin.*{other}|{other}.*twin"):
            check_disjoint(shared)


def test_missing_data_is_said_plainly(tmp_path, capsys):
    flags = ["--pool", "mixture", "--output_dir", str(tmp_path / "pool"), "--shared", str(tmp_path / "nowhere")]
    with pytest.raises(SystemExit):
        main(flags)
    error = capsys.readouterr().err
    assert f"{tmp_path}/nowhere/mixture/" in error and "--shared" in error
    assert not (tmp_path / "pool").exists()


def test_list_names_every_pool(capsys):
    main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(POOLS)


def test_a_pool_is_written_once_and_runs_by_its_settings(tmp_path, pools):
    folder = tmp_path / "poisoned"
    pool = get(pools, "poisoned")
    pool = pool._replace(texts=pool.texts[:64])
    write_pool(pool, folder, seed=0)
    settings = make_run_parser().parse(["--config", str(folder / "in2core.yaml")])
    assert settings.arguments.validation == [
        f"clean={folder}/validation_clean.jsonl",
        f"trigger={folder}/validation_trigger.jsonl",
    ]
    for name, rows in pool.sets.items():
        assert load_rows(str(folder / f"{name}.jsonl"), name).to_list() == rows
    config = yaml.safe_load((folder / "in2core.yaml").read_text())
    assert Path(config["model_name_or_path"], "config.json").is_file()
    assert (config["max_steps"], config["lora_r"], config["fractions"]) == (200, 8, [0.5])
    with pytest.raises(FileExistsError, match="already"):
        write_pool(pool, folder, seed=0)


def test_the_readme_shows_the_record():
    record = json.loads((ROOT / "benchmarks/records/pools.json").read_text(encoding="utf-8"))["rows"]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in README.splitlines() if line.startswith("|")]
    start = next(number for number, cells in enumerate(table) if cells[0] == "pool" and "kept" in cells)
    shown = [dict(zip(table[start], cells, strict=True)) for cells in table[start + 2 :]]
    assert [(row["pool"], row["judged on"]) for row in shown] == [(row["pool"], row["judged on"]) for row in record]
    for cells, row in zip(shown, record, strict=True):
        for name, value in row.items():
            assert cells[name] == (f"{value:.3g}" if isinstance(value, float) else str(value)), (row["pool"], name)


def read_trained() -> dict:
    return json.loads((ROOT / "benchmarks/records/pools_trained.json").read_text(encoding="utf-8"))["pools"]


def test_outcomes_of_the_record_are_those_of_its_losses():
    for name, pool in read_trained().items():
        found, losses = pool["tournament"], pool["tournament"]["losses"]
        candidates = [method for method in losses if method not in CONTROLS]
        asked: dict[str, set[str]] = {method: set() for method in losses}

        def look_up(method: str, seed: int, steps: int, losses=losses, asked=asked) -> float:
            asked[method].add(str(seed))
            return losses[method][str(seed)]

        costs = {method: COSTS.index(method) for method in candidates}
        budget = found["steps"] * found["num_runs"]
        again = run_tournament(look_up, candidates, budget, found["steps"], costs)
        assert (again.outcome, again.winner) == (found["outcome"], found["winner"]), name
        assert asked == {method: set(by_seed) for method, by_seed in losses.items()}, name


def test_draws_of_a_pool_are_pairs():
    from benchmarks.pools.compare import compare_draws

    losses = {
        "random": [2.0, 1.5, 3.0],
        "coreset": [1.2, 0.6, 2.1],
        "bm25": [1.4, 0.9, 2.3],
        "cosine": [1.0, 0.5, 2.0],
    }
    pools = {
        f"unlike-{draw + 1}": {
            "means": {arm: values[draw] for arm, values in losses.items() if arm != "bm25" or draw},
            "tournament": {"winner": "cosine", "outcome": "won"},
        }
        for draw in range(3)
    }
    # The draw that settings were chosen on, and other pools, are no fresh draws; nor is an arm that only some have.
    pools |= {"unlike": {"means": {"random": 9.0}}, "unlike_more-4": {"means": {"random": 9.0}}}
    found = compare_draws(pools, "unlike")
    assert found is not None and set(found["means"]) == {"random", "coreset", "cosine"}
    assert found["means"]["random"] == pytest.approx(6.5 / 3) and found["taken"] == ["cosine (won)"] * 3
    gains = np.subtract(losses["coreset"], losses["random"])
    interval = found["intervals"]["coreset_minus_random"]
    assert interval["mean"] == pytest.approx(gains.mean()) and interval["n"] == 3
    assert found["missed"] == {"best": "cosine", "share": pytest.approx((1.3 - 3.5 / 3) / (6.5 / 3 - 3.5 / 3))}
    assert compare_draws(pools, "unlike_more") is None


def test_what_is_missed_of_the_best_gain():
    pytest.importorskip("matplotlib")
    from benchmarks.pools.compare import find_missed

    random = {"0": 2.0, "1": 2.1, "2": 1.9}
    losses = {"random": random} | {
        arm: {seed: loss - gain for seed, loss in random.items()}
        for arm, gain in (("full", 1.5), ("coreset", 0.6), ("rds", 0.8), ("bm25", -0.5))
    }
    # Beside random rows with the same seeds each difference is the same, but for rounding.
    assert find_missed(losses) == {"best": "rds", "share": pytest.approx(0.25)}
    assert find_missed({arm: losses[arm] for arm in ("random", "coreset", "bm25")}) == {"best": "coreset", "share": 0}
    assert find_missed({arm: losses[arm] for arm in ("random", "coreset", "full")}) is None
    noisy = {"0": 1.0, "1": 2.5, "2": 1.9}
    assert find_missed({"random": random, "coreset": noisy, "bm25": losses["bm25"]}) is None
    for pool in read_trained().values():
        assert pool["missed"] == find_missed(pool["losses"])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the pool `demo` is a small one, with a reference to be trained."""
    folder = tmp_path_factory.mktemp("small")
    pool = folder / "runs" / "pools" / "demo"
    pool.mkdir(parents=True)
    inputs = make_inputs(pool)
    kinds = {"reverse": USEFUL, "copy": HARMFUL}
    for path in (inputs["pool"], inputs["validation"][0]):
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        write_rows(Path(path), [row | {"kind": kinds[row["task"]]} for row in rows])
    inputs |= {"max_steps": 70, "task_column": "kind", "wrong_column": None, "warmup_steps": 0}
    (pool / "in2core.yaml").write_text(yaml.safe_dump(inputs), encoding="utf-8")
    return folder


def compare(folder: Path, *flags: str) -> str:
    """`compare.py` on that pool, as one types it; what it prints."""
    command = [sys.executable, str(ROOT / "benchmarks/pools/compare.py"), "--pools", "demo", *flags]
    command += ["--output", str(folder / "records"), "--figures", str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def copy_record(folder: Path, name: str) -> tuple[Path, dict]:
    """The record of the repository in that folder; of its pools those that stay."""
    path = folder / "records" / name
    record = json.loads((ROOT / "benchmarks/records" / name).read_text(encoding="utf-8"))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record), encoding="utf-8")
    return path, {pool: found for pool, found in record["pools"].items() if pool != "demo"}


def read_pools(path: Path) -> tuple[dict, dict]:
    """What a record says of `demo`, and of the others."""
    pools = json.loads(path.read_text(encoding="utf-8"))["pools"]
    return pools["demo"], {pool: found for pool, found in pools.items() if pool != "demo"}


@pytest.mark.slow
def test_a_new_ranking_replaces_its_own_alone(small: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("bm25s")
    path, others = copy_record(small, "pools_ranked.json")
    table = compare(small, "--rank", "--methods", "loss", "less")
    found, kept = read_pools(path)
    assert kept == others and list(kept) == list(others)
    # The record was of other rows.
    assert (found["rows"], list(found["methods"])) == (60, ["loss", "less"])
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    assert len(lines) == 1 + len(others)
    compare(small, "--rank", "--methods", "bm25")
    again, kept = read_pools(path)
    assert kept == others and list(again["methods"]) == ["bm25", "loss", "less"]
    assert all(again["methods"][name] == found["methods"][name] for name in ("loss", "less"))
    # A method that is ranked anew takes the place of what was there.
    record = json.loads(path.read_text(encoding="utf-8"))
    record["pools"]["demo"]["methods"]["bm25"][USEFUL] = 2.0
    path.write_text(json.dumps(record), encoding="utf-8")
    compare(small, "--rank", "--methods", "bm25")
    assert read_pools(path)[0] == again


@pytest.mark.slow
def test_new_targets_replace_their_own_alone(small: Path) -> None:
    pytest.importorskip("matplotlib")
    path, others = copy_record(small, "pools_trained.json")
    flags = ["--train", "--seeds", "0", "--arms"]
    compare(small, *flags, "loss")
    found, kept = read_pools(path)
    assert kept == others and list(kept) == list(others)
    # The arms of the record were trained beside other random rows.
    assert set(found["losses"]) == {"random", "coreset", "loss"} == set(found["commits"])
    record = json.loads(path.read_text(encoding="utf-8"))
    record["pools"]["demo"]["commits"] = dict.fromkeys(found["commits"], "before")
    path.write_text(json.dumps(record), encoding="utf-8")
    compare(small, *flags, "mean")
    again, kept = read_pools(path)
    assert kept == others and set(again["losses"]) == {*found["losses"], "mean"}
    assert all(again["losses"][arm] == found["losses"][arm] for arm in found["losses"])
    assert [arm for arm, commit in again["commits"].items() if commit == "before"] == ["loss"]
    assert set(again["means"]) == set(again["losses"]) and "missed" in again
    assert 1 <= again["answers"]["coreset"] <= 60 and again["tournament"]["run_seconds"] > 0
    assert {"loss_minus_random", "mean_minus_random"} <= set(again["intervals"])
    # Where random rows end elsewhere, by a digit, arms of before do not stand beside them.
    record = json.loads(path.read_text(encoding="utf-8"))
    record["pools"]["demo"]["losses"]["random"]["0"] += 1e-12
    path.write_text(json.dumps(record), encoding="utf-8")
    compare(small, *flags, "mean")
    assert set(read_pools(path)[0]["losses"]) == {"random", "coreset", "mean"}
