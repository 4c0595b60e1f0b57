"""The Hub's HTTP interface on the loopback, as far as models are pushed to it and loaded from it.

It lives in memory, listens on 127.0.0.1 alone, and is bounded: after `max_requests` requests it
answers 503, after `max_seconds` seconds it stops. Tests read and plant repositories directly and
let clients, which run in processes of their own, talk to `url`.
"""

import base64
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt")
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class User:
    name: str
    organisations: tuple[str, ...] = ()
    may_write: bool = True

    def owns(self, repo_id: str) -> bool:
        return repo_id.partition("/")[0] in (self.name, *self.organisations)


USERS = {
    "hf_test_user": User("tester", ("acme",)),
    "hf_reader": User("reader", may_write=False),
}


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """As the client compares it: of git for small files, of LFS for large ones."""
        if self.lfs:
            return self.sha256
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    files: Mapping[str, File]
    title: str
    author: str


class Repository:
    """A repository's branches (pull requests are some) and commits, newest last."""

    numbers = itertools.count()

    def __init__(self, repo_id: str, *, private: bool) -> None:
        self.id = repo_id
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.commit("main", {".gitattributes": File(b"")}, "initial commit", "tester")

    def commit(self, branch: str, files: Mapping[str, File], title: str, author: str) -> str:
        sha = hashlib.sha1(f"commit {next(self.numbers)}".encode()).hexdigest()
        self.commits[sha] = Commit(files, title, author)
        self.branches[branch] = sha
        return sha

    def sha(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        found = self.commits[self.sha(revision)].files
        return {name: file.content for name, file in found.items()}

    def state(self) -> tuple[dict[str, str], int]:
        """Changes whenever anybody can see a difference."""
        return dict(self.branches), len(self.commits)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    status: int | None
    user: str | None


class Refusal(Exception):  # noqa: N818 - an answer of the Hub, and no mistake of ours
    """An answer other than 200."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        **body: str,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": message, **body}
        self.headers = {"X-Error-Message": message, **(headers or {})}
        if code is not None:
            self.headers["X-Error-Code"] = code


@dataclass
class LoopbackHub:
    """The server: start it, give `url` to clients, look at `repositories` and `requests`."""

    max_requests: int = 5000
    max_seconds: float = 600
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    lfs: dict[str, bytes] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    _planned: list[tuple[str, re.Pattern, Callable[[], None]]] = field(default_factory=list)

    def start(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._timer = threading.Timer(self.max_seconds, self._server.shutdown)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        self._timer.cancel()
        self._server.shutdown()
        self._server.server_close()

    def __getitem__(self, repo_id: str) -> Repository:
        return self.repositories[repo_id]

    def plant(self, repo_id: str, files: Mapping[str, bytes], *, private: bool = False) -> None:
        """Make a repository of these files without a client."""
        with self.lock:
            repository = self.repositories[repo_id] = Repository(repo_id, private=private)
            held = {name: File(content, is_lfs(name)) for name, content in files.items()}
            repository.commit("main", held, "planted", "tester")

    def before(self, method: str, pattern: str, action: Callable[[], None]) -> None:
        """Call `action` before the next such request is answered, once.

        An action that raises `ConnectionError` drops the connection without an answer.
        """
        self._planned.append((method, re.compile(pattern), action))

    def refuse(self, method: str, pattern: str, status: int, message: str) -> None:
        """Answer the next such request with an error, once."""

        def refuse() -> None:
            raise Refusal(status, message)

        self.before(method, pattern, refuse)

    def act_before(self, method: str, path: str) -> None:
        for planned in self._planned:
            if planned[0] == method and planned[1].search(path):
                self._planned.remove(planned)
                planned[2]()
                return

    def downloaded(self, repo_id: str, since: int = 0) -> list[str]:
        """Names of the files whose content was sent, from the `since`-th request on."""
        start = re.compile(rf"/{repo_id}/resolve/[^/]+/(.+)")
        return [
            found[1]
            for request in self.requests[since:]
            if request.method == "GET" and request.status == 200
            if (found := start.match(request.path))
        ]


def is_lfs(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in LFS_PATTERNS)


ROUTES: list[tuple[str, re.Pattern, Callable]] = []
REPOSITORY = r"/api/models/([^/]+/[^/]+)"


def route(method: str, pattern: str) -> Callable[[Callable], Callable]:
    """Send requests of this method and path to a method of the handler; groups are arguments."""

    def add(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern + "$"), function))
        return function

    return add


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # clients keep the connection

    @property
    def hub(self) -> LoopbackHub:
        return self.server.hub

    def log_message(self, *_args: object) -> None:
        """Nothing on stderr: `LoopbackHub.requests` has them all."""

    # ---- plumbing ----

    def answer(self) -> None:
        self.status = None
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path)
        self.query = parse_qs(path.query)
        try:
            self.hub.act_before(self.command, path.path)
            with self.hub.lock:
                self._route(path.path)
        except Refusal as refusal:
            self.send(refusal.body, refusal.status, refusal.headers)
        except ConnectionError:  # asked for by a test, or the client was ended
            self.close_connection = True
        finally:
            user = USERS.get(self._token())
            request = Request(self.command, self.path, self.status, user and user.name)
            self.hub.requests.append(request)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815 - http.server asks by these names

    def _route(self, path: str) -> None:
        if len(self.hub.requests) >= self.hub.max_requests:
            raise Refusal(503, "The bound on requests is reached.")
        if "Range" in self.headers or "Transfer-Encoding" in self.headers:
            raise Refusal(501, "This server knows no parts and no chunks.")
        method = "GET" if self.command == "HEAD" else self.command
        for known_method, pattern, function in ROUTES:
            found = pattern.match(path)
            if known_method == method and found:
                function(self, *(unquote(group) for group in found.groups() if group is not None))
                return
        raise Refusal(404, f"No such page: {method} {path}")

    def send(
        self,
        body: object = b"",
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status = status
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def user(self) -> User | None:
        if self._token() and self._token() not in USERS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return USERS.get(self._token())

    def known_user(self) -> User:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return user

    def readable(self, repo_id: str) -> Repository:
        repository, user = self.hub.repositories.get(repo_id), self.user()
        owns = user is not None and user.owns(repo_id)
        if repository is None or (repository.private and not owns):
            if user is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, repo_id: str) -> Repository:
        repository, user = self.readable(repo_id), self.known_user()
        if not (user.may_write and user.owns(repo_id)):
            raise Refusal(403, "Forbidden: you must use a token with write permissions.")
        return repository

    # ---- accounts and repositories ----

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        user = self.known_user()
        role = "write" if user.may_write else "read"
        organisations = [{"name": name, "roleInOrg": "admin"} for name in user.organisations]
        token = {"type": "access_token", "accessToken": {"displayName": "t", "role": role}}
        self.send({"type": "user", "name": user.name, "orgs": organisations, "auth": token})

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        user, asked = self.known_user(), self.json()
        repo_id = f"{asked.get('organization') or user.name}/{asked['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if not (user.may_write and user.owns(repo_id)):
            raise Refusal(403, "You don't have the rights to create a model under this namespace")
        if repo_id in self.hub.repositories:
            raise Refusal(409, "You already created this model repo", url=url)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[repo_id] = Repository(repo_id, private=private)
        self.send({"url": url, "name": repo_id})

    @route("GET", REPOSITORY + "(?:/revision/([^/]+))?")
    def info(self, repo_id: str, revision: str = "main") -> None:
        repository = self.readable(repo_id)
        sha = repository.sha(revision)
        about = {
            "id": repo_id,
            "sha": sha,
            "private": repository.private,
            "tags": [],
            "siblings": [{"rfilename": name} for name in repository.commits[sha].files],
            "lastModified": DATE,
        }
        config = repository.files(sha).get("config.json")
        if config is not None:
            about["library_name"] = "transformers"
        self.send(about)

    @route("POST", REPOSITORY + "/branch/([^/]+)")
    def create_branch(self, repo_id: str, branch: str) -> None:
        repository = self.writable(repo_id)
        if branch in repository.branches:
            raise Refusal(409, "Reference already exists")
        repository.branches[branch] = repository.sha(self.json().get("startingPoint") or "main")
        self.send()

    # ---- files ----

    @route("GET", REPOSITORY + "/tree/([^/]+)/?(.*)")
    def tree(self, repo_id: str, revision: str, folder: str) -> None:
        repository = self.readable(repo_id)
        files = repository.commits[repository.sha(revision)].files
        inside = {name: file for name, file in files.items() if name.startswith(folder)}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        entries = []
        for name, file in inside.items():
            size = len(file.content)
            entry = {"type": "file", "path": name, "size": size, "oid": file.oid}
            if file.lfs:
                entry["lfs"] = {"oid": file.oid, "size": size, "pointerSize": 134}
            entries.append(entry)
        self.send(entries)

    @route("GET", "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        repository = self.readable(repo_id)
        sha = repository.sha(revision)
        file = repository.commits[sha].files.get(name)
        headers = {"X-Repo-Commit": sha}
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        headers |= {"ETag": f'"{file.oid}"', "Accept-Ranges": "none"}
        if file.lfs:
            headers |= {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        self.send(file.content, headers=headers)

    # ---- a push, in the order of its requests ----

    @route("POST", "/api/validate-yaml")
    def validate(self) -> None:
        if not re.match(r"---\s*\n", self.json()["content"]):
            raise Refusal(400, "The card has no front matter.")
        self.send({"errors": [], "warnings": []})

    @route("POST", REPOSITORY + "/preupload/([^/]+)")
    def preupload(self, repo_id: str, revision: str) -> None:
        repository = self.writable(repo_id)
        sha = repository.sha(revision)
        present = repository.commits[sha].files
        answers = [
            {
                "path": name,
                "uploadMode": "lfs" if is_lfs(name) else "regular",
                "shouldIgnore": False,
                "oid": present[name].oid if name in present else None,
            }
            for name in (file["path"] for file in self.json()["files"])
        ]
        self.send({"files": answers, "commitOid": sha})

    @route("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo_id: str) -> None:
        self.writable(repo_id)
        objects = []
        for asked in self.json()["objects"]:
            found = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.lfs:
                put, verify = f"{self.hub.url}/lfs/{asked['oid']}", f"{self.hub.url}/lfs-verify"
                found["actions"] = {"upload": {"href": put}, "verify": {"href": verify}}
            objects.append(found)
        self.send({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs/([0-9a-f]{64})")
    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The content has another SHA-256.")
        self.hub.lfs[oid] = self.body
        self.send()

    @route("POST", "/lfs-verify")
    def lfs_verify(self) -> None:
        asked = self.json()
        if len(self.hub.lfs.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "Object not found")
        self.send({"message": "ok"})

    @route("POST", REPOSITORY + "/commit/([^/]+)")
    def commit(self, repo_id: str, revision: str) -> None:
        repository, user = self.writable(repo_id), self.known_user()
        header, *operations = (json.loads(line) for line in self.body.splitlines() if line)
        files = dict(repository.commits[repository.sha(revision)].files)
        for operation in operations:
            self._apply(files, operation["key"], operation["value"])
        number = 1 + sum(branch.startswith("refs/pr/") for branch in repository.branches)
        branch = f"refs/pr/{number}" if "create_pr" in self.query else revision
        sha = repository.commit(branch, files, header["value"]["summary"], user.name)
        place = f"{self.hub.url}/{repo_id}"
        done = {"success": True, "commitOid": sha, "commitUrl": f"{place}/commit/{sha}"}
        if branch != revision:
            done["pullRequestUrl"] = f"{place}/discussions/{number}"
        self.send(done)

    def _apply(self, files: dict[str, File], key: str, value: Mapping[str, str]) -> None:
        name = value["path"]
        if key == "file":
            files[name] = File(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.hub.lfs:
                raise Refusal(400, f"An LFS pointer points to a file that does not exist: {name}")
            files[name] = File(self.hub.lfs[value["oid"]], lfs=True)
        elif key == "deletedFile":
            del files[name]
        else:
            raise Refusal(400, f"Unknown operation {key}")
