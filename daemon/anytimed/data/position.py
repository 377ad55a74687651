"""The ledger: the part of the journal that is in effect.

A run lives once and may be replayed often. Living, the ledger appends decisions; after a restart it holds those
beyond the position and hands them out again, and the pipeline asks it before it decides anything itself. Length and
digest count only what took effect, so that positions come out equal either way.

A mixture takes effect at a block's start, and what had been decided beyond it by reading ahead never does: those
entries are void. A scope of its own says which; they stay in the journal and in its digest, and are counted together
with the entry that follows them.
"""

from __future__ import annotations

from collections import deque

from anytimed.contracts import Journal, Json, Position, Refused, chain

SCOPE = "data"
"""The journal's scope of everything that the data room decides."""
VOID = "void"
"""The scope of what is not in effect: {"first", "stop"}, numbers of entries of SCOPE, from 0."""


class Voids:
    """Which entries of the data scope are void."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._ranges = [(entry["first"], entry["stop"]) for entry in journal.entries(VOID)]

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and any(first <= number < stop for first, stop in self._ranges)

    def add(self, first: int, stop: int) -> None:
        """Make entries void, durably. Raises as `Journal.append`."""
        self._journal.append(VOID, {"first": first, "stop": stop})
        self._ranges.append((first, stop))


class Ledger:
    """The journal's data scope from a position on. Raises Refused where the journal is not the position's."""

    def __init__(self, journal: Journal, position: Position) -> None:
        self._journal = journal
        self.length, self.digest = position.journal_length, position.journal_digest
        there = journal.length(SCOPE)
        found = journal.digest(SCOPE, min(there, self.length))
        if there < self.length or found != self.digest:
            raise Refused(
                f"journal: {min(there, self.length)} data entries with digest {found or 'none'} found, the commit was "
                f"made after {self.length} with digest {self.digest or 'none'}. The journal belongs to another run or "
                "lost entries: restore journal.jsonl, or start over with --fresh"
            )
        self.voids = Voids(journal)
        self._raw = deque(journal.entries(SCOPE, self.length))
        self._waiting = deque(
            (number, entry) for number, entry in enumerate(self._raw, self.length) if number not in self.voids
        )

    @property
    def head(self) -> Json | None:
        """The oldest decision that waits to be replayed; None while living."""
        return self._waiting[0][1] if self._waiting else None

    def waiting(self, kind: str) -> list[Json]:
        """The decisions of a kind that wait to be replayed, oldest first."""
        return [entry for _, entry in self._waiting if entry["kind"] == kind]

    def replayed(self) -> None:
        """The head took effect."""
        number, _ = self._waiting.popleft()
        while self.length <= number:
            self._count(self._raw.popleft())

    def append(self, entry: Json) -> None:
        """Make a decision durable; it may take effect when this returns."""
        assert not self._waiting, "a replay decides nothing"
        self._journal.append(SCOPE, entry)
        self._raw.clear()  # void
        self.length, self.digest = self._journal.length(SCOPE), self._journal.digest(SCOPE)

    def drop(self) -> None:
        """Make void whatever waits to be replayed."""
        if self._waiting:
            self.voids.add(self.length, self.length + len(self._raw))
            self._waiting.clear()

    def _count(self, entry: Json) -> None:
        self.length += 1
        self.digest = chain(self.digest, entry)
