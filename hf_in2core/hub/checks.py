"""Everything that can go wrong with a push and can be known before the work that precedes it. Reads only."""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, resolve_revision
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError, validate_repo_id

from .state import Head, call_with_retries, get_status, read_head


# What `datasets` accepts, in ASCII; a longer name makes file names in its cache that a file system refuses.
_SPLIT = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_CONFIG = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9_.=-]*")
_LONGEST_NAME = 100


@dataclass(frozen=True)
class PushCheck:
    """
    What [`check_can_push`] found.

    Attributes:
        head (`Head` or `None`):
            What its branch holds now; `None` when there is no repository or no such branch yet.
        overwrites (`tuple[str, ...]`):
            Paths that exist and that the push replaces.
        warnings (`tuple[str, ...]`):
            Sentences for the user. Nothing here stops the push.
    """

    head: Head | None
    overwrites: tuple[str, ...]
    warnings: tuple[str, ...]


def check_names(splits: Iterable[str] = (), config_name: str = "default") -> None:
    """
    Check the names that a dataset repository is to carry.

    Args:
        splits (`Iterable[str]`):
            Names of splits.
        config_name (`str`, *optional*, defaults to `"default"`):
            Name of the configuration that holds them.

    Raises:
        ValueError: a name pushes but cannot be loaded afterwards, or names a path outside its folder.
    """
    if not _CONFIG.fullmatch(config_name) or len(config_name) > _LONGEST_NAME or config_name == "data":
        raise ValueError(
            f"{config_name!r} cannot name a configuration: load_dataset would not find it again. Use up to "
            f"{_LONGEST_NAME} ASCII letters, digits, '_', '=', '-' and, after the first, '.'; but not 'data'."
        )
    seen: set[str] = set()
    for split in splits:
        if not _SPLIT.fullmatch(split) or len(split) > _LONGEST_NAME or split.lower() == "all":
            raise ValueError(
                f"{split!r} cannot name a split: load_dataset would not find it again. Use up to {_LONGEST_NAME} "
                "ASCII letters, digits and '_', with single dots in between, but not 'all'; as in 'coreset_50'."
            )
        if split in seen:
            raise ValueError(f"Two splits are called {split!r}. Give each one a name of its own.")
        seen.add(split)


def check_can_push(
    repo_id: str,
    repo_type: str = "dataset",
    token: str | None = None,
    *,
    revision: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    splits: Iterable[str] = (),
    config_name: str = "default",
    source_datasets: Iterable[str] = (),
) -> PushCheck:
    """
    Check, without writing anything, that a later push can succeed. Call it before long work that ends in a push.

    Args:
        repo_id (`str`):
            Repository, `"user/name"` or `"name"` for the token's own user.
        repo_type (`str`, *optional*, defaults to `"dataset"`):
            `"dataset"` or `"model"`.
        token (`str`, *optional*):
            Access token; the one of `HF_TOKEN` or of the login when `None`.
        revision (`str`, *optional*):
            Branch to push to; it is created by the push when it does not exist.
        private (`bool`, *optional*):
            Visibility that will be asked for.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether the push opens a pull request, for which reading suffices.
        splits (`Iterable[str]`, *optional*):
            Names of the dataset splits to be pushed.
        config_name (`str`, *optional*, defaults to `"default"`):
            Configuration that holds them.
        source_datasets (`Iterable[str]`, *optional*):
            Hub ids of the datasets that the rows come from.

    Returns:
        [`PushCheck`]: what the push will meet.

    Raises:
        ValueError: a name or the repository type cannot work, or `private=True` on a public repository.
        PermissionError: the token is missing, invalid, may not write there, or the repository is gated or hidden.
    """
    splits = list(splits)
    _check_arguments(repo_id, repo_type, revision)
    check_names(splits, config_name)
    api = HfApi(token=token, library_name="hf_in2core")
    account = _read_account(api)
    repo_id = repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"
    warnings: list[str] = []
    head = None
    try:
        info = call_with_retries(lambda: api.repo_info(repo_id, repo_type=repo_type))
        exists = True
    except RepositoryNotFoundError:
        exists = False
        _check_namespace(account, repo_id, repo_type)
        other = "model" if repo_type == "dataset" else "dataset"
        if call_with_retries(lambda: api.repo_exists(repo_id, repo_type=other)):
            warnings.append(f"{repo_id} is a {other} today; the push makes a {repo_type} of the same name beside it.")
    if exists:
        if private and not info.private:
            raise ValueError(f"{repo_id} is public, but private=True was asked for. Make it private in its settings.")
        if private is False and info.private:
            warnings.append(f"{repo_id} is private and stays so: private=False does not change it.")
        _check_write(api, repo_id, repo_type, account, write=not create_pr)
        head = _read_head_if_any(repo_id, repo_type, revision, token, must_exist=create_pr)

    patterns = [f"{get_data_folder(config_name)}/{split}-*" for split in splits]
    held = head.files if head is not None else {}
    overwrites = tuple(path for path in held if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns))
    for source in dict.fromkeys(source_datasets):
        if not _states_license(api, source):
            warnings.append(f"{source} states no licence: check that you may publish its rows.")
    return PushCheck(head, overwrites, tuple(warnings))


