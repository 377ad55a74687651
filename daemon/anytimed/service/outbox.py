"""The one upload thread: builds exports in the spool, publishes them, tries again when the store does not answer.

In order of an export's life: `submit` leaves a recipe for the content where the thread finds it, the newest only; the
thread makes it and builds it in the spool, which survives a restart; everything older that still waits is dropped; the
newest is published, if the keeper says that the prefix is ours; a store that fails is tried again later with a growing
pause, and the loop never waits for it. What a killed process left half done in the store is repaired before anything
else. What happened is posted, and told to whoever asked for the export."""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from anytimed.contracts import AnytimedError, Json, Refused
from anytimed.service.keeper import Keeper
from anytimed.service.requests import Crashed, Published, Request
from anytimed.storage.exports import ExportContent, ExportRefused, Publisher, Spool, SpoolItem, Superseded
from anytimed.storage.gate import Standing
from anytimed.storage.manifest import NewerFormat

log = logging.getLogger("anytimed")

FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 120.0

Reply = Future[dict[str, Any]]
Make = Callable[[], ExportContent]
"""Waits for the device where it has to, then gives the content; called in the outbox's thread."""


class Outbox:
    """`parent`: the checkpoint published last, named as the parent of the next."""

    def __init__(
        self,
        spool: Spool,
        publisher: Publisher,
        keeper: Keeper,
        post: Callable[[Request], None],
        url: str,
        parent: str | None,
    ) -> None:
        self._spool, self._publisher, self._keeper, self._post, self._url = spool, publisher, keeper, post, url
        self._parent = parent
        self._repaired = False
        self.keeps: str | None = None
        """The checkpoint that the gate compares with: its files stay in the run directory."""
        self._changed = threading.Condition()
        self._make: Make | None = None
        self._replies: list[Reply] = []
        self._retention: Callable[[], object] | None = None
        self._upload: tuple[str, float, int, int] | None = None  # checkpoint, when it began, bytes done, bytes in all
        self._busy = False
        self._closing = False
        self._pause_s = FIRST_PAUSE_S
        self._retry_at = 0.0  # what an earlier run left in the spool goes out at once
        self._waiting = bool(spool.pending())
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, make: Make, reply: Reply | None = None) -> None:
        """Publish this next. What was not yet begun gives way to it, and who asked for that gets this one's answer."""
        with self._changed:
            self._make = make
            if reply is not None:
                self._replies.append(reply)
            self._changed.notify()

    def wake(self) -> None:
        """The prefix is ours again: go on at once."""
        with self._changed:
            self._retry_at, self._pause_s = 0.0, FIRST_PAUSE_S
            self._changed.notify()

    def retain(self, delete: Callable[[], object]) -> None:
        """Run a deletion in the published prefix between uploads."""
        with self._changed:
            self._retention = delete
            self._changed.notify()

    @property
    def idle(self) -> bool:
        """Nothing is being built or uploaded, and nothing waits for the store."""
        with self._changed:
            return not (self._busy or self._make or self._waiting)

    @property
    def spooled(self) -> int:
        """Exports that are built, or about to be, and wait for the store."""
        return int(self._waiting) + int(self._make is not None)

    @property
    def upload(self) -> Json | None:
        """The upload that is under way, with its rate and the time left; None where there is none."""
        upload = self._upload
        if upload is None:
            return None
        checkpoint, began, done, total = upload
        rate = done / max(time.monotonic() - began, 1e-9)
        return {
            "checkpoint": checkpoint,
            "done_bytes": done,
            "total_bytes": total,
            "bytes_per_s": rate,
            "left_s": (total - done) / rate if rate else None,
        }

    def close(self) -> None:
        """End the thread after what it is doing now; the spool keeps what was not published."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout=5)

    # --- the thread

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # noqa: BLE001 - not handled here: the loop raises it
            self._post(Crashed(error))

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                while not (self._closing or self._make or self._retention or self._due() or self._to_repair()):
                    self._changed.wait(self._nap())
                if self._closing:
                    return
                self._busy = True
                make, self._make = self._make, None
                replies, self._replies = self._replies, []
                retention, self._retention = self._retention, None
            try:
                if make is not None:
                    self._build(make)
                if make is not None or self._due() or self._to_repair():
                    self._publish(replies)
                if retention is not None:
                    retention()
            except ExportRefused as error:
                # The store is not to blame: what waits for it is tried as before.
                self._tell(error, replies)
            except AnytimedError as error:
                self._failed(error, replies)
            except OSError as error:
                self._failed(AnytimedError(f"spool: {error}; the next export may succeed"), replies)

    def _due(self) -> bool:
        return self._waiting and time.monotonic() >= self._retry_at

    def _to_repair(self) -> bool:
        return not self._repaired and self._keeper.held and time.monotonic() >= self._retry_at

    def _nap(self) -> float | None:
        return max(0.0, self._retry_at - time.monotonic()) if self._waiting else None

    def _build(self, make: Make) -> None:
        self._spool.build(replace(make(), parent=self._parent))
        self._waiting = True

    def _publish(self, replies: list[Reply]) -> None:
        """Publish the newest item of the spool and drop the older ones."""
        newest = next(iter(self._spool.coalesce()), None)
        self._waiting = newest is not None
        self._keeper.check()
        if not self._repaired:
            self._publisher.repair(alone=self._keeper.fences)
            self._repaired = True
        if newest is not None and self._sent(newest):
            served = self._spool.serve(newest, self.keeps)
            self._parent = newest.id
            for reply in replies:
                reply.set_result({"checkpoint": newest.id, "step": newest.manifest.step, "url": self._url})
            found = newest.manifest.evaluation
            self._post(
                Published(
                    newest.manifest.step,
                    checkpoint=newest.id,
                    digest=hashlib.sha256(newest.manifest.to_bytes()).hexdigest(),
                    standing=Standing(newest.id, found.holdout, found.loss_x) if found else None,
                    served=served,
                )
            )
        self._waiting, self._pause_s = False, FIRST_PAUSE_S

    def _sent(self, item: SpoolItem) -> bool:
        """Publish it; False where it is one that an earlier process left and that others have overtaken since: what
        this process exports counts as newer than theirs, that one never will, and it is dropped."""
        began, total = time.monotonic(), item.manifest.total_bytes

        def moved(done: int, _: int) -> None:
            self._upload = (item.id, began, done, total)

        moved(0, total)
        try:
            self._publisher.publish(item, moved, check=self._keeper.check)
        except (Superseded, Refused) as error:
            if item.manifest.term == self._spool.term or isinstance(error, NewerFormat):
                raise
            log.warning("%s: waited too long and is dropped: %s", item.id, error)
            self._spool.discard(item)
            return False
        finally:
            self._upload = None
        return True

    def _failed(self, error: AnytimedError, replies: list[Reply]) -> None:
        # Drawn at random, or a thousand daemons would come back to a store at the same moment.
        self._retry_at = time.monotonic() + self._pause_s * random.uniform(0.5, 1.5)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        self._tell(error, replies)

    def _tell(self, error: AnytimedError, replies: list[Reply]) -> None:
        for reply in replies:
            if not reply.done():
                reply.set_exception(error)
        ends = isinstance(error, Refused | Superseded)
        self._post(Published(error=str(error), refused=error if ends else None))
