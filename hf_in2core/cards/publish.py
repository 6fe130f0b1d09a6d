"""[`push_influence_dataset`]: a scored pool, its coresets and everything that explains them, in one commit."""

import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import yaml
from datasets import Dataset, Features
from datasets.utils.py_utils import convert_file_size_to_int
from huggingface_hub import HfApi
from huggingface_hub.utils import HfHubHTTPError

from hf_in2core.evaluation.formats import get_object, read_object
from hf_in2core.hub.checks import check_can_push, check_names, get_data_folder
from hf_in2core.hub.commits import Publication, is_main_process, publish_files, refuse_secrets
from hf_in2core.hub.state import Head, call_with_retries, check_inside, get_status, list_folder
from hf_in2core.names import REPLAY, RESULTS, VALIDATION, get_prefix, name_validation_config
from hf_in2core.rows.scored import require_scores
from hf_in2core.selection.coreset import select_coreset
from hf_in2core.selection.record import Coreset

from .composer import CARD, PAGE, PLOTS, SCORER, Composer, Configuration
from .dataset import summarise_influence
from .metadata import SplitFacts, merge_splits, parse_card
from .own_folders import hide_own_folders, list_own_folders, write_without
from .splits import Record, find_coreset, recognise_choice, record_choice


logger = logging.getLogger(__name__)


class SavesItself(Protocol):
    """What is published of a scorer: whatever writes a folder."""

    def save_pretrained(self, save_directory: Path) -> Any:
        """Write the folder."""


