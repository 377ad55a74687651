"""What is left for people and tools: metrics.jsonl, one JSON object a line, status.json, replaced whole, and what
trackers get (`sinks`).

The loop only puts: a record into a queue, the newest status where the thread finds it. The thread appends the records
to metrics.jsonl (`history`, which thins it with age), hands them on to the trackers' own threads, replaces status.json,
and looks how full the disk is. The training reads none of it back, and nobody waits for it: a full disk, a disk that
hangs or a power cut costs figures, never the run.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from anytimed.contracts import Json, SinkRun
from anytimed.service.history import History, finite
from anytimed.service.sinks import Sinks, Table

MOST_WAITING = 10_000
"""Lines that a disk which hangs may be behind by; then the oldest are dropped."""
CLOSE_S = 5.0
"""How long `close` waits for the disk, and then again for the trackers."""


class Metrics:
    """`failed` says what could not be written or sent, None when all is well again. The loop's thread calls `write`,
    `show` and `follow`; any thread may ask."""

    def __init__(self, path: Path, status: Path) -> None:
        self._path, self._status_path = path, status
        self.history = History(path)
        self._changed = threading.Condition()
        self._records: deque[Json] = deque()
        self._status: Json | None = None
        self._busy = self._closing = False
        self._lost = 0
        self._failures: dict[Path, str] = {}
        self._disk: Json | None = None
        self._sinks = Sinks()
        self._thread = threading.Thread(target=self._serve, name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def follow(self, tables: Mapping[str, Table], run: SinkRun) -> None:
        """Send what is written from now on to these trackers, and to no others."""
        self._sinks.follow(tables, run, CLOSE_S)

    @property
    def failed(self) -> str | None:
        problems = list(filter(None, (*self._failures.values(), self.history.problem)))
        if self._lost:
            problems.append(f"{self._path}: the disk does not keep up; {self._lost} lines are lost")
        for name, sink in self.sinks().items():
            if sink["problem"] is not None:
                problems.append(f"sink {name}: {sink['problem']}")
        return "; ".join(problems) or None

    def sinks(self) -> Json:
        """The trackers by name, as `Sinks.status` tells."""
        return self._sinks.status()

    @property
    def disk(self) -> Json | None:
        """`free_bytes` and `total_bytes` of the run directory's file system; None where it is not known yet."""
        return self._disk

    def show(self, status: Json) -> None:
        """Replace status.json, soon."""
        with self._changed:
            self._status = status
            self._changed.notify_all()

    def write(self, kind: str, **values: Any) -> Json:
        """A line of metrics.jsonl, soon; the record. Nobody may change it, or the values, any more."""
        record: Json = {"kind": kind, "time": round(time.time(), 3), **{key: finite(v) for key, v in values.items()}}
        with self._changed:
            self._records.append(record)
            if len(self._records) > MOST_WAITING:
                self._records.popleft()
                self._lost += 1
            self._changed.notify_all()
        return record

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until the files have what was put; whether they had it within `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not (self._records or self._status is not None or self._busy), timeout_s
            )

    def close(self) -> None:
        """Let files and trackers have what was put before; of those that do not take it in time, nobody waits."""
        if self._thread.ident is None:
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(CLOSE_S)
        self.history.close()
        self._sinks.close(CLOSE_S)

    # --- the thread

    def _serve(self) -> None:
        try:
            self.history.load()
        except OSError as error:
            self._failures[self._path] = f"{self._path}: {error}"
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closing or self._records or self._status is not None)
                if self._closing and not self._records and self._status is None:
                    return
                self._busy = True
                records, status = list(self._records), self._status
                self._records.clear()
                self._status = None
            for record in records:
                self._append(record)
            if status is not None:
                self._replace(status)
                self._look()

    def _append(self, record: Json) -> None:
        self._sinks.put(record)
        try:
            self.history.append(record)
            self._failures.pop(self._path, None)
        except OSError as error:
            self._failures[self._path] = f"{self._path}: {error}"

    def _replace(self, status: Json) -> None:
        beside = self._status_path.with_name(".tmp-status.json")
        try:
            beside.unlink(missing_ok=True)
            with _private(beside, os.O_EXCL) as file:
                file.write(json.dumps(status, default=str))
            beside.replace(self._status_path)
            self._failures.pop(self._status_path, None)
        except OSError as error:
            self._failures[self._status_path] = f"{self._status_path}: {error}"

    def _look(self) -> None:
        try:
            found = os.statvfs(self._path.parent)
        except OSError:
            return
        self._disk = {"free_bytes": found.f_bavail * found.f_frsize, "total_bytes": found.f_blocks * found.f_frsize}


def _private(path: Path, flags: int) -> TextIO:
    """A file to write, for the owner's eyes, and never through a symlink."""
    return os.fdopen(os.open(path, flags | os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "w")
