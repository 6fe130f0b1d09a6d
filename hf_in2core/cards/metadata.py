"""The front matter of a card on the Hub, and its sections: read, merged with what is there, written back.

What is not ours stays: unknown keys, other configurations and splits, and every word outside the marked section.
"""

import copy
import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from datasets import DatasetInfo, Features
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

from hf_in2core.rows.scored import forget_record


_INHERITED = ("language", "license", "license_name", "license_link", "license_details", "task_categories")
_SHARD = re.compile(r"data/(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}(-\w+)?\.parquet")


@dataclass(frozen=True)
class SplitFacts:
    """What the front matter says about a split: its rows, and their bytes once loaded."""

    num_examples: int
    num_bytes: int


class _CardLoader(yaml.SafeLoader):
    """YAML 1.2's booleans only: in a card, `language: no` is Norwegian and not `False`."""


_CardLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_card(text: str | bytes) -> tuple[dict[str, Any], str]:
    """
    Split a card into its front matter and its body.

    Args:
        text (`str` or `bytes`):
            The card.

    Returns:
        `tuple[dict, str]`: the metadata (empty when there is none) and everything after it, unchanged.

    Raises:
        ValueError: the front matter is not a YAML mapping, so writing it back could lose something.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"The card is not UTF-8 text ({error}). Correct README.md first.") from error
    text = text.removeprefix("\ufeff")
    match = REGEX_YAML_BLOCK.search(text)
    if match is None:
        return {}, text
    try:
        data = yaml.load(match.group(2), Loader=_CardLoader) or {}
    except yaml.YAMLError as error:
        raise ValueError(
            f"The front matter of the card is not valid YAML ({error}). Correct README.md first."
        ) from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ValueError("The front matter of the card is not a mapping of names. Correct README.md first.")
    return {key: value for key, value in data.items() if value is not None}, text[match.end() :]


def join_card(data: Mapping[str, Any], body: str) -> str:
    """
    Write a card from its metadata and its body; the reverse of [`parse_card`].

    Raises:
        ValueError: the metadata does not survive being written and read again.
    """
    # As DatasetCardData.to_yaml does, but for its strip(), which would take a last value's spaces away.
    header = yaml_dump(dict(data), sort_keys=False, line_break="\n").rstrip("\n")
    text = f"---\n{header}\n---\n{body}"
    if parse_card(text) != (dict(data), body):
        raise ValueError("The metadata of the card would read differently once written: a value is no plain YAML.")
    return text


def replace_section(body: str, name: str, section: str) -> str:
    """
    Put a generated section into a card's body, in place of an earlier one of the same name or at the end.

    Args:
        body (`str`):
            The card without front matter.
        name (`str`):
            Name in the marks `<!-- in2core:begin name -->` and `<!-- in2core:end name -->`.
        section (`str`):
            The new section with its marks.

    Returns:
        `str`: the body; everything outside the marks is as it was.
    """
    begin, end = (re.escape(f"<!-- in2core:{mark} {name} -->") for mark in ("begin", "end"))
    # A begin without its end is left alone: text of the user's may follow it.
    pattern = re.compile(f"{begin}(?:(?!<!-- in2core:begin ).)*?{end}", re.DOTALL)
    found = [match.span() for match in pattern.finditer(body)]
    if not found:
        return f"{body.rstrip()}\n\n{section.strip()}\n".lstrip() if body.strip() else f"\n{section.strip()}\n"
    for start, stop in reversed(found[1:]):
        body = body[:start] + body[stop:]
    start, stop = found[0]
    return body[:start] + section.strip() + body[stop:]


def add_tags(data: dict[str, Any], key: str, values: Iterable[str]) -> None:
    """Add values to a list of the metadata, in place, keeping what is there."""
    present = data.get(key) or []
    listed = list(present) if isinstance(present, list) else [present]
    data[key] = list(dict.fromkeys([*listed, *values]))
    if not data[key]:
        del data[key]


def inherit_metadata(data: dict[str, Any], sources: Mapping[str, Mapping[str, Any]]) -> None:
    """
    Take language, licence and task from the cards of the source datasets, in place, where the card states none.

    A licence is taken only when every source states one: rows without a licence do not get that of others.

    Args:
        data (`dict`):
            Metadata of the card to be published.
        sources (`Mapping[str, Mapping]`):
            Hub id of each source dataset → metadata of its card.
    """
    add_tags(data, "source_datasets", sources)
    has_license = "license" in data
    for key in _INHERITED:
        # Cards of strangers: what is neither a name nor a list of names is none.
        stated = [card[key] for card in sources.values() if _is_named(card.get(key))]
        if key.startswith("license") and (has_license or len(stated) < len(sources)):
            continue
        if key in data or not stated:
            continue
        values = list(dict.fromkeys(v for value in stated for v in (value if isinstance(value, list) else [value])))
        if key.startswith("license_") and len(values) > 1:
            continue  # one name or link cannot stand for several licences
        data[key] = values[0] if len(values) == 1 and key.startswith("license") else values


def _is_named(value: Any) -> bool:
    return all(isinstance(item, str) for item in (value if isinstance(value, list) and value else [value]))


def merge_splits(
    data: dict[str, Any],
    config_name: str,
    folder: str,
    features: Features,
    splits: Mapping[str, SplitFacts],
    files: Mapping[str, int],
) -> dict[str, int]:
    """
    Enter splits into `configs` and `dataset_info`, in place. Other splits and configurations stay.

    Args:
        data (`dict`):
            Metadata of the card.
        config_name (`str`):
            Configuration that the splits belong to.
        folder (`str`):
            Folder of its parquet files.
        features (`datasets.Features`):
            Columns of the splits.
        splits (`Mapping[str, SplitFacts]`):
            The splits to enter.
        files (`Mapping[str, int]`):
            Path → bytes of what the repository will hold. Splits among them that no configuration names yet are
            entered too: once there is a configuration, `datasets` finds nothing else.

    Returns:
        `dict[str, int]`: rows of every split of the configuration whose rows are known.

    Raises:
        ValueError: other splits of the configuration have other columns, so that `datasets` could load none of them.
    """
    configs = {config.get("config_name", "default"): dict(config) for config in data.get("configs") or []}
    if not configs:
        unnamed = dict.fromkeys(match["split"] for path in sorted(files) if (match := _SHARD.fullmatch(path)))
        unnamed = {split: None for split in unnamed if config_name != "default" or split not in splits}
        if unnamed:
            configs["default"] = {"data_files": _write_data_files({split: f"data/{split}-*" for split in unnamed})}
    config = configs.setdefault(config_name, {})
    paths = _list_data_files(config.get("data_files")) | {split: f"{folder}/{split}-*" for split in splits}
    config["data_files"] = _write_data_files(paths)
    data["configs"] = _name_entries(configs)

    stated = data.get("dataset_info") or []
    stated = stated if isinstance(stated, list) else [stated]
    infos = {info.get("config_name", "default"): dict(info) for info in stated}
    info = infos.setdefault(config_name, {})
    held = {split["name"]: split for split in info.get("splits") or [] if split["name"] in paths}
    _check_features(info.get("features"), features, [name for name in held if name not in splits], config_name)
    held |= {
        name: {"name": name, "num_bytes": facts.num_bytes, "num_examples": facts.num_examples}
        for name, facts in splits.items()
    }
    patterns = [pattern for path in paths.values() for pattern in (path if isinstance(path, list) else [path])]
    info["features"] = DatasetInfo(features=features)._to_yaml_dict()["features"]
    if set(held) == set(paths):
        info["splits"] = list(held.values())
        info["download_size"] = sum(
            size for path, size in files.items() if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
        )
        info["dataset_size"] = sum(int(split.get("num_bytes") or 0) for split in held.values())
    else:
        # `datasets` refuses a repository whose card counts the rows of some splits only.
        for key in ("splits", "download_size", "dataset_size"):
            info.pop(key, None)
    named = _name_entries(infos)
    if list(infos) == ["default"]:
        del named[0]["config_name"]
    data["dataset_info"] = named if len(named) > 1 else named[0]

    # What `datasets` itself could not read back must not be published.
    card = DatasetCardData(**copy.deepcopy(data))
    MetadataConfigs.from_dataset_card_data(card)
    DatasetInfosDict.from_dataset_card_data(card)
    return {name: int(split["num_examples"]) for name, split in held.items()}


def _list_data_files(data_files: Any) -> dict[str, str | list[str]]:
    """Split → pattern, from any form in which a card may state `data_files`."""
    if not data_files:
        return {}
    if isinstance(data_files, dict):
        return dict(data_files)
    if isinstance(data_files, list) and isinstance(data_files[0], dict):
        return {file["split"]: file["path"] for file in data_files}
    return {"train": data_files}


def _write_data_files(paths: Mapping[str, str | list[str]]) -> list[dict[str, str | list[str]]]:
    return [{"split": split, "path": path} for split, path in paths.items()]


def _name_entries(entries: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of `configs` or `dataset_info` as a list, each with its name in the first place."""
    return [{"config_name": name, **{k: v for k, v in e.items() if k != "config_name"}} for name, e in entries.items()]


def _check_features(stated: Any, features: Features, other_splits: list[str], config_name: str) -> None:
    if not other_splits or stated is None:
        return
    published = DatasetInfo._from_yaml_dict({"features": copy.deepcopy(stated)}).features or {}
    before, now = forget_record(published), forget_record(features)
    if before == now:
        return
    differing = sorted(set(before) ^ set(now) | {name for name in set(before) & set(now) if before[name] != now[name]})
    raise ValueError(
        f"The repository's splits {', '.join(other_splits)} of configuration {config_name!r} differ from these in "
        f"the columns {', '.join(differing)}; load_dataset needs the same columns in all. Publish those splits again "
        "along with these, or give another config_name."
    )
