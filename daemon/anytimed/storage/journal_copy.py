"""A journal as it stands in a run directory that belongs to somebody else: read, checked, and never written.

`JournalCopy` takes the whole lines that are in the file when it is made, checked as a start checks them; a last line
that is not whole may be one that is being written, and is passed over. What is appended stays in memory, behind them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from anytimed.contracts import AnytimedError, Json, chain

from .journal import CHECKED
from .journal_index import Index
from .journal_lines import checked, lines, stands, torn


class JournalCopy:
    """Implements `contracts.Journal`. Needs no lock and takes none; one thread at a time."""

    def __init__(self, path: Path) -> None:
        """`path` need not exist. Raises Refused naming the first line that is broken; AnytimedError where the file
        cannot be read."""
        self._path = path
        self._index = Index()
        self._added: dict[str, list[tuple[str, Json]]] = {}
        try:
            self._load()
        except FileNotFoundError:
            return
        except OSError as error:
            raise AnytimedError(f"{path}: cannot be read: {error.strerror}") from error

    def append(self, scope: str, entry: Json) -> None:
        """Kept in memory, as a reader would get it back from a file."""
        plain = json.loads(json.dumps(entry))
        digest = chain(self.digest(scope), plain)
        self._added.setdefault(scope, []).append((digest, plain))

    def entries(self, scope: str, start: int = 0, stop: int | None = None) -> list[Json]:
        """As `Journal.entries`."""
        stored, upto = self._stored(scope), self.length(scope) if stop is None else stop
        found = [entry for _, entry in self._read(scope, start, min(upto, stored))]
        return found + [entry for _, entry in self._more(scope)[max(0, start - stored) : max(0, upto - stored)]]

    def length(self, scope: str) -> int:
        return self._stored(scope) + len(self._more(scope))

    def digest(self, scope: str, length: int | None = None) -> str:
        """As `Journal.digest`."""
        stored, whole = self._stored(scope), self.length(scope)
        length = whole if length is None else length
        if not 0 <= length <= whole:
            raise IndexError(f"scope {scope} has {whole} entries, asked for the digest after {length}")
        if length > stored:
            return self._more(scope)[length - stored - 1][0]
        if length == stored:
            return self._index.last(scope)[1]
        return next((digest for digest, _ in self._read(scope, length - 1, length)), "") if length else ""

    # --- within ---

    def _load(self) -> None:
        self._index = index = Index.load(self._path.with_name(CHECKED), self._path)
        for number, line, last in lines(self._path, index.size, index.lines):
            if last and torn(line, index.size):
                break
            scope, digest = checked(f"{self._path} line {number}", line, index.last)
            index.add(scope, digest, line)

    def _stored(self, scope: str) -> int:
        return self._index.last(scope)[0]

    def _more(self, scope: str) -> list[tuple[str, Json]]:
        return self._added.get(scope, [])

    def _read(self, scope: str, start: int, stop: int) -> Iterator[tuple[str, Json]]:
        """Digest and entry of lines in the file."""
        if start >= stop:
            return
        try:
            with self._path.open("rb") as file:
                for n, (number, first, end) in enumerate(self._index.of(scope, start, stop), start + 1):
                    if file.tell() != first:
                        file.seek(first)
                    yield stands(f"{self._path} line {number + 1}", file.read(end - first), scope, n)
        except OSError as error:
            raise AnytimedError(f"{self._path}: cannot be read: {error.strerror}") from error
