"""The thread that writes commits: at most one in flight, so a slow disk costs commits, not steps.

The loop hands over a snapshot and goes on; when the commit stands (or failed) a `Committed` is posted. Retention runs
right after the commit point, in the same thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from anytimed.contracts import AnytimedError, Refused, Snapshot
from anytimed.service.requests import Committed, Crashed, Request
from anytimed.storage.commits import Commits

log = logging.getLogger("anytimed")


class Committer:
    def __init__(self, commits: Commits, post: Callable[[Request], None]) -> None:
        self._commits, self._post = commits, post
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="committer")
        self._flight: Future[None] | None = None

    @property
    def busy(self) -> bool:
        return self._flight is not None and not self._flight.done()

    def submit(self, snapshot: Snapshot, keep: int) -> None:
        """Write a snapshot and retain `keep` commits. The caller has seen that nothing is in flight."""
        assert not self.busy, "one commit at a time"
        self._flight = self._pool.submit(self._write, snapshot, keep)

    def wait(self) -> None:
        """Until the commit in flight, if any, is done and its outcome posted."""
        if self._flight is not None:
            self._flight.result()

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _write(self, snapshot: Snapshot, keep: int) -> None:
        try:
            self._post(self._committed(snapshot))
            self._retain(keep)
        except BaseException as error:  # noqa: BLE001 - not handled here: the loop raises it
            self._post(Crashed(error))

    def _committed(self, snapshot: Snapshot) -> Committed:
        try:
            commit = self._commits.write(snapshot)
        except Refused as error:
            return Committed(snapshot.step, error=str(error), refused=error)
        except AnytimedError as error:
            return Committed(snapshot.step, error=str(error))
        return Committed(snapshot.step, path=str(commit.path))

    def _retain(self, keep: int) -> None:
        try:
            self._commits.retain(keep)
        except (AnytimedError, OSError) as error:
            log.warning("older commits were not tidied up: %s; it is tried again after the next commit", error)
