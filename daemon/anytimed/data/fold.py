"""What a long journal comes to: the entries that its decisions adopted and finished, without reading each again.

A `Fold` is a run of consecutive decisions taken together: rows adopted per source, digests of finished rows per
source, and the decisions of other kinds as they are. `FoldFile.restore` gives the folds whose sum is the journal up to
a position: those that the file `journal.fold` keeps, then the rest from the journal itself. `FoldFile.keep`, called as
a run goes on, adds a fold to the file whenever enough has come together. Rows are any JSON values.

The file is a cache. A fold in it counts if its own digest is right and the journal's chain has, where the fold ends,
the digest that it had when the fold was made; what follows the first that does not count is forgotten. So one that is
missing, torn or of another journal costs time only.

The file is a sequence of folds, each a line `anytimed-fold-1 START LENGTH DIGEST BYTES SHA256` and so many bytes of
JSON; the SHA-256 is that of the line up to it and the JSON.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anytimed.contracts import Journal, Json
from anytimed.data.digests import Digests

log = logging.getLogger(__name__)

_SCOPE = "data"
_HEADER = re.compile(rb"(anytimed-fold-1 (\d{1,15}) (\d{1,15}) ([0-9a-f]{64}) (\d{1,12}) )([0-9a-f]{64})\n")
_HEADER_BYTES = 256
_CHUNK_BYTES = 4 << 20
_ENTRIES, _WEIGHT = 2_000, 10_000
"""Decisions, and rows and digests in them, that make a fold worth keeping: milliseconds of a start."""
_WINDOW = 2_048
"""The most decisions that are read at a time; fewer where they are long."""


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """No garbage collection within, in the whole process. A million rows that are made one after another and all kept
    make the collector walk over all of them again and again: that takes longer than making them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@dataclass(slots=True)
class Finished:
    """Rows that were read to their end, as `Digests.put` takes them: their indices, and their digests, or, where these
    come from the file, all in one text, 64 characters each."""

    indices: list[int] | NDArray[np.int64] = field(default_factory=list)
    digests: list[str] | str = field(default_factory=list)

    def to_json(self) -> list[Any]:
        # One text is read ten times as fast as a text each.
        one = isinstance(self.digests, list) and all(len(digest) == 64 for digest in self.digests)
        return [list(map(int, self.indices)), "".join(self.digests) if one else self.digests]

    @staticmethod
    def from_json(value: Any) -> Finished:
        """Raises ValueError, TypeError on what `to_json` did not make."""
        indices, digests = value
        if len(digests) != len(indices) * (64 if isinstance(digests, str) else 1):
            raise ValueError(f"{len(indices)} rows and {len(digests)} of digests")
        at = np.array(indices)
        if at.dtype.kind != "i" or at.ndim != 1:
            return Finished([int(index) for index in indices], digests)
        return Finished(at, digests)


