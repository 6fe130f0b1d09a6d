"""A small Hub on 127.0.0.1 that the real clients talk to over real HTTP, with fault injection.

Two origins, as on the real Hub: the API with the regular files, and a store of large files behind "signed" addresses,
which refuses an `Authorization` header as object stores do. Everything is in memory; a commit is applied whole or not
at all. Tests set `hub.faults`, read `hub.log`, look into `hub.repos`; clients are processes of `hub_client.py`.
"""

import base64
import hashlib
import itertools
import json
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import yaml
from loopback_http import Answer, Fault, Handler, HubError, Request, Server, ranged


LFS_SUFFIXES = (".parquet", ".safetensors", ".png", ".bin", ".arrow")
FRONT_MATTER = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")


@dataclass(frozen=True)
class Blob:
    """One file's content as the Hub sees it: `oid` is git's, of the content or of the LFS pointer."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()
        )

    @property
    def oid(self) -> str:
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def listing(self, path: str) -> dict:
        entry = {"type": "file", "oid": self.oid, "size": len(self.data), "path": path}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return entry


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    tree: dict[str, Blob]


@dataclass
class Repo:
    type: str
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: list[dict] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def commit(self, ref: str, parent: str | None, title: str, message: str, author: str, tree: dict) -> Commit:
        listed = sorted((path, blob.oid) for path, blob in tree.items())
        seed = f"{self.type}/{self.id}/{len(self.commits)}/{title}/{listed}"
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), parent, title, message, author, dict(tree))
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit

    def resolve(self, revision: str) -> Commit:
        for ref in (f"refs/heads/{revision}", revision, f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if revision in self.commits:
            return self.commits[revision]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits from newest to oldest."""
        commits = [self.resolve(revision)]
        while commits[-1].parent:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.resolve(revision).tree.items()}


