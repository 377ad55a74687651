"""metrics.jsonl: everything that was measured, in a file and in memory that both stay small however long a run lasts.

`load` reads the file that an earlier start left; `append` writes a line and keeps its figures; `view` makes a picture's
worth of them. Once the file has grown by enough, a thread of its own reads it again, thins what is old (`thinning`)
into a file beside, adds what was appended meanwhile, and renames it: a crash leaves the old one or the new one. Neither
appending nor viewing waits for that. Nothing is fsynced but that file before its rename: a power cut costs figures,
never the run. No line is fatal: one that is torn, garbage, or of another version is passed over.
"""

from __future__ import annotations

import json
import math
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from anytimed.contracts import Json
from anytimed.service.series import Series, few, since
from anytimed.service.thinning import FIELDS, Thinner, group_of, nothing, read
from anytimed.storage.durable import append_line, beside, fsync_folder, write_all

MOST_BYTES, BUDGET_BYTES, LEAST_BYTES = 8 << 20, 4 << 20, 2 << 20
"""It is thinned at twice of what the last thinning left, between the least and the most; to the budget."""
MOST_LINE_BYTES = 1 << 20
MOST_EVENTS = 4096
"""Of a group, in memory."""
MOST_POINTS = 4000
FEW_LINES = 64
"""May be caught up with while an append waits."""
SLICE_S, REST_S = 0.002, 0.006
"""Thinning works and rests in turn: the interpreter belongs to the training."""


class Figures:
    """What the lines say, in memory. Lines that were taken again are dropped."""

    def __init__(self) -> None:
        self.series = {kind: Series(kind) for kind in FIELDS}
        self.events: dict[str, deque[tuple[int, bytes]]] = {
            group: deque(maxlen=MOST_EVENTS) for group in ("lasting", "routine")
        }
        self._count = 0

    def add(self, raw: bytes) -> None:
        record = read(raw)
        if record is None:
            return
        kind = record["kind"]
        if kind in FIELDS:
            step = record["step"]
            self.series["evaluation"].cut(step)
            self.series["step"].cut(step if kind == "step" else step + 1)
            self.series[kind].add(record)
        elif kind == "event":
            self._count += 1
            self.events[group_of(record)].append((self._count, raw))


