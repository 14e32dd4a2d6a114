"""A hub on this machine: a real HTTP server that speaks the protocol of commits and of LFS.

It stores what it is sent and gives it back: creating repositories and branches, asking which files
are large, LFS batches and uploads, commits in lines of JSON, listing and downloading. A file whose
name is in `cut` breaks the connection half-way, so often as it says.

    with hub_server() as hub:
        HfApi(endpoint=hub.url, token="hf_x").upload_folder(...)
        hub.repos["me/model"]["main"]["config.json"]          # the bytes
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_FILES = (".safetensors", ".gguf")


@dataclass
class Hub:
    """What the server holds, and what it was asked."""

    url: str = ""
    token: str | None = None  # the one that may write; None: any
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS, by sha256
    cut: dict[int, int] = field(default_factory=dict)  # size of an upload -> how often it breaks
    uploads: list[str] = field(default_factory=list)  # LFS objects that came whole
    requests: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, body: object = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def refused(self) -> bool:
        wanted = self.hub.token
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if wanted is not None and given != wanted:
            self.body()
            self.answer(401, {"error": "Invalid username or password."})
            return True
        return False

    def do_POST(self) -> None:
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        self.hub.requests.append(f"POST {path}")
        if self.refused():
            return
        data = self.body()
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            known = name in self.hub.repos
            self.hub.repos.setdefault(name, {"main": {}})
            self.hub.private.setdefault(name, bool(asked.get("private")))
            self.answer(409 if known else 200, {"url": f"{self.hub.url}/{name}"})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            self.answer(200, {"transfer": "basic", "objects": self.batch(json.loads(data))})
        elif parts[:2] == ["api", "models"] and parts[4] == "branch":
            branches = self.hub.repos["/".join(parts[2:4])]
            branches.setdefault(unquote(parts[5]), dict(branches["main"]))
            self.answer(200, {})
        elif parts[:2] == ["api", "models"] and parts[4] == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE_FILES) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(data)["files"]
            ]
            self.answer(200, {"files": files})
        elif parts[:2] == ["api", "models"] and parts[4] == "commit":
            self.commit("/".join(parts[2:4]), unquote(parts[5]), data, "create_pr" in query)
        else:
            self.answer(404, {"error": path})

    def batch(self, asked: dict) -> list[dict]:
        found = []
        for thing in asked["objects"]:
            there = thing["oid"] in self.hub.objects
            href = f"{self.hub.url}/objects/{thing['oid']}"
            action = {} if there else {"actions": {"upload": {"href": href}}}
            found.append({"oid": thing["oid"], "size": thing["size"], **action})
        return found

    def commit(self, repo: str, branch: str, data: bytes, pull_request: bool) -> None:
        branches = self.hub.repos[repo]
        files = dict(branches.get(branch) or {})
        for line in data.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        place = f"refs/pr/{len(branches)}" if pull_request else branch
        branches[place] = files
        oid = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        address = f"{self.hub.url}/{repo}"
        self.answer(200, {
            "commitUrl": f"{address}/commit/{oid}", "commitOid": oid,
            "pullRequestUrl": f"{address}/discussions/1" if pull_request else None,
        })  # fmt: skip

    def do_PUT(self) -> None:
        size = int(self.headers["Content-Length"])
        if self.hub.cut.get(size, 0) > 0:
            self.hub.cut[size] -= 1
            self.rfile.read(size // 2)
            self.close_connection = True
            self.connection.close()
            return
        data, oid = self.body(), self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.objects[oid] = data
        self.hub.uploads.append(oid)
        self.answer(200)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo = "/".join(parts[2:4])
            if repo not in self.hub.repos:
                return self.answer(
                    404, {"error": "no such repository"}, X_Error_Code="RepoNotFound"
                )
            files = self.hub.repos[repo]["main"]
            if len(parts) > 4 and parts[4] == "tree":
                listed = [{"type": "file", "path": p, "size": len(b), "oid": _oid(b)}
                          for p, b in files.items()]  # fmt: skip
                return self.answer(200, listed)
            siblings = [{"rfilename": name} for name in files]
            return self.answer(200, {"id": repo, "sha": "0" * 40, "siblings": siblings,
                                     "private": False, "tags": [], "downloads": 0})  # fmt: skip
        repo, rest = "/".join(parts[:2]), parts[2:]
        branch = {"0" * 40: "main"}.get(rest[1], rest[1]) if len(rest) > 2 else ""
        files = self.hub.repos.get(repo, {}).get(branch, {})
        name = "/".join(rest[2:])
        if rest[:1] != ["resolve"] or name not in files:
            return self.answer(404, {"error": path}, X_Error_Code="EntryNotFound")
        data = files[name]
        return self.answer(200, data, X_Repo_Commit="0" * 40, ETag=f'"{_oid(data)}"')


def _oid(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def hub_server(token: str | None = None) -> Iterator[Hub]:
    """The server, on a free port, until the block is left."""
    hub = Hub(token=token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
