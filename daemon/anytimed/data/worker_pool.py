"""Texts to tokens in worker processes (`worker`): who gets which piece, and what happens when one of them dies.

`submit` cuts a batch into pieces and puts them at the end of the backlog. A piece goes from its front to the worker
with the least to do, as long as one has less than AHEAD before it. There is no thread here: whoever submits or waits
for a result moves the bytes of all workers meanwhile (`_turn`), and a worker has enough before it and enough room
behind it to work on alone in between.

A worker that dies is replaced, and what it had goes to the front of the backlog, in its order. The piece that it was
encoding goes text by text, so that one which ends three workers is known by its index, and given up: its batch raises
WorkerDied, the others go on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from anytimed.contracts import AnytimedError, Refused, Tokenizer
from anytimed.data.encoding import Closed, Rebuild, identity, pieces
from anytimed.data.worker import BUILD, BUILT, FAILED, Frame, error_of, json_frame, tokens_of
from anytimed.data.worker_process import AHEAD, DEATHS, Batch, Piece, WorkerProcess

log = logging.getLogger("anytimed")


class WorkerPool:
    """A `Tokenizing` of `workers` processes; they start at once. Raises AnytimedError where none can be started."""

    def __init__(self, tokenizer: Tokenizer, workers: int, rebuild: Rebuild) -> None:
        self.ahead = workers * AHEAD
        self.replaced = 0
        """Workers that died and were replaced."""
        self._identity = json.loads(json.dumps(identity(tokenizer)))
        self._build = json_frame(BUILD, rebuild.to_json())
        self._backlog: deque[Piece] = deque()
        self._failure: Exception | None = None
        self._failed_starts = 0
        self._closed = False
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._workers: list[WorkerProcess] = []
        for _ in range(workers):
            self._start()
        if self._failure is not None:
            self.close()
            raise self._failure

    @property
    def pids(self) -> list[int]:
        """Of the workers that there are now."""
        return [worker.pid for worker in self._workers]

    def submit(self, texts: Sequence[str]) -> Batch:
        batch = Batch(self._wait, len(texts))
        with self._lock:
            self._check()
            for first, run in pieces(texts):
                self._backlog.append(Piece(batch, first, run))
            self._turn(0)
        return batch

    def close(self) -> None:
        self._closed = True  # before the lock: who holds it waits for this
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")
        with self._lock:
            for worker in self._workers:
                worker.kill()
            self._workers.clear()
            self._backlog.clear()
            self._selector.close()
            self._woken.close()
            self._wake.close()

    def _wait(self, done: Callable[[], bool]) -> None:
        """Move bytes until `done`. Raises Closed, and what no worker can go on after."""
        with self._lock:
            while not done():
                self._check()
                self._turn(None)

    # --- one turn -----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._closed:
            raise Closed("the tokenizing is closed")
        if self._failure is not None:
            raise self._failure

    def _turn(self, timeout_s: float | None) -> None:
        """Hand out what there is, wait until a socket can be read or written (None: as long as it takes), do that."""
        self._hand_out()
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is not self._woken:
                self._attend(key.data)
        self._hand_out()

    def _attend(self, worker: WorkerProcess) -> None:
        try:
            worker.send()
            for frame in worker.frames():
                self._take(worker, frame)
        except OSError:
            self._lost(worker)
        else:
            self._selector.modify(worker.socket, worker.events, worker)

    def _hand_out(self) -> None:
        while self._backlog and self._failure is None:
            worker = min(self._workers, key=lambda worker: worker.load)
            if worker.load >= AHEAD or (worker.load and self._backlog[0].deaths):
                return
            worker.give(self._backlog.popleft())
            self._attend(worker)

    def _take(self, worker: WorkerProcess, frame: Frame) -> None:
        kind, count, body = frame
        if self._failure is not None:
            return
        if not worker.ready:
            self._greet(worker, kind, body)
            return
        piece = worker.done()
        if kind == FAILED:
            failed = json.loads(body.tobytes())
            piece.fail(failed["index"], error_of(failed))
        else:
            piece.finish(tokens_of(count, body))

    def _greet(self, worker: WorkerProcess, kind: int, body: NDArray[np.uint8]) -> None:
        """The answer to the first frame: is it the tokenizer that we have?"""
        told = json.loads(body.tobytes())
        if kind != BUILT:
            self._failure = error_of(told)
        elif told != self._identity:
            self._failure = Refused(
                "tokenizer: a worker that built it anew came to another one than the daemon has, so its files have "
                "changed since the start. Expected: the same tokens from both. Restore the files, or restart the daemon"
            )
        else:
            worker.ready = True
            self._failed_starts = 0

    # --- the end of a worker ------------------------------------------------------------------------------------------

    def _start(self) -> None:
        try:
            worker = WorkerProcess()
        except OSError as error:
            self._failure = AnytimedError(
                f"tokenizer: no worker can be started: {error}. Expected: memory and a process for each worker. Give "
                "the machine more, or ask for fewer workers"
            )
            return
        self._workers.append(worker)
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)
        worker.outgoing.append(memoryview(self._build))
        self._attend(worker)

    def _lost(self, worker: WorkerProcess) -> None:
        """Take back what the worker had, and put another one in its place."""
        self._selector.unregister(worker.socket)
        self._workers.remove(worker)
        how = worker.ended()
        back = list(worker.pieces)
        if worker.ready:
            if back:
                back[:1] = back[0].again(how)
        else:
            self._failed_starts += 1
        self._backlog.extendleft(reversed(back))
        self.replaced += 1
        log.warning("a tokenizing worker ended (%s); it is replaced, and %d pieces are sent again", how, len(back))
        if self._failed_starts >= DEATHS:
            self._failure = AnytimedError(
                f"tokenizer: {DEATHS} workers in a row ended before they had built it (the last: {how}). Expected: "
                "that they start as this process did. The log's lines before this may say why; 0 workers need no start"
            )
            return
        self._start()
