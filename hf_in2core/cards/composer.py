"""The card of a publication, composed anew for whatever the repository holds at the moment of the commit."""

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset

from hf_in2core.evaluation.formats import read_object
from hf_in2core.hub.checks import get_data_folder
from hf_in2core.hub.state import Head, LocalFile
from hf_in2core.names import REPLAY, RESULTS
from hf_in2core.rows.places import is_hub_id

from .dataset import InfluenceSummary, render_influence_section
from .metadata import SplitFacts, add_tags, inherit_metadata, join_card, merge_splits, parse_card, replace_section
from .splits import Record, read_records, write_records


CARD, PAGE, PLOTS, SCORER, SPLITS = "README.md", "report.html", "plots", "scorer", "splits.json"
_SIZES = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
_SIZES += [(10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B")]


class Configuration:
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


class Composer:
    """Merges the card with the one at the head, and finds the files that the new ones replace."""

    def __init__(
        self,
        configs: Sequence[Configuration],
        files: Mapping[str, Path | str | bytes],
        prefix: str,
        summary: InfluenceSummary,
        sources: Mapping[str, Mapping[str, Any]],
        records: Mapping[str, Record],
    ) -> None:
        self.configs, self.files, self.prefix = configs, files, prefix
        self.summary, self.sources, self.records = summary, sources, records
        self.hashed: dict[str, LocalFile] = {}
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
        existing = head.read(CARD)
        title = f"\n# {head.repo_id.split('/')[-1]}\n"
        data, body = parse_card(existing) if existing is not None else ({}, title)
        inherit_metadata(data, self.sources)
        rows: dict[str, int] = {}
        for config in self.configs:
            known = merge_splits(data, config.name, config.folder, config.features, config.facts, held)
            rows = rows or known
        add_tags(data, "tags", ["in2core", "influence", *(["coreset"] if len(rows) > 1 else [])])
        if data.get("size_categories", [])[1:] == []:  # several were written by hand
            data["size_categories"] = [_name_size(max(rows["train"], _count_rows(data)))]

        scorer = read_object(self._read(head, f"{SCORER}/config.json"))
        if is_hub_id(str(scorer.get("base_model") or "")):
            add_tags(data, "base_model", [scorer["base_model"]])
        results = read_object(self._read(head, RESULTS))
        is_same_pool = self._holds(head, "train")
        stale = "arms" in results and f"{self.prefix}{RESULTS}" not in self.files and not is_same_pool
        records = self._merge_records(head, rows, is_same_pool)
        section = render_influence_section(
            head.repo_id,
            features=main.features,
            splits=rows,
            config_name=main.name,
            summary=self.summary,
            scorer=scorer,
            scorer_folder=f"{self.prefix}{SCORER}" if scorer else None,
            results=None if stale else results,
            stale_results=stale,
            plots=[] if stale else self._list_plots(held),
            page=f"{self.prefix}{PAGE}" if f"{self.prefix}{PAGE}" in held and not stale else None,
            replay=f"{self.prefix}{REPLAY}" if f"{self.prefix}{REPLAY}" in held and not stale else None,
            records=records,
        )
        composed = {CARD: join_card(data, replace_section(body, main.name, section)).encode()}
        if records or f"{self.prefix}{SPLITS}" in head.files:
            composed[f"{self.prefix}{SPLITS}"] = write_records(records)
        return composed, replaced

    def _holds(self, head: Head, split: str) -> bool:
        """Whether a split at the head is the one to publish, so that what is said of it there still holds."""
        shards = fnmatch.filter(self.files, f"{self.configs[0].folder}/{split}-*")
        for path in shards:
            if path not in self.hashed:
                self.hashed[path] = LocalFile.read(self.files[path])
        return all(self.hashed[path].equals(head.files.get(path)) for path in shards)

    def _merge_records(self, head: Head, splits: Iterable[str], is_same_pool: bool) -> dict[str, Record]:
        """How every split was made: as published now, else as it was known of the same rows of the same pool."""
        held = read_records(head.read(f"{self.prefix}{SPLITS}"))
        merged: dict[str, Record] = {}
        for split in splits:
            ours = self.records.get(split, {})
            is_same = is_same_pool and (split not in self.records or self._holds(head, split))
            known = held.get(split, {}) if is_same else {}
            if "strategy" in ours:
                known = {key: value for key, value in known.items() if key == "command"}
            merged[split] = ours | {key: value for key, value in known.items() if key not in ours}
        return {split: record for split, record in merged.items() if record}

    def _list_plots(self, held: Iterable[str]) -> list[str]:
        """Pictures to show; what else may lie in that folder could carry markup in its name."""
        plain = re.compile(re.escape(f"{self.prefix}{PLOTS}/") + r"[\w.-]+\.png", flags=re.ASCII)
        return sorted(path for path in held if plain.fullmatch(path))

    def _read(self, head: Head, path: str) -> bytes | None:
        """A file as it will be in the repository."""
        path = f"{self.prefix}{path}"
        source = self.files.get(path)
        if isinstance(source, bytes):
            return source
        return Path(source).read_bytes() if source is not None else head.read(path)


def _count_rows(data: Mapping[str, Any]) -> int:
    """Rows of the largest pool that a card states."""
    infos = data.get("dataset_info") or []
    splits = [split for info in (infos if isinstance(infos, list) else [infos]) for split in info.get("splits") or []]
    return max((int(split["num_examples"]) for split in splits if split["name"] == "train"), default=0)


def _name_size(rows: int) -> str:
    return next((name for limit, name in _SIZES if rows < limit), "n>10B")
