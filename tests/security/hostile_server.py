"""A web server on the loopback that lies: about lengths, about ranges, about when it ends; and that compresses bombs.

The first part of a path says how every file below it is answered: `honest`, `gzip`, `deflate`, `endless`, `overlong`
(more than the range that was asked for), `short` (fewer bytes than Content-Length), `page` (a listing without end),
`denied` (403, with what the client sent to prove who it is in the reason).
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

MIB = 1 << 20
BOMB_BYTES = 1 << 30
"""What a few megabytes become when somebody inflates them; also where an endless answer ends at last."""


@functools.cache
def compressed(window: int) -> bytes:
    """BOMB_BYTES zeros. window: of zlib, 31 makes gzip, 15 deflate."""
    squeeze, zeros = zlib.compressobj(1, zlib.DEFLATED, window), bytes(16 * MIB)
    parts = [squeeze.compress(zeros) for _ in range(BOMB_BYTES // len(zeros))]
    return b"".join([*parts, squeeze.flush()])


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: ClassVar[Path]
    asked: ClassVar[list[str]]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        with contextlib.suppress(OSError):  # a reader that hangs up early is what is wanted
            self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.asked.append(self.path)
        kind, _, name = self.path.strip("/").partition("/")
        file = self.folder / name.partition("?")[0]
        if kind != "page" and not file.is_file():
            self._head(404, {"Content-Length": "0"})
            return
        content = file.read_bytes() if file.is_file() else b""
        match kind:
            case "honest":
                self._send(content, body)
            case "gzip" | "deflate":
                bomb = compressed(31 if kind == "gzip" else 15) if body else b""
                self._head(200, {"Content-Encoding": kind, "Content-Length": str(len(bomb) or len(content))})
                self.wfile.write(bomb)
            case "denied":
                self.send_response(403, f"no {self.headers.get('Authorization')} for {self.path}")
                self.send_header("Content-Length", "0")
                self.end_headers()
            case "endless" | "page":
                said = {"Transfer-Encoding": "chunked", "Content-Type": "text/html"}
                self._head(200, said if body else {"Content-Length": str(len(content))})
                if body:
                    self._forever()
            case "overlong":
                self._head(206, {"Content-Length": str(BOMB_BYTES if body else len(content))})
                for _ in range(BOMB_BYTES // MIB if body else 0):
                    self.wfile.write(bytes(MIB))
            case "short":
                self._head(200, {"Content-Length": str(len(content) + 1000)})
                self.wfile.write(content if body else b"")
                self.close_connection = True
            case _:
                raise AssertionError(self.path)

    def _send(self, content: bytes, body: bool) -> None:
        asked = self.headers.get("Range")
        status, extra = 200, {}
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            total = len(content)
            content = content[int(first) : int(last) + 1 if last else None]
            status, extra = 206, {"Content-Range": f"bytes {first}-{int(first) + len(content) - 1}/{total}"}
        self._head(status, {"Content-Length": str(len(content)), **extra})
        self.wfile.write(content if body else b"")

    def _forever(self) -> None:
        for _ in range(BOMB_BYTES // MIB):
            self.wfile.write(b"%x\r\n" % MIB + b'<a href="x">' + bytes(MIB - 12) + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # hung up between two requests
            super().handle()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The server's address, and the paths it was asked for, as they come."""
    asked: list[str] = []
    handler = type("Bound", (Handler,), {"folder": folder, "asked": asked})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
