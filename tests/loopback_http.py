"""HTTP for the loopback Hub: requests, answers, injected faults, and the handler that brings them together."""

import itertools
import json
import re
import socket
import struct
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Fault:
    """What to do to the requests that match. `number` counts the requests of one user (or signed address), from 0.

    `action` is "status" (answer `status` with `headers`, made at that moment where they are a function, and do
    nothing), "reset" (read half of the body, then reset the connection), "lost" (do what was asked, then reset instead
    of answering), "misanswer" (do what was asked, then answer `status`), "slow" (wait `seconds`, go on), "call" (run
    `call(hub)` first, go on) or "silent" (do nothing and never answer, until the Hub is closed).
    """

    action: str
    kind: str | None = None
    number: int | None = None
    owner: str | None = None
    method: str | None = None
    times: int = 1
    status: int = 503
    headers: dict[str, str] | Callable[[], dict[str, str]] = field(default_factory=dict)
    seconds: float = 0.0
    call: Callable[[Any], None] | None = None
    hits: int = 0

    def matches(self, request: "Request") -> bool:
        wanted = {key: getattr(self, key) for key in ("kind", "number", "owner", "method")}
        return self.hits < self.times and all(
            value is None or value == getattr(request, key) for key, value in wanted.items()
        )


@dataclass
class Request:
    origin: str
    method: str
    kind: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    owner: str
    number: int
    body: bytes = b""
    status: int | None = None  # None while it is under way, 0 when the connection broke off
    time: float = field(default_factory=time.monotonic)


@dataclass
class Answer:
    status: int = 200
    body: bytes | dict | list = b""
    headers: dict[str, str] = field(default_factory=dict)


