"""Fine-tune a target model on a coreset, from the Hub or from disk.

    in2core sft --model_name_or_path Qwen/Qwen3-4B --dataset_name user/alpaca-in2core \\
        --split coreset_25 --columns alpaca --output_dir runs/target

An ordinary TRL SFT with LoRA; `output_dir` then holds the adapter, its card, config.yaml and training.json. With a
scored pool, `--fraction` selects: from `RUN/scored` as the run did, from others the strongest proponents. `--test` and
`--tasks` (of lm-eval) judge the model, `--hub_id user/repo` publishes it.
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hf_in2core.names import ALL_ARMS, REPLAY, RESULTS, parse_coreset
from hf_in2core.pipeline.parser import TRAINING, RecipeParser, Settings
from hf_in2core.pipeline.stage_arguments import SftCoresetArguments


PARSER = RecipeParser("sft", SftCoresetArguments, __doc__, shown={"targets": TRAINING})


def main(settings: Settings) -> None:
    """Check, train, judge, save and publish."""
    from accelerate import PartialState
    from trl import ModelConfig

    from hf_in2core import InfluenceConfig, select_coreset
    from hf_in2core.cards.composer import CARD
    from hf_in2core.evaluation.formats import format_number
    from hf_in2core.evaluation.tasks import check_task_settings
    from hf_in2core.hub.checks import check_can_push
    from hf_in2core.hub.state import read_head
    from hf_in2core.influence.launcher import check_launcher
    from hf_in2core.pipeline.arm_tasks import describe_scores, evaluate_on_tasks, load_given_tasks
    from hf_in2core.pipeline.inputs import check_trainable, keep_good_rows, load_good_rows
    from hf_in2core.pipeline.models import check_model, load_tokenizer
    from hf_in2core.pipeline.run_folder import agree, join_processes, say, warn
    from hf_in2core.pipeline.training import evaluate_model, make_trainer, tokenize, train_and_save
    from hf_in2core.rows.checks import check_rows
    from hf_in2core.rows.masks import compare_masks
    from hf_in2core.rows.preparation import Preparation
    from hf_in2core.rows.sources import find_hub_id, load_raw_rows
    from hf_in2core.selection.record import read_choice

    args: SftCoresetArguments = settings.arguments
    join_processes(settings)
    if args.tasks:
        check_launcher("`--tasks`")
        check_task_settings(args.tasks, args.include_path, args.num_fewshot, args.limit)
    if args.hub_id is not None and PartialState().is_main_process:
        check_can_push(args.hub_id, "model", private=settings.values["hub_private_repo"])
    model_args = settings.make(ModelConfig)
    training_args = settings.make(InfluenceConfig)
    check_model(model_args, training_args, for_influence=False)
    tokenizer = load_tokenizer(model_args, training_args)
    source = f"{args.dataset_name}:{args.split}" if args.split else args.dataset_name
    assert source is not None and args.dataset_name is not None
    revision = args.dataset_revision
    if find_hub_id(source) is not None:
        # Every process loads the same commit, and the card names it.
        hub_id = find_hub_id(source) or ""
        revision = agree(lambda: read_head(hub_id, repo_type="dataset", revision=args.dataset_revision).oid)
    rows = load_good_rows(source, "coreset", args, training_args, tokenizer, revision)
    if args.fraction is not None:
        # In the order in which a run's arms have them: the same seed then trains the same model.
        chosen = {} if args.split else read_choice(args.dataset_name, args.fraction)
        rows = select_coreset(rows, fraction=args.fraction, order="original", **chosen)
    prepared_test = None
    if args.test is not None:
        test = load_raw_rows(args.test, "test set", args.columns)
        preparation = Preparation.from_args(training_args, tokenizer, rows)
        sets = check_rows(rows, preparation, "coreset"), check_rows(test, preparation, "test set")
        for message in compare_masks(sets[0], sets[1:], training_args.completion_only_loss is not None):
            warn(message)
        test = keep_good_rows(test, "test set", preparation, args.bad_rows)
        prepared_test = check_trainable(test, "test set", training_args, tokenizer, rows)
    tasks = load_given_tasks(args) if args.tasks else {}
    trainer = make_trainer(model_args, training_args, tokenize(rows, training_args, tokenizer), tokenizer)
    render_card = prepare_card(settings, revision)
    trained = train_and_save(trainer, settings, "Target")
    folder = Path(training_args.output_dir or "")
    if PartialState().is_main_process:
        # The adapter is there already, and the judging below may be cut off.
        (folder / CARD).write_text(render_card(trained), encoding="utf-8")
    if prepared_test is not None:
        trained |= evaluate_model(trainer.model, prepared_test, training_args)
        loss, perplexity = trained["test_loss"], trained["test_perplexity"]
        say(f"test loss {format_number(loss, '.3f')}, perplexity {format_number(perplexity, '.2f')}")
    if tasks:
        trained["tasks"] = evaluate_on_tasks(trainer.model, tokenizer, tasks, args.limit, training_args)
        say(", ".join(f"{name} {value:.4f}" for name, value in describe_scores(trained["tasks"]).items()))
    if PartialState().is_main_process:
        (folder / CARD).write_text(render_card(trained), encoding="utf-8")
        if args.hub_id is not None:
            say(f"published: {publish(settings, folder, lambda card: render_card(trained, card))}")
    PartialState().wait_for_everyone()
    say(f"{trained['rows']:,} rows, {trained['steps']:,} steps, {trained['seconds']:.0f} s: {args.output_dir}")


def publish(settings: Settings, folder: Path, render_card: Callable[[bytes | None], str]) -> str:
    """Publish the files of the model, without folders of one's own in its settings; returns where it is."""
    from hf_in2core.cards.composer import CARD
    from hf_in2core.cards.own_folders import list_own_folders, write_without
    from hf_in2core.hub.commits import publish_files
    from hf_in2core.hub.state import Head, list_folder

    def compose(head: Head) -> tuple[dict[str, bytes], list[str]]:
        return {CARD: render_card(head.read(CARD)).encode()}, []

    # Checkpoints, in folders of their own, stay here.
    files = {path: file for path, file in list_folder(folder).items() if "/" not in path}
    with TemporaryDirectory(prefix="in2core-") as temporary:
        files[REPLAY] = write_without(folder / REPLAY, list_own_folders(settings.values), Path(temporary) / REPLAY)
        private = settings.values["hub_private_repo"]
        published = publish_files(
            settings.arguments.hub_id,
            files,
            repo_type="model",
            message="Publish model",
            compose=compose,
            private=private,
        )
    return published.url


