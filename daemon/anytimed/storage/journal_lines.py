"""The lines of a journal: how one is written, what a torn one is, and what is refused.

`lines` goes through a file, `checked` says whether a line goes on where its scope ends, `check_lines` does both for a
file that nobody needs to own; `stands` asks less, of a line that `checked` has accepted before.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from anytimed.contracts import CorruptError, Json, Refused, chain

LINE_BYTES = 256 << 20
"""The longest line: the names of a million files that were found at once."""
_BLOCK_BYTES = 512
"""Disks write no less at a time."""


def made(scope: str, n: int, digest: str, text: str) -> bytes:
    """The line of a scope's n-th entry; `digest`: the scope's after it, `text`: its JSON."""
    told = {"scope": scope, "n": n, "digest": digest}
    body = f'{json.dumps(told, separators=(",", ":"))[:-1]},"entry":{text}'.encode()
    return body + b',"crc":%d}\n' % zlib.crc32(body)


def check_lines(path: Path) -> tuple[int, int]:
    """Check every line of a journal, without opening it for anything else: bytes that are whole, bytes at the end that
    are no whole line. Raises Refused naming the first line that is broken; OSError."""
    ends: dict[str, tuple[int, str]] = {}
    whole = 0
    for number, line, last in lines(path):
        if last and torn(line, whole):
            return whole, len(line)
        scope, digest = checked(f"{path} line {number}", line, lambda scope: ends.get(scope, (0, "")))
        ends[scope] = ends.get(scope, (0, ""))[0] + 1, digest
        whole += len(line)
    return whole, 0


def lines(path: Path, start: int = 0, number: int = 0) -> Iterator[tuple[int, bytes, bool]]:
    """Number, line, and whether it is the last, of the file as long as it is now: it may be growing. From byte `start`
    on, before which there are `number` lines."""
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size - start
        file.seek(start)
        while left > 0 and (line := file.readline(min(left, LINE_BYTES))):
            left -= len(line)
            number += 1
            yield number, line, not left


def torn(line: bytes, at: int) -> bool:
    """A crash leaves a line without its end, a power cut zero bytes where a block never arrived. A whole entry with
    another byte in place of its end, or a zero elsewhere, was damaged later, and may have taken effect: not torn.
    `at`: where in the file the line begins."""
    zero = line.find(b"\0")
    if zero == 0 or (zero > 0 and (at + zero) % _BLOCK_BYTES == 0):
        return True
    body, _, crc = line[:-2].rpartition(b',"crc":')
    return not line.endswith(b"\n") and crc != b"%d" % zlib.crc32(body)


def checked(where: str, line: bytes, ends: Callable[[str], tuple[int, str]]) -> tuple[str, str]:
    """Scope and digest of a line that goes on where its scope ends (`ends`: length and digest of a scope)."""
    hint = "restore the file from a copy, or start over with --fresh"
    try:
        scope, n, found, entry = _told(line)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(f"{where}: no journal entry ({str(error)[:200]}); {hint}") from error
    length, digest = ends(scope)
    expected = chain(digest, entry)
    if n != length + 1 or found != expected:
        raise Refused(
            f"{where}: entry {n} of {scope} with digest {found}; expected entry {length + 1} "
            f"with {expected}; the chain is broken: {hint}"
        )
    return scope, found


def stands(where: str, line: bytes, scope: str, n: int) -> tuple[str, Json]:
    """Digest and entry of a line that was checked before as the n-th of the scope. Raises CorruptError where it is
    none any more: the bytes changed under a journal that is open."""
    try:
        found_scope, found_n, digest, entry = _told(line)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptError(f"{where}: was entry {n} of {scope} when it was checked ({str(error)[:200]})") from error
    if (found_scope, found_n) != (scope, n):
        raise CorruptError(f"{where}: entry {found_n} of {found_scope}, was entry {n} of {scope} when it was checked")
    return digest, entry


def _told(line: bytes) -> tuple[str, int, str, Json]:
    """Scope, number, digest and entry of a line whose checksum is right."""
    told = json.loads(line)
    scope, n, found, entry = told["scope"], told["n"], told["digest"], told["entry"]
    if not isinstance(scope, str) or not isinstance(n, int):
        raise ValueError("scope and n are a text and a number")
    if zlib.crc32(line.rpartition(b',"crc":')[0]) != told["crc"]:
        raise ValueError(f"its bytes have another checksum than {told['crc']}")
    return scope, n, found, entry
