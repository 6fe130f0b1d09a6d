"""Publishing to the Hugging Face Hub: one commit, whole or not at all, and checked afterwards.

The plain network layer. It moves named bytes and knows nothing of influence; it is the only module that writes to the
network.

A publication reads the head of the branch, composes what depends on it (a card is merged with the card that is
there), uploads large files ahead, and makes **one** commit with the head as `parent_commit`: a reader sees the old
state or the new one. What fails in passing is tried again from the start: when somebody else committed in between
(HTTP 409, 412) the head is read anew and merged anew; when the answer to a commit is lost, the history is looked at
before another commit is made. Large files that arrived once are not sent again. In the end the Hub is asked, by
commit and not by branch, for the hashes of what it holds.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationDelete, HfApi, get_token
from huggingface_hub.utils import RepositoryNotFoundError, RevisionNotFoundError, validate_repo_id

from hf_in2core.hub_checks import PushCheck, check_can_push
from hf_in2core.hub_state import (
    ATTEMPTS,
    Head,
    LocalFile,
    PublicationError,
    call_with_retries,
    find_differences,
    get_status,
    list_folder,
    read_head,
    sleep_before_retry,
)


__all__ = [
    "Head",
    "Publication",
    "PublicationError",
    "PushCheck",
    "check_can_push",
    "is_main_process",
    "list_folder",
    "publish_files",
    "read_head",
    "upload_folder_in_one_commit",
]

logger = logging.getLogger(__name__)

Compose = Callable[[Head], tuple[dict[str, bytes], list[str]]]

# The same 412 again and again while nobody commits is not a race: a token that may only open pull requests gets it.
_LONELY_CONFLICTS = 4
_TOKEN_PATTERN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
_TEXT_SUFFIXES = (".json", ".jsonl", ".yaml", ".yml", ".toml", ".cfg", ".txt", ".log", ".md", ".html")
# Compressed or numbers: a search for a token would find nothing.
_NOT_SEARCHED = (".parquet", ".safetensors", ".png")


@dataclass(frozen=True)
class Publication:
    """What a publication did: the commit that holds it, and the paths that changed (none when all was there already).

    `url` is the commit's, or the pull request's when one was opened (`pr_url` says so).
    """

    repo_id: str
    commit: str
    url: str
    pr_url: str | None
    changed: tuple[str, ...]


def is_main_process() -> bool:
    """Whether this process is the one that pushes: rank 0 of a launcher (`RANK`), or the only one there is."""
    return int(os.environ.get("RANK", "0")) == 0


def publish_files(
    repo_id: str,
    files: Mapping[str, str | Path | bytes],
    *,
    repo_type: str,
    message: str,
    compose: Compose | None = None,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Publication:
    """
    Publish files in one commit. The repository and the branch are created when they do not exist.

    Files that the repository already holds with the same content are left out; when nothing is left, no commit is
    made. Everything else in the repository stays as it is.

    Args:
        repo_id (`str`):
            Repository, `"user/name"` or `"name"` for the token's own user.
        files (`Mapping[str, str | Path | bytes]`):
            Path in the repository → local file, or the bytes themselves.
        repo_type (`str`):
            `"dataset"` or `"model"`.
        message (`str`):
            First line of the commit message.
        compose (`Callable[[Head], tuple[dict[str, bytes], list[str]]]`, *optional*):
            Called with the head that the commit will be based on; returns further files and the paths to delete. It is
            called again whenever the head has moved, so whatever merges with published content belongs here.
        token (`str`, *optional*):
            Access token; the one of `HF_TOKEN` or of the login when `None`.
        private (`bool`, *optional*):
            Visibility of a repository that is created. An existing public repository with `private=True` is an error.
        revision (`str`, *optional*):
            Branch to commit to; the default branch when `None`.
        create_pr (`bool`, *optional*, defaults to `False`):
            Open a pull request instead. An open pull request with the same content is found and returned.

    Returns:
        [`Publication`]: the commit, verified against the hashes that the Hub reports for it.

    Raises:
        ValueError: a file would publish an access token, or `private=True` on a public repository.
        PermissionError: commits keep being refused although nobody else commits.
        PublicationError: the Hub reports other content than what was sent.
        HfHubHTTPError: the Hub refused (authentication, permission, missing repository).
    """
    validate_repo_id(repo_id)
    _refuse_secrets(files, token)
    api = HfApi(token=token, library_name="hf_in2core")
    local = {path: LocalFile.read(source) for path, source in files.items()}
    if "/" not in repo_id:
        repo_id = f"{call_with_retries(api.whoami)['name']}/{repo_id}"
    _ensure_repository(api, repo_id, repo_type, private, revision, create_pr)

    sent: dict[str, tuple[dict[str, LocalFile], list[str]]] = {}  # content id -> what that commit changes
    first_parent, lonely_conflicts, last_parent = None, 0, None
    for attempt in range(ATTEMPTS):
        head = read_head(repo_id, repo_type=repo_type, revision=revision, token=token)
        if private and not head.private:
            raise ValueError(f"{repo_id} is public, but private=True was asked for. Make it private in its settings.")
        landed = _find_landed_commit(api, repo_id, repo_type, revision, sent, first_parent, head)
        if landed is not None:
            return _verified(api, repo_id, repo_type, landed[0], None, *sent[landed[1]])
        composed, deleted = compose(head) if compose is not None else ({}, [])
        _refuse_secrets(composed, token)
        wanted = local | {path: LocalFile.read(data) for path, data in composed.items()}
        changed = {path: file for path, file in wanted.items() if not file.equals(head.files.get(path))}
        deleted = [path for path in deleted if path in head.files and path not in wanted]
        if not changed and not deleted:
            logger.info("%s already holds all of it: nothing to commit.", repo_id)
            return Publication(repo_id, head.oid, _commit_url(api, repo_id, repo_type, head.oid), None, ())
        content_id = _compute_content_id(changed, deleted)
        sent[content_id] = (changed, deleted)
        if create_pr:
            pull = _find_pull_request(api, repo_id, repo_type, message, sent)
            if pull is not None:
                return _verified(api, repo_id, repo_type, pull[0], pull[1], *sent[pull[2]])
        first_parent = first_parent or head.oid
        operations = [file.to_operation(path) for path, file in changed.items()]
        try:
            info = api.create_commit(
                repo_id,
                operations + [CommitOperationDelete(path, is_folder=False) for path in deleted],
                commit_message=message,
                commit_description=f"Content: {content_id}",
                repo_type=repo_type,
                revision=revision,
                create_pr=create_pr,
                parent_commit=head.oid,
            )
        except Exception as error:
            lonely_conflicts = lonely_conflicts + 1 if get_status(error) == 412 and last_parent == head.oid else 0
            if lonely_conflicts >= _LONELY_CONFLICTS:
                raise PermissionError(
                    f"The Hub keeps refusing the commit to {repo_id} (412) although nobody else commits there. The "
                    "token may be allowed to open pull requests only: pass create_pr=True or use a write token."
                ) from error
            last_parent = head.oid
            sleep_before_retry(error, attempt)
            continue
        return _verified(api, repo_id, repo_type, info.oid, info.pr_url, changed, deleted)
    raise AssertionError("unreachable: the last attempt raises")


def upload_folder_in_one_commit(
    folder: str | Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    path_in_repo: str = "",
    message: str = "Upload folder",
    compose: Compose | None = None,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Publication:
    """
    Publish a folder in one commit, with the guarantees of [`publish_files`].

    Hidden files, pickles and `training_args.bin` are left out.

    Args:
        folder (`str` or `Path`):
            The local folder.
        repo_id (`str`):
            Repository, `"user/name"` or `"name"` for the token's own user.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"dataset"` or `"model"`.
        path_in_repo (`str`, *optional*, defaults to `""`):
            Folder in the repository, its root by default.
        message (`str`, *optional*, defaults to `"Upload folder"`):
            First line of the commit message.
        compose (`Callable`, *optional*):
            See [`publish_files`]; what it returns wins over the folder's file of the same path.
        token, private, revision, create_pr:
            See [`publish_files`].

    Returns:
        [`Publication`]: the verified commit.
    """
    files = list_folder(folder, path_in_repo)
    if not files:
        raise ValueError(f"{Path(folder).name} holds no file to publish. Save into it first.")
    return publish_files(
        repo_id,
        files,
        repo_type=repo_type,
        message=message,
        compose=compose,
        token=token,
        private=private,
        revision=revision,
        create_pr=create_pr,
    )


def _ensure_repository(
    api: HfApi, repo_id: str, repo_type: str, private: bool | None, revision: str | None, create_pr: bool
) -> None:
    try:
        call_with_retries(lambda: api.repo_info(repo_id, repo_type=repo_type, revision=revision))
        return
    except RevisionNotFoundError:
        if create_pr or str(revision).startswith("refs/"):
            raise
    except RepositoryNotFoundError:
        call_with_retries(lambda: api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True))
    if revision is not None and not revision.startswith("refs/"):
        call_with_retries(lambda: api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True))


def _find_landed_commit(
    api: HfApi,
    repo_id: str,
    repo_type: str,
    revision: str | None,
    sent: Mapping[str, Any],
    first_parent: str | None,
    head: Head,
) -> tuple[str, str] | None:
    """The commit of an earlier attempt whose answer was lost, and its content id, if the history since holds one."""
    if first_parent is None or head.oid == first_parent:
        return None
    history = call_with_retries(lambda: api.list_repo_commits(repo_id, repo_type=repo_type, revision=revision))
    for commit in history:
        if commit.commit_id == first_parent:
            break
        for content_id in sent:
            if content_id in commit.message:
                return commit.commit_id, content_id
    return None


def _find_pull_request(
    api: HfApi,
    repo_id: str,
    repo_type: str,
    title: str,
    sent: Mapping[str, tuple[dict[str, LocalFile], list[str]]],
) -> tuple[str, str, str] | None:
    """Commit, address and content id of an open pull request that holds one of the contents already."""
    kind: dict[str, Any] = {"repo_type": repo_type}
    pulls = call_with_retries(lambda: list(api.get_repo_discussions(repo_id, discussion_type="pull_request", **kind)))
    for pull in pulls:
        if pull.status not in ("open", "draft") or pull.title != title:
            continue
        ref = f"refs/pr/{pull.num}"
        commit = call_with_retries(lambda ref=ref: api.list_repo_commits(repo_id, revision=ref, **kind))[0]
        for content_id, (changed, _) in sent.items():
            # The message alone proves nothing: anybody may open a pull request that claims the same content.
            if content_id in commit.message and not find_differences(
                api, repo_id, repo_type, commit.commit_id, changed
            ):
                return commit.commit_id, pull.url, content_id
    return None


def _verified(
    api: HfApi,
    repo_id: str,
    repo_type: str,
    oid: str,
    pr_url: str | None,
    changed: Mapping[str, LocalFile],
    deleted: Iterable[str],
) -> Publication:
    for attempt in range(3):
        wrong = find_differences(api, repo_id, repo_type, oid, changed)
        if not wrong:
            url = pr_url or _commit_url(api, repo_id, repo_type, oid)
            return Publication(repo_id, oid, url, pr_url, (*changed, *deleted))
        time.sleep(attempt)
    raise PublicationError(
        f"Commit {oid} of {repo_id} does not hold what was sent: {', '.join(wrong[:5])} ({len(wrong)} of "
        f"{len(changed)} files). A .gitignore in the repository may name them; otherwise publish again."
    )


def _commit_url(api: HfApi, repo_id: str, repo_type: str, oid: str) -> str:
    prefix = "" if repo_type == "model" else f"{repo_type}s/"
    return f"{api.endpoint}/{prefix}{repo_id}/commit/{oid}"


def _compute_content_id(changed: Mapping[str, LocalFile], deleted: Iterable[str]) -> str:
    listed = {path: file.sha256.hex() for path, file in changed.items()} | dict.fromkeys(deleted)
    return "sha256:" + hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def _refuse_secrets(files: Mapping[str, str | Path | bytes], token: str | None) -> None:
    """Raise when a file holds the token in use, or a text file on disk any access token."""
    secret = (token or get_token() or "").encode()
    for path, source in files.items():
        if path.endswith(_NOT_SEARCHED):
            continue
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        # Composed bytes (a card) may quote a row of the data in which somebody's token is data like any other.
        is_file = not isinstance(source, bytes) and path.endswith(_TEXT_SUFFIXES)
        if (secret and secret in data) or (is_file and _TOKEN_PATTERN.search(data)):
            raise ValueError(
                f"{path} holds an access token, which anyone could read after publication. Remove it from the file; "
                "pass tokens by HF_TOKEN or token=, never in a configuration."
            )