class History:
    """`append` and `load` are for one thread, `view` and `problem` for any."""

    def __init__(
        self, path: Path, *, most_bytes: int = MOST_BYTES, budget_bytes: int = BUDGET_BYTES, rests: bool = True
    ) -> None:
        self._path, self._most, self._budget, self._rests = path, most_bytes, budget_bytes, rests
        self._least = min(LEAST_BYTES, most_bytes)
        self._lock = threading.Lock()  # the figures; held for microseconds
        self._file = threading.Lock()  # the file; between appending and renaming
        self._figures = Figures()
        self._size, self._limit = 0, self._least
        self._torn = False
        self._since: list[bytes] | None = None  # what was appended since a thinning began
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self.problem: str | None = None
        """Why the file could not be thinned."""

    def load(self) -> None:
        """Take in what earlier starts wrote. Raises OSError where that cannot be read."""
        figures = Figures()
        try:
            size = self._end()
            for raw in lines_of(self._path, max(0, size - 2 * self._most)):
                figures.add(raw)
        except FileNotFoundError:
            size = 0
        with self._lock:
            self._figures = figures
        # After a thinning it had at most the budget; what is over is new since.
        self._size, self._limit = size, self._most
        if size > self._most:
            self._begin()

    def append(self, record: Json) -> None:
        """Write the record and keep its figures. Raises OSError where it could not be written; it is then forgotten."""
        raw = line_of(record)
        with self._file:
            append_line(self._path, (b"\n" if self._torn else b"") + raw + b"\n")
            self._torn = False
            self._size += len(raw) + 1
            with self._lock:
                self._figures.add(raw)
            if self._since is not None:
                self._since.append(raw)
        if self._size > self._limit:
            self._begin()

    def view(self, points: int, since_s: float = 0.0) -> Json:
        """At most about `points` rows of steps and of evaluations, by column, and as many events; all of them since a
        time in seconds since 1970. Steps are means with `_low` and `_high`, evaluations the newest likewise; the tokens
        of an evaluation are those trained on until its step. The newest are always among them."""
        points = min(max(points, 4), MOST_POINTS)
        with self._lock:
            copies = {kind: series.rows() for kind, series in self._figures.series.items()}
            lasting, routine = (list(islice(reversed(held), points)) for held in self._figures.events.values())
        steps, evaluations = copies["step"].columns, copies["evaluation"].columns
        if len(steps["step"]):
            evaluations["tokens"] = np.interp(evaluations["step"], steps["step"], steps["tokens"])
        half = points // 2
        spare = (max(0, half - len(routine)), max(0, half - len(lasting)))
        kept = sorted(lasting[: points - half + spare[0]] + routine[: half + spare[1]])
        events = [json.loads(raw) for _, raw in kept]
        return {
            **{f"{kind}s": few(since(rows, since_s), kind, points) for kind, rows in copies.items()},
            "events": [event for event in events if event["time"] >= since_s],
        }

    def close(self) -> None:
        """A thinning that is under way is given up; the next start begins another."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def settle(self) -> None:
        """Wait for the thinning that is under way."""
        if self._thread is not None:
            self._thread.join()

    # --- thinning, in a thread of its own

    def _begin(self) -> None:
        if self._closing.is_set() or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._thin, name="history", daemon=True)
        self._thread.start()

    def _thin(self) -> None:
        try:
            self._rewrite(_Breath(self._closing) if self._rests else nothing)
            self.problem = None
        except _Closed:
            pass
        except OSError as error:
            self.problem = f"{self._path} cannot be thinned and grows: {error}"
            self._limit = self._size + self._least
        finally:
            with self._file:
                self._since = None

    def _rewrite(self, breathe: Callable[[], None]) -> None:
        thinner, figures = Thinner(self._budget, breathe), Figures()
        with self._file:
            self._since = []
            end = self._end()
        for raw in lines_of(self._path, 0, end):
            thinner.add(raw)
        lines = thinner.lines()
        for raw in lines:
            figures.add(raw)
            breathe()
        with beside(self._path) as temporary:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            file = os.open(temporary, flags, 0o600)
            try:
                _write(file, lines)
                os.fsync(file)
                done = 0
                while len(self._since) - done > FEW_LINES:
                    done += _take(file, figures, self._since[done:])
                with self._file:
                    _take(file, figures, self._since[done:])
                    temporary.rename(self._path)
                    self._size = os.fstat(file).st_size
                    self._limit = max(min(max(2 * self._size, self._least), self._most), self._size + self._least // 4)
                    self._torn = False
                    with self._lock:
                        self._figures = figures
            finally:
                os.close(file)
        fsync_folder(self._path.parent)

    def _end(self) -> int:
        """The size of the file, and whether its last line is whole."""
        with opened(self._path) as file:
            size: int = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                self._torn = file.read(1) != b"\n"
            return size


class _Closed(Exception):
    """The daemon ends; the file may stay as it is."""


class _Breath:
    def __init__(self, closing: threading.Event) -> None:
        self._closing, self._until = closing, 0.0

    def __call__(self) -> None:
        if time.monotonic() > self._until:
            if self._closing.wait(REST_S):
                raise _Closed
            self._until = time.monotonic() + SLICE_S


def opened(path: Path) -> Any:
    """A regular file to read, never through a link that somebody planted. Raises OSError."""
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(f"{path} is not a regular file")
    return os.fdopen(file, "rb")


def lines_of(path: Path, start: int, end: int | None = None) -> Iterator[bytes]:
    """The lines between two places; the first is left out where `start` may be in its middle, a very long one too."""
    with opened(path) as file:
        whole = start == 0
        file.seek(start)
        while end is None or start < end:
            raw = file.readline(MOST_LINE_BYTES)
            start += len(raw)
            if not raw:
                return
            ended = raw.endswith(b"\n")
            if whole and (ended or len(raw) < MOST_LINE_BYTES):
                yield raw.rstrip(b"\n")
            whole = ended


def line_of(record: Json) -> bytes:
    """JSON has no word for NaN and Inf: null."""
    try:
        text = json.dumps(record, separators=(",", ":"), allow_nan=False)
    except ValueError:
        text = json.dumps(finite(record), separators=(",", ":"), allow_nan=False)
    return text.encode()


def finite(value: Any) -> Any:
    """The same with null for NaN and Inf, at every depth."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _take(file: int, figures: Figures, lines: list[bytes]) -> int:
    """Write lines to a file and take their figures in; their number."""
    _write(file, lines)
    for raw in lines:
        figures.add(raw)
    return len(lines)


def _write(file: int, lines: list[bytes]) -> None:
    for first in range(0, len(lines), 1024):
        write_all(file, memoryview(b"".join(raw + b"\n" for raw in lines[first : first + 1024])))