class LoopbackHub:
    """The server. Above `multipart_above` bytes an upload comes in parts of that size."""

    def __init__(self, multipart_above: int = 1 << 20):
        self.multipart_above = multipart_above
        self.users: dict[str, dict] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.parts: dict[tuple[str, str], bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.errors: list[str] = []
        self.counts: dict[str, itertools.count] = {}
        self.lock = threading.RLock()
        self.closed = threading.Event()

    def __enter__(self) -> "LoopbackHub":
        self.servers = [self._serve("hub"), self._serve("store")]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()
        assert not self.errors, self.errors

    def _serve(self, origin: str) -> Server:
        handler = type("Handler", (Handler,), {"hub": self, "origin": origin})
        server = Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    def add_user(self, token: str, name: str, role: str = "write", orgs: tuple[str, ...] = ()) -> None:
        self.users[token] = {"name": name, "role": role, "orgs": orgs}

    def add_repo(self, repo_type: str, repo_id: str, files: dict[str, bytes] | None = None, **fields: Any) -> Repo:
        repo = Repo(repo_type, repo_id, **fields)
        tree = {path: Blob(data, path.endswith(LFS_SUFFIXES)) for path, data in (files or {}).items()}
        tree.setdefault(".gitattributes", Blob(b"*.parquet filter=lfs diff=lfs merge=lfs -text\n", False))
        repo.commit("refs/heads/main", None, "initial commit", "", repo_id.split("/")[0], tree)
        repo.objects = {blob.sha256: blob.data for blob in tree.values() if blob.lfs}
        self.repos[(repo_type, repo_id)] = repo
        return repo

    def requests(self, owner: str | None = None, kind: str | None = None) -> list[Request]:
        with self.lock:
            return [r for r in self.log if (owner in (None, r.owner)) and (kind in (None, r.kind))]

    # What each route does. `user` is None for an anonymous request; `p` holds the route's named parts.

    def _repo(self, user: dict | None, p: dict, write: bool = False, content: bool = False) -> Repo:
        repo_type = p.get("type") or (p.get("prefix") or "models/").removesuffix("s/")
        repo = self.repos.get((repo_type, p["id"]))
        owns = user is not None and p["id"].split("/")[0] in (user["name"], *user["orgs"])
        if repo is None or (repo.private and not owns):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if content and repo.gated and not owns:
            raise HubError(403, f"Access to {repo_type} {p['id']} is restricted", "GatedRepo")
        if write and (user is None or not owns or user["role"] != "write"):
            raise HubError(403, "You don't have write access to this repository")
        return repo

    def whoami(self, user: dict | None, p: dict, r: Request) -> Answer:
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        orgs = [{"type": "org", "name": name} for name in user["orgs"]]
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": user["role"]}}
        return Answer(body={"type": "user", "name": user["name"], "orgs": orgs, "auth": auth})

    def create_repo(self, user: dict | None, p: dict, r: Request) -> Answer:
        body = json.loads(r.body)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        owner, repo_type = body.get("organization") or user["name"], body.get("type") or "model"
        repo_id = f"{owner}/{body['name']}"
        url = f"{self.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"
        if owner not in (user["name"], *user["orgs"]) or user["role"] != "write":
            raise HubError(403, f'You don\'t have the rights to create a {repo_type} under the namespace "{owner}"')
        with self.lock:
            if (repo_type, repo_id) in self.repos:
                return Answer(409, {"error": "You already created this repo", "url": url})
            self.add_repo(repo_type, repo_id, private=body.get("visibility") == "private")
        return Answer(body={"url": url, "name": repo_id})

    def validate_yaml(self, user: dict | None, p: dict, r: Request) -> Answer:
        match = FRONT_MATTER.search(json.loads(r.body)["content"])
        try:
            data = yaml.safe_load(match.group(2)) if match else {}
            errors = [] if isinstance(data, dict) else [{"message": "metadata is not a mapping"}]
        except yaml.YAMLError as error:
            data, errors = None, [{"message": str(error)}]
        warnings = [] if data or errors else [{"message": "empty or missing yaml metadata in repo card"}]
        return Answer(400 if errors else 200, {"errors": errors, "warnings": warnings})

    def auth_check(self, user: dict | None, p: dict, r: Request) -> Answer:
        self._repo(user, p, write=bool(p["write"]), content=True)
        return Answer(body={})

    def info(self, user: dict | None, p: dict, r: Request) -> Answer:
        repo = self._repo(user, p)
        commit = repo.resolve(p["revision"] or "main")
        siblings = [{"rfilename": path} for path in commit.tree]
        body = {"id": repo.id, "sha": commit.oid, "private": repo.private, "siblings": siblings}
        match, card = FRONT_MATTER.search(repo.files(commit.oid).get("README.md", b"").decode(errors="replace")), None
        with suppress(yaml.YAMLError):
            card = yaml.load(match.group(2), Loader=yaml.BaseLoader) if match else None
        gated = "manual" if repo.gated else False
        return Answer(body=body | {"gated": gated, "disabled": False, "tags": [], "cardData": card})

    def tree(self, user: dict | None, p: dict, r: Request) -> Answer:
        commit, base = self._repo(user, p, content=True).resolve(p["revision"]), unquote(p["path"] or "").strip("/")
        inside = {path: blob for path, blob in commit.tree.items() if not base or path.startswith(base + "/")}
        if base and not inside:
            raise HubError(404, f"{base} does not exist on {p['revision']}", "EntryNotFound")
        entries, depth = {}, len(base.split("/")) if base else 0
        for path, blob in sorted(inside.items()):
            parts = path.split("/")
            for length in range(depth + 1, len(parts)):
                folder = "/".join(parts[:length])
                entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            entries[path] = blob.listing(path)
        if r.query.get("recursive", "").lower() not in ("1", "true"):
            entries = {path: entry for path, entry in entries.items() if path.count("/") == depth}
        last = {"id": commit.oid, "title": commit.title, "date": "2026-01-01T00:00:00.000Z"}
        start, listed = int(r.query.get("cursor", 0)), [entry | {"lastCommit": last} for entry in entries.values()]
        more = f'<{self.endpoint}{r.path}?recursive={r.query.get("recursive", "")}&cursor={start + 1000}>; rel="next"'
        headers = {"Link": more} if start + 1000 < len(listed) else {}
        return Answer(body=listed[start : start + 1000], headers=headers)

    def paths_info(self, user: dict | None, p: dict, r: Request) -> Answer:
        tree = self._repo(user, p, content=True).resolve(p["revision"]).tree
        is_form = "form" in r.headers.get("content-type", "")
        paths = parse_qs(r.body.decode()).get("paths", []) if is_form else json.loads(r.body)["paths"]
        found = [tree[path].listing(path) for path in paths if path in tree]
        folders = [path for path in paths if any(name.startswith(path + "/") for name in tree)]
        return Answer(body=found + [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders])

    def refs(self, user: dict | None, p: dict, r: Request) -> Answer:
        repo = self._repo(user, p)
        listed: dict[str, list] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        groups = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
        for ref, oid in repo.refs.items():
            prefix = next(prefix for prefix in groups if ref.startswith(prefix))
            listed[groups[prefix]].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid})
        return Answer(body=listed)

    def commits(self, user: dict | None, p: dict, r: Request) -> Answer:
        return Answer(
            body=[
                {"id": c.oid, "title": c.title, "message": c.message, "date": "2026-01-01T00:00:00.000Z"}
                | {"authors": [{"user": c.author}]}
                for c in self._repo(user, p, content=True).history(p["revision"])
            ]
        )

    def discussions(self, user: dict | None, p: dict, r: Request) -> Answer:
        wanted = r.query.get("status", "all"), r.query.get("author")
        pulls = [d for d in self._repo(user, p).pulls if wanted[0] in ("all", d["status"])]
        pulls = [d for d in pulls if wanted[1] in (None, d["author"]["name"])]
        return Answer(body={"count": len(pulls), "start": 0, "discussions": pulls})

    def branch(self, user: dict | None, p: dict, r: Request) -> Answer:
        repo, ref = self._repo(user, p, write=True), f"refs/heads/{p['revision']}"
        if ref in repo.refs:
            raise HubError(409, "Reference already exists")
        repo.refs[ref] = repo.resolve(json.loads(r.body or b"{}").get("startingPoint") or "main").oid
        return Answer(body={})

    def preupload(self, user: dict | None, p: dict, r: Request) -> Answer:
        as_pr = r.query.get("create_pr") == "1"
        repo, answers = self._repo(user, p, write=not as_pr), []
        tree = repo.resolve(p["revision"]).tree
        ignored = [line for line in tree.get(".gitignore", Blob(b"", False)).data.decode().split() if line]
        for file in json.loads(r.body)["files"]:
            path, known = file["path"], tree.get(file["path"])
            mode = "lfs" if path.endswith(LFS_SUFFIXES) or file["size"] > 10 << 20 else "regular"
            skip = any(path.endswith(line.removeprefix("*")) for line in ignored)
            oid = {"oid": known.sha256 if known.lfs else known.oid} if known else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": skip} | oid)
        return Answer(body={"files": answers})

    def lfs_batch(self, user: dict | None, p: dict, r: Request) -> Answer:
        repo, objects = self._repo(user, p, content=True), []
        if user is None or user["role"] != "write":
            raise HubError(403, "Your token does not allow uploads")
        for wanted in json.loads(r.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry, signed = {"oid": oid, "size": size}, f"owner={r.owner}&signature=x"
            href = f"{self.storage}/store/{repo.type}/{repo.id}/{oid}?{signed}"
            if oid not in repo.objects:
                upload = {"href": href, "header": {}}
                if size > self.multipart_above:
                    count = ceil(size / self.multipart_above)
                    parts = {f"{n:05d}": f"{href}&part={n}" for n in range(1, count + 1)}
                    target = quote(f"{repo.type}/{repo.id}", safe="")
                    complete = f"{self.endpoint}/api/complete?repo={target}&oid={oid}&{signed}"
                    upload = {"href": complete, "header": {"chunk_size": str(self.multipart_above)} | parts}
                prefix = "" if repo.type == "model" else f"{repo.type}s/"
                verify = {"href": f"{self.endpoint}/{prefix}{repo.id}.git/info/lfs/verify", "header": {}}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        return Answer(body={"transfer": "basic", "objects": objects})

    def _store(self, repo_type: str, repo_id: str, oid: str, data: bytes) -> Answer:
        if hashlib.sha256(data).hexdigest() != oid:
            raise HubError(400, "The content does not match the announced sha256")
        repo = self.repos.get((repo_type, repo_id))
        if repo is None:
            raise HubError(404, "NoSuchBucket")
        repo.objects[oid] = data
        return Answer(headers={"ETag": f'"{oid[:32]}"'})

    def upload(self, user: dict | None, p: dict, r: Request) -> Answer:
        if "part" not in r.query:
            return self._store(p["type"], p["id"], p["oid"], r.body)
        self.parts[(p["oid"], r.query["part"])] = r.body
        return Answer(headers={"ETag": f'"part-{r.query["part"]}"'})

    def complete(self, user: dict | None, p: dict, r: Request) -> Answer:
        body = json.loads(r.body)
        repo_type, repo_id = r.query["repo"].split("/", 1)
        data = b"".join(self.parts[(body["oid"], str(part["partNumber"]))] for part in body["parts"])
        return self._store(repo_type, repo_id, body["oid"], data)

    def lfs_verify(self, user: dict | None, p: dict, r: Request) -> Answer:
        if json.loads(r.body)["oid"] not in self._repo(user, p).objects:
            raise HubError(404, "Object does not exist")
        return Answer(body={})

    def commit(self, user: dict | None, p: dict, r: Request) -> Answer:
        as_pr = r.query.get("create_pr") == "1"
        repo = self._repo(user, p, write=not as_pr, content=True)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if not repo.lock.acquire(blocking=False):
            raise HubError(409, "Another commit is in progress. Please retry.")
        try:
            lines = [json.loads(line) for line in r.body.splitlines() if line]
            header, head = lines[0]["value"], repo.resolve(p["revision"])
            parent = header.get("parentCommit")
            if parent and not as_pr and not head.oid.startswith(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(repo.commits[parent or head.oid].tree if as_pr else head.tree)
            for line in lines[1:]:
                value, path = line["value"], line["value"]["path"]
                if line["key"] == "file":
                    tree[path] = Blob(base64.b64decode(value["content"]), False)
                elif line["key"] == "lfsFile":
                    if value["oid"] not in repo.objects:
                        raise HubError(400, f"LFS pointer of {path} points to a file that does not exist")
                    tree[path] = Blob(repo.objects[value["oid"]], True)
                elif line["key"] == "deletedFile" and path not in tree:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                else:
                    tree = {name: blob for name, blob in tree.items() if name != path and not name.startswith(path)}
            heads = f"refs/heads/{p['revision']}"
            ref = f"refs/pr/{len(repo.pulls) + 1}" if as_pr else heads if heads in repo.refs else p["revision"]
            description = header.get("description", "")
            commit = repo.commit(ref, parent or head.oid, header["summary"], description, user["name"], tree)
            url, number = f"{self.endpoint}/{repo.type}s/{repo.id}", len(repo.pulls) + 1
            if as_pr:
                pull = {"num": number, "title": commit.title, "author": {"name": user["name"]}, "status": "open"}
                pull |= {"createdAt": "2026-01-01T00:00:00.000Z", "isPullRequest": True}
                repo.pulls.append(pull | {"repo": {"name": repo.id, "type": repo.type}})
            pull_url = f"{url}/discussions/{number}" if as_pr else None
            body = {"commitUrl": f"{url}/commit/{commit.oid}", "commitOid": commit.oid, "pullRequestUrl": pull_url}
            return Answer(body=body | {"hookOutput": "", "success": True})
        finally:
            repo.lock.release()

    def resolve(self, user: dict | None, p: dict, r: Request) -> Answer:
        repo = self._repo(user, p, content=True)
        commit = repo.resolve(p["revision"])
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        blob = commit.tree.get(unquote(p["path"]))
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound")
        if not blob.lfs:
            return ranged(blob.data, r, headers | {"ETag": f'"{blob.oid}"'})
        href = f"{self.storage}/store/{repo.type}/{repo.id}/{blob.sha256}?owner={r.owner}&signature=x"
        linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data)), "Location": href}
        return Answer(302, b"", headers | linked | {"ETag": f'"{blob.oid}"'})

    def download(self, user: dict | None, p: dict, r: Request) -> Answer:
        repo = self.repos.get((p["type"], p["id"]))
        if repo is None or p["oid"] not in repo.objects:
            raise HubError(404, "NoSuchKey")
        return ranged(repo.objects[p["oid"]], r, {"ETag": f'"{p["oid"]}"', "Accept-Ranges": "bytes"})