def prepare_card(settings: Settings, revision: str | None) -> Callable[..., str]:
    """The card as a function of the trained model and of the card that is there, with the comparison of its rows."""
    from hf_in2core.cards.model import add_task_results, render_target_model_card
    from hf_in2core.cards.own_folders import hide_own_folders, list_own_folders
    from hf_in2core.evaluation.formats import read_object
    from hf_in2core.hub.state import read_head
    from hf_in2core.pipeline.arguments import describe_command
    from hf_in2core.rows.sources import find_hub_id

    args: SftCoresetArguments = settings.arguments
    source, command = args.dataset_name or "", describe_command()
    hub_id, split = find_hub_id(source), args.split
    # Of a run's folder: its pool, or one of its coresets.
    folder = Path(source)
    run_folder = folder.parent if folder.name == "scored" else folder.parent.parent
    results: dict[str, Any] = {} if hub_id else read_object(run_folder / RESULTS)
    if hub_id is not None:
        split = split or (source.split(":")[-1] if ":" in source else "train")
        results = read_object(read_head(hub_id, repo_type="dataset", revision=revision).read(RESULTS))
    name = split or ("" if hub_id else folder.name)
    arm, share = parse_coreset("full" if name in ("train", "scored") else name)
    if args.fraction is not None:
        arm, share = "coreset", args.fraction
    model_name = (args.hub_id or args.output_dir or "").rstrip("/").split("/")[-1]

    def render(run: dict[str, Any], existing: bytes | None = None) -> str:
        card = render_target_model_card(
            model_name,
            existing,
            base_model=args.model_name_or_path or "",
            dataset_id=hub_id or source,
            run=run | {"arm": arm if arm in ALL_ARMS else "–", "fraction": share or "–"},
            results=results,
            split=split,
            dataset_revision=revision if hub_id else None,
            test_name=find_hub_id(args.test or "") or _name_test_file(args.test, results),
            lora=bool(settings.values["use_peft"]),
            command=hide_own_folders(command, list_own_folders(settings.values, command)),
        )
        tasks = run.get("tasks")
        return add_task_results(card, tasks, model_name) if tasks else card

    return render


def _name_test_file(test: str | None, results: dict[str, Any]) -> str:
    """What a card calls a test set without a page: that of the run whose rows were trained on, or another."""
    from hf_in2core.evaluation.formats import get_value

    judge = get_value(results, "config", "test")
    is_same = isinstance(judge, str) and test is not None and Path(judge).absolute() == Path(test).absolute()
    return "the test set of the run that chose its rows" if is_same else "a test set of its own"
