"""The ledger: the part of the journal that is in effect.

A run lives once and may be replayed often. Living, the ledger appends decisions; after a restart it holds those
beyond the position and hands them out again, and the pipeline asks it before it decides anything itself. Length and
digest count only what took effect, so that positions come out equal either way.

A mixture takes effect at a block's start, and what had been decided beyond it by reading ahead never does: the entry
that changes the mixture names the length of the journal that still counts (`after`); entries between are void. They
stay in the journal and in its digest, and are counted together with the entry that made them void.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from anytimed.contracts import Journal, Json, Position, Refused, chain

SCOPE = "data"
"""The journal's scope of everything that the data room decides."""


class Ledger:
    """The journal's data scope from a position on. Raises Refused where the journal is not the position's."""

    def __init__(self, journal: Journal, position: Position) -> None:
        self._journal = journal
        entries = journal.entries(SCOPE)
        self.length = 0
        self.digest = ""
        effective = entries[: position.journal_length]
        for entry in effective:
            self._count(entry)
        if (self.length, self.digest) != (position.journal_length, position.journal_digest):
            raise Refused(
                f"journal: {self.length} data entries with digest {self.digest or 'none'} found, the commit was made "
                f"after {position.journal_length} with digest {position.journal_digest or 'none'}. The journal belongs "
                "to another run or lost entries: restore journal.jsonl, or start over with --fresh"
            )
        self.effective = [entry for _, entry in valid(effective)]
        self._raw = deque(entries[position.journal_length :])
        self._waiting = deque(valid(self._raw, position.journal_length))
        self.mixtures = [entry for _, entry in self._waiting if entry["kind"] == "mixture"]
        """The changes of the mixture that wait to be replayed."""

    @property
    def head(self) -> Json | None:
        """The oldest decision that waits to be replayed; None while living."""
        return self._waiting[0][1] if self._waiting else None

    def replayed(self) -> None:
        """The head took effect."""
        number, _ = self._waiting.popleft()
        while self.length <= number:
            self._count(self._raw.popleft())

    def append(self, entry: Json) -> None:
        """Make a decision durable; it may take effect when this returns."""
        assert not self._waiting, "a replay decides nothing"
        self._journal.append(SCOPE, entry)
        self._count(entry)

    def change_mixture(self, entry: Json) -> None:
        """Make a change of the mixture durable, which makes void whatever waits to be replayed."""
        told = {**entry, "after": self.length}
        self._journal.append(SCOPE, told)
        while self._raw:
            self._count(self._raw.popleft())
        self._waiting.clear()
        self._count(told)

    def _count(self, entry: Json) -> None:
        self.length += 1
        self.digest = chain(self.digest, entry)


def valid(entries: Iterable[Json], first: int = 0) -> list[tuple[int, Json]]:
    """Entries that were not made void by a later one among them, each with its number; that of the first is given."""
    found: list[tuple[int, Json]] = []
    counts_before: int | None = None
    for number, entry in reversed(list(enumerate(entries, first))):
        if counts_before is None or number < counts_before:
            found.append((number, entry))
            if entry["kind"] == "mixture":
                counts_before = entry["after"]
    return found[::-1]
