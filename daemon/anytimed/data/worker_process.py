"""A worker process as the daemon sees it, and the work that it has.

In order: `Batch` is what was submitted, `Piece` the part of it that a worker is given at once; `WorkerProcess` is the
process with our end of its socket, which never blocks; `_Frames` takes what it answers out of that.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anytimed.contracts import Tokens
from anytimed.data.encoding import PIECE_CHARACTERS, WorkerDied, size
from anytimed.data.worker import HEADER, Frame, texts_frame

AHEAD = 4 * PIECE_CHARACTERS
"""A worker with less than this before it gets another piece. About a quarter of a second of work."""
DEATHS = 3
"""Of workers, by one text or before they are ready, until it is given up."""
_SOCKET_BYTES = 1 << 20
_LAST_BREATH_S = 5.0
_OF_THE_MANAGER = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
_ALONE = {"TOKENIZERS_PARALLELISM": "false"} | dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1"
)


class Batch:
    """A `Pending`. wait: returns when what it is given is true; results: by text, None while not done."""

    def __init__(self, wait: Callable[[Callable[[], bool]], None], count: int) -> None:
        self._wait = wait
        self.results: list[Tokens | None] = [None] * count
        self.left = count
        self.failures: dict[int, Exception] = {}

    def result(self) -> list[Tokens]:
        self._wait(lambda: self.left == 0)
        if self.failures:
            # that of the first text, whichever worker was faster
            raise self.failures[min(self.failures)]
        return [tokens for tokens in self.results if tokens is not None]


@dataclass(slots=True)
class Piece:
    """Texts that a worker is given at once. first: the index of the first one in the batch; deaths: of workers that
    were encoding it."""

    batch: Batch
    first: int
    texts: Sequence[str]
    deaths: int = 0

    @property
    def load(self) -> int:
        """In characters. What was there when a worker died has one to itself, so that the next death is known to be
        its own."""
        return AHEAD if self.deaths else sum(map(size, self.texts))

    def finish(self, tokens: list[Tokens]) -> None:
        self.batch.results[self.first : self.first + len(self.texts)] = tokens
        self.batch.left -= len(self.texts)

    def fail(self, index: int, error: Exception) -> None:
        at = self.first + index
        error.add_note(f"text {at} of a batch of {len(self.batch.results)}, counted from 0")
        self.batch.failures[at] = error
        self.batch.left -= len(self.texts)

    def again(self, how: str) -> list[Piece]:
        """What is to be sent again after a worker died of this: each text by itself, or nothing once it has to be
        given up."""
        deaths = self.deaths + 1
        if deaths < DEATHS:
            return [Piece(self.batch, self.first + i, [text], deaths) for i, text in enumerate(self.texts)]
        text = self.texts[0]
        self.batch.failures[self.first] = WorkerDied(
            f"tokenizer: text {self.first} of a batch of {len(self.batch.results)}, counted from 0, of {len(text)} "
            f"characters, ended the worker that encoded it {DEATHS} times (the last: {how}). Expected: its tokens. "
            "Give the machine more memory where that ran out (SIGKILL), or take the record out of the data",
            self.first,
        )
        self.batch.left -= 1
        return []


class WorkerProcess:
    """A process and our end of its socket. pieces: sent to it and not answered, in order; load: in characters."""

    def __init__(self) -> None:
        self.ready = False
        self.pieces: deque[Piece] = deque()
        self.load = 0
        self.outgoing: deque[memoryview] = deque()
        self._frames = _Frames()
        self.socket, other = socket.socketpair()
        with other:
            for end in (self.socket, other):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
            # -P and all of our path: it imports what this process would, and nothing from the working directory.
            path = os.pathsep.join(place for place in sys.path if place)
            environment = {key: value for key, value in os.environ.items() if key not in _OF_THE_MANAGER}
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "anytimed.data.worker", str(other.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env={**environment, **_ALONE, "PYTHONPATH": path},
                    pass_fds=(other.fileno(),),
                    start_new_session=True,  # a Ctrl-C is the daemon's to handle
                )
            except BaseException:
                self.socket.close()
                raise
        self.socket.setblocking(False)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def events(self) -> int:
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self.outgoing else 0)

    def give(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.load += piece.load
        self.outgoing.append(memoryview(texts_frame(piece.texts)))

    def done(self) -> Piece:
        """The piece that was answered."""
        piece = self.pieces.popleft()
        self.load -= piece.load
        return piece

    def send(self) -> None:
        """What the socket takes now. Where the worker is gone, `frames` says so, after what it had answered."""
        try:
            while self.outgoing:
                sent = self.socket.send(self.outgoing[0])
                if sent == len(self.outgoing[0]):
                    self.outgoing.popleft()
                else:
                    self.outgoing[0] = self.outgoing[0][sent:]
        except BlockingIOError:
            pass
        except OSError:
            self.outgoing.clear()

    def frames(self) -> Iterator[Frame]:
        """What has come whole. Raises OSError where the worker is gone."""
        return self._frames.read(self.socket)

    def kill(self) -> None:
        """It holds nothing that has to be put away."""
        self.socket.close()
        self._process.kill()
        self._process.wait()

    def ended(self) -> str:
        """How it ended, after its socket did."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_BREATH_S)
        self.kill()
        code = self._process.returncode
        return f"exit status {code}" if code >= 0 else signal.Signals(-code).name


class _Frames:
    """Frames out of a socket that does not block."""

    def __init__(self) -> None:
        self._header = bytearray(HEADER.size)
        self._body: NDArray[np.uint8] | None = None
        self._missing = memoryview(self._header)

    def read(self, connection: socket.socket) -> Iterator[Frame]:
        """The frames that are there. Raises ConnectionError at the end, OSError."""
        while True:
            while self._missing:
                try:
                    got = connection.recv_into(self._missing)
                except BlockingIOError:
                    return
                if not got:
                    raise ConnectionResetError("the socket has ended")
                self._missing = self._missing[got:]
            kind, count, length = HEADER.unpack(self._header)
            if self._body is None:
                self._body = np.empty(length, np.uint8)
                self._missing = self._body.data
            if not self._missing:
                body, self._body = self._body, None
                self._missing = memoryview(self._header)
                yield kind, count, body