@dataclass(slots=True)
class Fold:
    """The data decisions [start, length) of a journal, taken together.

    adopted: per source its new rows, in order; finished: per source, rows and digests, the last of a row counts;
    others: decisions of other kinds, in order, but for blocks that were cut (once a cut took effect nothing asks for
    it). `weight`: rows, digests and others. `digest`: the journal's at `length`, "" until somebody sets it.
    """

    start: int = 0
    length: int = 0
    digest: str = ""
    adopted: dict[str, list[Json]] = field(default_factory=dict)
    finished: dict[str, Finished] = field(default_factory=dict)
    others: list[Json] = field(default_factory=list)
    weight: int = 0

    def update(self, entry: Json) -> None:
        """Take in the next decision."""
        match entry:
            case {"kind": "discovered", "source": str(name), "entries": list(rows)}:
                self.adopted.setdefault(name, []).extend(rows)
                self.weight += len(rows)
            case {"kind": "finished", "sources": dict(sources)}:
                for name, digests in sources.items():
                    known = self.finished.setdefault(name, Finished())
                    assert isinstance(known.indices, list), "a fold from the file is complete"
                    assert isinstance(known.digests, list), "a fold from the file is complete"
                    known.indices += map(int, digests)
                    known.digests += digests.values()
                    self.weight += len(digests)
            case {"kind": "block_cut"}:
                pass
            case _:
                self.others.append(entry)
                self.weight += 1
        self.length += 1

    @property
    def worth_keeping(self) -> bool:
        return self.length - self.start >= _ENTRIES or self.weight >= _WEIGHT

    def to_bytes(self) -> bytes:
        told = {
            "adopted": self.adopted,
            "finished": {name: finished.to_json() for name, finished in self.finished.items()},
            "others": self.others,
        }
        body = json.dumps(told, separators=(",", ":")).encode()
        header = f"anytimed-fold-1 {self.start} {self.length} {self.digest} {len(body)} ".encode()
        return header + hashlib.sha256(header + body).hexdigest().encode() + b"\n" + body

    @staticmethod
    def from_body(start: int, length: int, digest: str, body: bytes) -> Fold:
        """The inverse of `to_bytes`, after its line. Raises ValueError, LookupError, TypeError, AttributeError or
        RecursionError on what it did not make."""
        told = json.loads(body)
        finished = {name: Finished.from_json(columns) for name, columns in told["finished"].items()}
        fold = Fold(start, length, digest, told["adopted"], finished, told["others"])
        rows = [*fold.adopted.values(), *(part.indices for part in finished.values()), fold.others]
        fold.weight = sum(map(len, rows))
        return fold


@dataclass(slots=True)
class Gathered:
    """The sum of folds, with the digests in 33 bytes each."""

    length: int = 0
    adopted: dict[str, list[Json]] = field(default_factory=dict)
    finished: dict[str, Digests] = field(default_factory=dict)
    others: list[Json] = field(default_factory=list)


def gathered(folds: Iterable[Fold]) -> Gathered:
    """Add up consecutive folds from the first decision on."""
    whole = Gathered()
    with collector_off():
        for fold in folds:
            assert fold.start == whole.length, (fold.start, whole.length)
            for name, rows in fold.adopted.items():
                whole.adopted.setdefault(name, []).extend(rows)
            for name, part in fold.finished.items():
                whole.finished.setdefault(name, Digests()).put(part.indices, part.digests)
            whole.others += fold.others
            whole.length = fold.length
    return whole


class _Part(NamedTuple):
    """A fold in the file: where its JSON begins and ends, and what its line says."""

    first: int
    end: int
    start: int
    length: int
    digest: str


