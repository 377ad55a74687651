"""Trackers that get the figures too, each served by a thread of its own.

In order of a record: `Sinks.put` leaves it with every tracker's thread, which holds a bounded number of them and drops
the oldest; the thread opens the tracker, writes one record after the other, and flushes when none is left. A tracker
that fails is closed and a new one opened after a growing pause, from the record that failed on; a record that fails
again and again is passed over. Nobody waits for any of this but `close`, and that not for long.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from anytimed.config import Config
from anytimed.contracts import AnytimedError, Json, Sink, SinkRun
from anytimed.service.assembly import sink_of
from anytimed.urls import told

log = logging.getLogger("anytimed")

MOST_WAITING = 10_000
"""Records that a tracker may be behind by: a day of a run that reports every ten seconds."""
MOST_TRIES = 5
"""Of one record."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 120.0

Make = Callable[[], Sink]


@dataclass(frozen=True, slots=True)
class Table:
    """A tracker's table of the configuration. settings: what makes another tracker of it when it changes."""

    type: str
    settings: Json
    make: Make


def tables_of(config: Config) -> dict[str, Table]:
    """The trackers that a configuration names."""
    return {
        name: Table(table.type, table.settings, partial(sink_of, config, name))
        for name, table in sorted(config.sinks.items())
    }


class Follower:
    """One tracker's thread, which `close` ends. Other threads call only `put`, `close`, `join` and `status`."""

    def __init__(self, name: str, table: Table, run: SinkRun) -> None:
        self.name, self.table = name, table
        self._run = run
        self._changed = threading.Condition()
        self._waiting: deque[Json] = deque()
        self._written = self._dropped = 0
        self._problem: str | None = None
        self._deadline: float | None = None
        self._tries = 0
        self._pause_s = FIRST_PAUSE_S
        self._thread = threading.Thread(target=self._serve, name=f"sink {name}", daemon=True)
        self._thread.start()

    def put(self, record: Json) -> None:
        with self._changed:
            self._waiting.append(record)
            if len(self._waiting) > MOST_WAITING:
                self._waiting.popleft()
                self._dropped += 1
            self._changed.notify()

    def status(self) -> Json:
        with self._changed:
            return {
                "type": self.table.type,
                "written": self._written,
                "waiting": len(self._waiting),
                "dropped": self._dropped,
                "problem": self._problem,
            }

    def close(self, within_s: float) -> None:
        """Write what waits, for so long at most, and end."""
        with self._changed:
            self._deadline = time.monotonic() + within_s
            self._changed.notify()

    def join(self, timeout_s: float) -> bool:
        """Whether it has ended within `timeout_s`."""
        self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    # --- the thread

    def _serve(self) -> None:
        left = self._follow()
        if left:
            log.warning("sink %s: ends with %d records that it did not take: %s", self.name, left, self._problem)

    def _follow(self) -> int:
        """Until it is to end; how many records are left."""
        record: Json | None = None
        while True:
            sink: Sink | None = None
            try:
                sink = self.table.make()
                sink.open(self._run)
                if record is None and not self._waiting:
                    self._well()
                while (record := record or self._next()) is not None:
                    sink.write(record)
                    self._took(record)
                    record = None
                    if not self._waiting:
                        sink.flush()
                        self._well()
                sink.close()
                return len(self._waiting)
            except BaseException as error:  # noqa: BLE001 - whatever its library raises is told and tried again
                if sink is not None:
                    with contextlib.suppress(Exception):
                        sink.close()
                self._failed(error)
            if record is not None and self._often_enough():
                record = None
            if not self._rest():
                return len(self._waiting) + (record is not None)

    def _next(self) -> Json | None:
        """The next record; None where it is to end."""
        with self._changed:
            while not self._waiting and self._deadline is None:
                self._changed.wait()
            late = self._deadline is not None and time.monotonic() > self._deadline
            return self._waiting.popleft() if self._waiting and not late else None

    def _took(self, record: Json) -> None:
        with self._changed:
            self._written += 1
        self._tries = 0
        if record["kind"] == "step":
            self._run = replace(self._run, step=record["step"], tokens=record["tokens"])

    def _well(self) -> None:
        self._pause_s = FIRST_PAUSE_S
        if self._problem is not None:
            self._problem = None
            log.info("sink %s: well again", self.name)

    def _failed(self, error: BaseException) -> None:
        problem = told(str(error) if isinstance(error, AnytimedError) else f"{type(error).__name__}: {error}")[:500]
        if self._problem is None:
            log.warning("sink %s: %s; the training goes on, and it is tried again", self.name, problem)
        self._problem = problem

    def _often_enough(self) -> bool:
        """Whether the record that failed is to be passed over: it may be the record."""
        self._tries += 1
        if self._tries < MOST_TRIES:
            return False
        self._tries = 0
        with self._changed:
            self._dropped += 1
        return True

    def _rest(self) -> bool:
        """Wait before the next try, which is the last one where it is to end meanwhile; False where it was the last."""
        until = time.monotonic() + self._pause_s * random.uniform(0.5, 1.5)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        with self._changed:
            if self._deadline is not None:
                return False
            while self._deadline is None and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            return True


class Sinks:
    """All trackers of a run."""

    def __init__(self) -> None:
        self._followers: dict[str, Follower] = {}
        self._changing = threading.Lock()

    def follow(self, tables: Mapping[str, Table], run: SinkRun, within_s: float) -> None:
        """Have these trackers and no others: one whose table has changed ends and begins anew. `within_s`: how long one
        that ends may go on writing; nobody waits for it."""
        with self._changing:
            before, self._followers = self._followers, {}
            for name, table in tables.items():
                old = before.get(name)
                if old is not None and (old.table.type, old.table.settings) == (table.type, table.settings):
                    self._followers[name] = before.pop(name)
            for old in before.values():
                old.close(within_s)
            for name, table in tables.items():
                if name not in self._followers:
                    own = replace(run, folder=run.folder / name)
                    self._followers[name] = Follower(name, table, own)

    def put(self, record: Json) -> None:
        with self._changing:
            for follower in self._followers.values():
                follower.put(record)

    def status(self) -> Json:
        """By name the type, counts of records written, waiting and dropped, and what is wrong, None for nothing."""
        return {name: follower.status() for name, follower in sorted(self._followers.items())}

    def close(self, within_s: float) -> None:
        """Have all written what waits, for so long at most."""
        until = time.monotonic() + within_s
        followers = list(self._followers.values())
        for follower in followers:
            follower.close(within_s)
        for follower in followers:
            if not follower.join(until - time.monotonic()):
                log.warning(
                    "sink %s: not done within %.0f s; what it has not written is lost to it", follower.name, within_s
                )
