"""What may be asked of the loop, and the mailbox it is posted in.

Signal handlers, timers, threads and the control socket only post; the loop drains the mailbox between steps, so
everything that changes anything happens in one thread. `SimpleQueue.put` is reentrant: a signal handler may post at
any moment."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anytimed.storage.commit import Commit as WrittenCommit
from anytimed.storage.commit import Rejected
from anytimed.storage.gate import Standing
from anytimed.storage.mirror_manifest import MirrorManifest


@dataclass(frozen=True, slots=True)
class Stop:
    """Commit, drain the uploads, end. A second one gives up the uploads, never the commit. `at`: when it was asked
    for, by the monotonic clock."""

    why: str
    at: float = field(default_factory=time.monotonic, compare=False)


@dataclass(frozen=True, slots=True)
class Pause:
    """Take no more steps until `Resume`, or another start. `reply` gets the state and the step."""

    reply: Future[dict[str, Any]] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on after a `Pause`. `reply` gets the state and the step."""

    reply: Future[dict[str, Any]] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Reload:
    """Read the config file again. `reply` gets what changed, or the reason why nothing did."""

    reply: Future[dict[str, Any]] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Commit:
    """Write the resumable state. `reply` gets the commit's JSON, of this step or a later one, or the error."""

    reply: Future[dict[str, Any]] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Export:
    """Publish x now. `reply` gets the published checkpoint's JSON, or the error."""

    reply: Future[dict[str, Any]] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Discover:
    """Look for new data."""


@dataclass(frozen=True, slots=True)
class Retain:
    """Delete what retention lets go of in the published prefix."""


@dataclass(frozen=True, slots=True)
class Verify:
    """Read the commits that are kept again, from the disk."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The committer is done: the commit, or why there is none. `refused` ends the run."""

    step: int
    commit: WrittenCommit | None = None
    error: str | None = None
    refused: Exception | None = None


@dataclass(frozen=True, slots=True)
class Verified:
    """The committer has read its commits again: how many, what is wrong with which, or why it could not read them."""

    commits: int
    rotten: tuple[Rejected, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Mirrored:
    """The mirror holds a commit, verified; or it could not be sent for now. `refused` ends the run."""

    manifest: MirrorManifest | None = None
    error: str | None = None
    refused: Exception | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """The outbox is done with one checkpoint, or could not publish for now. `refused` ends the run. `digest`: SHA-256
    of its manifest, `standing`: how good the published x is, `served`: the folder that keeps it here."""

    step: int | None = None
    checkpoint: str | None = None
    digest: str | None = None
    standing: Standing | None = None
    served: Path | None = None
    error: str | None = None
    refused: Exception | None = None


@dataclass(frozen=True, slots=True)
class Leased:
    """The right to publish changed: held (no error), or not held for now and why. `refused` ends the run."""

    error: str | None = None
    refused: Exception | None = None


@dataclass(frozen=True, slots=True)
class Crashed:
    """A thread met an error that nobody foresaw: the loop raises it, so that it ends the run and is seen."""

    error: BaseException


Request = (
    Stop
    | Pause
    | Resume
    | Reload
    | Commit
    | Export
    | Discover
    | Retain
    | Verify
    | Committed
    | Verified
    | Mirrored
    | Published
    | Leased
    | Crashed
)


class Mailbox:
    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Request] = queue.SimpleQueue()

    def post(self, request: Request) -> None:
        self._queue.put(request)

    def drain(self, wait_s: float = 0.0) -> Iterator[Request]:
        """Everything posted so far, oldest first; waits up to `wait_s` for the first."""
        try:
            yield self._queue.get(timeout=wait_s) if wait_s > 0 else self._queue.get_nowait()
            while True:
                yield self._queue.get_nowait()
        except queue.Empty:
            return
