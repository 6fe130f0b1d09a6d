"""[`push_influence_dataset`]: a scored pool, its coresets and everything that explains them, in one commit."""

import fnmatch
import json
import logging
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from datasets import Dataset, Features
from datasets.utils.py_utils import convert_file_size_to_int
from huggingface_hub import HfApi
from huggingface_hub.utils import HfHubHTTPError

from hf_in2core.card_metadata import (
    SplitFacts,
    add_tags,
    inherit_metadata,
    join_card,
    merge_splits,
    parse_card,
    replace_section,
)
from hf_in2core.dataset_card import is_hub_id, render_influence_section, summarise_influence
from hf_in2core.hub import Head, Publication, is_main_process, list_folder, publish_files
from hf_in2core.hub_checks import check_can_push, check_names, get_data_folder
from hf_in2core.hub_state import LocalFile, call_with_retries, get_status


if TYPE_CHECKING:
    from hf_in2core.scorer import InfluenceScorer

logger = logging.getLogger(__name__)

_CARD, _RESULTS, _REPLAY, _SCORER, _PLOTS = "README.md", "results.json", "config.yaml", "scorer", "plots"
_PAGE = "report.html"
_SIZES = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
_SIZES += [(10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B")]


def push_influence_dataset(
    repo_id: str,
    scored: Dataset,
    *,
    coresets: Mapping[str, Dataset] | None = None,
    scorer: "InfluenceScorer | str | Path | None" = None,
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
        coresets (`Mapping[str, datasets.Dataset]`, *optional*):
            Split name → rows, with the pool's columns. Random controls and opponents are given here too.
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

    Returns:
        [`Publication`] or `None`: the commit, verified by the hashes that the Hub reports for it; `None` in every
        process of a launcher but the first, which alone publishes.

    Raises:
        ValueError: names, columns or an existing card cannot work, or a file would publish an access token.
        PermissionError, PublicationError, HfHubHTTPError: see [`hub.publish_files`].
    """
    if not is_main_process():
        return None
    splits = {"train": scored, **(coresets or {})}
    if coresets is not None and "train" in coresets:
        raise ValueError(
            "A coreset cannot be called 'train': that split is the whole pool. Call it 'coreset_50' or so."
        )
    check_names(splits, config_name)
    splits = {name: _align_columns(name, dataset, scored) for name, dataset in splits.items()}
    sets = {"validation": validation} if isinstance(validation, Dataset) else dict(validation or {})
    validation_config = "validation" if config_name == "default" else f"{config_name}-validation"
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
    prefix = "" if config_name == "default" else f"{config_name}/"

    with tempfile.TemporaryDirectory(prefix="in2core-") as folder:
        configs = [_Config(config_name, splits)] + ([_Config(validation_config, sets)] if sets else [])
        files: dict[str, Path | str | bytes] = {}
        for config in configs:
            files |= config.write(Path(folder), max_bytes)
        files |= _list_scorer(scorer, Path(folder), f"{prefix}{_SCORER}")
        files |= _list_report(report, prefix)
        sources = _read_sources(source_datasets, token)
        composer = _Composer(repo_id, configs, files, prefix, summarise_influence(scored), sources)
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
    card = head.read(_CARD) if head is not None else None
    if card is not None:
        data, _ = parse_card(card.decode())
        facts = dict.fromkeys(splits, SplitFacts(0, 0))
        merge_splits(data, config_name, get_data_folder(config_name), features, facts, {})


class _Config:
    """A configuration to publish: its splits, and what is known of them once they are written."""

    def __init__(self, name: str, splits: Mapping[str, Dataset]) -> None:
        self.name, self.splits = name, splits
        self.folder = get_data_folder(name)
        self.features = next(iter(splits.values())).features
        self.facts: dict[str, SplitFacts] = {}
        for split, dataset in splits.items():
            if dataset.features != self.features:
                raise ValueError(
                    f"The splits {next(iter(splits))!r} and {split!r} of {name!r} have different columns "
                    f"({list(self.features)} and {dataset.column_names}); load_dataset needs the same in both."
                )

    def write(self, folder: Path, max_bytes: int) -> dict[str, Path]:
        """Write every split as parquet files below `folder`; path in the repository → file."""
        written: dict[str, Path] = {}
        for split, dataset in self.splits.items():
            # A selection of rows still refers to the whole table: count its share only.
            size = dataset.data.nbytes * len(dataset) / max(dataset.data.num_rows, 1)
            count = min(max(1, math.ceil(size / max_bytes)), len(dataset))
            num_bytes = 0
            for index in range(count):
                path = f"{self.folder}/{split}-{index:05d}-of-{count:05d}.parquet"
                local = folder / path
                local.parent.mkdir(parents=True, exist_ok=True)
                dataset.shard(num_shards=count, index=index, contiguous=True).to_parquet(local)
                metadata = pq.read_metadata(local)
                num_bytes += sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
                written[path] = local
            self.facts[split] = SplitFacts(len(dataset), num_bytes)
        return written


class _Composer:
    """Merges the card with the one at the head, and finds the files that the new ones replace."""

    def __init__(
        self,
        repo_id: str,
        configs: Sequence[_Config],
        files: Mapping[str, Path | str | bytes],
        prefix: str,
        summary: Mapping[str, Any],
        sources: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.repo_id, self.configs, self.files, self.prefix = repo_id, configs, files, prefix
        self.summary, self.sources = summary, sources
        self.sizes = {
            path: len(source) if isinstance(source, bytes) else Path(source).stat().st_size
            for path, source in files.items()
        }

    def __call__(self, head: Head) -> tuple[dict[str, bytes], list[str]]:
        """The card, and the parquet files of an earlier publication of the same splits."""
        main = self.configs[0]
        patterns = [f"{config.folder}/{split}-*" for config in self.configs for split in config.splits]
        replaced = [
            path
            for path in head.files
            if path not in self.files and any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
        ]
        held = {path: file.size for path, file in head.files.items() if path not in replaced} | self.sizes
        existing = head.read(_CARD)
        name = self.repo_id.split("/")[-1]
        data, body = parse_card(existing.decode()) if existing is not None else ({}, f"\n# {name}\n")
        inherit_metadata(data, self.sources)
        rows: dict[str, int] = {}
        for config in self.configs:
            known = merge_splits(data, config.name, config.folder, config.features, config.facts, held)
            rows = rows or known
        add_tags(data, "tags", ["in2core", "influence", *(["coreset"] if len(rows) > 1 else [])])
        if data.get("size_categories", [])[1:] == []:  # several were written by hand
            data["size_categories"] = [_name_size(max(rows["train"], _count_rows(data)))]

        scorer = self._read_json(head, f"{_SCORER}/config.json") or {}
        if is_hub_id(str(scorer.get("base_model") or "")):
            add_tags(data, "base_model", [scorer["base_model"]])
        results = self._read_json(head, _RESULTS)
        stale = results is not None and f"{self.prefix}{_RESULTS}" not in self.files and not self._holds_pool(head)
        section = render_influence_section(
            self.repo_id,
            features=main.features,
            splits=rows,
            config_name=main.name,
            summary=self.summary,
            scorer=scorer,
            scorer_folder=f"{self.prefix}{_SCORER}" if scorer else None,
            results=None if stale else results,
            stale_results=stale,
            plots=[] if stale else sorted(p for p in held if p.startswith(f"{self.prefix}{_PLOTS}/")),
            replay=f"{self.prefix}{_REPLAY}" if f"{self.prefix}{_REPLAY}" in held and not stale else None,
        )
        return {_CARD: join_card(data, replace_section(body, main.name, section)).encode()}, replaced

    def _holds_pool(self, head: Head) -> bool:
        """Whether the pool at the head is the one to publish, so that what is said of it there still holds."""
        shards = fnmatch.filter(self.files, f"{self.configs[0].folder}/train-*")
        return all(LocalFile.read(self.files[path]).equals(head.files.get(path)) for path in shards)

    def _read_json(self, head: Head, path: str) -> dict[str, Any] | None:
        path = f"{self.prefix}{path}"
        source = self.files.get(path)
        if isinstance(source, bytes):
            content: bytes | None = source
        else:
            content = Path(source).read_bytes() if source is not None else head.read(path)
        if content is None:
            return None
        value = json.loads(content)
        return value if isinstance(value, dict) else None


def _align_columns(name: str, dataset: Dataset, scored: Dataset) -> Dataset:
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{name!r} has to be a datasets.Dataset, but is a {type(dataset).__name__}. A stream is published with "
            "its own push_to_hub."
        )
    if len(dataset) == 0:
        raise ValueError(f"{name!r} has no rows, so there is nothing to publish under that name. Leave it out.")
    if "influence" not in scored.column_names:
        raise ValueError(
            f"The pool has no column 'influence' (it has {', '.join(scored.column_names)}). Score it first, with "
            "InfluenceTrainer.score_influence() or dataset.map(scorer, batched=True)."
        )
    if set(dataset.column_names) != set(scored.column_names):
        differing = sorted(set(dataset.column_names) ^ set(scored.column_names))
        raise ValueError(
            f"{name!r} and the pool differ in the columns {', '.join(differing)}; load_dataset needs the same columns "
            "in every split. Select the coreset from the scored pool."
        )
    return dataset.with_format(None).select_columns(scored.column_names)


def _list_scorer(scorer: "InfluenceScorer | str | Path | None", folder: Path, prefix: str) -> dict[str, Path]:
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


def _list_report(report: str | Path | None, prefix: str) -> dict[str, Path]:
    if report is None:
        return {}
    folder = Path(report)
    if not folder.is_dir():
        raise ValueError(f"report={folder.name!r} is not a folder. Give the run's folder, which holds results.json.")
    names = (_RESULTS, _REPLAY, _PAGE)
    found = {f"{prefix}{name}": folder / name for name in names if (folder / name).is_file()}
    for plot in sorted(folder.glob("*.png")):
        if not re.fullmatch(r"[\w.-]+", plot.name, flags=re.ASCII):
            raise ValueError(
                f"{plot.name!r} cannot be shown in a card. Rename it with letters, digits, '_', '-', '.'."
            )
        found[f"{prefix}{_PLOTS}/{plot.name}"] = plot
    if not found:
        raise ValueError(
            f"{folder.name} holds no results.json, config.yaml or *.png to publish. Give the run's folder."
        )
    return found


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


def _count_rows(data: Mapping[str, Any]) -> int:
    """Rows of the largest pool that a card states."""
    infos = data.get("dataset_info") or []
    splits = [split for info in (infos if isinstance(infos, list) else [infos]) for split in info.get("splits") or []]
    return max((int(split["num_examples"]) for split in splits if split["name"] == "train"), default=0)


def _name_size(rows: int) -> str:
    return next((name for limit, name in _SIZES if rows < limit), "n>10B")
