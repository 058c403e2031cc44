"""As much of the Hub as huggingface_hub talks to when it loads from it or uploads to it, on this machine alone."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_token_of_the_test"


class Repository:
    def __init__(self, files: dict[str, bytes] | None = None):
        self.files = files or {}
        self.num_commits = 1

    @property
    def commit(self) -> str:
        return f"{self.num_commits:040x}"


class HubServer(ThreadingHTTPServer):
    """`repositories` by type and id. `not_understood` are requests that got no proper answer."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubRequestHandler)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.not_understood: list[str] = []
        self.requests_of_files: list[tuple[str, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add_folder(self, repo_id: str, folder: str | Path, repo_type: str = "model") -> None:
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        self.repositories[repo_type, repo_id] = Repository(files)


@contextmanager
def running_hub() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class HubRequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        match self.path_parts():
            case ["api", "whoami-v2"]:
                if self.is_authorized():
                    self.send_json({"type": "user", "name": "user", "orgs": []})
            case ["api", repo_types, user, name, *rest]:
                self.get_info(repo_types.removesuffix("s"), f"{user}/{name}", rest)
            case [user, name, "resolve", revision, *path]:
                self.get_file("model", f"{user}/{name}", revision, "/".join(path))
            case ["datasets", user, name, "resolve", revision, *path]:
                self.get_file("dataset", f"{user}/{name}", revision, "/".join(path))
            case ["api", "agent-harnesses"]:
                # Statistics of huggingface_hub, which it can do without.
                self.send_error_code("EntryNotFound")
            case _:
                self.refuse()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else b""
        body = body or self.read_chunks()
        if not self.is_authorized():
            return
        match self.path_parts():
            case ["api", "validate-yaml"]:
                text = json.loads(body)["content"]
                metadata = yaml.safe_load(text.split("---\n")[1])
                errors = [] if "license" in metadata else [{"message": "no license"}]
                self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)
            case ["api", "repos", "create"]:
                self.create_repository(json.loads(body))
            case ["api", repo_types, user, name, "preupload", "main"]:
                files = [
                    {"path": file["path"], "uploadMode": upload_mode(file["path"]), "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self.send_json({"files": files})
            case [*_, "info", "lfs", "objects", "batch"]:
                self.send_json(
                    {"transfer": "basic", "objects": [self.upload_action(o) for o in json.loads(body)["objects"]]}
                )
            case ["api", repo_types, user, name, "commit", "main"]:
                self.make_commit(repo_types.removesuffix("s"), f"{user}/{name}", body)
            case _:
                self.refuse()

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path_parts()[-1]
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.uploads[oid] = body
        self.send_json({})

    # What the requests ask for

    def get_info(self, repo_type: str, repo_id: str, rest: list[str]) -> None:
        repository = self.server.repositories.get((repo_type, repo_id))
        if repository is None:
            self.send_error_code("RepoNotFound")
        elif not rest or rest == ["revision", "main"] or rest == ["revision", repository.commit]:
            siblings = [{"rfilename": path} for path in repository.files]
            self.send_json(
                {"id": repo_id, "sha": repository.commit, "private": False, "tags": [], "siblings": siblings}
            )
        elif rest[0] == "revision":
            self.send_error_code("RevisionNotFound")
        elif rest[0] == "tree":
            self.send_tree(repository, "/".join(rest[2:]))
        else:
            self.refuse()

    def send_tree(self, repository: Repository, folder: str) -> None:
        prefix = f"{folder}/" if folder else ""
        is_deep = "recursive=true" in self.path.lower()
        files = {path: data for path, data in repository.files.items() if path.startswith(prefix)}
        below = {path: path.removeprefix(prefix).split("/")[:-1] for path in files}
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": git_id(data)}
            for path, data in files.items()
            if is_deep or not below[path]
        ]
        folders = {prefix + parts[0] for parts in below.values() if parts}
        entries += [{"type": "directory", "path": path, "size": 0, "oid": git_id(b"")} for path in sorted(folders)]
        if files or not folder:
            self.send_json(entries)
        else:
            self.send_error_code("EntryNotFound")

    def get_file(self, repo_type: str, repo_id: str, revision: str, path: str) -> None:
        repository = self.server.repositories.get((repo_type, repo_id))
        if repository is None:
            self.send_error_code("RepoNotFound")
        elif revision not in ("main", repository.commit):
            self.send_error_code("RevisionNotFound")
        elif path not in repository.files:
            self.send_error_code("EntryNotFound", {"X-Repo-Commit": repository.commit})
        else:
            data = repository.files[path]
            headers = {"ETag": f'"{git_id(data)}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if match:
                start, end = int(match[1]), min(int(match[2] or len(data)) + 1, len(data))
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
                self.server.requests_of_files.append((path, start))
                self.send(206, data[start:end], headers)
            else:
                self.server.requests_of_files.append((path, 0))
                self.send(200, data, headers)

    def create_repository(self, request: dict) -> None:
        repo_type, repo_id = (
            request.get("type") or "model",
            f"{request.get('organization') or 'user'}/{request['name']}",
        )
        is_new = (repo_type, repo_id) not in self.server.repositories
        self.server.repositories.setdefault((repo_type, repo_id), Repository())
        self.send_json({"url": self.repository_url(repo_type, repo_id), "id": repo_id}, 200 if is_new else 409)

    def upload_action(self, lfs_object: dict) -> dict:
        oid = lfs_object["oid"]
        return {**lfs_object, "actions": {"upload": {"href": f"{self.server.url}/upload/{oid}"}}}

    def make_commit(self, repo_type: str, repo_id: str, body: bytes) -> None:
        repository = self.server.repositories[repo_type, repo_id]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            match entry["key"]:
                case "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    repository.files[value["path"]] = self.server.uploads[value["oid"]]
                case "deletedFile":
                    del repository.files[value["path"]]
                case key:
                    assert key == "header", key
        repository.num_commits += 1
        url = f"{self.repository_url(repo_type, repo_id)}/commit/{repository.commit}"
        self.send_json({"success": True, "commitOid": repository.commit, "commitUrl": url})

    # Answers

    def path_parts(self) -> list[str]:
        return [unquote(part) for part in urlsplit(self.path).path.split("/")[1:]]

    def repository_url(self, repo_type: str, repo_id: str) -> str:
        return f"{self.server.url}/{'spaces/' if repo_type == 'space' else ''}{repo_id}"

    def read_chunks(self) -> bytes:
        """A body of unknown length."""
        chunks = []
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline(), 16)
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
            if size == 0:
                break
        return b"".join(chunks)

    def is_authorized(self) -> bool:
        is_authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not is_authorized:
            self.send_json({"error": "Invalid credentials"}, 401)
        return is_authorized

    def send_json(self, value, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_error_code(self, code: str, headers: dict[str, str] | None = None) -> None:
        self.send(404, b"", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def refuse(self) -> None:
        self.server.not_understood.append(f"{self.command} {self.path}")
        self.send(404, b"", {})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def upload_mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".png")) else "regular"


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