class FoldFile:
    """The folds of a journal, and the file that keeps them. One thread at a time."""

    def __init__(self, path: Path | None, journal: Journal) -> None:
        """`path`: of the cache, which need not exist; None for none. Never raises for what it finds there."""
        self._path = path
        self._journal = journal
        self._parts = self._fitting(_intact(path)) if path is not None else []
        self._pending = self._next()

    def restore(self, length: int) -> Iterator[Fold]:
        """The folds whose sum is the first `length` data decisions of the journal, which has that many; each is the
        caller's. What had to be read from the journal itself is kept for the next time."""
        at = 0
        for part in [part for part in self._parts if part.length <= length]:
            fold = self._decoded(part)
            if fold is None:
                break
            at = part.length
            yield fold
        for fold in self._folded(at, length):
            if fold.worth_keeping and fold.start == self._stored:
                self._append(fold)
            yield fold

    def keep(self, length: int) -> None:
        """The first `length` data decisions stand in a position: keep what came together since the last fold, if that
        is worth it. Cheap otherwise. Raises as `Journal.entries`."""
        if self._path is None or length <= self._pending.length:
            return
        for entry in self._journal.entries(_SCOPE, self._pending.length, length):
            self._pending.update(entry)
        if self._pending.worth_keeping:
            self._pending.digest = self._journal.digest(_SCOPE, self._pending.length)
            self._append(self._pending)

    # --- within ---

    @property
    def _stored(self) -> int:
        return self._parts[-1].length if self._parts else 0

    def _next(self) -> Fold:
        return Fold(self._stored, self._stored)

    def _folded(self, start: int, stop: int) -> Iterator[Fold]:
        """Folds of the journal's decisions [start, stop), read a few at a time."""
        fold, window = Fold(start, start), 16
        while fold.length < stop:
            before = fold.weight
            with collector_off():
                for entry in self._journal.entries(_SCOPE, fold.length, min(stop, fold.length + window)):
                    fold.update(entry)
            window = min(_WINDOW, window * 2) if fold.weight - before < _WEIGHT // 2 else max(1, window // 2)
            if fold.worth_keeping or fold.length == stop:
                fold.digest = self._journal.digest(_SCOPE, fold.length)
                at = fold.length
                yield fold
                fold = Fold(at, at)

    def _fitting(self, parts: list[_Part]) -> list[_Part]:
        """The first of them that are of this journal. If one is, all before it are: none is added to another's."""

        def fits(part: _Part) -> bool:
            return part.length <= self._journal.length(_SCOPE) and (
                self._journal.digest(_SCOPE, part.length) == part.digest
            )

        if not parts or fits(parts[-1]):
            return parts
        low, high = 0, len(parts) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if fits(parts[middle]) else (low, middle)
        log.info("%s: %d of %d folds are of this journal", self._path, low, len(parts))
        return parts[:low]

    def _decoded(self, part: _Part) -> Fold | None:
        """None for what cannot be used; it is forgotten then, with all that follows."""
        assert self._path is not None
        try:
            with self._path.open("rb") as file, collector_off():
                file.seek(part.first)
                return Fold.from_body(*part[2:], file.read(part.end - part.first))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            log.info("%s: the fold up to decision %d is not used: %s", self._path, part.length, str(error)[:200])
            self._parts = [known for known in self._parts if known.length < part.length]
            self._pending = self._next()
            return None

    def _append(self, fold: Fold) -> None:
        """Put a fold behind those that count, over whatever stands there. Not durable: a torn one does not count. A
        disk that takes none makes the next start slower, no more; it is not tried again before that."""
        if self._path is None:
            return
        at, data = self._parts[-1].end if self._parts else 0, fold.to_bytes()
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(self._path, flags, 0o600)
            try:
                os.ftruncate(file, at)
                os.lseek(file, at, os.SEEK_SET)
                _write_all(file, memoryview(data))
            finally:
                os.close(file)
        except OSError as error:
            log.info("%s: not written: %s; the next start reads the journal instead", self._path, error.strerror)
            self._path = None
            return
        first = at + data.index(b"\n") + 1
        self._parts.append(_Part(first, at + len(data), fold.start, fold.length, fold.digest))
        self._pending = self._next()


def _intact(path: Path) -> list[_Part]:
    """The folds at the beginning of a file that follow each other and are what was written."""
    parts: list[_Part] = []
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError:
        return parts
    with file, contextlib.suppress(OSError):
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return parts
        while (part := _part(file, parts[-1].length if parts else 0)) is not None:
            parts.append(part)
    return parts


def _part(file: BinaryIO, start: int) -> _Part | None:
    """The fold that begins here, if it is whole and goes on at decision `start`."""
    header = _HEADER.fullmatch(file.readline(_HEADER_BYTES))
    if header is None or int(header[2]) != start or int(header[3]) <= start:
        return None
    first, left, digest = file.tell(), int(header[5]), hashlib.sha256(header[1])
    while left and (chunk := file.read(min(_CHUNK_BYTES, left))):
        digest.update(chunk)
        left -= len(chunk)
    if left or digest.hexdigest() != header[6].decode():
        return None
    return _Part(first, file.tell(), start, int(header[3]), header[4].decode())


def _write_all(file: int, data: memoryview) -> None:
    while data.nbytes:
        data = data[os.write(file, data) :]
