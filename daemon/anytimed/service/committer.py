"""The thread that writes commits: at most one in flight, so a slow disk costs commits, not steps.

The loop hands over a snapshot and goes on; when the commit stands (or failed) a `Committed` is posted. Retention runs
right after the commit point, in the same thread. So does `verify`, which reads the kept commits again, one at a time:
a commit that comes due meanwhile waits for one of them at most. What was found is posted as `Verified`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from anytimed.contracts import AnytimedError, Refused, Snapshot
from anytimed.service.requests import Committed, Crashed, Request, Verified
from anytimed.storage.commits import Commits, Rejected

log = logging.getLogger("anytimed")


class Committer:
    def __init__(self, commits: Commits, post: Callable[[Request], None]) -> None:
        self._commits, self._post = commits, post
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="committer")
        self._flight: Future[None] | None = None
        self._verifying = False
        self._closing = threading.Event()

    @property
    def busy(self) -> bool:
        """A commit is in flight."""
        return self._flight is not None and not self._flight.done()

    def submit(self, snapshot: Snapshot, keep: int) -> None:
        """Write a snapshot and retain `keep` commits. The caller has seen that nothing is in flight."""
        assert not self.busy, "one commit at a time"
        self._flight = self._pool.submit(self._write, snapshot, keep)

    def verify(self) -> None:
        """Read the kept commits again, unless that is going on already."""
        if not self._verifying:
            self._verifying = True
            self._pool.submit(self._guarded, self._begin_verification)

    def wait(self) -> None:
        """Until the commit in flight, if any, is done and its outcome posted."""
        if self._flight is not None:
            self._flight.result()

    def close(self) -> None:
        self._closing.set()
        self._pool.shutdown(wait=True)

    # --- the thread

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            work(*arguments)
        except BaseException as error:  # noqa: BLE001 - not handled here: the loop raises it
            self._post(Crashed(error))

    def _write(self, snapshot: Snapshot, keep: int) -> None:
        self._guarded(lambda: self._post(self._committed(snapshot)))
        self._guarded(self._retain, keep)

    def _committed(self, snapshot: Snapshot) -> Committed:
        try:
            commit = self._commits.write(snapshot)
        except Refused as error:
            return Committed(snapshot.step, error=str(error), refused=error)
        except AnytimedError as error:
            return Committed(snapshot.step, error=str(error))
        return Committed(snapshot.step, commit)

    def _retain(self, keep: int) -> None:
        try:
            self._commits.retain(keep)
        except (AnytimedError, OSError) as error:
            log.warning("older commits were not tidied up: %s; it is tried again after the next commit", error)

    def _begin_verification(self) -> None:
        try:
            paths = self._commits.kept()
        except OSError as error:
            self._end_verification(0, (), str(error))
        else:
            self._verify_next(paths, 0, ())

    def _verify_next(self, paths: list[Path], count: int, rotten: tuple[Rejected, ...]) -> None:
        """Read the first of `paths`, then queue for the rest behind what was submitted meanwhile."""
        while paths and not paths[0].is_dir():  # retired meanwhile
            paths = paths[1:]
        if self._closing.is_set() or not paths:
            self._end_verification(count, rotten, None)
            return
        try:
            found = self._commits.recheck(paths[0])
        except AnytimedError as error:
            self._end_verification(count, rotten, str(error))
            return
        rotten += (found,) if found is not None else ()
        try:
            self._pool.submit(self._guarded, self._verify_next, paths[1:], count + 1, rotten)
        except RuntimeError:  # closed meanwhile
            self._end_verification(count + 1, rotten, None)

    def _end_verification(self, count: int, rotten: tuple[Rejected, ...], error: str | None) -> None:
        self._verifying = False
        self._post(Verified(count, rotten, error))
