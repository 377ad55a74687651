"""The file that keeps the folds of a journal, so that a start need not read every decision of a long run again.

`FoldFile.restore` gives the folds whose sum is the journal up to a position: those in the file, then the rest from the
journal itself. `FoldFile.keep`, called as a run goes on, adds a fold to the file whenever enough has come together.

The file is a cache: one fold after another, from the first decision on. A fold counts if its own digest is right and
the journal's chain has, where the fold ends, the digest that it had when the fold was made; what follows the first
that does not count is forgotten. So a file that is missing, torn or of another journal costs time only.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
from collections.abc import Container, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from anytimed.contracts import AnytimedError, Journal, Json
from anytimed.data.fold import FORM, FORM_BYTES, Fold, collector_off

log = logging.getLogger(__name__)

_SCOPE = "data"
_CHUNK_BYTES = 4 << 20
_ENTRIES, _WEIGHT = 2_000, 10_000
"""Decisions, and rows and digests in them, that make a fold worth keeping: milliseconds of a start."""
_WINDOW = 2_048
"""The most decisions that are read at a time; fewer where they are long."""


class _Part(NamedTuple):
    """A fold in the file: where its JSON begins and ends, and what its line says."""

    first: int
    end: int
    start: int
    length: int
    digest: str


class FoldFile:
    """The folds of a journal, and the file that keeps them. One thread at a time."""

    def __init__(self, path: Path | None, journal: Journal, void: Container[int] = ()) -> None:
        """`path`: of the cache, which need not exist; None for none. void: numbers of decisions that are not in effect.
        Never raises for what it finds there."""
        self._path = path
        self._void = void
        self._journal = journal
        self._parts = self._fitting(_intact(path)) if path is not None else []
        self._pending = self._next()

    def restore(self, length: int) -> Iterator[Fold]:
        """The folds whose sum is the first `length` data decisions of the journal, which has that many; each is the
        caller's. What had to be read from the journal itself is kept for the next time. Raises as `Journal.entries`."""
        assert length <= self._journal.length(_SCOPE), length
        at = 0
        for part in [part for part in self._parts if part.length <= length]:
            fold = self._decoded(part)
            if fold is None:
                break
            at = part.length
            yield fold
        for fold in self._folded(at, length):
            if _enough(fold) and fold.start == self._stored:
                self._append(fold)
            yield fold

    def keep(self, length: int) -> None:
        """The first `length` data decisions took effect: keep what came together since the last fold, if that is worth
        it. To be called after `restore`, now and then; cheap. A journal that cannot be read is no matter of a cache:
        nothing is kept from there on."""
        if self._path is None or length <= self._pending.length:
            return
        try:
            for entry in self._journal.entries(_SCOPE, self._pending.length, length):
                self._take(self._pending, entry)
            if _enough(self._pending):
                self._pending.digest = self._journal.digest(_SCOPE, self._pending.length)
                self._append(self._pending)
        except AnytimedError as error:
            log.warning("%s: nothing more is kept: %s", self._path, error)
            self._path = None

    def forget(self, length: int) -> None:
        """Decisions beyond the first `length` are about to be made void: no fold that holds them stays. Raises
        AnytimedError where that cannot be done: one that stays would be believed."""
        if self._stored > length:
            self._parts = [part for part in self._parts if part.length <= length]
            self._truncate()
        if self._pending.length > length:
            self._pending = self._next()

    # --- within ---

    def _take(self, fold: Fold, entry: Json) -> None:
        if fold.length in self._void:
            fold.pass_over()
        else:
            fold.update(entry)

    def _truncate(self) -> None:
        """Cut off what no longer counts."""
        assert self._path is not None, "there are folds in a file"
        try:
            os.truncate(self._path, self._parts[-1].end if self._parts else 0)
        except FileNotFoundError:
            self._parts = []
        except OSError as error:
            raise AnytimedError(f"{self._path}: cannot be cut: {error.strerror}; delete it, it is a cache") from error

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
                    self._take(fold, entry)
            window = min(_WINDOW, window * 2) if fold.weight - before < _WEIGHT // 2 else max(1, window // 2)
            if _enough(fold) or fold.length == stop:
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


def _enough(fold: Fold) -> bool:
    return fold.length - fold.start >= _ENTRIES or fold.weight >= _WEIGHT


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
    header = FORM.fullmatch(file.readline(FORM_BYTES))
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
