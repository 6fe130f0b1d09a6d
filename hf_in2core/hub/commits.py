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
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationDelete, HfApi, get_token
from huggingface_hub.utils import RepositoryNotFoundError, RevisionNotFoundError, validate_repo_id

from .silence import limited_silence
from .state import (
    CONFLICTS,
    Head,
    LocalFile,
    PublicationError,
    call_with_retries,
    find_differences,
    get_status,
    read_head,
    sleep_before_retry,
)


logger = logging.getLogger(__name__)

Compose = Callable[[Head], tuple[dict[str, bytes], list[str]]]

# The same 412 again and again while nobody commits is not a race: a token that may only open pull requests gets it.
_LONELY_CONFLICTS = 4
_MOST_CONFLICTS = 60
_TOKEN_PATTERN = re.compile(rb"hf_(oauth_|jwt_)?[A-Za-z0-9]{30,}")
_TEXT_SUFFIXES = (".json", ".jsonl", ".yaml", ".yml", ".toml", ".cfg", ".txt", ".log", ".md", ".html", ".jinja")
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
    parent_commit: str | None = None,
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
        parent_commit (`str`, *optional*):
            Commit that the content was made from. Nothing is published when the branch holds something newer, which
            the content would not account for.

    Returns:
        [`Publication`]: the commit, verified against the hashes that the Hub reports for it.

    Raises:
        ValueError: a file would publish an access token, or `private=True` on a public repository.
        PermissionError: commits keep being refused although nobody else commits.
        PublicationError: the Hub reports other content than what was sent, or the branch moved on from
            `parent_commit`.
        HfHubHTTPError: the Hub refused (authentication, permission, missing repository).
        TimeoutError: the Hub takes requests and does not answer. Publishing again goes on from there.
    """
    validate_repo_id(repo_id)
    refuse_secrets(files, token)
    local = {path: LocalFile.read(source) for path, source in files.items()}
    api = HfApi(token=token, library_name="hf_in2core")
    if "/" not in repo_id:
        repo_id = f"{call_with_retries(api.whoami)['name']}/{repo_id}"
    target = _Target(api, repo_id, repo_type, revision, create_pr, message)
    _ensure_repository(target, private)

    sent: list[_Change] = []
    parents: list[str] = []
    conflicts = failures = 0
    while True:
        head = read_head(repo_id, repo_type=repo_type, revision=revision, token=token)
        if parents and head.oid != parents[0]:
            landed = _find_landed_commit(target, sent, parents[0])
            if landed is not None:
                return landed
        _check_head(head, repo_id, private, parent_commit)
        change = _compare(local, compose, head, token)
        if not change.files and not change.deleted:
            logger.info("%s already holds all of it: nothing to commit.", repo_id)
            return Publication(repo_id, head.oid, target.get_commit_url(head.oid), None, ())
        sent.append(change)
        if create_pr:
            opened = _find_pull_request(target, sent)
            if opened is not None:
                return opened
        parents.append(head.oid)
        try:
            with limited_silence():
                info = _commit(target, change, head.oid)
        except Exception as error:
            if get_status(error) == 412 and parents[-_LONELY_CONFLICTS:] == [head.oid] * _LONELY_CONFLICTS:
                raise PermissionError(
                    f"The Hub keeps refusing the commit to {repo_id} (412) although nobody else commits there. The "
                    "token may be allowed to open pull requests only: pass create_pr=True or use a write token."
                ) from error
            # Behind every conflict is a publication of somebody's: they are not counted with the failures.
            if get_status(error) in CONFLICTS:
                sleep_before_retry(error, conflicts, _MOST_CONFLICTS)
                conflicts += 1
            else:
                sleep_before_retry(error, failures)
                failures += 1
            continue
        return _verify(target, info.oid, info.pr_url, change)


@dataclass(frozen=True)
class _Target:
    """Where a publication goes."""

    api: HfApi
    repo_id: str
    repo_type: str
    revision: str | None
    create_pr: bool
    message: str

    def get_commit_url(self, oid: str) -> str:
        prefix = "" if self.repo_type == "model" else f"{self.repo_type}s/"
        return f"{self.api.endpoint}/{prefix}{self.repo_id}/commit/{oid}"


@dataclass(frozen=True)
class _Change:
    """What a commit is to change. `content_id` goes into its message, so that it is known when its answer is lost."""

    files: dict[str, LocalFile]
    deleted: list[str]

    @property
    def content_id(self) -> str:
        listed = {path: file.sha256.hex() for path, file in self.files.items()} | dict.fromkeys(self.deleted)
        return "sha256:" + hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def _ensure_repository(target: _Target, private: bool | None) -> None:
    api, repo_id, kind = target.api, target.repo_id, target.repo_type
    is_branch = target.revision is not None and not target.revision.startswith("refs/")
    try:
        call_with_retries(lambda: api.repo_info(repo_id, repo_type=kind, revision=target.revision))
        return
    except RevisionNotFoundError:
        if target.create_pr or not is_branch:
            raise
    except RepositoryNotFoundError:
        call_with_retries(lambda: api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True))
    if is_branch:
        branch = str(target.revision)
        call_with_retries(lambda: api.create_branch(repo_id, branch=branch, repo_type=kind, exist_ok=True))


def _check_head(head: Head, repo_id: str, private: bool | None, parent_commit: str | None) -> None:
    if private and not head.private:
        raise ValueError(f"{repo_id} is public, but private=True was asked for. Make it private in its settings.")
    if parent_commit is not None and head.oid != parent_commit:
        raise PublicationError(
            f"{repo_id} has a newer commit ({head.oid}) than the one that this was made from ({parent_commit}), so "
            "publishing could undo what was added there. Nothing was published: load it again and repeat."
        )


def _compare(local: Mapping[str, LocalFile], compose: Compose | None, head: Head, token: str | None) -> _Change:
    composed, deleted = compose(head) if compose is not None else ({}, [])
    refuse_secrets(composed, token)
    wanted = {**local, **{path: LocalFile.read(data) for path, data in composed.items()}}
    changed = {path: file for path, file in wanted.items() if not file.equals(head.files.get(path))}
    return _Change(changed, [path for path in deleted if path in head.files and path not in wanted])


def _commit(target: _Target, change: _Change, parent: str) -> CommitInfo:
    additions = [file.to_operation(path) for path, file in change.files.items()]
    deletions = [CommitOperationDelete(path, is_folder=False) for path in change.deleted]
    kind: dict[str, Any] = {"repo_type": target.repo_type, "revision": target.revision, "create_pr": target.create_pr}
    target.api.preupload_lfs_files(target.repo_id, additions, free_memory=False, **kind)
    return target.api.create_commit(
        target.repo_id,
        [*additions, *deletions],
        commit_message=target.message,
        commit_description=f"Content: {change.content_id}",
        parent_commit=parent,
        **kind,
    )


def _find_landed_commit(target: _Target, sent: Iterable[_Change], first_parent: str) -> Publication | None:
    """The commit of an attempt whose answer was lost, if the history since `first_parent` holds one."""
    list_commits = partial(target.api.list_repo_commits, repo_type=target.repo_type, revision=target.revision)
    for commit in call_with_retries(lambda: list_commits(target.repo_id)):
        if commit.commit_id == first_parent:
            break
        for change in sent:
            if change.content_id in commit.message:
                return _verify(target, commit.commit_id, None, change)
    return None


def _find_pull_request(target: _Target, sent: Iterable[_Change]) -> Publication | None:
    """An open pull request of ours that holds one of the contents already."""
    # Anybody may open one that claims the same content, and bring more along: it is not ours to hand on.
    user = call_with_retries(target.api.whoami)["name"]
    kind: dict[str, Any] = {"repo_type": target.repo_type}
    list_pulls = partial(target.api.get_repo_discussions, target.repo_id, author=user, **kind)
    for pull in call_with_retries(lambda: list(list_pulls(discussion_type="pull_request"))):
        if pull.status not in ("open", "draft") or pull.title != target.message or pull.author != user:
            continue
        read_commits = partial(target.api.list_repo_commits, target.repo_id, revision=f"refs/pr/{pull.num}", **kind)
        commit = call_with_retries(read_commits)[0]
        for change in sent:
            is_same = change.content_id in commit.message
            if is_same and not find_differences(
                target.api, target.repo_id, target.repo_type, commit.commit_id, change.files
            ):
                return Publication(target.repo_id, commit.commit_id, pull.url, pull.url, _list_paths(change))
    return None


def _verify(target: _Target, oid: str, pr_url: str | None, change: _Change) -> Publication:
    wrong: list[str] = []
    for attempt in range(3):
        wrong = find_differences(target.api, target.repo_id, target.repo_type, oid, change.files)
        if not wrong:
            url = pr_url or target.get_commit_url(oid)
            return Publication(target.repo_id, oid, url, pr_url, _list_paths(change))
        time.sleep(attempt)
    raise PublicationError(
        f"Commit {oid} of {target.repo_id} does not hold what was sent: {', '.join(wrong[:5])} ({len(wrong)} of "
        f"{len(change.files)} files). A .gitignore in the repository may name them; otherwise publish again."
    )


def _list_paths(change: _Change) -> tuple[str, ...]:
    return (*change.files, *change.deleted)


def refuse_secrets(files: Mapping[str, str | Path | bytes], token: str | None, everybodys: bool = False) -> None:
    """
    Raise when something to publish holds the token in use, or where nobody's data is, any access token.

    Args:
        files (`Mapping[str, str | Path | bytes]`):
            Path → file or bytes. In text files any token counts; in bytes (a card may quote a row of the data, in
            which somebody's token is data like any other) only the one in use does.
        token (`str`, *optional*):
            The token in use; the one of `HF_TOKEN` or of the login when `None`.
        everybodys (`bool`, *optional*, defaults to `False`):
            Whether any token counts in bytes too.

    Raises:
        ValueError: naming the path, not the token.
    """
    secret = (token or get_token() or "").encode()
    for path, source in files.items():
        if path.endswith(_NOT_SEARCHED):
            continue
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        is_ours = everybodys if isinstance(source, bytes) else path.endswith(_TEXT_SUFFIXES)
        if (secret and secret in data) or (is_ours and _TOKEN_PATTERN.search(data)):
            raise ValueError(
                f"{path} holds an access token, which anyone could read after publication. Remove it from there; "
                "pass tokens by HF_TOKEN or token=, never in a configuration."
            )
