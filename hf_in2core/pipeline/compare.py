"""[`compare_arms`]: the comparison of `in2core run` in Python, from a scored pool on."""

import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, SFTTrainer

from hf_in2core import InfluenceConfig
from hf_in2core.engine.sharding import save_adapter
from hf_in2core.influence.launcher import check_launcher
from hf_in2core.names import ALL_ARMS, ARMS, BUDGETS, NUM_LOSS_TOKENS, PER_QUERY, POOL, VALIDATION
from hf_in2core.report.terminal import print_verdict
from hf_in2core.rows.checks import check_rows, refuse_bad_rows
from hf_in2core.rows.doubts import say_doubts
from hf_in2core.rows.hashes import hash_rows, hash_value
from hf_in2core.rows.overlap import find_overlap
from hf_in2core.rows.preparation import Preparation, tokenize_rows
from hf_in2core.rows.scored import read_scores, require_scores

from .arguments import check_comparison
from .arm_folders import write_card
from .comparison import (
    Arm,
    Comparison,
    build_results,
    choose_coresets,
    describe_selection,
    find_equal_run,
    judge_run,
    plan_arms,
    write_results,
)
from .coreset_folders import keep_rows, write_coresets
from .inputs import check_trainable
from .job import HARMLESS
from .leakage import count_near_copies
from .models import hash_folder, load_tokenizer
from .next_steps import describe_publication, recommend_rows
from .run_folder import lock_folder, quiet_loading, say, warn
from .steps import take_or_judge, take_or_train, train_arms
from .training import count_loss_tokens, make_sft_trainer


