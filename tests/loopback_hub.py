"""A small Hub on this machine, for the real `huggingface_hub` client to talk to.

It keeps what the real one promises: files are addressed by content, a commit becomes visible whole
or not at all, and only if every large file that it names has arrived with the right hash and size.
And it can fail on demand: with a status, or by hanging up in the middle of a transfer.

Large files (LFS) are served as the real Hub does, by a redirect to another host: the same server
under the name `localhost`, where no token may arrive.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".pt", ".pth", ".bin", ".tar", ".parquet", ".mp4")
CHUNK = 1 << 16


class HubError(Exception):
    """An answer other than what was asked for."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str = ""):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message}
        if code is not None:
            self.headers["X-Error-Code"] = code
        if commit:
            self.headers["X-Repo-Commit"] = commit


class HangUp(Exception):
    """End the connection without an answer."""


@dataclass(frozen=True)
class File:
    """A file of a commit, by the hash of its content."""

    sha256: str
    size: int
    large: bool
    git_sha1: str

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.git_sha1

    def describe(self, path: str) -> dict[str, Any]:
        """What the API says of it."""
        entry: dict[str, Any] = {"type": "file", "path": path, "size": self.size}
        entry["oid"] = self.git_sha1
        if self.large:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return entry


@dataclass
class Repository:
    """Commits, each with all its files, and names for some of them."""

    name: str
    private: bool
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag or a commit's own hash stands for."""
        commit = self.branches.get(revision) or self.tags.get(revision) or revision
        if commit not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def add(self, branch: str, files: dict[str, File], message: str) -> str:
        """Make a commit visible as the head of a branch."""
        content = json.dumps([branch, message, len(self.commits), sorted(files)])
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits[commit] = files
        self.messages[commit] = message
        self.branches[branch] = commit
        return commit


@dataclass
class Fault:
    """Something to go wrong in the next requests of a kind.

    Args:
        method: HTTP method of the requests.
        path: Regular expression found in their path.
        status: Status to answer with; None to hang up.
        after: Bytes of the body that pass before hanging up: of the answer to a GET, of the request
            otherwise; 0 for all of the request.
        reset: Whether hanging up is a reset of the connection instead of its end.
        work: Whether the request is served before hanging up, and only the answer is lost.
        times: How many requests are left to go wrong.
    """

    method: str
    path: str
    status: int | None = None
    after: int = 0
    reset: bool = False
    work: bool = False
    times: int = 1

    @property
    def hangs_up(self) -> bool:
        return self.status is None


