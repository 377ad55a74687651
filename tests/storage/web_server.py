"""A web server on loopback over a folder, with the habits of real ones: with or without ranges, failing now and then.

`ranges`: whether a request for a range is answered with a 206. `failures`: how many of the next requests for ranges
get a 503 or a connection that breaks in the middle. What it sent is counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar


class WebServer:
    """Serves `folder` while it is open."""

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        self.folder = folder
        self.ranges = ranges
        self.failures: list[str] = []
        """What happens to the next requests for ranges: "503", "403", "cut", "more", in this order."""
        self.asked: list[tuple[str, int, int]] = []
        """Ranges asked for: name, start, end."""
        self.before: Callable[[str], None] = lambda path: None
        """Called with the path before each answer."""
        handler = type("Bound", (_Handler,), {"site": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __enter__(self) -> WebServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    site: ClassVar[WebServer]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.site.before(self.path)
        path = self.site.folder / self.path.lstrip("/")
        if not path.is_file():
            self._send(404, b"", body)
            return
        data = path.read_bytes()
        told = self.headers.get("Range")
        if told is None or not self.site.ranges:
            self._send(200, data, body)
            return
        first, _, last = told.removeprefix("bytes=").partition("-")
        start, end = int(first), int(last) + 1
        self.site.asked.append((path.name, start, end))
        failure = self.site.failures.pop(0) if self.site.failures else ""
        if failure.isdigit():
            self._send(int(failure), b"slow down", body)
        elif start >= len(data):
            self._send(416, b"", body)
        elif failure == "more":
            self._send(206, data[start:], body)
        else:
            self._send(206, data[start:end], body, cut=failure == "cut")

    def _send(self, status: int, data: bytes, body: bool, *, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass
