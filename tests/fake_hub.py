"""A small Hugging Face hub on loopback: what `huggingface_hub` asks of a server to read and push.

Repositories are branches of commits, a commit is {path: bytes}. Weights travel as LFS objects.
"""

import base64
import hashlib
import http.server
import json
import re
import urllib.parse

TOKEN = "hf_of_this_test"
Files = dict[str, bytes]


class FakeHub(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits: dict[str, Files] = {}
        self.branches: dict[str, dict[str, str]] = {}  # repository -> {branch or tag: commit}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[str] = []  # "GET /path" of every request
        self.refuse = ""  # paths that hold this text are forbidden

    def commit(self, repository: str, files: Files, branch: str = "main") -> str:
        """Makes `files` the whole content of a branch. Returns the commit."""
        seed = json.dumps([repository, branch, len(self.commits), sorted(files)])
        sha = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches.setdefault(repository, {})[branch] = sha
        return sha

    def content(self, repository: str, branch: str = "main") -> Files:
        return self.commits[self.branches[repository][branch]]

    def downloads(self) -> set[str]:
        """Paths of the files that were fetched, not only asked about."""
        found = (re.fullmatch(r"GET /[^/]+/[^/]+/resolve/[^/]+/(.+)", line) for line in self.log)
        return {match[1] for match in found if match}


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def _answer(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        body = self._body()
        self.server.log.append(f"{self.command} {path}")
        if self.server.refuse and self.server.refuse in path:
            return self._send(403, {"error": "not for you"})
        for pattern, method in _ROUTES:
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                return method(self, body, **match.groupdict())
        self._send(404, {"error": f"the fake hub knows no {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, value=None, data: bytes | None = None, **headers: str) -> None:
        data = json.dumps(value).encode() if data is None else data
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _may_write(self) -> bool:
        good = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not good:
            self._send(401, {"error": "Invalid user token."})
        return good

    def _commit(self, repo: str, revision: str) -> str | None:
        branches = self.server.branches.get(repo)
        if branches is None:
            self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif revision in branches:
            return branches[revision]
        elif revision in self.server.commits:
            return revision
        else:
            self._send(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        return None

    def _whoami(self, _) -> None:
        if self._may_write():
            self._send(200, {"type": "user", "name": "me", "auth": {}})

    def _create(self, body) -> None:
        if not self._may_write():
            return
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = f"{self.server.url}/{repo}"
        if repo in self.server.branches:
            return self._send(409, {"error": "You already created this model repo", "url": url})
        self.server.private[repo] = asked.get("private") or asked.get("visibility") == "private"
        self.server.commit(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._send(200, {"url": url, "id": repo})

    def _validate(self, body) -> None:
        content = json.loads(body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no YAML header"}]
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def _preupload(self, body, repo, revision) -> None:
        if self._may_write() and self._commit(repo, revision):
            kind = lambda path: "lfs" if path.endswith(".safetensors") else "regular"  # noqa: E731
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = [{"path": p, "uploadMode": kind(p), "shouldIgnore": False} for p in paths]
            self._send(200, {"files": answer})

    def _batch(self, body, repo) -> None:
        objects = []
        for entry in json.loads(body)["objects"]:
            href = f"{self.server.url}/lfs/{entry['oid']}"
            objects.append({**entry, "actions": {"upload": {"href": href}}})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _store(self, body, oid) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._send(200, {})

    def _push(self, body, repo, revision) -> None:
        if not self._may_write() or not self._commit(repo, revision):
            return
        files = dict(self.server.content(repo, revision))
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.server.commit(repo, files, revision)
        url = f"{self.server.url}/{repo}/commit/{sha}"
        self._send(200, {"success": True, "commitUrl": url, "commitOid": sha, "hookOutput": ""})

    def _info(self, _, repo, revision="main") -> None:
        sha = self._commit(repo, revision)
        if sha:
            siblings = [{"rfilename": path} for path in self.server.commits[sha]]
            self._send(200, {"id": repo, "sha": sha, "siblings": siblings, "tags": []})

    def _tree(self, _, repo, revision) -> None:
        sha = self._commit(repo, revision)
        if sha:
            files = self.server.commits[sha].items()
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data)}
                for path, data in files
            ]
            self._send(200, entries)

    def _resolve(self, _, repo, revision, path) -> None:
        sha = self._commit(repo, revision)
        if not sha:
            return
        data = self.server.commits[sha].get(path)
        if data is None:
            return self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        self._send(200, data=data, ETag=f'"{_blob_id(data)}"', X_Repo_Commit=sha)


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = (
    (r"GET /api/whoami-v2", _Handler._whoami),
    (r"POST /api/repos/create", _Handler._create),
    (r"POST /api/validate-yaml", _Handler._validate),
    (rf"POST /api/models/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler._preupload),
    (rf"POST /api/models/{_REPO}/commit/(?P<revision>[^/]+)", _Handler._push),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler._batch),
    (r"PUT /lfs/(?P<oid>\w+)", _Handler._store),
    (rf"GET /api/models/{_REPO}/revision/(?P<revision>[^/]+)", _Handler._info),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)", _Handler._tree),
    (rf"GET /api/models/{_REPO}", _Handler._info),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler._resolve),
)