class LoopbackHub:
    """The server. Use as a context; `url` is its endpoint.

    `tokens` are those that may write (any repository), `readers` those that may read private ones.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # by sha256
        self.tokens = {"hf_owner": "owner"}
        self.readers = {"hf_reader": "reader"}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers
        self.lock = threading.RLock()
        self.server = Server(self)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method: str, path: str, status: int, times: int = 1) -> None:
        """Answer the next requests of a kind with a status."""
        self.faults.append(Fault(method, path, status=status, times=times))

    def hang_up(self, method: str, path: str, **options: Any) -> None:
        """End the next connections of a kind in the middle of the transfer; see `Fault`."""
        self.faults.append(Fault(method, path, **options))

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault that is to hit a request, if any; it is used up."""
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def seen(self, method: str, path: str) -> list[dict[str, str]]:
        """Headers, in lower case, of the requests of a kind so far."""
        return [h for m, p, h in self.requests if m == method and re.search(path, p)]

    def clear(self) -> None:
        """Forget all."""
        for memory in (self.repositories, self.objects, self.faults, self.requests):
            memory.clear()

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """Content of every file of a revision."""
        repo = self.repositories[repository]
        files = repo.commits[repo.resolve(revision)]
        return {path: self.objects[file.sha256] for path, file in files.items()}

    def check(self) -> None:
        """Assert that every visible file is there, with the hash and size it is said to have."""
        for repository in self.repositories.values():
            for files in repository.commits.values():
                for path, file in files.items():
                    content = self.objects[file.sha256]
                    assert hashlib.sha256(content).hexdigest() == file.sha256, path
                    assert len(content) == file.size, path

    def put(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commit files from the test itself, without a client."""
        with self.lock:
            repo = self.repositories.get(repository) or self.create(repository)
            stored = {path: self.store(path, content) for path, content in files.items()}
            return repo.add(branch, {**repo.commits[repo.branches[branch]], **stored}, "put")

    def create(self, name: str, private: bool = False) -> Repository:
        """A new repository, with the first commit that the real Hub makes."""
        repo = self.repositories[name] = Repository(name, private)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE)
        repo.add("main", {".gitattributes": self.store("", attributes.encode())}, "initial commit")
        return repo

    def store(self, path: str, content: bytes) -> File:
        """Keep content, and describe it as the file of that path."""
        sha256 = hashlib.sha256(content).hexdigest()
        git_sha1 = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        self.objects[sha256] = content
        return File(sha256, len(content), path.endswith(LARGE), git_sha1)


class Server(ThreadingHTTPServer):
    """Threads that do not outlive the tests, and do not write to their output."""

    daemon_threads = True

    def __init__(self, hub: LoopbackHub):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that the client ends are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet for headers and body
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *arguments: Any) -> None:
        """Nothing: tests have their own output."""

    def handle_request(self) -> None:
        """Answer one request, whatever its method."""
        self.hub = self.server.hub
        url = urlsplit(self.path)
        self.url_path = url.path
        self.query = parse_qs(url.query)
        path = unquote(url.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append((self.command, path, headers))
        self.fault = self.hub.take_fault(self.command, path)
        try:
            self.body = self.read_body()
            if self.fault is not None and self.fault.status is not None:
                raise HubError(self.fault.status, "This fault was asked for.")
            self.route()
        except HubError as error:
            message = json.dumps({"error": str(error)}).encode()
            self.answer(message, status=error.status, headers=error.headers)
        except HangUp:
            self.end()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def end(self) -> None:
        """Close the connection, now."""
        self.close_connection = True
        self.wfile.flush()
        if self.fault is not None and self.fault.reset:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.rfile.close()
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)

    def read_body(self) -> bytes:
        """The body of the request, or as much as a fault lets pass."""
        body = bytearray()
        for chunk in self.body_chunks():
            body += chunk
            if self.fault is not None and self.fault.hangs_up and len(body) > self.fault.after > 0:
                raise HangUp
        fault = self.fault
        if fault is not None and fault.hangs_up and self.command != "GET" and not fault.work:
            raise HangUp
        return bytes(body)

    def body_chunks(self) -> Iterator[bytes]:
        """The body of the request piece by piece, however it is sent."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            chunk = self.rfile.read(min(left, CHUNK))
            if not chunk:
                raise HangUp
            left -= len(chunk)
            yield chunk

    def answer(
        self, content: bytes, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        """Send status, headers and content, or as much of that as a fault lets pass."""
        if self.fault is not None and self.fault.work:
            raise HangUp
        self.send_response(status)
        headers = {"Content-Type": "application/json", **(headers or {})}
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.hangs_up:
            self.wfile.write(content[: self.fault.after])
            raise HangUp
        self.wfile.write(content)

    def answer_json(self, value: Any, status: int = 200) -> None:
        self.answer(json.dumps(value).encode(), status)

    def json_body(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def token(self) -> str | None:
        header = self.headers.get("Authorization", "")
        return header.removeprefix("Bearer ") or None

    def route(self) -> None:
        """Find what the path asks for."""
        for pattern, method in ROUTES:
            verb, _, path = pattern.partition(" ")
            match = re.fullmatch(path, self.url_path)
            if match and self.command in verb.split("|"):
                # A slash within a revision or a folder's name comes quoted.
                parts = {name: part and unquote(part) for name, part in match.groupdict().items()}
                with self.hub.lock if self.command in ("POST", "PUT") else nullcontext():
                    getattr(self, method)(**parts)
                return
        raise HubError(404, f"The loopback Hub has no {self.command} {self.url_path}.")

    # Who may do what

    def readable(self, repo: str) -> Repository:
        """A repository that the caller may read."""
        repository = self.hub.repositories.get(repo)
        known = self.token in self.hub.tokens or self.token in self.hub.readers
        if self.token is not None and not known:
            raise HubError(401, "Invalid credentials in Authorization header")
        if repository is None or (repository.private and not known):
            status = 404 if known else 401
            raise HubError(status, "Repository not found", "RepoNotFound")
        if repository.gated and not known:
            message = f"Access to model {repo} is restricted. You must have access to it."
            raise HubError(401, message, "GatedRepo")
        return repository

    def writable(self, repo: str) -> Repository:
        """A repository that the caller may change."""
        repository = self.readable(repo)
        self.need_writer()
        return repository

    def need_writer(self) -> None:
        if self.token is None:
            raise HubError(401, "Invalid username or password.")
        if self.token not in self.hub.tokens:
            raise HubError(403, "Forbidden: you must use a write token")

    # The API

    def whoami(self) -> None:
        name = self.hub.tokens.get(self.token or "") or self.hub.readers.get(self.token or "")
        if name is None:
            raise HubError(401, "Invalid user token.")
        self.answer_json({"type": "user", "name": name, "auth": {"type": "access_token"}})

    def create_repo(self) -> None:
        self.need_writer()
        request = self.json_body()
        owner = request.get("organization") or self.hub.tokens[self.token or ""]
        name = f"{owner}/{request['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repositories:
            self.answer_json({**answer, "error": "You already created this model repo"}, 409)
            return
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.hub.create(name, private)
        self.answer_json(answer)

    def validate_yaml(self) -> None:
        self.answer_json({"errors": [], "warnings": []})

    def repo_info(self, repo: str, revision: str | None = None) -> None:
        repository = self.readable(repo)
        commit = repository.resolve(revision or "main")
        self.answer_json(
            {
                "id": repo,
                "sha": commit,
                "private": repository.private,
                "tags": [],
                "downloads": 0,
                "siblings": [{"rfilename": path} for path in repository.commits[commit]],
            }
        )

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        repository = self.readable(repo)
        commit = repository.resolve(revision)
        prefix = f"{folder}/" if folder else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries: dict[str, dict[str, Any]] = {}
        for path, file in sorted(repository.commits[commit].items()):
            inside = path.removeprefix(prefix)
            if not path.startswith(prefix):
                continue
            if "/" in inside:
                name = prefix + inside.split("/")[0]
                entries[name] = {"type": "directory", "path": name, "oid": commit, "size": 0}
            if "/" not in inside or recursive:
                entries[path] = file.describe(path)
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound", commit)
        self.answer_json(list(entries.values()))

    def paths_info(self, repo: str, revision: str) -> None:
        repository = self.readable(repo)
        files = repository.commits[repository.resolve(revision)]
        paths = parse_qs(self.body.decode()).get("paths", [])
        self.answer_json([files[path].describe(path) for path in paths if path in files])

    def refs(self, repo: str) -> None:
        repository = self.readable(repo)
        kinds = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
        answer: dict[str, list] = {"converts": []}
        for kind, (folder, names) in kinds.items():
            answer[kind] = [
                {"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": commit}
                for name, commit in names.items()
            ]
        self.answer_json(answer)

    def create_branch(self, repo: str, name: str) -> None:
        repository = self.writable(repo)
        if name in repository.branches:
            raise HubError(409, "Reference already exists")
        start = self.json_body().get("startingPoint", "main")
        repository.branches[name] = repository.resolve(start)
        self.answer_json({})

    def create_tag(self, repo: str, revision: str) -> None:
        repository = self.writable(repo)
        repository.tags[self.json_body()["tag"]] = repository.resolve(revision)
        self.answer_json({})

    # Upload

    def preupload(self, repo: str, revision: str) -> None:
        repository = self.writable(repo)
        files = repository.commits[repository.resolve(revision)]
        answers = []
        for request in self.json_body()["files"]:
            path = request["path"]
            mode = "lfs" if path.endswith(LARGE) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in files:
                answer["oid"] = files[path].etag
            answers.append(answer)
        self.answer_json({"files": answers})

    def lfs_batch(self, repo: str) -> None:
        self.writable(repo)
        objects = []
        for request in self.json_body()["objects"]:
            answer = {"oid": request["oid"], "size": request["size"]}
            if request["oid"] not in self.hub.objects:
                upload = f"http://localhost:{self.hub.port}/bucket/{request['oid']}"
                verify = f"{self.hub.url}/{repo}.git/info/lfs/verify"
                answer["actions"] = {
                    "upload": {"href": f"{upload}?size={request['size']}"},
                    "verify": {"href": verify},
                }
            objects.append(answer)
        self.answer_json({"transfer": "basic", "objects": objects})

    def put_object(self, oid: str) -> None:
        if self.token is not None:
            raise HubError(400, "A token was sent to the storage.")
        sha256 = hashlib.sha256(self.body).hexdigest()
        if sha256 != oid or len(self.body) != int(self.query["size"][0]):
            raise HubError(400, f"The content has sha256 {sha256}, not {oid}.")
        self.hub.objects[oid] = self.body
        self.answer(b"")

    def verify(self, repo: str) -> None:
        self.writable(repo)
        request = self.json_body()
        if len(self.hub.objects.get(request["oid"], b"")) != request["size"]:
            raise HubError(404, f"Object {request['oid']} has not arrived.")
        self.answer_json({})

    def commit(self, repo: str, revision: str) -> None:
        repository = self.writable(repo)
        if revision not in repository.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, operations = lines[0]["value"], lines[1:]
        parent = repository.branches[revision]
        if not parent.startswith(header.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[parent])
        for operation in operations:
            self.apply(operation["key"], operation["value"], files)
        commit = repository.add(revision, files, header["summary"])
        self.answer_json(
            {"commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"}
        )

    def apply(self, key: str, value: dict[str, Any], files: dict[str, File]) -> None:
        """One operation of a commit, on the files that are to be."""
        path = value["path"]
        if key == "file":
            files[path] = self.hub.store(path, base64.b64decode(value["content"]))
        elif key == "lfsFile":
            content = self.hub.objects.get(value["oid"])
            if content is None or len(content) != value["size"]:
                raise HubError(400, f"{path} points to a large file that is not there.")
            files[path] = self.hub.store(path, content)
        elif key == "deletedFile":
            del files[path]
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]
        else:
            raise HubError(400, f"Unknown operation {key}.")

    # Download

    def resolve_file(self, repo: str, revision: str, path: str) -> None:
        repository = self.readable(repo)
        commit = repository.resolve(revision)
        file = repository.commits[commit].get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"'}
        if file.large:
            headers["X-Linked-Etag"] = headers.pop("ETag")
            headers["X-Linked-Size"] = str(file.size)
            headers["Location"] = f"http://localhost:{self.hub.port}/bucket/{file.sha256}"
            self.answer(b"", 302, headers)
        else:
            self.send_content(self.hub.objects[file.sha256], headers)

    def get_object(self, oid: str) -> None:
        if self.token is not None:
            raise HubError(400, "A token was sent to the storage.")
        self.send_content(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def send_content(self, content: bytes, headers: dict[str, str]) -> None:
        """The content, or the range of it that was asked for."""
        headers["Content-Type"] = "application/octet-stream"
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self.answer(content, 200, headers)
            return
        start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
        if start >= len(content):
            raise HubError(416, "Requested Range Not Satisfiable")
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self.answer(content[start : end + 1], 206, headers)


_API = r"/api/(?:models|datasets)/(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create_repo"),
    (r"POST /api/validate-yaml", "validate_yaml"),
    (rf"GET {_API}", "repo_info"),
    (rf"GET {_API}/revision/(?P<revision>[^/]+)", "repo_info"),
    (rf"GET {_API}/refs", "refs"),
    (rf"GET {_API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
    (rf"POST {_API}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    (rf"POST {_API}/branch/(?P<name>[^/]+)", "create_branch"),
    (rf"POST {_API}/tag/(?P<revision>[^/]+)", "create_tag"),
    (rf"POST {_API}/preupload/(?P<revision>[^/]+)", "preupload"),
    (rf"POST {_API}/commit/(?P<revision>[^/]+)", "commit"),
    (r"POST /(?:datasets/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"POST /(?:datasets/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/verify", "verify"),
    (r"PUT /bucket/(?P<oid>[0-9a-f]{64})", "put_object"),
    (r"GET|HEAD /bucket/(?P<oid>[0-9a-f]{64})", "get_object"),
    (
        r"GET|HEAD /(?:datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        "resolve_file",
    ),
]