REPO = r"/api/(?P<type>model|dataset|space)s/(?P<id>[^/]+/[^/]+?)"
GIT = r"/(?P<prefix>datasets/|spaces/)?(?P<id>[^/]+/[^/]+?)"
ROUTES = [
    (method, kind, re.compile(pattern))
    for method, kind, pattern in [
        ("GET", "whoami", r"/api/whoami-v2"),
        ("POST", "create_repo", r"/api/repos/create"),
        ("POST", "validate_yaml", r"/api/validate-yaml"),
        ("POST", "complete", r"/api/complete"),
        ("GET", "auth_check", REPO + r"/auth-check(?P<write>/write)?"),
        ("GET", "tree", REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?"),
        ("POST", "paths_info", REPO + r"/paths-info/(?P<revision>[^/]+)"),
        ("GET", "refs", REPO + r"/refs"),
        ("GET", "commits", REPO + r"/commits/(?P<revision>[^/]+)"),
        ("GET", "discussions", REPO + r"/discussions"),
        ("POST", "branch", REPO + r"/branch/(?P<revision>[^/]+)"),
        ("POST", "preupload", REPO + r"/preupload/(?P<revision>[^/]+)"),
        ("POST", "commit", REPO + r"/commit/(?P<revision>[^/]+)"),
        ("GET", "info", REPO + r"(?:/revision/(?P<revision>[^/]+))?"),
        ("POST", "lfs_batch", GIT + r"\.git/info/lfs/objects/batch"),
        ("POST", "lfs_verify", GIT + r"\.git/info/lfs/verify"),
        ("GET", "resolve", GIT + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
        ("HEAD", "resolve", GIT + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
        ("PUT", "upload", r"/store/(?P<type>model|dataset|space)/(?P<id>[^/]+/[^/]+)/(?P<oid>\w+)"),
        ("GET", "download", r"/store/(?P<type>model|dataset|space)/(?P<id>[^/]+/[^/]+)/(?P<oid>\w+)"),
    ]
]


def ranged(data: bytes, request: Request, headers: dict[str, str]) -> Answer:
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if not match:
        return Answer(200, data, headers)
    start, stop = match.groups()
    first = int(start) if start else max(len(data) - int(stop), 0)
    last = min(int(stop), len(data) - 1) if start and stop else len(data) - 1
    if first > last:
        return Answer(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
    return Answer(206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})


class Server(ThreadingHTTPServer):
    """One thread per connection. On a busy machine many wait to be accepted; the default would drop all but five."""

    daemon_threads = True
    request_queue_size = 256


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An answer is two writes; together with a client's delayed acknowledgement Nagle's algorithm makes it wait 40 ms.
    disable_nagle_algorithm = True
    hub: Any
    origin: str
    request_now: Request | None = None

    def log_message(self, *_: object) -> None:
        pass

    def _read(self, limit: int | None = None) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
                if limit is not None:
                    break
            else:
                self.rfile.readline()
            return b"".join(chunks)
        length = int(self.headers.get("Content-Length", 0))
        return self.rfile.read(length if limit is None else min(limit, length))

    def _reset(self) -> None:
        # SO_LINGER with a timeout of 0 makes close() send RST instead of FIN: a reset, not an orderly end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()
        self.close_connection = True

    def _answer(self, request: Request, answer: Answer) -> None:
        request.status = answer.status
        is_json = not isinstance(answer.body, bytes)
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        if is_json:
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        headers = {key.lower(): value for key, value in self.headers.items()}
        token = headers.get("authorization", "").removeprefix("Bearer ")
        user = hub.users.get(token)
        found = ((k, m) for method, k, rx in ROUTES if method == self.command and (m := rx.fullmatch(url.path)))
        kind, match = next(found, ("unknown", None))
        owner = query.get("owner") or (user["name"] if user else "anonymous")
        with hub.lock:
            number = next(hub.counts.setdefault(owner, itertools.count()))
            request = Request(self.origin, self.command, kind, url.path, query, headers, owner, number)
            hub.log.append(request)
            self.request_now = request
            fault = next((fault for fault in hub.faults if fault.matches(request)), None)
            if fault is not None:
                fault.hits += 1
        if fault is not None and fault.action == "reset":
            self._read(limit=int(headers.get("content-length", 0)) // 2)
            return self._reset()
        request.body = self._read()
        if fault is not None and fault.action == "status":
            # Gateways answer in HTML, the Hub itself in JSON: clients must survive both.
            page = b"<html>bad gateway</html>" if fault.status in (502, 503) else {"error": "injected"}
            return self._answer(
                request, Answer(fault.status, page, fault.headers() if callable(fault.headers) else fault.headers)
            )
        if fault is not None and fault.action == "silent":
            hub.closed.wait()
            return self._reset()
        if fault is not None and fault.action == "slow":
            time.sleep(fault.seconds)
        if fault is not None and fault.action == "call":
            fault.call(hub)
        answer = self._do(user, token, kind, match, request)
        if fault is not None and fault.action == "lost":
            request.status = 0
            return self._reset()
        if fault is not None and fault.action == "misanswer":
            answer = Answer(fault.status, {"error": "injected"})
        self._answer(request, answer)

    def _do(self, user: dict | None, token: str, kind: str, match: re.Match | None, request: Request) -> Answer:
        try:
            if self.origin == "store" and token:
                raise HubError(400, "Only one auth mechanism allowed")
            if token and user is None:
                raise HubError(401, "Invalid credentials in Authorization header")
            if match is None or (self.origin == "store") != (kind in ("upload", "download")):
                raise HubError(404, f"no such route: {request.method} {request.path}")
            parts = {k: unquote(v) if v and k == "revision" else v for k, v in match.groupdict().items()}
            return getattr(self.hub, kind)(user, parts, request)
        except HubError as error:
            named = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            return Answer(error.status, {"error": error.message}, named)
        except Exception:
            # A mistake of this server's, which clients would retry and so hide: tests look at `errors`.
            self.hub.errors.append(traceback.format_exc())
            return Answer(500, {"error": "the loopback Hub failed"})

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, ValueError):
            # The client went away in the middle (it was killed, or reset its end): nothing is left to answer.
            self.close_connection = True
        finally:
            if self.request_now is not None and self.request_now.status is None:
                self.request_now.status = 0

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle
