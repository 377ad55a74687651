"""The journal: decisions that change the numbers, durable before they take effect.

One JSON object a line: {"scope", "n", "digest", "entry", "crc"}; entries of a scope are numbered from 1 and chained
by digest (`contracts.chain`), `crc` is the CRC-32 of the line before it. Opening reads and checks every line. A last
line that never reached the disk as a whole is dropped and logged: its append never returned. Any other line that does
not fit is refused, for replaying past it would train something else. An append is one write and one fsync under a
lock. After a failed fsync the file is never written again: the next append first puts a copy of what was durable in
its place.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from anytimed.contracts import AnytimedError, Json, Refused, chain

from .durable import fsync_folder, write_all, write_durably

log = logging.getLogger(__name__)

_BLOCK_BYTES = 512
"""Disks write no less at a time."""
_LINE_BYTES = 256 << 20
"""The longest entry: the names of a million files that were found at once."""


class Journal:
    """Implements `contracts.Journal` on one file. Thread-safe; one process at a time, the owner of the run."""

    def __init__(self, path: Path) -> None:
        """Opens or creates. Raises Refused naming the first line that is broken; OSError."""
        self._path = path
        self._lock = threading.Lock()
        self._entries: dict[str, list[str]] = {}
        self._digests: dict[str, list[str]] = {}
        self._failed = ""
        self._closed = False
        self._crc = 0
        new = not path.exists()
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if new:
                fsync_folder(path.parent)
            self._size = self._load()
        except BaseException:
            os.close(self._file)
            raise

    @property
    def path(self) -> Path:
        return self._path

    @property
    def size(self) -> int:
        """Bytes of the file that are durable: whole lines, and what stands there never changes."""
        with self._lock:
            return self._size

    def append(self, scope: str, entry: Json) -> None:
        """Durable when this returns. Raises AnytimedError where it cannot be made so for now; the entry then does not
        count, and may be appended again later."""
        # What is kept is what a later reader gets back: JSON turns tuples into lists and keys into texts.
        text = json.dumps(entry, separators=(",", ":"))
        with self._lock:
            if self._closed:
                raise AnytimedError(f"{self._path}: closed; no entry can be added")
            if self._failed:
                self._renew()
            digest = chain(self.digest(scope), json.loads(text))
            told = {"scope": scope, "n": self.length(scope) + 1, "digest": digest}
            body = f'{json.dumps(told, separators=(",", ":"))[:-1]},"entry":{text}'.encode()
            line = body + b',"crc":%d}\n' % zlib.crc32(body)
            if len(line) > _LINE_BYTES:
                raise AnytimedError(f"{self._path}: an entry of {len(line)} bytes; the most is {_LINE_BYTES}")
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
            self._size += len(line)
            self._crc = zlib.crc32(line, self._crc)
            self._remember(scope, text, digest)

    def entries(self, scope: str) -> list[Json]:
        """All entries of the scope, oldest first; copies."""
        return [json.loads(text) for text in self._entries.get(scope, [])]

    def length(self, scope: str) -> int:
        """How many entries the scope has."""
        return len(self._entries.get(scope, []))

    def digest(self, scope: str, length: int | None = None) -> str:
        """The scope's digest after all entries, or after the first `length`; "" for none."""
        digests = self._digests.get(scope, [])
        upto = len(digests) if length is None else length
        if not 0 <= upto <= len(digests):
            raise IndexError(f"scope {scope} has {len(digests)} entries, asked for the digest after {length}")
        return digests[upto - 1] if upto else ""

    def close(self) -> None:
        """No append after this."""
        with self._lock:
            if not self._closed:
                os.close(self._file)
            self._closed = True

    # --- within ---

    def _load(self) -> int:
        """Read and check all lines; the size of the file after what was torn has been cut off."""
        at = 0
        for number, line, last in _lines(self._path):
            if last and _torn(line, at):
                log.warning("%s: line %d was torn by a crash and is dropped (%d bytes)", self._path, number, len(line))
                os.ftruncate(self._file, at)
                break
            scope, entry, digest = _checked(f"{self._path} line {number}", line, self._ends)
            self._remember(scope, json.dumps(entry, separators=(",", ":")), digest)
            at += len(line)
            self._crc = zlib.crc32(line, self._crc)
        # A process that was killed between write and fsync leaves a whole line that is in memory only.
        os.fsync(self._file)
        return at

    def _renew(self) -> None:
        """After a failure that leaves the file's state unknown: a new file with the lines that were durable, byte for
        byte, takes its place. Raises AnytimedError where that cannot be done for now."""
        try:
            with self._path.open("rb") as old:
                durable = old.read(self._size)
            if len(durable) != self._size or zlib.crc32(durable) != self._crc:
                raise AnytimedError(
                    f"{self._path}: closed after an earlier failure ({self._failed}), and its first {self._size} bytes "
                    "are no longer what was written; look at the disk, and restart to go on"
                )
            write_durably(self._path, durable)
            file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            raise AnytimedError(
                f"{self._path}: closed after an earlier failure ({self._failed}), and no new file can take its place "
                f"yet: {error.strerror}"
            ) from error
        log.warning("%s: a new file with all its entries, after an earlier failure (%s)", self._path, self._failed)
        os.close(self._file)
        self._file, self._failed = file, ""

    def _ends(self, scope: str) -> tuple[int, str]:
        return self.length(scope), self.digest(scope)

    def _remember(self, scope: str, text: str, digest: str) -> None:
        self._entries.setdefault(scope, []).append(text)
        self._digests.setdefault(scope, []).append(digest)

    def _take_back(self, error: OSError) -> None:
        """Cut off what a failed append left, so that the next one starts a line of its own."""
        try:
            os.ftruncate(self._file, self._size)
        except OSError:
            self._failed = self._failed or f"write: {error.strerror}"


