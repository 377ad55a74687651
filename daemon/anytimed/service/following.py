"""`pull --follow`: a folder that is kept at the newest checkpoint, and a command after each change, for ever.

In order: take the folder's follower lock; look at the store, by a `Watcher`; tell systemd READY once a good checkpoint
is in place, at the start one that an earlier follower left too; run the command for it, unless it has succeeded for
just this one; rest; look again. A command that fails is run again after each look, until it succeeds or a newer
checkpoint is in place. `.follow.json` in the folder says for which checkpoint which command last succeeded, so that
across restarts it runs at least once for what is in place, and not again once it has succeeded; after another --exec
line it runs once more. A follower that is killed while its command runs cannot know how that ended, and runs it again.

SIGTERM and SIGINT end it with exit code 0: at once where it looks, pulls or rests (the next start goes on with a pull
that was cut), and through the command where that runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from anytimed.contracts import AnytimedError, CorruptError, Json, Refused
from anytimed.service.after_pull import Command
from anytimed.service.console import ago, size
from anytimed.service.systemd import Systemd
from anytimed.storage.durable import make_folders, write_durably
from anytimed.storage.strangers import read_json
from anytimed.storage.watch import Checkpoint, Watcher

log = logging.getLogger("anytimed")

_TELL_EVERY_S = 10.0
_ALLOWANCE_S, _FIRST_ALLOWANCE_S = 120.0, 900.0
"""What systemd is asked for, again and again, until the first checkpoint is in place; and at the start, when every byte
of one that is there already is compared with its digest."""
_STATE, _LOCK = ".follow.json", ".follow.lock"


class _Ended(BaseException):
    """Told to stop, at a moment when anything may be left as it is."""


class Follower:
    """Follows `url` into the folder `to`. keep: versions that stay there, None for all."""

    def __init__(
        self,
        url: str,
        to: Path,
        *,
        every_s: float,
        keep: int | None,
        command: Command | None,
        systemd: Systemd,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._watcher = Watcher(url, to=to, every_s=every_s, progress=self._pulling)
        self._to, self._keep, self._command = to.absolute(), keep, command
        self._systemd, self._clock = systemd, clock
        self._stop = threading.Event()
        self._commanding = False
        self._ready = False
        self._current: Checkpoint | None = None
        self._trouble: str | None = None
        self._told_at = self._pull_told_at = 0.0

    def run(self) -> None:
        """Follow until a signal says stop. Main thread only. Raises Refused, ConfigError."""
        try:
            with self._only_one(), self._signals():
                self._systemd.extend(_FIRST_ALLOWANCE_S)
                while not self._stop.is_set():
                    self._look()
                    self._rest(self._watcher.pause_s())
        except _Ended:
            pass
        self._systemd.notify("STOPPING=1")
        log.info("stopped; %s", f"{self._current.id} is in place" if self._current else "nothing was pulled")

    # --- one round ---

    def _look(self) -> None:
        self._pull_told_at = time.monotonic()
        found = self._watcher.look()
        if found is not None:
            self._current, self._trouble = found, None
            log.info(
                "%s in place: step %s, %s tokens, published %s ago, %s",
                found.id, f"{found.step:,}", f"{found.tokens:,}", self._age(found), found.path,
            )  # fmt: skip
            if found.fell_back:
                log.warning("%s is the newest good one; the newest is damaged", found.id)
            self._retain()
            if not self._ready:
                self._ready = True
                self._systemd.notify("READY=1")
        self._tell(now=True)
        if self._current is not None and self._command is not None:
            self._after(self._current, self._command)

    def _after(self, current: Checkpoint, command: Command) -> None:
        """Run the command, unless it has succeeded for this checkpoint."""
        which = {"id": current.id, "run_id": current.manifest.run_id, "command": command.digest}
        done = self._succeeded()
        if done == which or current.path is None:
            return
        began = time.monotonic()
        self._commanding = True  # from here on a signal waits until the command has ended
        try:
            if self._stop.is_set():
                return
            previous = str(done.get("id", ""))
            problem = command.run(current.manifest, current.path, previous, self._stop, self._tell)
            if problem is None:
                self._note(which)
        finally:
            self._commanding = False
        if problem is None:
            log.info("the command succeeded for %s in %s", current.id, ago(time.monotonic() - began))
            self._trouble = None
            self._retain()
        else:
            again = "" if self._stop.is_set() else "; it is run again after the next look"
            log.warning("the command failed for %s: %s%s", current.id, problem, again)
            self._trouble = f"the command failed: {problem}"
        self._tell(now=True)

    def _rest(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0 and not self._stop.wait(min(left, 1.0)):
            self._tell()

    def _retain(self) -> None:
        """What the command last succeeded for is in use, and stays."""
        if self._keep is not None:
            in_use = self._succeeded().get("id")
            self._watcher.retain(self._keep, (in_use,) if isinstance(in_use, str) else ())

    # --- what it says ---

    def _tell(self, *, now: bool = False) -> None:
        """Feed the watchdog, or have systemd wait on; every few seconds say where things stand."""
        self._systemd.ping()
        if not now and time.monotonic() - self._told_at < _TELL_EVERY_S:
            return
        self._told_at = time.monotonic()
        if not self._ready:
            self._systemd.extend(_ALLOWANCE_S)
        self._systemd.notify(f"STATUS={self._status()}")

    def _status(self) -> str:
        current, problem = self._current, self._watcher.problem
        standing = "nothing in place yet"
        if current is not None:
            standing = f"{current.id}, step {current.step:,}, published {self._age(current)} ago"
        more = [self._trouble] if self._trouble else []
        if problem is not None:
            more.append(f"the store fails: {str(problem)[:200]}")
        elif self._watcher.damaged:
            more.append("a newer one is damaged")
        elif self._watcher.waiting:
            more.append("nothing is published")
        return "; ".join([standing, *more])

    def _age(self, checkpoint: Checkpoint) -> str:
        return ago(max(self._clock() - checkpoint.manifest.created_s, 0.0))

    def _pulling(self, done: int, total: int) -> None:
        self._tell()
        if time.monotonic() - self._pull_told_at >= _TELL_EVERY_S:
            self._pull_told_at = time.monotonic()
            log.info("pulling: %s of %s", size(done), size(total))
            self._systemd.notify(f"STATUS=pulling, {size(done)} of {size(total)}; {self._status()}")

    # --- what outlives it ---

    def _succeeded(self) -> Json:
        """For which checkpoint which command last succeeded; {} for none."""
        try:
            found = read_json(self._to / _STATE, 1 << 16).get("succeeded")
        except FileNotFoundError:
            return {}
        except (OSError, CorruptError) as error:
            log.warning("%s; so the command is run again", error)
            return {}
        return found if isinstance(found, dict) else {}

    def _note(self, which: Json) -> None:
        try:
            write_durably(self._to / _STATE, json.dumps({"format_version": 1, "succeeded": which}).encode() + b"\n")
        except OSError as error:
            log.warning("%s: not noted that the command succeeded, so it is run again: %s", self._to / _STATE, error)

    @contextlib.contextmanager
    def _only_one(self) -> Iterator[None]:
        """Two followers of one folder would each run a command for what the other had put there."""
        try:
            make_folders(self._to)
            file = os.open(self._to / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise AnytimedError(f"{self._to}: cannot be written: {error.strerror or error}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise Refused(f"{self._to}: another `pull --follow` keeps this folder; one is enough") from None
        finally:
            os.close(file)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._told_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    def _told_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()
        if not self._commanding:
            raise _Ended
