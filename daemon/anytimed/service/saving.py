"""When the state is written, and what came of it: the loop's hand on the committer and the mirror.

In order of a commit's life: `begin` hands a snapshot to the committer, if none is in flight; `committed` notes what
came of it and hands it to the mirror; one that failed is owed, and so is one for every rotten commit that a
verification found: `catch_up`, called between steps, begins what is owed. `finish` makes the last one. Steps that stay
unsaved for longer than `give_up_after_s` end the run. Everything here runs in the loop's thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from anytimed.config import CommitsTable
from anytimed.contracts import AnytimedError, Json, Snapshot
from anytimed.service.board import Board
from anytimed.service.committer import Committer
from anytimed.service.mirroring import Mirroring
from anytimed.service.requests import Committed, Mirrored, Request, Verified
from anytimed.service.session import Session
from anytimed.storage.commit import Commit

log = logging.getLogger("anytimed")

RETRY_S = 30.0
"""After a commit that failed, the next is not left to the timetable."""


class Saving:
    """`snapshot` copies the state out at the step that the learner has reached."""

    def __init__(
        self,
        session: Session,
        table: CommitsTable,
        board: Board,
        post: Callable[[Request], None],
        snapshot: Callable[[], Snapshot],
    ) -> None:
        self.table = table
        self._session, self._board, self._snapshot = session, board, snapshot
        self._learner = session.learner
        self._committer = Committer(session.commits, post)
        self._mirroring = Mirroring(session.mirror, session.commits, session.journal, post)
        self._committed_step = session.learner.step_count if session.resumed else 0
        self._began = 0.0
        self._unsaved_since: float | None = None
        self._owed = 0
        self._owed_from = 0.0
        self._asked: list[tuple[int, Future[dict[str, Any]]]] = []

    def start(self) -> None:
        self._mirroring.start()
        if self._session.commit is not None:
            self._mirror(self._session.commit)

    def close(self) -> None:
        self._committer.close()
        self._mirroring.close()
        self._answer(AnytimedError("the daemon is stopping"))

    @property
    def mirrored(self) -> bool:
        """Nothing waits for the mirror."""
        return self._mirroring.idle

    def stepped(self) -> None:
        """A step was taken that no commit holds yet."""
        self._unsaved_since = self._unsaved_since or time.monotonic()

    def begin(self, *, again: bool = False) -> None:
        """Begin a commit; not while one is in flight, nor (unless `again`) where no step was taken since the last.
        Raises AnytimedError where one has been in flight for too long."""
        if self._committer.busy:
            self._check_age("one is in flight and does not end")
        elif again or self._committed_step != self._learner.step_count:
            snapshot = self._snapshot()
            self._committed_step, self._began = self._learner.step_count, time.monotonic()
            self._committer.submit(snapshot, self.table.keep)

    def ask(self, reply: Future[dict[str, Any]]) -> None:
        """Begin a commit for somebody who waits for it: of this step, or a later one."""
        step, commit = self._learner.step_count, self._board.commit
        if not step:
            reply.set_exception(AnytimedError("no step was taken yet; there is nothing to commit"))
            return
        if commit is not None and commit["step"] == step and not self._committer.busy:
            reply.set_result(commit)
            return
        self._asked.append((step, reply))
        if self._committer.busy:  # with an older step, or with what was already told as done
            self._owed = max(self._owed, 1)
        else:
            self.begin(again=True)

    def settle(self) -> None:
        """Wait for the commit in flight, if there is one."""
        self._committer.wait()

    def catch_up(self) -> None:
        """Begin what is owed."""
        if self._owed and not self._committer.busy and time.monotonic() >= self._owed_from:
            self.begin(again=True)

    def verify(self) -> None:
        """Have the kept commits read again."""
        self._committer.verify()

    def finish(self, drain: Callable[[], None]) -> None:
        """The commit at the end; `drain` does what was posted. Raises AnytimedError where it could not be written."""
        self._owed = 0
        for _ in range(2):  # first the one in flight, then one of now
            self._committer.wait()
            drain()
            self.begin()
        self._committer.wait()
        drain()
        commit = self._board.commit
        if self._learner.step_count and (commit is None or commit["step"] != self._learner.step_count):
            raise AnytimedError(f"the last commit could not be written: {self._board.problems.get('commit')}")

    # --- what came of it

    def committed(self, done: Committed, *, waiting: bool) -> None:
        """`waiting`: there is no data, so no later step will make a commit due. Raises Refused where the run is no
        longer ours, AnytimedError where it has failed for too long."""
        if done.refused is not None:
            raise done.refused
        self._board.problem("commit", done.error)
        if done.commit is None:
            self._answer(AnytimedError(f"not committed: {done.error}; it is tried again"))
            self._committed_step = 0
            self._owed, self._owed_from = max(self._owed, 1), time.monotonic() + RETRY_S
            self._check_age(str(done.error))
            return
        newer = self._learner.step_count != done.step
        self._unsaved_since = self._began if newer else None
        self._owed = max(self._owed - 1, int(newer and waiting))
        if not self._owed:
            self._board.problem("verification", None)
        self._answer(self._board.committed(done.step, done.commit.path))
        self._owed = max(self._owed, int(bool(self._asked)))  # this one was in flight when they asked
        self._mirror(done.commit)

    def verified(self, done: Verified) -> None:
        """A rotten commit is replaced by a new one at once; then retention moves it to quarantine."""
        self._board.verified(done)
        self._owed = max(self._owed, len(done.rotten))

    def mirrored_one(self, done: Mirrored) -> None:
        """Raises Refused where the mirror belongs to another process."""
        if done.refused is not None:
            raise done.refused
        self._board.problem("mirror", done.error)
        if done.manifest is not None:
            self._board.mirrored_one(done.manifest.step, str(done.manifest.id))

    # --- within

    def _answer(self, outcome: Json | AnytimedError) -> None:
        """Tell those who asked for a commit: of one, who asked for its step or an earlier one; of a failure, all."""
        waiting, self._asked = self._asked, []
        for step, reply in waiting:
            if isinstance(outcome, AnytimedError):
                reply.set_exception(outcome)
            elif step <= outcome["step"]:
                reply.set_result(outcome)
            else:
                self._asked.append((step, reply))

    def _mirror(self, commit: Commit) -> None:
        self._mirroring.submit(commit, self.table.mirror_keep or self.table.keep)

    def _check_age(self, why: str) -> None:
        age_s = time.monotonic() - (self._unsaved_since or time.monotonic())
        if age_s > self.table.give_up_after_s:
            raise AnytimedError(f"no commit for {age_s:.0f} s ([commits] give_up_after_s); the last: {why}")
