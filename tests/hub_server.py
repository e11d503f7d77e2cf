"""A Hugging Face Hub on the loopback interface that serves one folder, with faults on demand.

It answers what `huggingface_hub.snapshot_download` asks from version 0.34 (requests) to 2 (httpx2):
the repository's description and file listing, and each file's metadata and content. As on the real
Hub a large file is redirected to another host, and its identity stands on the redirect.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

BRANCH = "main"
LARGE_BYTES = 1 << 20

Fault = Literal[
    "private",  # 401, as for a repository that does not exist or is private
    "gated",  # 401, as for a repository whose terms are not accepted
    "forbidden",  # 403, as for a token without the right
    "no repository",  # 404, as for a token's owner
    "internal error",  # 500
    "web page",  # 200 and HTML, as from a hotel's network
    "hang up",  # the connection ends without an answer
    "cut once",  # the first transfer of a large file ends half-way
    "cut always",  # and each later one before its first byte
    "no storage",  # large files are on Xet storage, which does not have them
]
# status, X-Error-Code
_REFUSALS = {
    "private": (401, "RepoNotFound"),
    "gated": (401, "GatedRepo"),
    "forbidden": (403, None),
    "no repository": (404, "RepoNotFound"),
    "internal error": (500, None),
}


class Request(NamedTuple):
    """One request, as it came."""

    method: str
    path: str


class HubServer:
    """Serves a folder under one or more names, each with one commit and the branch "main".

    Args:
        folder: The files.
        commits: Repository name to commit.

    Attributes:
        fault: What goes wrong from now on; None for nothing.
        requests: Everything asked for since the last `reset`.
    """

    def __init__(self, folder: Path, commits: dict[str, str]) -> None:
        self.commits = commits
        self.files = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        self.hashes = {
            name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in self.files.items()
        }
        self.reset()
        self._server = _Server(self, port=0)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def reset(self, fault: Fault | None = None) -> None:
        """Forget the requests so far and set what goes wrong from now on."""
        self.fault = fault
        self.requests: list[Request] = []
        self.cuts = 0

    def stop(self) -> None:
        """Close the port and every connection: from now on nobody answers."""
        self._server.stop()

    def restart(self) -> None:
        """Listen again, on the same port."""
        self._server = _Server(self, self.port)

    def fetched(self) -> Counter[str]:
        """Files whose content was sent, and how often."""
        names = {f"/storage/{digest}": name for name, digest in self.hashes.items()}
        for repo, commit in self.commits.items():
            names |= {
                f"/{repo}/resolve/{commit}/{name}": name
                for name in self.files
                if not self.is_large(name)
            }
        paths = [request.path for request in self.requests if request.method == "GET"]
        return Counter(names[path] for path in paths if path in names)

    def is_large(self, name: str) -> bool:
        """Whether a file is redirected to the storage host."""
        return self.files[name].stat().st_size >= LARGE_BYTES


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: HubServer, port: int) -> None:
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)
        self.thread = Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.shutdown()
        self.thread.join()
        # a connection that is kept alive would otherwise go on being served by its own thread
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that hangs up; report the rest."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    # headers and body are written apart, which Nagle's algorithm would delay by 40 ms
    disable_nagle_algorithm = True

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""

    def _answer(self) -> None:
        hub = self.hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(Request(self.command, path))
        if hub.fault == "hang up":
            self.close_connection = True
        elif hub.fault == "web page":
            self._send(200, b"<html>Welcome! Please log in.</html>", {"Content-Type": "text/html"})
        elif hub.fault in _REFUSALS:
            status, code = _REFUSALS[hub.fault]
            self._refuse(status, code, f"the test asks for {status}")
        else:
            self._route(path)

    def _route(self, path: str) -> None:
        if path.startswith("/storage/"):
            digest = path.removeprefix("/storage/")
            name = next(name for name, known in self.hub.hashes.items() if known == digest)
            self._send_content(name, {"ETag": '"not what identifies the file"'})
            return
        if path == "/xet-token":
            headers = {
                "X-Xet-Cas-Url": f"{self.hub.url}/xet",
                "X-Xet-Access-Token": "token",
                "X-Xet-Token-Expiration": str(int(time.time()) + 3600),
            }
            self._send(200, b"{}", headers)
            return
        for repo, commit in self.hub.commits.items():
            api, files = f"/api/models/{repo}", f"/{repo}/resolve/"
            if path == api or path.startswith(f"{api}/"):
                kind, _, revision = path.removeprefix(api).strip("/").partition("/")
                if self._knows(revision or BRANCH, commit):
                    self._send_json(
                        self._tree() if kind == "tree" else self._description(repo, commit)
                    )
                return
            if path.startswith(files):
                revision, _, name = path.removeprefix(files).partition("/")
                if self._knows(revision, commit):
                    self._send_file(name, commit)
                return
        self._refuse(404, "RepoNotFound", "Repository not found")

    def _knows(self, revision: str, commit: str) -> bool:
        if revision in (BRANCH, commit):
            return True
        self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return False

    def _description(self, repo: str, commit: str) -> dict[str, Any]:
        return {
            "id": repo,
            "modelId": repo,
            "sha": commit,
            "private": False,
            "gated": False,
            "tags": [],
            "downloads": 0,
            "siblings": [{"rfilename": name} for name in self.hub.files],
        }

    def _tree(self) -> list[dict[str, Any]]:
        entries = []
        for name, path in self.hub.files.items():
            size, digest = path.stat().st_size, self.hub.hashes[name]
            # a git object's name has 40 digits, a large file's 64
            entry = {"type": "file", "path": name, "size": size, "oid": digest[:40]}
            if self.hub.is_large(name):
                entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 135}
            entries.append(entry)
        return entries

    def _send_file(self, name: str, commit: str) -> None:
        hub = self.hub
        if name not in hub.files:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        digest = hub.hashes[name]
        headers = {"X-Repo-Commit": commit}
        if not hub.is_large(name):
            self._send_content(name, headers | {"ETag": f'"{digest[:40]}"'})
            return
        headers |= {
            # another name for the same address, so that it counts as another host
            "Location": f"http://localhost:{hub.port}/storage/{digest}",
            "X-Linked-Size": str(hub.files[name].stat().st_size),
            "X-Linked-ETag": f'"{digest}"',
        }
        if hub.fault == "no storage":
            headers |= {"X-Xet-Hash": digest, "X-Xet-Refresh-Route": f"{hub.url}/xet-token"}
        self._send(302, b"", headers)

    def _send_content(self, name: str, headers: dict[str, str]) -> None:
        hub = self.hub
        content = hub.files[name].read_bytes()
        size, status = len(content), 200
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes="):
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            content, status = content[start:], 206
            headers = headers | {"Content-Range": f"bytes {start}-{size - 1}/{size}"}
        kept = len(content)
        if self.command == "GET" and hub.is_large(name):
            if hub.fault in ("cut once", "cut always") and hub.cuts == 0:
                kept //= 2
            elif hub.fault == "cut always":
                kept = 0
            hub.cuts += kept < len(content)
        self._send(status, content, headers, kept)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], kept: int | None = None
    ) -> None:
        """Send an answer, of which only the first `kept` bytes arrive."""
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:kept])
        if kept is not None and kept < len(content):
            self.close_connection = True