def get_data_folder(config_name: str) -> str:
    """Folder of a configuration's parquet files in a repository, as `datasets` lays it out."""
    return "data" if config_name == "default" else config_name


def _check_arguments(repo_id: str, repo_type: str, revision: str | None) -> None:
    if repo_type not in ("dataset", "model"):
        raise ValueError(f"repo_type={repo_type!r} cannot hold this. Use 'dataset' or 'model'.")
    if not isinstance(repo_id, str) or not repo_id:
        raise ValueError(f"repo_id={repo_id!r} is no repository. Use 'user/name'.")
    validate_repo_id(repo_id)
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(f"revision={revision!r} is a commit, which nothing can be pushed to. Name a branch.")


def _read_head_if_any(
    repo_id: str, repo_type: str, revision: str | None, token: str | None, must_exist: bool
) -> Head | None:
    try:
        return read_head(repo_id, repo_type=repo_type, revision=revision, token=token)
    except RevisionNotFoundError:
        if must_exist or str(revision).startswith("refs/"):
            raise
        return None


def _read_account(api: HfApi) -> dict[str, Any]:
    try:
        account = call_with_retries(api.whoami)
    except LocalTokenNotFoundError as error:
        raise PermissionError("No access token was found. Set HF_TOKEN, or run `hf auth login`.") from error
    except HfHubHTTPError as error:
        if get_status(error) in (401, 403):
            raise PermissionError(
                "The Hub does not accept the access token. Make a new one with write permission at "
                "https://huggingface.co/settings/tokens and set HF_TOKEN, or run `hf auth login`."
            ) from error
        raise
    if _get_role(account) == "read":
        raise PermissionError(
            f"The access token of {account['name']} may only read. Make one with write permission at "
            "https://huggingface.co/settings/tokens."
        )
    return account


def _get_role(account: Mapping[str, Any]) -> str | None:
    return ((account.get("auth") or {}).get("accessToken") or {}).get("role")


def _check_namespace(account: Mapping[str, Any], repo_id: str, repo_type: str) -> None:
    namespace = repo_id.split("/")[0]
    allowed = [account["name"], *(org["name"] for org in account.get("orgs") or [])]
    if namespace not in allowed:
        raise PermissionError(
            f"{account['name']} cannot create the {repo_type} {repo_id}: it does not exist (or is hidden), and "
            f"{namespace!r} is not one of {', '.join(allowed)}. Push to one of these, or ask for access."
        )
    token = (account.get("auth") or {}).get("accessToken") or {}
    if _get_role(account) == "fineGrained":
        scopes = (token.get("fineGrained") or {}).get("scoped") or []
        granted = {
            name
            for scope in scopes
            for name in scope.get("permissions") or []
            if (scope.get("entity") or {}).get("name") == namespace
        }
        if "repo.write" not in granted:
            raise PermissionError(
                f"The fine-grained token may not write to repositories of {namespace}, so it cannot create {repo_id}. "
                "Give it that permission at https://huggingface.co/settings/tokens."
            )


def _check_write(api: HfApi, repo_id: str, repo_type: str, account: Mapping[str, Any], write: bool) -> None:
    try:
        call_with_retries(lambda: api.auth_check(repo_id, repo_type=repo_type, write=write))
    except HfHubHTTPError as error:
        if get_status(error) == 404 and not isinstance(error, RepositoryNotFoundError):
            return  # a Hub of another make may lack this question; the push will tell
        if get_status(error) not in (401, 403):
            raise
        remedy = "Ask for access." if not write else "Ask for write access, or pass create_pr=True."
        what = "write to" if write else "read"
        raise PermissionError(f"{account['name']} may not {what} the {repo_type} {repo_id}. {remedy}") from error


def _states_license(api: HfApi, source: str) -> bool:
    try:
        info = call_with_retries(lambda: api.repo_info(source, repo_type="dataset"))
    except HfHubHTTPError as error:
        if get_status(error) in (401, 403, 404):
            return False
        raise
    card = getattr(info, "card_data", None)
    return card is not None and card.get("license") is not None


def find_revision(name: str, revision: str | None = None) -> str | None:
    """
    Commit on the Hub that a model was loaded from, as the local cache has it, by its id or folder and the branch or
    commit that was asked for.

    Returns:
        `str` or `None`: the commit; `None` for a folder, and for what was never loaded from the Hub.
    """
    if not name or Path(name).exists():
        return None
    try:
        return resolve_revision(name, revision=revision, local_files_only=True).resolved
    except (OSError, ValueError):  # not in the cache, or no id at all
        return None
