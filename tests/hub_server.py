"""A Hugging Face Hub on loopback, for the real `huggingface_hub` client: repositories in memory, served by a thread.

What the client asks for a model repository is here: files (HEAD, GET, ranges), revisions, making a repository or a
branch, uploads of small files in the commit and of large ones beside it. `Hub.drops` says how many of the next
downloads of a file break off in the middle, `Hub.broken` which files the server fails at; `Hub.requests` has what was
asked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

Files = dict[str, bytes]
LARGE = (".safetensors", ".bin")


@dataclass
class Repository:
    """Commits by hash, branches by name; `token` is who may read it, if not everybody."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)
    token: str | None = None
    gated: bool = False
    private: bool = False

    def commit(self, files: Files, branch: str = "main") -> str:
        """A new commit with these files over those of the branch; returns its hash."""
        files = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        content = repr((sorted(files.items()), len(self.commits))).encode()
        sha = hashlib.sha1(content).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


@dataclass
class Hub:
    """The server's state."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    drops: Counter[str] = field(default_factory=Counter)
    broken: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def add(self, repo_id: str, files: Files, **how: Any) -> Repository:
        """A repository with one commit on main."""
        repository = self.repositories[repo_id] = Repository(**how)
        repository.commit(files)
        return repository

    def asked(self, method: str, part: str = "") -> list[dict[str, str]]:
        """Headers of the requests of this method whose path has this part."""
        return [headers for m, path, headers in self.requests if m == method and part in path]


class Refusal(Exception):
    """An answer that is an error: a status and the Hub's name for it."""

    def __init__(self, status: int, code: str):
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self) -> None:
        """Find the route of this request; every handler of one is below."""
        path = unquote(self.path.partition("?")[0])
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path, {name.lower(): value for name, value in self.headers.items()}))
        try:
            for method, pattern, handle in ROUTES:
                if re.fullmatch(method, self.command) and (found := re.fullmatch(pattern, path)):
                    handle(self, **found.groupdict())
                    return
            raise Refusal(404, "NoRoute")
        except Refusal as refusal:
            self.send(refusal.status, b"", {"X-Error-Code": refusal.code, "X-Error-Message": refusal.code})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None, length: int | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def repository(self, repo: str) -> Repository:
        found = self.hub.repositories.get(repo)
        if found is None:
            raise Refusal(404, "RepoNotFound")
        if found.token and self.headers.get("Authorization") != f"Bearer {found.token}":
            raise Refusal(403, "GatedRepo") if found.gated else Refusal(401, "RepoNotFound")
        return found

    def at(self, repo: str, revision: str) -> tuple[str, Files]:
        repository = self.repository(repo)
        sha = repository.resolve(revision)
        if sha is None:
            raise Refusal(404, "RevisionNotFound")
        return sha, repository.commits[sha]


def serve_file(call: Handler, repo: str, revision: str, file: str) -> None:
    sha, files = call.at(repo, revision)
    if file in call.hub.broken:
        raise Refusal(500, "Broken")
    if file not in files:
        raise Refusal(404, "EntryNotFound")
    content = files[file]
    headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
    asked = re.fullmatch(r"bytes=(\d+)-", call.headers.get("Range") or "")
    status, start = (206, int(asked[1])) if asked else (200, 0)
    if asked:
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
    rest = content[start:]
    if call.command == "GET" and call.hub.drops[file] > 0:
        call.hub.drops[file] -= 1
        call.send(status, rest[: len(rest) // 2], headers, length=len(rest))
        call.wfile.flush()
        call.connection.shutdown(socket.SHUT_RDWR)
        call.close_connection = True
        return
    call.send(status, rest, headers)


def serve_info(call: Handler, repo: str, revision: str = "main") -> None:
    sha, files = call.at(repo, revision)
    call.send_json({"id": repo, "sha": sha, "siblings": [{"rfilename": file} for file in files]})


def serve_tree(call: Handler, repo: str, revision: str) -> None:
    """The list of files that a snapshot is made of."""
    _, files = call.at(repo, revision)
    oids = {file: hashlib.sha1(content).hexdigest() for file, content in files.items()}
    call.send_json([{"type": "file", "path": f, "oid": oids[f], "size": len(content)} for f, content in files.items()])


def make_repository(call: Handler) -> None:
    asked = json.loads(call.body)
    repo = f"{asked['organization']}/{asked['name']}"
    exists = repo in call.hub.repositories
    if not exists:
        call.hub.add(repo, {}, private=asked.get("visibility") == "private")
    call.send_json({"url": f"{call.hub.url}/{repo}"}, 409 if exists else 200)


def make_branch(call: Handler, repo: str, branch: str) -> None:
    repository = call.repository(repo)
    exists = branch in repository.branches
    if not exists:
        repository.branches[branch] = repository.branches["main"]
    call.send_json({}, 409 if exists else 200)


def choose_upload(call: Handler, repo: str, revision: str) -> None:
    call.at(repo, revision)
    files = [file["path"] for file in json.loads(call.body)["files"]]
    modes = {file: "lfs" if file.endswith(LARGE) else "regular" for file in files}
    call.send_json({"files": [{"path": f, "uploadMode": mode, "shouldIgnore": False} for f, mode in modes.items()]})


def offer_upload(call: Handler, repo: str) -> None:
    call.repository(repo)
    objects = [
        {**asked, "actions": {"upload": {"href": f"{call.hub.url}/blobs/{asked['oid']}"}}}
        for asked in json.loads(call.body)["objects"]
    ]
    call.send_json({"transfer": "basic", "objects": objects})


def keep_blob(call: Handler, oid: str) -> None:
    assert hashlib.sha256(call.body).hexdigest() == oid
    call.hub.blobs[oid] = call.body
    call.send(200, b"")


def make_commit(call: Handler, repo: str, revision: str) -> None:
    repository = call.repository(repo)
    operations = [json.loads(line) for line in call.body.splitlines()]
    files = {}
    for operation in operations:
        value = operation["value"]
        if operation["key"] == "header":
            repository.messages.append(value)
        elif operation["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        else:
            files[value["path"]] = call.hub.blobs[value["oid"]]
    pull_request = "create_pr=1" in call.path
    sha = repository.commit(files, "refs/pr/1" if pull_request else revision)
    answer = {"commitUrl": f"{call.hub.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True}
    call.send_json(answer | ({"pullRequestUrl": f"{call.hub.url}/{repo}/discussions/1"} if pull_request else {}))


def check_card(call: Handler) -> None:
    call.send_json({"errors": [], "warnings": []})


REPO, REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>refs/pr/\d+|[^/]+)"
ROUTES = (
    ("HEAD|GET", rf"/{REPO}/resolve/{REVISION}/(?P<file>.+)", serve_file),
    ("GET", rf"/api/models/{REPO}", serve_info),
    ("GET", rf"/api/models/{REPO}/revision/{REVISION}", serve_info),
    ("GET", rf"/api/models/{REPO}/tree/{REVISION}", serve_tree),
    ("POST", r"/api/repos/create", make_repository),
    ("POST", rf"/api/models/{REPO}/branch/(?P<branch>.+)", make_branch),
    ("POST", rf"/api/models/{REPO}/preupload/{REVISION}", choose_upload),
    ("POST", rf"/api/models/{REPO}/commit/{REVISION}", make_commit),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", offer_upload),
    ("PUT", r"/blobs/(?P<oid>.+)", keep_blob),
    ("POST", r"/api/validate-yaml", check_card),
)


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers at `hub.url` until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