def push_influence_dataset(
    repo_id: str,
    scored: Dataset,
    *,
    coresets: Mapping[str, Dataset | Coreset | Mapping[str, Any]] | None = None,
    scorer: SavesItself | str | Path | None = None,
    report: str | Path | None = None,
    validation: Dataset | Mapping[str, Dataset] | None = None,
    source_datasets: Sequence[str] = (),
    config_name: str = "default",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    parent_commit: str | None = None,
    token: str | None = None,
    max_shard_size: int | str = "500MB",
    commit_message: str = "Publish influence",
    command: str | None = None,
) -> Publication | None:
    """
    Publish a scored pool to the Hub in one commit, with a card that explains it.

    ```python
    push_influence_dataset("user/alpaca-in2core", scored, coresets={"coreset_50": coreset}, scorer=scorer)
    load_dataset("user/alpaca-in2core", split="coreset_50")
    ```

    The pool becomes the split `train`, each coreset a split of its own. A reader sees the old state of the repository
    or the new one, never half. What was there stays: other splits and configurations, and the card's own text and
    metadata. Publishing the same content again changes nothing; an interrupted publication is taken up by calling
    again, without sending large files that arrived. Several publishers at once each end published.

    Negative influence = proponent (training on the row lowers the validation loss), positive = opponent.

    Args:
        repo_id (`str`):
            Dataset repository, `"user/name"`; created when it does not exist.
        scored (`datasets.Dataset`):
            The annotated pool: its own columns and `influence` (float; null or NaN where a row carries no loss).
        coresets (`Mapping[str, datasets.Dataset | Coreset | Mapping]`, *optional*):
            Split name → rows with the pool's columns, the arguments of [`select_coreset`] that choose them, as in
            `{"coreset_50": {"fraction": 0.5}}`, or a [`~selection.record.Coreset`] of a run. Random controls and
            opponents are given here too. The card tells how each was chosen; of rows that are given as they are, as
            far as their influence shows it.
        scorer ([`InfluenceScorer`], `str` or `Path`, *optional*):
            The fitted scorer, or the folder it was saved in; published under `scorer/`.
        report (`str` or `Path`, *optional*):
            Folder of the run: its `results.json`, `config.yaml`, `*.png` and `report.html` are published where they
            exist. The page shows rows of the pool, and validation rows where `influence_per_query` was computed.
        validation (`datasets.Dataset` or `Mapping[str, datasets.Dataset]`, *optional*):
            Validation sets to publish along, as splits of the configuration `validation`.
        source_datasets (`Sequence[str]`, *optional*):
            Hub ids of the datasets that the pool was made of; language and licence are taken from their cards.
        config_name (`str`, *optional*, defaults to `"default"`):
            Configuration that the splits belong to; another name keeps several scored pools in one repository.
        private (`bool`, *optional*):
            Visibility of a repository that is created. An existing public repository with `private=True` is an error.
        revision (`str`, *optional*):
            Branch to publish to; created when it does not exist.
        create_pr (`bool`, *optional*, defaults to `False`):
            Open a pull request instead.
        parent_commit (`str`, *optional*):
            Commit that the pool was loaded from, when published rows were added to: nothing is published when somebody
            has published there since, whose rows would be lost.
        token (`str`, *optional*):
            Access token; the one of `HF_TOKEN` or of the login when `None`.
        max_shard_size (`int` or `str`, *optional*, defaults to `"500MB"`):
            Largest size of a parquet file, before compression. All files are written to the temporary folder
            (`TMPDIR`) first.
        commit_message (`str`, *optional*, defaults to `"Publish influence"`):
            First line of the commit message.
        command (`str`, *optional*):
            Commands that made the splits, one a line, for the card.

    Returns:
        [`Publication`] or `None`: the commit, verified by the hashes that the Hub reports for it; `None` in every
        process of a launcher but the first, which alone publishes.

    Raises:
        ValueError: names, columns or an existing card cannot work, or a file would publish an access token.
        PermissionError, PublicationError, HfHubHTTPError: see [`hub.publish_files`].
    """
    if not is_main_process():
        return None
    if command is not None:
        refuse_secrets({"command": command.encode()}, token, everybodys=True)
    if coresets is not None and "train" in coresets:
        raise ValueError(
            "A coreset cannot be called 'train': that split is the whole pool. Call it 'coreset_50' or so."
        )
    check_names(["train", *(coresets or {})], config_name)
    own_folders = _find_own_folders(report, command or "")
    if command is not None:
        command = hide_own_folders(command, own_folders)
    splits, records = _choose_splits(scored, coresets or {}, command)
    sets = {VALIDATION: validation} if isinstance(validation, Dataset) else dict(validation or {})
    validation_config = name_validation_config(config_name)
    if sets:
        check_names(sets, validation_config)
    check = check_can_push(
        repo_id,
        token=token,
        revision=revision,
        private=private,
        create_pr=create_pr,
        splits=splits,
        config_name=config_name,
        source_datasets=source_datasets,
    )
    for warning in check.warnings:
        logger.warning(warning)
    if check.overwrites:
        logger.info("%s holds these splits already; what differs is replaced.", repo_id)
    max_bytes = convert_file_size_to_int(max_shard_size)
    prefix = get_prefix(config_name)

    with tempfile.TemporaryDirectory(prefix="in2core-") as folder:
        configs = [Configuration(config_name, splits)] + ([Configuration(validation_config, sets)] if sets else [])
        files: dict[str, Path | str | bytes] = {}
        for config in configs:
            files |= config.write(Path(folder), max_bytes)
        files |= _list_scorer(scorer, Path(folder), f"{prefix}{SCORER}")
        files |= _list_report(report, prefix, Path(folder), own_folders)
        sources = _read_sources(source_datasets, token)
        found = (find_coreset(name, given, scored) for name, given in (coresets or {}).items())
        told = files.get(f"{prefix}{SCORER}/config.json")
        fitted_on = get_object(read_object(told if isinstance(told, Path) else None), "validation_sets")
        summary = summarise_influence(
            scored, [coreset for coreset in found if coreset is not None], validation_sets=fitted_on
        )
        composer = Composer(configs, files, prefix, summary, sources, records)
        return publish_files(
            repo_id,
            files,
            repo_type="dataset",
            message=commit_message,
            compose=composer,
            token=token,
            private=private,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent_commit,
        )


def check_published_columns(head: Head | None, features: Features, splits: Sequence[str], config_name: str) -> None:
    """
    Check, before the work that ends in a push, that what a repository holds can be merged with.

    Args:
        head ([`Head`] or `None`):
            What the branch holds, from [`hub.check_can_push`]; `None` where there is nothing.
        features (`datasets.Features`):
            Columns that the splits will have.
        splits (`Sequence[str]`):
            Splits that will be published.
        config_name (`str`):
            Configuration that they belong to.

    Raises:
        ValueError: its card is not valid, or splits that stay there have other columns.
    """
    card = head.read(CARD) if head is not None else None
    if card is not None:
        data, _ = parse_card(card)
        facts = dict.fromkeys(splits, SplitFacts(0, 0))
        merge_splits(data, config_name, get_data_folder(config_name), features, facts, {})


