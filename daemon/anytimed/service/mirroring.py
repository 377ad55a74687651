"""The thread that keeps the mirror: the newest commit, one at a time, tried again when the store does not answer.

`submit` leaves a commit where the thread finds it, the newest only; the thread pins it, sends it and lets older ones
go. A store that fails is tried again after a pause that grows and is drawn anew each time, so that many daemons do not
come back together. Neither the loop nor the committer ever waits for it. What happened is posted as `Mirrored`.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from anytimed.contracts import AnytimedError, Refused
from anytimed.service.requests import Crashed, Mirrored, Request
from anytimed.storage.commits import Commit, Commits
from anytimed.storage.journal import Journal
from anytimed.storage.mirror import Mirror

log = logging.getLogger("anytimed")

FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 300.0


class Mirroring:
    """Keeps `mirror` up with the commits it is told of. Without a mirror nothing happens."""

    def __init__(
        self, mirror: Mirror | None, commits: Commits, journal: Journal, post: Callable[[Request], None]
    ) -> None:
        self._mirror, self._commits, self._journal, self._post = mirror, commits, journal, post
        self._changed = threading.Condition()
        self._next: Commit | None = None
        self._keep = 2
        self._busy = self._closing = False
        self._pause_s = FIRST_PAUSE_S
        self._retry_at = 0.0
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def start(self) -> None:
        if self._mirror is not None:
            self._thread.start()

    def submit(self, commit: Commit, keep: int) -> None:
        """Mirror this next; what was not yet begun gives way to it."""
        if self._mirror is None:
            return
        with self._changed:
            self._next, self._keep = commit, keep
            self._changed.notify()

    @property
    def idle(self) -> bool:
        """Nothing is being sent, and nothing waits for the store."""
        with self._changed:
            return not self._busy and self._next is None

    def close(self) -> None:
        """End the thread after what it is doing now; what was not sent is sent after the next start."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout=5)

    # --- the thread

    def _run(self) -> None:
        assert self._mirror is not None
        try:
            while (work := self._wait()) is not None:
                self._serve(self._mirror, *work)
        except BaseException as error:  # noqa: BLE001 - not handled here: the loop raises it
            self._post(Crashed(error))

    def _wait(self) -> tuple[Commit, int] | None:
        """The commit to send; None once closed."""
        with self._changed:
            self._busy = False
            while not self._closing and (self._next is None or time.monotonic() < self._retry_at):
                self._changed.wait(None if self._next is None else max(0.0, self._retry_at - time.monotonic()))
            if self._closing or self._next is None:
                return None
            self._busy = True
            commit, self._next = self._next, None
            return commit, self._keep

    def _serve(self, mirror: Mirror, commit: Commit, keep: int) -> None:
        try:
            with self._commits.pinned(commit) as there:
                if not there:
                    return  # a newer one has been made since, and is waited for
                manifest = mirror.push(commit, self._journal)
        except (AnytimedError, OSError) as error:
            self._failed(error, commit)
            return
        self._pause_s = FIRST_PAUSE_S
        self._post(Mirrored(manifest))
        try:
            mirror.retain(keep)
        except Refused as error:
            self._post(Mirrored(error=str(error), refused=error))
        except (AnytimedError, OSError) as error:
            log.warning("mirror: older commits were not tidied up: %s; tried again after the next one", error)

    def _failed(self, error: AnytimedError | OSError, commit: Commit) -> None:
        with self._changed:
            if self._next is None:
                self._next = commit
            self._retry_at = time.monotonic() + self._pause_s * random.uniform(0.5, 1.0)
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        told = f"mirror: {error}; training goes on, the newest commit is sent later"
        self._post(Mirrored(error=told, refused=error if isinstance(error, Refused) else None))
