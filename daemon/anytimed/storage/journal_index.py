"""Where the lines of a journal stand, in a few bytes a line, and the cache that spares the next start their check.

An `Index` of a journal's first bytes: where each line ends, which lines are a scope's, the digest of each scope, and
the SHA-256 of the bytes. `save` keeps it beside the journal. `load` gives it back only for a journal that begins with
the very bytes that were checked then: it digests them anew, at the speed of the disk, and all that it saves is taking
every line apart again. Whatever is wrong with the cache itself (torn, stale, of another journal or version) means that
there is none. Whoever can write a false one here can write a false journal as well.

The cache, integers little-endian: a line that names the form, a line of JSON, where each line ends (8 bytes each), per
scope the numbers of its lines from 0 (4 bytes each), the SHA-256 of all that.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from anytimed.contracts import CorruptError

from .durable import CHUNK_BYTES, beside, write_all
from .journal_lines import stands

log = logging.getLogger(__name__)

_FORM = b"anytimed journal index 1\n"
"""Goes up where a line that was accepted need not be accepted any more."""
_HEADER_BYTES = 1 << 20
_SHORTEST_LINE = 100
"""In bytes; a line holds a digest of 64."""
_LINE_COST = 12


class Index:
    """Lines that were checked, of the first `size` bytes. One thread adds; others may read meanwhile."""

    def __init__(self) -> None:
        self._ends = array("Q")
        self._scopes: dict[str, array[int]] = {}
        self._last: dict[str, tuple[int, str]] = {}
        self.sha256 = hashlib.sha256()

    @property
    def size(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def lines(self) -> int:
        return len(self._ends)

    def add(self, scope: str, digest: str, line: bytes) -> None:
        self.sha256.update(line)
        # In this order: who finds the line in its scope finds where it stands.
        self._ends.append(self.size + len(line))
        numbers = self._scopes.setdefault(scope, array("I"))
        numbers.append(len(self._ends) - 1)
        self._last[scope] = len(numbers), digest

    def last(self, scope: str) -> tuple[int, str]:
        """Length and digest of a scope; (0, "") where it has no entries."""
        return self._last.get(scope, (0, ""))

    def of(self, scope: str, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Line number from 0, first byte and end of a scope's lines [start, stop)."""
        for number in self._scopes.get(scope, array("I"))[start:stop]:
            yield number, self._ends[number - 1] if number else 0, self._ends[number]

    def save(self, path: Path) -> None:
        """Replace the cache, atomically and not durably: a torn one is none. Without one the next start is slow, so a
        disk that takes none is worth a line in the log only."""
        told = {
            "size": self.size,
            "sha256": self.sha256.hexdigest(),
            "lines": self.lines,
            "scopes": [[scope, *self._last[scope]] for scope in self._scopes],
        }
        parts = [_FORM, json.dumps(told).encode() + b"\n", np.asarray(self._ends, "<u8").tobytes()]
        parts += [np.asarray(numbers, "<u4").tobytes() for numbers in self._scopes.values()]
        data = b"".join(parts)
        try:
            with beside(path) as temporary:
                file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                try:
                    write_all(file, memoryview(data + hashlib.sha256(data).digest()))
                finally:
                    os.close(file)
                temporary.rename(path)
        except OSError as error:
            log.info("%s: not written: %s; the next start checks every line again", path, error.strerror)

    @classmethod
    def load(cls, path: Path, journal: Path) -> Index:
        """What the cache `path` tells of the first bytes of `journal`, if these are what they were; else an empty
        index. Raises OSError where the journal cannot be read."""
        with journal.open("rb", buffering=0) as file:
            length = os.fstat(file.fileno()).st_size
            data = _read(path, len(_FORM) + _HEADER_BYTES + length // _SHORTEST_LINE * _LINE_COST + 32)
            if data is None:
                return cls()
            index = cls()
            try:
                size, sha256 = index._parse(data)
                if size > length:
                    raise ValueError(f"{size} bytes were checked, the journal has {length}")
                left = size
                while left and (chunk := file.read(min(CHUNK_BYTES, left))):
                    index.sha256.update(chunk)
                    left -= len(chunk)
                if index.sha256.hexdigest() != sha256:
                    raise ValueError(f"the first {size} bytes of the journal are not what was checked")
                for scope, (n, digest) in index._last.items():
                    ((number, first, end),) = index.of(scope, n - 1, n)
                    file.seek(first)
                    if stands(f"{journal} line {number + 1}", file.read(end - first), scope, n)[0] != digest:
                        raise ValueError(f"{scope} does not end with {digest}")
            except (ValueError, KeyError, TypeError, RecursionError, OverflowError, CorruptError) as error:
                log.info("%s: not used (%s); every line is checked", path, str(error)[:200])
                return cls()
            return index

    def _parse(self, data: bytes) -> tuple[int, str]:
        """Fill an empty index; size and SHA-256 of the bytes that it is of."""
        body, digest = data[:-32], data[-32:]
        if not body.startswith(_FORM) or hashlib.sha256(body).digest() != digest:
            raise ValueError("torn, or of another form")
        header = body.index(b"\n", len(_FORM), len(_FORM) + _HEADER_BYTES)
        told = json.loads(body[len(_FORM) : header])
        size, lines, scopes = told["size"], told["lines"], told["scopes"]
        counts = [count for _, count, _ in scopes]
        if len(body) - header - 1 != lines * _LINE_COST or sum(counts) != lines or not lines or min(counts) < 1:
            raise ValueError("lines do not add up")
        at = header + 1
        ends = np.frombuffer(body, "<u8", lines, at)
        at += ends.nbytes
        if size != ends[-1] or not ends[0] or bool((ends[1:] <= ends[:-1]).any()):
            raise ValueError("lines do not follow each other")
        owned = np.zeros(lines, bool)
        for scope, count, last in scopes:
            numbers = np.frombuffer(body, "<u4", count, at)
            at += numbers.nbytes
            if bool((numbers >= lines).any()) or bool((numbers[1:] <= numbers[:-1]).any()) or scope in self._scopes:
                raise ValueError("lines of a scope do not follow each other")
            owned[numbers] = True
            self._scopes[str(scope)] = _filled("I", numbers.astype(np.uintc).tobytes())
            self._last[str(scope)] = count, str(last)
        if not owned.all():
            raise ValueError("a line without a scope")
        self._ends = _filled("Q", ends.astype(np.ulonglong).tobytes())
        return size, told["sha256"]


def _filled(code: str, data: bytes) -> array[int]:
    found: array[int] = array(code)
    found.frombytes(data)
    return found


def _read(path: Path, most: int) -> bytes | None:
    """A plain file of at most so many bytes; None for anything else. What lies there may be a pipe that never ends."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) or found.st_size > most:
                return None
            with os.fdopen(file, "rb", closefd=False) as opened:
                return opened.read(most)
        finally:
            os.close(file)
    except OSError:
        return None
