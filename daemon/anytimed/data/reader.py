"""Runs the pipeline ahead of the learner, in one thread, into a bounded queue.

Only the thread touches the pipeline; everyone else takes batches out, posts requests and reads a snapshot. A dry
stream puts the thread to sleep: before that it polls once by itself, so that a block is cut short only when there is
nothing new, and then it waits until someone asks for a poll. Batches that were made before a failure are still handed
out, for they are good; then the failure is raised where the batches are taken.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from anytimed.contracts import Batch, Json
from anytimed.data.cursor import Interrupted
from anytimed.data.pipeline import Dry, Pipeline

log = logging.getLogger("anytimed")


def read_one(pipeline: Pipeline) -> Batch | Dry:
    """One batch. Dry only if a poll has found nothing and nothing could be done about it, or none can be made."""
    polled = False
    while isinstance(outcome := pipeline.next_batch(), Dry):
        if polled and pipeline.stands:
            break
        polled = True
        if not pipeline.poll() and not pipeline.stands:
            break
    return outcome


POLL_SHARE, PREPARE_SHARE = 50.0, 4.0
"""While there is something to read, a poll comes no sooner than so many times as long as the last one, and what was
prepared beside for it, took: listing a million files takes seconds."""


class Reader:
    """A restored pipeline and its thread. `depth`: the most batches kept ready (>= 1)."""

    def __init__(self, pipeline: Pipeline, depth: int) -> None:
        self._pipeline = pipeline
        self._depth = depth
        self._changed = threading.Condition()
        self._batches: deque[Batch] = deque()
        self._dry: Dry | None = None
        self._poll = False
        self._preparing: float | None = None  # since when
        self._prepared = False
        self._oldest: tuple[Json, bool] | None = None
        self._polls_from = 0.0
        self._was_dry = False
        self._closed = False
        self._failure: BaseException | None = None
        self._told: Json = pipeline.status()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        # a daemon: a store that hangs inside a read must not keep the process from ending
        self._thread = threading.Thread(target=self._run, name="anytimed-reader", daemon=True)
        self._thread.start()

    def get(self, timeout_s: float) -> Batch | Dry | None:
        """The next batch; Dry when every made batch was taken and no more can be made; None after `timeout_s` without
        either. Raises what the thread failed with, Interrupted after `close`."""
        with self._changed:
            self._changed.wait_for(self._has_answer, timeout_s)
            if self._closed:
                raise Interrupted("the reader is closed")
            if self._batches:
                batch = self._batches.popleft()
                if self._may_read():
                    self._changed.notify_all()
                return batch
            if self._failure is not None:
                raise self._failure
            return self._dry

    def poll(self) -> None:
        """Ask the thread to look for new data soon; wakes it where the stream was dry."""
        with self._changed:
            self._poll = True
            self._was_dry = self._was_dry or self._dry is not None
            self._dry = None
            self._changed.notify_all()

    def acknowledge(self, position: Json, *, tell: bool = True) -> None:
        """No commit resumes before this position, as JSON; the sources are told, where `tell`."""
        with self._changed:
            self._oldest = (position, tell)
            self._changed.notify_all()

    def status(self) -> Json:
        """Ready batches, the queue's depth, `waiting` (reason per source while dry) and the pipeline's own status."""
        with self._changed:
            return {
                **self._told,
                "ready": len(self._batches),
                "depth": self._depth,
                "waiting": dict(self._dry.reasons) if self._dry else {},
            }

    def close(self, timeout_s: float = 10.0) -> bool:
        """Stop reading and drop what was made. Whether the thread ended within `timeout_s`; where it hangs in a read,
        it ends by itself after that and journals nothing more."""
        self._pipeline.interrupt()
        with self._changed:
            self._closed = True
            self._batches.clear()
            self._changed.notify_all()
        if self._thread is None:
            self._let_go()
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                outcome = self._read()
                made = [outcome] if isinstance(outcome, Batch) else []
                while made and self._pipeline.has_batch and len(made) < self._depth:
                    made.append(self._made())
                self._offer(made, outcome if isinstance(outcome, Dry) else None)
        except Interrupted:
            pass  # closed in the middle of a read
        except BaseException as failure:  # noqa: BLE001 - not handled here: it is raised again in `get`
            with self._changed:
                self._failure = failure
                self._changed.notify_all()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        try:
            self._pipeline.close()
        except Exception as error:  # noqa: BLE001 - whatever a client raises, the reading is over
            log.warning("a source could not be closed: %s: %s", type(error).__name__, error)

    def _read(self) -> Batch | Dry:
        return read_one(self._pipeline)

    def _made(self) -> Batch:
        batch = self._pipeline.next_batch()
        assert isinstance(batch, Batch), "it needs no reading"
        return batch

    def _wait_for_work(self) -> bool:
        """Sleep while the queue is full or the stream dry, serving polls and acknowledgements; False once closed."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        self._closed
                        or self._may_poll()
                        or self._prepared
                        or self._oldest is not None
                        or self._may_read()
                    )
                )
                if self._closed:
                    return False
                oldest, self._oldest = self._oldest, None
                prepared, self._prepared = self._prepared, False
                dry, self._was_dry = self._was_dry, False
                if poll := self._may_poll() or dry:
                    self._poll = False
            if oldest is not None:
                self._pipeline.acknowledge(oldest[0], tell=oldest[1])
            if prepared:
                self._poll_now(prepared=True)
            if poll and dry:
                self._poll_now()
            elif poll and time.monotonic() >= self._polls_from:
                # What is new is looked up beside the reading, where that takes long.
                self._preparing = time.monotonic()
                self._pipeline.prepare(self._note_prepared)
                with self._changed:
                    at_once, self._prepared = self._prepared, False
                if at_once:
                    self._poll_now(prepared=True)
            if oldest is not None or prepared or poll:
                self._tell()
            with self._changed:
                if self._may_read():
                    # A poll that takes longer than the time between two of them must not be all that is done.
                    return True

    def _poll_now(self, *, prepared: bool = False) -> None:
        began = time.monotonic()
        self._pipeline.poll(prepared=prepared)
        now = time.monotonic()
        beside = now - self._preparing if prepared and self._preparing is not None else 0.0
        self._polls_from = now + max(POLL_SHARE * (now - began), PREPARE_SHARE * beside)
        if prepared:
            self._preparing = None

    def _note_prepared(self) -> None:
        with self._changed:
            self._prepared = True
            self._changed.notify_all()

    def _may_poll(self) -> bool:
        return self._poll and (self._was_dry or self._preparing is None)

    def _may_read(self) -> bool:
        return self._dry is None and len(self._batches) <= self._depth // 2

    def _offer(self, made: list[Batch], dry: Dry | None) -> None:
        self._tell()
        with self._changed:
            self._batches += made
            if dry is not None and not self._poll:  # a poll that was asked for meanwhile comes first
                self._dry = dry
            self._changed.notify_all()

    def _tell(self) -> None:
        told = self._pipeline.status()
        with self._changed:
            self._told = told

    def _has_answer(self) -> bool:
        return bool(self._batches) or self._dry is not None or self._failure is not None or self._closed
