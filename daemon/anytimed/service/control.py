"""HTTP over a Unix socket in the run directory, and over TCP on this machine where that is asked for.

In order: binding and connecting by way of the folder's descriptor, because a socket's path may not exceed 107 bytes
and a run directory may; connections that are few, and closed when they ask for nothing; the server, which runs the
routes (`api`) in a thread of its own; the client that the CLI uses."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from anytimed.contracts import AnytimedError, ConfigError, Json
from anytimed.storage.strangers import parse

ANSWER_S = 605.0
"""A little more than the daemon takes to say that something takes too long."""
ANSWER_BYTES = 16 << 20
MOST_CONNECTIONS = 64
SLOWEST_S = 10.0


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name for `path` that fits into a socket address, however deep its folder is."""
    folder = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class _Connection(H11Protocol):
    """One of at most MOST_CONNECTIONS, each of which has SLOWEST_S to send its request: a monitor that forgets to close
    its sockets must not take the file descriptors that commits need."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._late = self.loop.call_later(SLOWEST_S, self._close_unless_asked)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
        super().connection_lost(exc)

    def _close_unless_asked(self) -> None:
        if self.cycle is None:
            self.transport.abort()


class Control:
    """Serves an application on a socket that only the owner and its group may use, and on `listen`, a loopback address
    with a port (0: any that is free), which everybody on this machine reaches. on_close: ends what answers for ever."""

    def __init__(
        self,
        path: Path,
        app: ASGIApp,
        listen: str | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._path, self._listen, self._on_close = path, listen, on_close
        self._tcp: socket.socket | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        # Its log lines go through ours, which hides credentials; garbage that somebody sends is no line of a log.
        config = uvicorn.Config(
            app, http=_Connection, ws="none", log_config=None, log_level="error", access_log=False, lifespan="off"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)

    @property
    def listens(self) -> str | None:
        """The address and port of TCP, once it has started."""
        if self._tcp is None or self._listen is None:
            return None
        return f"{self._listen.rpartition(':')[0]}:{self._tcp.getsockname()[1]}"

    def start(self) -> None:
        """Bind and serve. Whoever holds the run's lock may remove a socket that a killed daemon left. Raises
        AnytimedError where the address is taken."""
        if self._listen is not None:
            self._tcp = _bound(self._listen)
        self._path.unlink(missing_ok=True)
        with _short(self._path) as address:
            self._socket.bind(address)
        self._path.chmod(0o660)  # nobody connects before listen(), which the thread calls
        self._thread.start()

    def _serve(self) -> None:
        self._server.run([self._socket] if self._tcp is None else [self._socket, self._tcp])

    def close(self) -> None:
        self._on_close()
        self._server.should_exit = True
        self._server.force_exit = True
        if self._thread.ident is not None:
            self._thread.join(timeout=5)
        self._socket.close()
        if self._tcp is not None:
            self._tcp.close()
        self._path.unlink(missing_ok=True)


def _bound(listen: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # What a daemon that has just ended still holds is no reason to refuse the next one.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, int(port)))
    except OSError as error:
        made.close()
        raise AnytimedError(
            f"[control] listen = {listen!r}: {error}; take another port, or end what holds it"
        ) from error
    return made


class UnixConnection(http.client.HTTPConnection):
    """A connection to the socket at `path`, which may be long."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._unix_path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        with _short(self._unix_path) as address:
            self.sock.connect(address)


def ask(path: Path, method: str, route: str, body: Json | None = None, timeout_s: float = ANSWER_S) -> Json:
    """The daemon's JSON answer. Raises OSError when no daemon listens, AnytimedError with its message when it says no
    or answers with something else, ConfigError where it says that the configuration is wrong."""
    connection = UnixConnection(path, timeout_s)
    try:
        connection.request(method, route, None if body is None else json.dumps(body).encode())
        response = connection.getresponse()
        answer = parse(response.read(ANSWER_BYTES), str(path))
    except http.client.HTTPException as error:
        raise AnytimedError(f"{path}: no daemon of anytimed answers there: {error!r}") from error
    finally:
        connection.close()
    if not isinstance(answer, dict):
        raise AnytimedError(f"{path}: answers {type(answer).__name__}, expected a JSON object")
    if response.status >= 400:
        kind = ConfigError if response.status == 422 else AnytimedError
        raise kind(str(answer.get("error", f"the daemon answered {response.status}")))
    return answer
