"""The spans of files that a stream has adopted, in columns, and the digests of those that were read.

A span is bytes [start, stop) of a file, and the file's version when it was discovered; it is journalled as the row
[path, start, stop, version]. There may be a million of them at a start, so everything that goes through all is one
pass over plain columns, and reading looks up single rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, repeat
from operator import ne, sub
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anytimed_adapters.streams.walk import Listing, Version

_ROWS = 1024
"""Taken in at a time: they stay in the processor's cache."""
_COMPARED = 8192
"""Compared at a time: for a few milliseconds no other thread has the interpreter."""


class Span(NamedTuple):
    """One row. path: relative to the glob's base."""

    path: str
    start: int
    stop: int
    version: Version


class Spans:
    """All adopted spans by index, and per file which one is its last."""

    def __init__(self) -> None:
        self._paths: list[str] = []
        self._starts = array("q")
        self._stops = array("q")
        self._versions = _Versions()
        self._ends = array("q", [0])  # bytes up to and including a span; one longer than the spans
        self._before = array("q")  # the span before in the same file, or -1
        self._last: dict[str, int] = {}
        self._grown: set[str] = set()  # files with more than one span
        # By last span: the newest version under which the file's content was found unchanged at the span's stop, and
        # for files that are longer by now, at which size.
        self._checked = _Versions()
        self._longer: dict[int, tuple[int, Version]] = {}

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Span:
        return Span(self._paths[index], self._starts[index], self._stops[index], self._versions[index])

    def adopt(self, rows: Sequence[Sequence[Any]]) -> None:
        """Append rows as they come from the journal."""
        for at in range(0, len(rows), _ROWS):
            self._adopt(rows[at : at + _ROWS])

    def _adopt(self, rows: Sequence[Sequence[Any]]) -> None:
        first = len(self._paths)
        columns: list[list[Any]] = list(map(list, zip(*rows, strict=True)))
        paths, starts, stops, versions = columns
        last = dict(zip(paths, range(first, first + len(paths)), strict=True))
        if len(last) == len(paths) and self._last.keys().isdisjoint(last.keys()):
            self._before.extend(repeat(-1, len(paths)))
            self._last.update(last)
        else:
            for i, path in enumerate(paths):
                before = self._last.get(path, -1)
                if before >= 0:
                    paths[i] = self._paths[before] if before < first else paths[before - first]  # one string a file
                    self._grown.add(paths[i])
                    self._longer.pop(before, None)
                self._before.append(before)
                self._last[paths[i]] = first + i
        self._paths += paths
        self._starts.extend(starts)
        self._stops.extend(stops)
        self._versions.extend(versions)
        self._checked.extend(versions)
        total = self._ends.pop()
        self._ends.extend(accumulate(map(sub, stops, starts), initial=total))

    def last(self, path: str) -> int | None:
        """The index of the file's last span."""
        return self._last.get(path)

    def of_file(self, index: int) -> Iterator[int]:
        """The span and those before it in the same file, newest first."""
        while index >= 0:
            yield index
            index = self._before[index]

    def bytes_from(self, index: int) -> int:
        """Bytes of the span and of all after it."""
        return self._ends[-1] - self._ends[index]

    def changed(self, listing: Listing) -> list[int]:
        """Rows of the listing that differ from what was adopted or last `note_checked`: new, grown, touched."""
        if not self._paths:
            return list(range(len(listing.paths)))
        found: list[int] = []
        for at in range(0, len(listing.paths), _COMPARED):
            rows = slice(at, at + _COMPARED)
            paths = listing.paths[rows]
            known = np.fromiter(map(self._last.get, paths, repeat(-1)), np.int64, len(paths))
            # Of a new file some other is compared.
            differs = (known < 0) | (np.frombuffer(self._stops, np.int64)[known] != listing.sizes[rows])
            differs |= self._checked.differs(known, listing.versions[rows])
            found += (np.flatnonzero(differs) + at).tolist()
        return found

    def grown(self, listing: Listing) -> list[int]:
        """Rows of the listing whose file has more than one span."""
        return [row for row, path in enumerate(listing.paths) if path in self._grown] if self._grown else []

    def is_checked(self, last: int, size: int, version: Version) -> bool:
        """Whether the file of a last span was found unchanged at this size and version."""
        return self._longer.get(last, (self._stops[last], self._checked[last])) == (size, version)

    def note_checked(self, last: int, size: int, version: Version) -> None:
        if size == self._stops[last]:
            self._checked[last] = version
            self._longer.pop(last, None)
        else:
            self._longer[last] = (size, version)


class _Versions:
    """Versions by index; eight bytes each while all of them are numbers."""

    def __init__(self) -> None:
        self._column: array[int] | list[Version] = array("q")

    def __getitem__(self, index: int) -> Version:
        return self._column[index]

    def __setitem__(self, index: int, version: Version) -> None:
        try:
            self._column[index] = version  # type: ignore[assignment]  # a text in an array is what fails
        except (TypeError, OverflowError):
            self._column = list(self._column)
            self._column[index] = version

    def extend(self, versions: Sequence[Version]) -> None:
        if isinstance(self._column, array):
            try:
                self._column.extend(array("q", versions))  # type: ignore[arg-type]  # likewise
            except (TypeError, OverflowError):
                self._column = list(self._column)
        if isinstance(self._column, list):
            self._column += versions

    def differs(self, at: NDArray[np.int64], versions: Sequence[Version]) -> NDArray[np.bool_]:
        """Where the versions at these indices are others than those given; shape as `at`."""
        if isinstance(self._column, array) and (given := np.asarray(versions)).dtype == np.int64:
            changed: NDArray[np.bool_] = np.frombuffer(self._column, np.int64)[at] != given
            return changed
        # Texts, or times beyond the year 2262: one by one.
        known = map(self._column.__getitem__, at.tolist())
        return np.fromiter(map(ne, known, versions), np.bool_, len(at))


class Fingerprints:
    """Digests of spans that were read to their end, by index: those of a start as they were given, those read since in
    33 bytes each."""

    def __init__(self) -> None:
        self._given: Mapping[int, str] = {}
        self._first = 0  # of the columns that follow
        self._read = bytearray()
        self._known = bytearray()

    def give(self, digests: Mapping[int, str]) -> None:
        """Kept, not copied: the caller leaves it as it is. Takes the place of what was known of the same spans."""
        before, self._given = self._given, digests
        for at, known in enumerate(self._known):
            if known and self._first + at in digests:
                self._known[at] = 0
        for index, digest in before.items() if before is not digests else ():
            if self.get(index) is None:
                self.put(index, digest)

    def put(self, index: int, digest: str) -> None:
        """Of a span that was read now; SHA-256 in hex."""
        if not self._known:
            self._first = index
        if index < self._first:  # a second pass begins
            missing, self._first = self._first - index, index
            self._known[:0], self._read[:0] = bytes(missing), bytes(32 * missing)
        at = index - self._first
        if at >= len(self._known):
            missing = max(at + 1 - len(self._known), len(self._known) // 8)
            self._known += bytes(missing)
            self._read += bytes(32 * missing)
        self._read[32 * at : 32 * at + 32] = bytes.fromhex(digest)
        self._known[at] = 1

    def get(self, index: int) -> str | None:
        at = index - self._first
        if 0 <= at < len(self._known) and self._known[at]:
            return self._read[32 * at : 32 * at + 32].hex()
        return self._given.get(index)
