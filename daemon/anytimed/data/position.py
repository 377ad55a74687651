"""What a position is made of: `Ledger`, the part of the journal that is in effect, and `Cursor`, the place in one
source.

A run lives once and may be replayed often. Living, the ledger appends decisions; after a restart it holds those
beyond the position and hands them out again, and the pipeline asks it before it decides anything itself. Length and
digest count only what took effect, so that positions come out equal either way.

The cursor takes records one at a time. That an entry was finished counts only with the next record of the source: when
one asks a dry source depends on the clock, and nothing that stands in a position may.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

from anytimed.contracts import (
    Finished,
    Journal,
    Json,
    Position,
    Record,
    Refused,
    Rejected,
    Stream,
    StreamUnavailable,
    chain,
)

SCOPE = "data"
"""The journal's scope of everything that the data room decides."""


class Ledger:
    """The journal's data scope from a position on. Raises Refused where the journal is not the position's."""

    def __init__(self, journal: Journal, position: Position) -> None:
        self._journal = journal
        entries = journal.entries(SCOPE)
        self.effective = entries[: position.journal_length]
        self._waiting = deque(entries[position.journal_length :])
        self.length = 0
        self.digest = ""
        for entry in self.effective:
            self._count(entry)
        if (self.length, self.digest) != (position.journal_length, position.journal_digest):
            raise Refused(
                f"journal: {self.length} data entries with digest {self.digest or 'none'} found, the commit was made "
                f"after {position.journal_length} with digest {position.journal_digest or 'none'}. The journal belongs "
                "to another run or lost entries: restore journal.jsonl, or start over with --fresh"
            )

    @property
    def head(self) -> Json | None:
        """The oldest decision that waits to be replayed; None while living."""
        return self._waiting[0] if self._waiting else None

    def replayed(self) -> None:
        """The head took effect."""
        self._count(self._waiting.popleft())

    def append(self, entry: Json) -> None:
        """Make a decision durable; it may take effect when this returns."""
        assert not self._waiting, "a replay decides nothing"
        self._journal.append(SCOPE, entry)
        self._count(entry)

    def _count(self, entry: Json) -> None:
        self.length += 1
        self.digest = chain(self.digest, entry)


class Cursor:
    """One source, read record by record.

    `reason` says why the last `take` gave nothing; `exhausted` that it was because every adopted entry has been read,
    and not because the source did not answer. `undiscovered` is why the last `discover` failed, None if it did not.
    """

    def __init__(self, stream: Stream, place: Json | None, entries: list[Json], finished: Mapping[int, str]) -> None:
        self._stream = stream
        self._place = place
        self._unverified = finished
        self._items: Iterator[tuple[Record | Rejected | Finished, Json]] | None = None
        self._riding: dict[int, str] = {}
        self.entries = 0
        self.exhausted = False
        self.reason = ""
        self.undiscovered: str | None = None
        self.adopt(entries)
        self.verify()

    def adopt(self, entries: list[Json]) -> None:
        if entries:
            self._stream.adopt(entries)
            self.entries += len(entries)

    def discover(self) -> list[Json]:
        """What the stream could adopt; nothing, and a reason, where it does not answer."""
        try:
            entries = self._stream.discover()
        except StreamUnavailable as error:
            self.undiscovered = str(error)
            return []
        self.undiscovered = None
        return entries

    def verify(self) -> bool:
        """Check the entries finished before the position, once; False where the stream does not answer yet."""
        if self._unverified:
            try:
                self._stream.verify(self._unverified)
            except StreamUnavailable as error:
                self.exhausted, self.reason = False, str(error)
                return False
            self._unverified = {}
        return True

    def take(self) -> tuple[Record | Rejected, Json, dict[int, str]] | None:
        """The next record, the place after it, and the entries finished on the way to it; None when there is none
        now."""
        if not self.verify():
            return None
        try:
            self._items = self._items or self._stream.read(self._place)
            for item, place in self._items:
                self._place = place
                if not isinstance(item, Finished):
                    riding, self._riding = self._riding, {}
                    return item, place, riding
                self._riding[item.entry] = item.digest
        except StreamUnavailable as error:
            self._items = None
            self.exhausted, self.reason = False, str(error)
            return None
        self._items = None  # ended: what is adopted later needs a new call of read
        self.exhausted = True
        self.reason = f"all of its {self.entries} entries have been read" if self.entries else "nothing was found yet"
        return None

    def lag_bytes(self) -> int:
        return self._stream.lag(self._place)