def check_lines(path: Path) -> tuple[int, int]:
    """Check every line of a journal, without opening it for anything else: bytes that are whole, bytes at the end that
    are no whole line. Raises Refused naming the first line that is broken; OSError."""
    ends: dict[str, tuple[int, str]] = {}
    whole = 0
    for number, line, last in _lines(path):
        if last and _torn(line, whole):
            return whole, len(line)
        scope, _, digest = _checked(f"{path} line {number}", line, lambda scope: ends.get(scope, (0, "")))
        ends[scope] = ends.get(scope, (0, ""))[0] + 1, digest
        whole += len(line)
    return whole, 0


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Number from 1, line, and whether it is the last, of the file as long as it is now: it may be growing."""
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size
        number = 0
        while left and (line := file.readline(min(left, _LINE_BYTES))):
            left -= len(line)
            number += 1
            yield number, line, not left


def _torn(line: bytes, at: int) -> bool:
    """A crash leaves a line without its end, a power cut zero bytes where a block never arrived. A whole entry with
    another byte in place of its end, or a zero elsewhere, was damaged later, and may have taken effect: not torn."""
    zero = line.find(b"\0")
    if zero == 0 or (zero > 0 and (at + zero) % _BLOCK_BYTES == 0):
        return True
    body, _, crc = line[:-2].rpartition(b',"crc":')
    return not line.endswith(b"\n") and crc != b"%d" % zlib.crc32(body)


def _checked(where: str, line: bytes, ends: Callable[[str], tuple[int, str]]) -> tuple[str, Json, str]:
    """Scope, entry and digest of a line that goes on where its scope ends (`ends`: length and digest of a scope)."""
    hint = "restore the file from a copy, or start over with --fresh"
    try:
        told = json.loads(line)
        scope, n, found, entry = told["scope"], told["n"], told["digest"], told["entry"]
        if zlib.crc32(line.rpartition(b',"crc":')[0]) != told["crc"]:
            raise ValueError(f"its bytes have another checksum than {told['crc']}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(f"{where}: no journal entry ({str(error)[:200]}); {hint}") from error
    length, digest = ends(scope)
    expected = chain(digest, entry)
    if n != length + 1 or found != expected:
        raise Refused(
            f"{where}: entry {n} of {scope} with digest {found}; expected entry {length + 1} "
            f"with {expected}; the chain is broken: {hint}"
        )
    return scope, entry, found
