"""The control socket of a real daemon, abused: it answers afterwards, and training went on meanwhile."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from anytimed.contracts import AnytimedError
from anytimed.service.control import MOST_CONNECTIONS, ask
from tests import tiny
from tests.service.test_daemon import running, status, until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a daemon runs that has more to read than any test here takes."""
    folder = tmp_path_factory.mktemp("control")
    tiny.write_text(folder / "data", 3000)
    with running(tiny.config(folder)) as process:
        until(process, lambda: status(folder)["step"] > 5)
        yield folder
        assert process.poll() is None, process.communicate()[0]


def connect(folder: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(30)
    here = os.open(folder / "run", os.O_PATH)
    connection.connect(f"/proc/self/fd/{here}/control.sock")
    os.close(here)
    return connection


def until_true(told: Callable[[], bool]) -> None:
    class Alive:
        def poll(self) -> None:
            return None

    until(Alive(), told)  # type: ignore[arg-type]


def goes_on(folder: Path) -> None:
    """It answers, and it trains."""
    before = status(folder)["step"]
    assert before > 0
    until_true(lambda: status(folder)["step"] > before or status(folder)["state"] == "waiting for data")


def answered(folder: Path, request: bytes) -> bytes:
    with connect(folder) as connection:
        try:
            connection.sendall(request)
            return connection.recv(65536)
        except OSError:
            return b""


def test_only_the_owner_reaches_it(folder: Path) -> None:
    assert stat.S_IMODE((folder / "run").stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "run" / "control.sock").stat().st_mode) == 0o660


@pytest.mark.parametrize(
    "request_",
    [
        b"\0" * 4096,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 500,
        b"GET\n\n",
        b"GET /status HTTP/9.9\r\n\r\n",
        b"GET /status HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /status HTTP/1.1\r\nContent-Length: -1\r\nHost: a\r\n\r\n",
        b"GET /status HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /status HTTP/1.1\r\nHost: " + b"a" * 1_000_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /status HTTP/1.1\r\n" + b"".join(b"x%d: y\r\n" % i for i in range(20_000)) + b"\r\n",
        b"GET /status HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ],
    ids=[
        "zeros",
        "TLS",
        "no-version",
        "HTTP-9.9",
        "two-hosts",
        "negative",
        "smuggling",
        "long-host",
        "long-path",
        "many-headers",
        "websocket",
    ],
)
def test_garbage_is_answered_or_hung_up_on(folder: Path, request_: bytes) -> None:
    answer = answered(folder, request_)
    assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 200")), answer[:100]
    goes_on(folder)


@pytest.mark.parametrize(
    "path",
    [
        "/../status",
        "/status/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/status/",
        "/export/x",
        "/*",
    ],
)
def test_paths_lead_nowhere(folder: Path, path: str) -> None:
    answer = answered(folder, f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 307", b"HTTP/1.1 400")), answer[:100]
    assert b"root:" not in answer


@pytest.mark.parametrize("method", ["DELETE", "PUT", "CONNECT", "TRACE"])
def test_other_methods_change_nothing(folder: Path, method: str) -> None:
    for route in ("/status", "/export"):
        answer = answered(folder, f"{method} {route} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        assert answer.startswith((b"HTTP/1.1 405", b"HTTP/1.1 4")), answer[:100]


def test_an_endless_body_is_not_kept(folder: Path) -> None:
    """A gigabyte is announced; as much is sent as the daemon takes. Its memory does not grow with it."""
    pid = status(folder)["pid"]

    def memory() -> int:
        rows = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(row for row in rows if row.startswith("VmRSS")).split()[1]) * 1024

    before = memory()
    with connect(folder) as connection:
        connection.settimeout(2)
        connection.sendall(b"GET /status HTTP/1.1\r\nHost: a\r\nContent-Length: 1073741824\r\n\r\n")
        sent = 0
        try:
            while sent < 256 << 20:
                sent += connection.send(bytes(1 << 20))
        except OSError:
            pass  # it stopped reading, or hung up
        assert memory() - before < 100 << 20
    goes_on(folder)


def test_a_crowd_that_asks_for_nothing_is_sent_away(folder: Path) -> None:
    pid = status(folder)["pid"]

    def open_files() -> int:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))

    before = open_files()
    crowd = [connect(folder) for _ in range(MOST_CONNECTIONS + 100)]
    slow = crowd[0]
    slow.sendall(b"GET /status HT")
    try:
        until_true(lambda: open_files() <= before + MOST_CONNECTIONS)
        # Those that are left have some seconds to ask for something; then there is room again.
        until_true(lambda: status(folder)["step"] > 0)
        until_true(lambda: open_files() <= before + 10)
        assert slow.recv(100) == b"", "half a request is none"
    finally:
        for connection in crowd:
            connection.close()
    goes_on(folder)


@pytest.mark.parametrize(
    "said", [b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000, b"HTTP/1.1 200 OK\r\n\r\n[]"],
    ids=["garbage", "a bomb", "a list"],
)  # fmt: skip
def test_whatever_answers_in_its_place_is_named(tmp_path: Path, said: bytes) -> None:
    """Another process on the socket's path cannot crash the command that asks it."""
    path = tmp_path / "control.sock"

    def answer() -> None:
        connection, _ = squatter.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(said)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as squatter:
        squatter.bind(str(path))
        squatter.listen()
        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(AnytimedError, match=r"control\.sock"):
            ask(path, "GET", "/status", timeout_s=10)
        thread.join()
