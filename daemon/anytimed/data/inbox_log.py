"""The segments of an inbox: files to which requests are appended, and that are deleted from the oldest on.

Bytes are numbered through all segments that there ever were, and so are records; a segment's name says the numbers of
its first, so that they go on whatever was deleted. A segment reaches to where the next one begins: what stands there
beyond that was never durable. Of the newest only whole requests count.

`of(folder)` is the process's one log of a folder: whoever appends (`service.inbox_file`) moves the end of it once the
bytes are durable, and whoever reads sees nothing beyond. A log that nobody appends to is only looked at.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from anytimed.contracts import Refused
from anytimed.data.inbox_lines import head_of

_NAME = re.compile(r"([0-9]{20})-([0-9]{20})\.jsonl")
_RANGE_BYTES = 1 << 20

_logs: WeakValueDictionary[str, InboxLog] = WeakValueDictionary()
_opening = threading.Lock()


@dataclass(frozen=True, slots=True)
class Segment:
    """A file; the numbers of its first byte and its first record."""

    path: Path
    byte: int
    record: int


@dataclass(frozen=True, slots=True)
class Span:
    """Whole requests of one segment: bytes [start, stop); `record` is the number of the one after them."""

    start: int
    stop: int
    record: int


class Gone(Exception):
    """The segment was deleted."""


def of(folder: Path) -> InboxLog:
    """The log of a folder, which need not exist: the same one while anybody in this process holds it."""
    where = os.path.realpath(folder)
    with _opening:
        log = _logs.get(where)
        if log is None:
            log = _logs[where] = InboxLog(Path(where))
        return log


class InboxLog:
    """What is kept of an inbox. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        """Reads names, and of the newest segment the lines. Raises OSError."""
        self.folder = folder
        self._lock = threading.Lock()
        self._segments: list[Segment] = []
        self._end = self._record = self._taken = 0
        self.damage = ""
        """What is wrong with bytes that were durable, where that shows without reading everything."""
        self.clean = True
        """Whether the newest segment ends where the log does."""
        self.reached = (0, 0)
        """Byte and record that the run's journal knows of: what is appended comes after, even if all else was lost."""
        self._load()

    # --- what there is ---

    @property
    def end(self) -> tuple[int, int]:
        """Byte and record after everything that is durable."""
        with self._lock:
            return self._end, self._record

    @property
    def first(self) -> int:
        """The oldest byte that is kept."""
        with self._lock:
            return self._segments[0].byte if self._segments else self._end

    @property
    def newest(self) -> Segment | None:
        with self._lock:
            return self._segments[-1] if self._segments else None

    @property
    def waiting(self) -> int:
        """Bytes that are durable and that nobody has read."""
        with self._lock:
            first = self._segments[0].byte if self._segments else self._end
            return max(0, self._end - max(self._taken, first))

    def spans(self, after: int) -> list[Span]:
        """What is durable from byte `after` on, a span a segment."""
        with self._lock:
            found = [self._span(i) for i in range(len(self._segments))]
        return [Span(max(s.start, after), s.stop, s.record) for s in found if s.stop > max(s.start, after)]

    def lines(self, start: int, stop: int) -> Iterator[bytes]:
        """The lines of bytes [start, stop), which are whole lines of one segment. Raises Gone; Refused where the
        segment is shorter; OSError."""
        rest = b""
        for chunk in self.chunks(start, stop):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line + b"\n" for line in lines)
        if rest:
            yield rest

    def chunks(self, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) of one segment. Raises as `lines`."""
        segment = self._holding(start)
        while start < stop:
            try:
                # By its name each time: no file stays open between two records.
                with segment.path.open("rb", buffering=0) as file:
                    file.seek(start - segment.byte)
                    chunk = file.read(min(_RANGE_BYTES, stop - start))
            except FileNotFoundError:
                raise Gone from None
            if not chunk:
                raise Refused(
                    f"{segment.path}: ends after {start - segment.byte} bytes, {stop - segment.byte} expected"
                )
            start += len(chunk)
            yield chunk

    # --- what changes it ---

    def took(self, byte: int) -> None:
        """The reader has come to this byte."""
        with self._lock:
            self._taken = byte

    def reach(self, byte: int, record: int) -> None:
        """The journal knows of what lies before these."""
        with self._lock:
            self.reached = max(self.reached, (byte, record))

    def began(self, segment: Segment) -> None:
        """A new, empty segment is there, after everything that is durable."""
        with self._lock:
            if self._segments and self._segments[-1].byte == segment.byte:
                self._segments.pop()
            self._segments.append(segment)
            self._end, self._record, self.clean = segment.byte, segment.record, True

    def grew(self, size: int, records: int) -> None:
        """So many bytes and records at the end of the newest segment are durable now."""
        with self._lock:
            self._end += size
            self._record += records

    def forget(self, before: int) -> None:
        """Delete the segments that end at byte `before` or earlier, but never the newest one. Raises OSError."""
        with self._lock:
            gone = [s for s, after in zip(self._segments, self._segments[1:], strict=False) if after.byte <= before]
        for segment in gone:  # oldest first: what stays has no hole
            segment.path.unlink(missing_ok=True)
            with self._lock:
                self._segments.remove(segment)

    # --- within ---

    def _load(self) -> None:
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if told := _NAME.fullmatch(path.name):
                self._segments.append(Segment(path, int(told[1]), int(told[2])))
        if self._segments:
            self._read_newest(self._segments[-1])

    def _read_newest(self, segment: Segment) -> None:
        """Find where its whole requests end, and make that durable: a process that was killed between write and fsync
        leaves them in memory only."""
        self._end, self._record = segment.byte, segment.record
        at, record, broken = segment.byte, segment.record, False
        with segment.path.open("rb") as file:
            for line in file:
                try:
                    head = head_of(line)
                    if head.n != record and not broken:
                        raise ValueError(f"it is record {head.n}, expected {record}")
                except (ValueError, KeyError, TypeError, RecursionError):
                    broken = True
                    continue
                if broken:
                    if not head.left and head.synced > at:
                        self.damage = (
                            f"{segment.path}: the line at byte {at - segment.byte} is not as it was written, and was "
                            "durable before the line of record "
                            f"{head.n} was"
                        )
                        break
                    continue
                at, record = at + len(line), record + 1
                if not head.left:
                    self._end, self._record = at, record
            os.fsync(file.fileno())
            self.clean = os.fstat(file.fileno()).st_size == self._end - segment.byte

    def _span(self, index: int) -> Span:
        segment = self._segments[index]
        if index + 1 == len(self._segments):
            return Span(segment.byte, self._end, self._record)
        after = self._segments[index + 1]
        try:
            stop = min(segment.byte + segment.path.stat().st_size, after.byte)
        except FileNotFoundError:
            stop = segment.byte
        return Span(segment.byte, stop, after.record)

    def _holding(self, byte: int) -> Segment:
        with self._lock:
            for segment in reversed(self._segments):
                if segment.byte <= byte:
                    return segment
        raise Gone


def segment_name(byte: int, record: int) -> str:
    """The name of the segment that begins with these."""
    return f"{byte:020d}-{record:020d}.jsonl"
