"""A stand-in of the Hugging Face Hub on 127.0.0.1: the few routes that uploads and downloads take, done for real.

Repositories with a history of commits, branches, LFS objects whose digest is checked, redirects to where these lie,
tokens that may read or write, private and gated repositories, and the errors with the headers that the hub sends.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

READ, WRITE = "hf_reads", "hf_writes"
"""The two tokens that it knows."""


@dataclass
class Repository:
    """Files of every commit, oldest first."""

    private: bool = False
    gated: bool = False
    closed: bool = False
    """Whether the token for reading is not for this one."""
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, changes: Mapping[str, bytes], message: str) -> str:
        files = {**(self.commits[self.main] if self.commits else {}), **changes}
        text = repr((len(self.commits), message, sorted(files.items())))
        self.commits[hashlib.sha1(text.encode()).hexdigest()] = files
        self.messages.append(message)
        return self.main

    @property
    def main(self) -> str:
        return list(self.commits)[-1]

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.main if revision == "main" else revision
        return (commit, self.commits[commit]) if commit in self.commits else None


class Hub(ThreadingHTTPServer):
    """The server; ``log`` holds every request as (method, path)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.moves_on: dict[str, bytes] | None = None
        """What someone else commits to a repository as soon as an LFS object was asked for."""
        self.names: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def create(self, name: str, files: Mapping[str, bytes] | None = None, **flags: bool) -> Repository:
        self.repositories[name] = Repository(**flags)
        self.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        if files:
            self.repositories[name].commit(files, "files")
        return self.repositories[name]

    def fetched(self) -> list[str]:
        """Names of the files whose content was sent, in order."""
        sent = [path.split("/") for method, path in self.log if method == "GET"]
        names = [self.names[parts[2]] if parts[1] == "objects" else "/".join(parts[5:]) for parts in sent]
        return [name for name, parts in zip(names, sent, strict=True) if "objects" in parts or "resolve" in parts]


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that is gone after the block."""
    hub = Hub()
    thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class Refusal(Exception):
    """An answer that is an error, with the hub's own headers."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        super().__init__(message)
        named = {"X-Error-Code": code, "X-Error-Message": message}
        self.status, self.headers = status, {k: v for k, v in named.items() if v} | headers
        self.message = message or code


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        self.body = self._read()
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, path))
        try:
            self._route(path.strip("/").split("/"))
        except Refusal as refusal:
            self._answer(refusal.status, {"error": refusal.message}, **refusal.headers)

    def _read(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, content: object = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, parts: list[str]) -> None:
        match self.command, parts:
            case "POST", ["api", "repos", "create"]:
                self._create(json.loads(self.body))
            case "POST", ["api", "validate-yaml"]:
                self._validate(json.loads(self.body)["content"])
            case "POST", ["api", "models", user, name, "preupload", "main"]:
                self._preupload(self._writable(f"{user}/{name}"), json.loads(self.body))
            case "POST", [user, name, "info", "lfs", "objects", "batch"]:
                self._writable(f"{user}/{name.removesuffix('.git')}")
                self._batch(json.loads(self.body))
            case "PUT", ["objects", oid]:
                self._store(oid)
            case "POST", ["api", "models", user, name, "commit", "main"]:
                self._commit(f"{user}/{name}", [json.loads(line) for line in self.body.splitlines()])
            case "GET", ["api", "models", user, name, *_]:
                self._describe(f"{user}/{name}", parts[4:])
            case "GET" | "HEAD", [user, name, "resolve", revision, *file]:
                self._resolve(f"{user}/{name}", revision, "/".join(file))
            case "GET" | "HEAD", ["objects", oid]:
                self._fetch(oid)
            case _:
                raise Refusal(404, message=f"no route for {self.path}")

    # ---- who may

    @property
    def _token(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", READ, WRITE):
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return token

    def _readable(self, name: str) -> Repository:
        found, token = self.server.repositories.get(name), self._token
        if found is None or (found.private and not token):
            # Whether it is there is nobody's business who has not logged in.
            raise Refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        if found.gated and not token:
            raise Refusal(401, "GatedRepo", "Access to this model is restricted.")
        if found.closed and token == READ:
            raise Refusal(403, message="Your token is not for this repository")
        return found

    def _may_write(self) -> None:
        if self._token != WRITE:
            message = "You don't have the rights to write here."
            raise (
                Refusal(403, message=message) if self._token else Refusal(401, message="Invalid username or password.")
            )

    def _writable(self, name: str) -> Repository:
        found = self._readable(name)
        self._may_write()
        return found

    # ---- uploads

    def _create(self, asked: dict[str, Any]) -> None:
        self._may_write()
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repositories:
            self._answer(409, {"error": "You already created this model repo", "url": url})
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.create(name, private=private)
        self._answer(200, {"url": url, "name": name})

    def _validate(self, content: str) -> None:
        """As strict as the hub: a model-index needs task, data set and metrics, each with its type."""
        try:
            data = yaml.safe_load(content.split("---\n")[1])
            for entry in data.get("model-index", ()):
                for result in entry["results"]:
                    assert result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
                    assert all(isinstance(each["value"], (int, float)) and each["type"] for each in result["metrics"])
        except (yaml.YAMLError, KeyError, IndexError, AssertionError, AttributeError) as cause:
            self._answer(400, {"errors": [{"message": repr(cause)}], "warnings": []})
            return
        self._answer(200, {"errors": [], "warnings": []})

    def _preupload(self, repository: Repository, asked: dict[str, Any]) -> None:
        def mode(path: str) -> str:
            return "lfs" if path.endswith(".safetensors") else "regular"

        paths = [file["path"] for file in asked["files"]]
        self._answer(200, {"files": [{"path": p, "uploadMode": mode(p), "shouldIgnore": False} for p in paths]})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for each in asked["objects"]:
            href = f"{self.server.url}/objects/{each['oid']}"
            missing = {"actions": {"upload": {"href": href}}} if each["oid"] not in self.server.objects else {}
            objects.append({**each, **missing})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, message="the digest is another")
        self.server.objects[oid] = self.body
        self._answer(200)

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repository, changes = self._writable(name), {}
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    changes[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    changes[value["path"]] = self.server.objects[value["oid"]]
                case other:
                    raise Refusal(400, message=f"unknown operation {other}")
        oid = repository.commit(changes, lines[0]["value"]["summary"])
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    # ---- downloads

    def _describe(self, name: str, rest: list[str]) -> None:
        repository = self._readable(name)
        commit, files = self._files(repository, rest[1] if rest else "main")
        if rest and rest[0] == "tree":
            rows = [{"type": "file", "path": p, "size": len(d), "oid": _sha1(d)} for p, d in files.items()]
            self._answer(200, rows)
            return
        siblings = [{"rfilename": path} for path in files]
        self._answer(200, {"id": name, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []})

    def _files(self, repository: Repository, revision: str) -> tuple[str, dict[str, bytes]]:
        found = repository.files(revision)
        if found is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repository = self._readable(name)
        commit, files = self._files(repository, revision)
        if file not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
        data, headers = files[file], {"X-Repo-Commit": commit}
        if not file.endswith(".safetensors"):
            self._answer(200, data, ETag=f'"{_sha1(data)}"', **headers)
            return
        oid = hashlib.sha256(data).hexdigest()
        self.server.objects[oid], self.server.names[oid] = data, file
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{oid}"'}
        # On the hub, too, objects lie at another host, which must not see the token.
        elsewhere = self.server.url.replace("127.0.0.1", "localhost")
        self._answer(302, Location=f"{elsewhere}/objects/{oid}", **headers, **linked)
        if self.server.moves_on is not None:
            repository.commit(self.server.moves_on, "someone else's")
            self.server.moves_on = None

    def _fetch(self, oid: str) -> None:
        if "Authorization" in self.headers:
            raise Refusal(400, message="a token was sent to a stranger")
        self._answer(200, self.server.objects[oid])


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
