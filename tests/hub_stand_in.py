"""A stand-in for the Hugging Face hub on loopback: the endpoints that a download of a whole repository asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SHA = "1" * 40  # of the one commit


@dataclass
class Hub:
    """`files` of the one repository `name`; a file in `cut` ends in its middle."""

    name: str
    files: dict[str, bytes]
    cut: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def etag(self, path: str) -> str:
        return hashlib.sha1(self.files[path]).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, hub: Hub, *args: object) -> None:
        self._hub = hub
        super().__init__(*args)  # type: ignore[arg-type]

    def log_message(self, format: str, *args: object) -> None:
        """Tests look at `asked` instead."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self._hub, urlsplit(self.path).path
        hub.asked.append(f"{self.command} {path}")
        api, files = f"/api/models/{hub.name}", f"/{hub.name}/resolve/"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{SHA}"):
            siblings = [{"rfilename": name} for name in hub.files]
            self._json({"id": hub.name, "modelId": hub.name, "sha": SHA, "private": False, "siblings": siblings})
        elif path == f"{api}/tree/{SHA}":
            entries = [("file", name, len(data)) for name, data in hub.files.items()]
            self._json([{"type": t, "path": n, "size": s, "oid": hub.etag(n)} for t, n, s in entries])
        elif path.startswith(files) and path[len(files) :].partition("/")[2] in hub.files:
            self._file(path[len(files) :].partition("/")[2])
        else:
            self._send(404, b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str) -> None:
        data = self._hub.files[name]
        headers = {"ETag": f'"{self._hub.etag(name)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0] or 0)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206 if start else 200, data[start:], headers, cut=name in self._hub.cut)

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