def _choose_splits(
    scored: Dataset, coresets: Mapping[str, Dataset | Coreset | Mapping[str, Any]], command: str | None
) -> tuple[dict[str, Dataset], dict[str, Record]]:
    """Rows of every split, and what is known of how they were chosen."""
    splits, records = {"train": _align_columns("train", scored, scored)}, {"train": Record()}
    for name, given in coresets.items():
        if isinstance(given, Mapping):
            splits[name] = _align_columns(name, select_coreset(scored, **given), scored)
            records[name] = record_choice(given)
        elif isinstance(given, Coreset):
            splits[name] = _align_columns(name, given.take_from(scored), scored)
            records[name] = record_choice(given.arguments)
        else:
            splits[name] = _align_columns(name, given, scored)
            records[name] = recognise_choice(name, splits[name], scored)
    return splits, {name: record | ({"command": command} if command else {}) for name, record in records.items()}


def _align_columns(name: str, dataset: Dataset, scored: Dataset) -> Dataset:
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{name!r} has to be a datasets.Dataset, but is a {type(dataset).__name__}. A stream is published with "
            "its own push_to_hub."
        )
    if len(dataset) == 0:
        raise ValueError(f"{name!r} has no rows, so there is nothing to publish under that name. Leave it out.")
    require_scores(scored)
    if set(dataset.column_names) != set(scored.column_names):
        differing = sorted(set(dataset.column_names) ^ set(scored.column_names))
        raise ValueError(
            f"{name!r} and the pool differ in the columns {', '.join(differing)}; load_dataset needs the same columns "
            "in every split. Select the coreset from the scored pool."
        )
    return dataset.with_format(None).select_columns(scored.column_names)


def _list_scorer(scorer: SavesItself | str | Path | None, folder: Path, prefix: str) -> dict[str, Path]:
    if scorer is None:
        return {}
    if not isinstance(scorer, str | Path):
        scorer.save_pretrained(folder / "scorer-folder")
        scorer = folder / "scorer-folder"
    if not (Path(scorer) / "config.json").is_file():
        raise ValueError(
            f"{Path(scorer).name} is no scorer's folder: it has no config.json. Save the scorer there first."
        )
    return list_folder(scorer, prefix)


def _find_own_folders(report: str | Path | None, command: str) -> list[str]:
    """The folders of this machine that a run's configuration, results and commands name."""
    if report is None:
        return list_own_folders({}, command)
    config = Path(report) / REPLAY
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None
    told = get_object(read_object(Path(report) / RESULTS), "config")
    return list_own_folders({"told": told, "settings": settings}, command)


def _list_report(
    report: str | Path | None, prefix: str, temporary: Path, own_folders: Sequence[str]
) -> dict[str, Path]:
    if report is None:
        return {}
    folder = Path(report)
    if not folder.is_dir():
        raise ValueError(f"report={folder.name!r} is not a folder. Give the run's folder, which holds results.json.")
    names = (RESULTS, REPLAY, PAGE)
    found = {f"{prefix}{name}": folder / name for name in names if (folder / name).is_file()}
    for path in [*found.values(), *folder.glob("*.png")]:
        check_inside(path, folder)
    for plot in sorted(folder.glob("*.png")):
        if not re.fullmatch(r"[\w.-]+", plot.name, flags=re.ASCII):
            raise ValueError(
                f"{plot.name!r} cannot be shown in a card. Rename it with letters, digits, '_', '-', '.'."
            )
        found[f"{prefix}{PLOTS}/{plot.name}"] = plot
    if not found:
        raise ValueError(
            f"{folder.name} holds no results.json, config.yaml or *.png to publish. Give the run's folder."
        )
    if f"{prefix}{REPLAY}" in found:
        found[f"{prefix}{REPLAY}"] = _write_replay(folder / REPLAY, temporary)
    for name in names:
        if (file := found.get(f"{prefix}{name}")) is not None:
            found[f"{prefix}{name}"] = write_without(file, own_folders, temporary / f"public-{name}")
    return found


def _write_replay(config: Path, temporary: Path) -> Path:
    """The run's settings without where it is published: whoever runs it again may write elsewhere, or nowhere."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or "hub_id" not in settings:
        return config
    replay = temporary / REPLAY
    del settings["hub_id"]
    replay.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return replay


def _read_sources(source_datasets: Sequence[str], token: str | None) -> dict[str, dict[str, Any]]:
    """Metadata of the cards of the source datasets, by their Hub ids."""
    api = HfApi(token=token, library_name="hf_in2core")
    cards: dict[str, dict[str, Any]] = {}
    for source in source_datasets:
        try:
            info = call_with_retries(partial(api.dataset_info, source))
        except HfHubHTTPError as error:
            if get_status(error) not in (401, 403, 404):
                raise
            cards[source] = {}
            continue
        cards[source] = info.card_data.to_dict() if info.card_data is not None else {}
    return cards