def compare_arms(
    model: str,
    args: InfluenceConfig,
    scored: Dataset,
    test: Dataset,
    peft_config: PeftConfig,
    processing_class: PreTrainedTokenizerBase | None = None,
    *,
    strategy: str = "top",
    arms: Sequence[str] = ARMS,
    fractions: Sequence[float] = (0.25,),
    seeds: Sequence[int] = (0, 1, 2),
    budgets: Sequence[str] = ("steps",),
    selection: Mapping[str, Any] | None = None,
    quantization_config: Any = None,
) -> dict[str, Any]:
    """
    Train targets on a coreset, on random rows and on the whole pool, and judge whether selecting was worth it.

    What `in2core run` does once the pool is scored: the rows of every arm are chosen once and written down, each arm
    is trained by TRL's SFT with every seed, judged on the test set, and compared with intervals over the seeds.
    `args.output_dir` becomes a run's folder, with `scored/`, `coresets/`, `arms/` (the adapters), `results.json`,
    pictures and `report.html`, for `in2core report` and `publish`; which rows to train on is printed. Called again it
    goes on where it was: an arm of the same rows and settings is not trained again; one of others takes the place of
    what was there.

    Example:

    ```python
    from hf_in2core import InfluenceConfig, compare_arms

    results = compare_arms(
        model="Qwen/Qwen3-0.6B",
        args=InfluenceConfig("comparison", learning_rate=2e-4),
        scored=trainer.score_influence(),
        test=test,
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    print(results["verdict"]["text"])
    ```

    Args:
        model (`str`):
            Model to fine-tune, a Hub id or folder: every arm starts from it anew.
        args ([`InfluenceConfig`]):
            Training arguments of every arm but for `seed` and, at equal steps, `max_steps`; `columns` and
            `tokens_per_batch` count too.
        scored ([`~datasets.Dataset`]):
            The pool with its influence, from [`InfluenceTrainer.score_influence`] or a scorer.
        test ([`~datasets.Dataset`]):
            Rows that judge, of the pool's form. They should neither be in the pool nor have selected anything; rows
            of the pool and near-copies are counted, warned of and told with the verdict.
        peft_config ([`~peft.PeftConfig`]):
            Adapter that every arm trains.
        processing_class (`transformers.PreTrainedTokenizerBase`, *optional*):
            Tokenizer; the model's own by default.
        strategy (`str`, *optional*, defaults to `"top"`):
            How the coreset is chosen, as in [`select_coreset`], or a method whose column the pool has.
        arms (`Sequence[str]`, *optional*, defaults to `("full", "coreset", "random", "opponents")`):
            Arms to compare; also other ways to choose as many rows, where the pool has their columns.
        fractions (`Sequence[float]`, *optional*, defaults to `(0.25,)`):
            Shares of the pool to keep, each in (0, 1]; the first leads.
        seeds (`Sequence[int]`, *optional*, defaults to `(0, 1, 2)`):
            Seeds of the adapter, of the order and of the random rows. At least two give an interval.
        budgets (`Sequence[str]`, *optional*, defaults to `("steps",)`):
            `"steps"`: every arm takes as many steps as the largest (or `args.max_steps`). `"epochs"`: each takes
            `args.num_train_epochs` over its own rows, which tells what selecting saves.
        selection (`Mapping[str, Any]`, *optional*):
            What selecting cost, for the verdict: `seconds` of the influence, `reference_seconds` of training the
            reference.
        quantization_config (`transformers.BitsAndBytesConfig`, *optional*):
            As of [`~trl.SFTTrainer`].

    Returns:
        `dict`: what `results.json` holds: `arms` (one entry per run: `test_loss` in nats per labelled token, lower is
        better, `seconds`, …), `verdict` ([`~hf_in2core.evaluation.verdict.Verdict`] as a dict), `base`, `selection`,
        `choice`, `examples`.

    Raises:
        ValueError: before any training: for a model in memory, a pool without influence or without the column of a
            method, rows that cannot be trained on, values that cannot be, or a folder in which another is at work.
    """
    given = Comparison(list(arms), list(fractions), list(seeds), list(budgets))
    check_launcher()
    check_inputs(model, args, scored, peft_config, given)
    run = Path(args.output_dir or "")
    lock_folder(run)
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(args.model_init_kwargs, dict) else None
    model_args = ModelConfig(model_name_or_path=model, model_revision=revision or "main")
    tokenizer = processing_class or load_tokenizer(model_args, args)
    tokens, prepared_test, facts = prepare_sets(scored, test, args, tokenizer)
    coresets = choose_coresets(given, run, scored, strategy)
    keep_rows(run / "scored", scored)
    write_coresets(run, scored, {name: rows for name, rows in coresets.items() if name.startswith("coreset_")})

    sets = {VALIDATION: len(scored[0][PER_QUERY])} if PER_QUERY in scored.column_names else {VALIDATION: 0}
    known = {"seconds": None, "reference_seconds": None, "rows": len(scored), **(selection or {})}
    deciding, headline, findings = describe_selection(
        scored, scored, args.columns, tokenizer, [], given.fractions, coresets, sets, known
    )
    findings["data"] = facts
    settings = list_settings(model, args, peft_config, quantization_config)
    config = settings | asdict(given) | {"strategy": strategy, "output_dir": str(run)}
    shaping = [settings, hash_folder(model), hash_rows(tokens), hash_rows(prepared_test), PartialState().num_processes]
    shaping_hash = hash_value(shaping)

    def make(positions: list[int], name: str, **changes: Any) -> SFTTrainer:
        target_args = copy(args)
        for key, value in {"output_dir": str(run / "checkpoints" / name), **changes}.items():
            setattr(target_args, key, value)
        options = {"peft_config": copy(peft_config), "quantization_config": quantization_config}
        return make_sft_trainer(model, target_args, tokens.select(positions), tokenizer, **options)

    def save(trainer: Any, folder: Path) -> None:
        save_adapter(trainer.model, folder)
        if PartialState().is_main_process:
            tokenizer.save_pretrained(folder)

    plan = plan_arms(given)
    largest = max((coresets[arm.rows].positions for arm in plan), key=len)
    identity = hash_value([shaping_hash, largest])
    base = take_or_judge(run / "arms" / "base", identity, lambda: make(largest, "base"), prepared_test)

    def train(arm: Arm) -> dict[str, Any]:
        same, positions = find_equal_run(arm, given, args.max_steps), coresets[arm.rows].positions
        changes = {"seed": same.seed, "max_steps": base["steps"] if same.budget == "steps" else -1}
        trained = take_or_train(
            same.find_folder(run),
            hash_value([shaping_hash, positions, changes]),
            same.label,
            lambda: make(positions, same.name, **changes),
            prepared_test,
            model_args,
            save,
        )
        return same.describe() | trained | {"budget": arm.budget}

    def write(trained: list[dict[str, Any]]) -> dict[str, Any]:
        results = build_results(config, trained, len(plan), base, known, findings, given.fractions, command="")
        write_results(run, results, scored, deciding, headline)
        return results

    results = train_arms(plan, train, write)
    verdict = judge_run(results["arms"], known, base, given.fractions)
    _, lines, _ = recommend_rows(verdict, run, scored, coresets, seeds[0])
    for line in (*lines, describe_publication(run)):
        say(line)
    if PartialState().is_main_process:
        for arm, entry in zip(plan, results["arms"], strict=True):
            if find_equal_run(arm, given, args.max_steps) == arm:
                of_whom = {"base_model": model, "dataset_id": str(run / "scored")}
                write_card(arm.find_folder(run), entry, results, test_name="the test set of its comparison", **of_whom)
        print_verdict(results)
    return results


