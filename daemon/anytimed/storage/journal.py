"""The journal: decisions that change the numbers, durable before they take effect.

One JSON object a line: {"scope", "n", "digest", "entry", "crc"}; entries of a scope are numbered from 1 and chained
by digest (`contracts.chain`), `crc` is the CRC-32 of the line before it. Opening reads and checks every line. A last
line that never reached the disk as a whole is dropped and logged: its append never returned. Any other line that does
not fit is refused, for replaying past it would train something else. An append is one write and one fsync under a
lock.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import zlib
from pathlib import Path

from anytimed.contracts import AnytimedError, Json, Refused, chain

from .durable import fsync_folder, write_all

log = logging.getLogger(__name__)

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
        new = not path.exists()
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if new:
                fsync_folder(path.parent)
            self._size = self._load()
        except BaseException:
            os.close(self._file)
            raise

    def append(self, scope: str, entry: Json) -> None:
        """Durable when this returns. Raises AnytimedError where it cannot be made so; the entry then does not count."""
        # What is kept is what a later reader gets back: JSON turns tuples into lists and keys into texts.
        text = json.dumps(entry, separators=(",", ":"))
        with self._lock:
            if self._failed:
                raise AnytimedError(f"{self._path}: closed after an earlier failure ({self._failed}); restart to go on")
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
            if not self._failed:
                os.close(self._file)
            self._failed = self._failed or "closed"

    # --- within ---

    def _load(self) -> int:
        """Read and check all lines; the size of the file after what was torn has been cut off."""
        with self._path.open("rb") as file:
            at = 0
            for number, line in enumerate(iter(lambda: file.readline(_LINE_BYTES), b""), 1):
                # A power cut leaves a line without its end, or zero bytes where a block never arrived.
                if (not line.endswith(b"\n") or b"\0" in line) and not file.peek(1):
                    log.warning(
                        "%s: line %d was torn by a crash and is dropped (%d bytes)", self._path, number, len(line)
                    )
                    os.ftruncate(self._file, at)
                    os.fsync(self._file)
                    break
                self._check(number, line)
                at += len(line)
        return at

    def _check(self, number: int, line: bytes) -> None:
        where = f"{self._path} line {number}"
        hint = "restore the file from a copy, or start over with --fresh"
        try:
            told = json.loads(line)
            scope, n, found, entry = told["scope"], told["n"], told["digest"], told["entry"]
            if zlib.crc32(line.rpartition(b',"crc":')[0]) != told["crc"]:
                raise ValueError(f"its bytes have another checksum than {told['crc']}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Refused(f"{where}: no journal entry ({str(error)[:200]}); {hint}") from error
        expected = chain(self.digest(scope), entry)
        if n != self.length(scope) + 1 or found != expected:
            raise Refused(
                f"{where}: entry {n} of {scope} with digest {found}; expected entry {self.length(scope) + 1} "
                f"with {expected}; the chain is broken: {hint}"
            )
        self._remember(scope, json.dumps(entry, separators=(",", ":")), found)

    def _remember(self, scope: str, text: str, digest: str) -> None:
        self._entries.setdefault(scope, []).append(text)
        self._digests.setdefault(scope, []).append(digest)

    def _take_back(self, error: OSError) -> None:
        """Cut off what a failed append left, so that the next one starts a line of its own."""
        try:
            os.ftruncate(self._file, self._size)
        except OSError:
            self._failed = self._failed or f"write: {error.strerror}"
