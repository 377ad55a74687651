"""The journal: decisions that change the numbers, durable before they take effect.

One JSON object a line: {"scope", "n", "digest", "entry", "crc"}; entries of a scope are numbered from 1 and chained
by digest (`contracts.chain`), `crc` is the CRC-32 of the line before it. Opening checks every line, or, of what was
checked before, that its bytes are the same (`journal_index`). A last line that never reached the disk as a whole is
dropped and logged: its append never returned. Any other line that does not fit is refused, for replaying past it would
train something else. An append is one write and one fsync under a lock. After a failed fsync the file is never written
again: the next append first puts a copy of what was durable in its place.

Memory holds where each line stands, 12 bytes a line; entries are read from the file when they are asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from anytimed.contracts import AnytimedError, Json, chain

from .durable import CHUNK_BYTES, beside, fsync_folder, write_all
from .journal_index import Index
from .journal_lines import LINE_BYTES, checked, lines, made, stands, torn

log = logging.getLogger(__name__)

CHECKED = "journal.checked"
"""The name of the cache, in the folder of the journal. A journal that is tried beside another shares it: it says of
which bytes it is."""
_MUCH_LINES, _MUCH_BYTES = 2_000, 1 << 20
"""What is worth a cache: it takes longer to check than the cache takes to read."""
_READ_BYTES = 1 << 16
_GROWTH = 32
"""While a journal grows the cache is written again after one part in so many: all of its writing together is a few
hundred bytes a line."""


class Journal:
    """Implements `contracts.Journal` on one file. Thread-safe; one process at a time, the owner of the run."""

    def __init__(self, path: Path) -> None:
        """Opens or creates. Raises Refused naming the first line that is broken; OSError."""
        self._path = path
        self._lock = threading.Lock()
        self._failed = ""
        self._closed = False
        new = not path.exists()
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if new:
                fsync_folder(path.parent)
            self._index = Index.load(self._cache, path)
            self._cached = self._index.lines, self._index.size
            self._load()
        except BaseException:
            os.close(self._file)
            raise
        self._save()

    @property
    def path(self) -> Path:
        return self._path

    @property
    def size(self) -> int:
        """Bytes of the file that are durable: whole lines, and what stands there never changes."""
        with self._lock:
            return self._index.size

    def append(self, scope: str, entry: Json) -> None:
        """Durable when this returns. Raises AnytimedError where it cannot be made so for now; the entry then does not
        count, and may be appended again later."""
        # What is chained is what a later reader gets back: JSON turns tuples into lists and keys into texts.
        text = json.dumps(entry, separators=(",", ":"))
        with self._lock:
            if self._closed:
                raise AnytimedError(f"{self._path}: closed; no entry can be added")
            if self._failed:
                self._renew()
            length, before = self._index.last(scope)
            digest = chain(before, json.loads(text))
            line = made(scope, length + 1, digest, text)
            if len(line) > LINE_BYTES:
                raise AnytimedError(f"{self._path}: an entry of {len(line)} bytes; the most is {LINE_BYTES}")
            try:
                write_all(self._file, memoryview(line))
            except OSError as error:
                self._take_back(error)
                raise AnytimedError(f"{self._path}: entry not written: {error.strerror}") from error
            try:
                os.fsync(self._file)
            except OSError as error:
                # After a failed fsync the kernel may call the page clean: nothing after it could be trusted.
                self._failed = f"fsync: {error.strerror}"
                self._take_back(error)
                raise AnytimedError(f"{self._path}: entry not durable: {error.strerror}") from error
            self._index.add(scope, digest, line)
            self._save(_GROWTH)

    def entries(self, scope: str, start: int = 0, stop: int | None = None) -> list[Json]:
        """Entries of the scope, oldest first: those from index `start` (from 0) up to `stop`, all that follow if None.
        Read from the file now. Raises AnytimedError where that cannot be done, CorruptError where a line is not what
        it was when it was checked."""
        return [entry for _, entry in self._read(scope, start, stop)]

    def length(self, scope: str) -> int:
        """How many entries the scope has."""
        return self._index.last(scope)[0]

    def digest(self, scope: str, length: int | None = None) -> str:
        """The scope's digest after all entries, or after the first `length`; "" for none. Raises as `entries`."""
        found, digest = self._index.last(scope)
        if length is None or length == found:
            return digest
        if not 0 <= length <= found:
            raise IndexError(f"scope {scope} has {found} entries, asked for the digest after {length}")
        return next((digest for digest, _ in self._read(scope, length - 1, length)), "") if length else ""

    def close(self) -> None:
        """No append after this; entries can still be read."""
        with self._lock:
            if not self._closed:
                self._save()
                self._closed = True
                os.close(self._file)

    # --- within ---

    @property
    def _cache(self) -> Path:
        return self._path.with_name(CHECKED)

    def _load(self) -> None:
        """Read and check all lines that the index does not hold yet; cut off what was torn."""
        index = self._index
        for number, line, last in lines(self._path, index.size, index.lines):
            if last and torn(line, index.size):
                log.warning("%s: line %d was torn by a crash and is dropped (%d bytes)", self._path, number, len(line))
                os.ftruncate(self._file, index.size)
                break
            scope, digest = checked(f"{self._path} line {number}", line, index.last)
            index.add(scope, digest, line)
        # A process that was killed between write and fsync leaves a whole line that is in memory only.
        os.fsync(self._file)

    def _read(self, scope: str, start: int, stop: int | None) -> Iterator[tuple[str, Json]]:
        """Digest and entry."""
        upto = self.length(scope) if stop is None else min(stop, self.length(scope))
        if start >= upto:
            return
        data, base = b"", 0
        for n, (number, first, end) in enumerate(self._index.of(scope, start, upto), start + 1):
            if not base <= first < end <= base + len(data):
                data, base = self._bytes(first, max(end - first, _READ_BYTES)), first
            yield stands(f"{self._path} line {number + 1}", data[first - base : end - base], scope, n)

    def _bytes(self, at: int, count: int) -> bytes:
        try:
            if not self._closed:
                return os.pread(self._file, count, at)  # needs no file descriptor: there may be none left
            with self._path.open("rb", buffering=0) as file:
                file.seek(at)
                return file.read(count)
        except OSError as error:
            raise AnytimedError(f"{self._path}: cannot be read: {error.strerror}") from error

    def _save(self, growth: int = 0) -> None:
        """Write the cache again where the one that stands spares too little; of a long journal that is growing, where
        it grew by one part in `growth` since."""
        now = self._index.lines, self._index.size
        for found, cached, much in zip(now, self._cached, (_MUCH_LINES, _MUCH_BYTES), strict=True):
            if found - cached > much + (found // growth if growth else 0):
                self._index.save(self._cache)
                self._cached = now
                return

    def _renew(self) -> None:
        """After a failure that leaves the file's state unknown: a new file with the lines that were durable, byte for
        byte, takes its place. Raises AnytimedError where that cannot be done for now."""
        try:
            with beside(self._path) as copy:
                self._copy_durable(copy)
                copy.rename(self._path)
            fsync_folder(self._path.parent)
            file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            try:
                os.dup2(file, self._file, inheritable=False)  # for who is reading, it is the same number throughout
            finally:
                os.close(file)
        except OSError as error:
            raise AnytimedError(
                f"{self._path}: closed after an earlier failure ({self._failed}), and no new file can take its place "
                f"yet: {error.strerror}"
            ) from error
        log.warning("%s: a new file with all its entries, after an earlier failure (%s)", self._path, self._failed)
        self._failed = ""

    def _copy_durable(self, copy: Path) -> None:
        """The bytes that were durable into a new file, fsynced, if they still are what was written."""
        size, digest, left = self._index.size, hashlib.sha256(), self._index.size
        file = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with self._path.open("rb") as old:
                while left and (chunk := old.read(min(CHUNK_BYTES, left))):
                    digest.update(chunk)
                    write_all(file, memoryview(chunk))
                    left -= len(chunk)
            if left or digest.digest() != self._index.sha256.digest():
                raise AnytimedError(
                    f"{self._path}: closed after an earlier failure ({self._failed}), and its first {size} bytes "
                    "are no longer what was written; look at the disk, and restart to go on"
                )
            os.fsync(file)
        finally:
            os.close(file)

    def _take_back(self, error: OSError) -> None:
        """Cut off what a failed append left, so that the next one starts a line of its own."""
        try:
            os.ftruncate(self._file, self._index.size)
        except OSError:
            self._failed = self._failed or f"write: {error.strerror}"