def check_inputs(model: Any, args: Any, scored: Dataset, peft_config: Any, given: Comparison) -> None:
    """
    Refuse what cannot work, before anything is read.

    Raises:
        ValueError: naming the argument, and what to give instead.
    """
    if not isinstance(model, str):
        raise ValueError(
            f"`model` is a {type(model).__name__}: every arm starts from the untrained model anew, so give its Hub id "
            "or the folder of `save_pretrained`."
        )
    if not isinstance(args, InfluenceConfig):
        raise ValueError(
            f"`args` is a {type(args).__name__}. Give an InfluenceConfig, which takes all that TRL's SFTConfig does."
        )
    if not isinstance(peft_config, PeftConfig):
        raise ValueError(
            f"`peft_config` is {peft_config!r}: arms train adapters. Give one, such as "
            'LoraConfig(target_modules="all-linear").'
        )
    require_scores(scored)
    for name, known in (("arms", ALL_ARMS), ("budgets", BUDGETS)):
        if unknown := [value for value in getattr(given, name) if value not in known]:
            raise ValueError(f"{name} has {', '.join(map(repr, unknown))}. Known are {', '.join(known)}.")
    check_comparison(given)


def prepare_sets(
    scored: Dataset, test: Dataset, args: InfluenceConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset, dict[str, dict[str, Any]]]:
    """
    Look at every row of pool and test set, and make tokens of them.

    Returns:
        `tuple`: tokens and labels of the pool, prepared rows of the test set, and `data` of `results.json`.

    Raises:
        ValueError: if a row of either cannot be trained on, or none of the test set carries loss.
    """
    with quiet_loading():
        preparation = Preparation.from_args(args, tokenizer, scored)
        checked = {POOL: check_rows(scored, preparation, POOL), "test": check_rows(test, preparation, "test set")}
        refuse_bad_rows(checked.values())
        for message in say_doubts(checked["test"]):
            warn(message)
        shared = find_overlap(checked[POOL], checked["test"])
        if shared is not None:
            warn(f"{shared}; what they measure is too good.")
        in_pool = {checked[POOL].hashes[row] for row in checked[POOL].list_good()}
        near = count_near_copies({POOL: scored, "test": test}, in_pool, args.columns, tokenizer)["test"]
        prepared_test = check_trainable(test, "test set", args, tokenizer, scored)
        tokens = tokenize_rows(scored, preparation, args.dataset_num_proc)
    loss_tokens = int(read_scores(scored, NUM_LOSS_TOKENS).sum())
    in_test = 0 if shared is None else len(shared.rows)
    pool_facts = {"rows": len(scored), "loss_tokens": loss_tokens, "shared": {"test": in_test}}
    judging = count_loss_tokens(prepared_test)["loss_tokens"]
    test_facts = {"rows": len(test), "near_copies": near, "loss_tokens": judging}
    return tokens, prepared_test, {POOL: pool_facts, "test": test_facts}


def list_settings(
    model: str, args: InfluenceConfig, peft_config: PeftConfig, quantization_config: Any
) -> dict[str, Any]:
    """What of the arguments shapes a result, as JSON holds it: of the training what is not the default."""
    defaults = {field.name: field.default for field in fields(SFTConfig) if field.name not in HARMLESS}
    values = {name: value for name, value in args.to_dict().items() if name in defaults}
    # Transformers hides the value of what is called a token; those of the tokenizer show in the rows.
    given = {name: value for name, value in values.items() if value != defaults[name] and not name.endswith("_token")}
    quantization = None if quantization_config is None else quantization_config.to_dict()
    settings = given | {
        "model_name_or_path": model,
        "columns": args.columns,
        "peft_config": {name: value for name, value in peft_config.to_dict().items() if value is not None},
        "quantization_config": quantization,
    }
    # A set's order is another one in every process.
    return json.loads(
        json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )
