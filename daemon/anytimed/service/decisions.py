"""What was decided about the training, in the journal's scope `training`: skipped steps, forgettings, rollbacks, jumps.

A replay comes to the same decisions again, and says so again: each is journalled once. Those that must not be taken
twice (what a rollback has jumped over, how many there were) are read from here, so a rollback does not take them back.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable

from anytimed.contracts import Journal, Json

log = logging.getLogger("anytimed")

SCOPE = "training"
TOLD = 100
"""Interventions that an export tells of, the newest."""


class Decisions:
    """The journal's entries about the training, oldest first; a copy is kept in memory, for they are few."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._entries = journal.entries(SCOPE)
        self._known = {_key(entry) for entry in self._entries}
        self._spans = _spans_of(self._entries)

    def note(self, entry: Json) -> bool:
        """Make a decision durable, once; whether it is new. Raises AnytimedError where the journal cannot take it for
        now: it is to be noted again."""
        if _key(entry) in self._known:
            return False
        self._journal.append(SCOPE, entry)
        self._known.add(_key(entry))
        self._entries.append(entry)
        self._spans += _spans_of([entry])
        return True

    def of(self, kind: str) -> list[Json]:
        return [entry for entry in self._entries if entry["kind"] == kind]

    def interventions(self, step: int) -> list[Json]:
        """The newest that concern a checkpoint of this step."""
        return [entry for entry in self._entries if entry["step"] <= step][-TOLD:]

    def counts(self) -> dict[str, int]:
        """How many there were of each kind."""
        return dict(sorted(Counter(entry["kind"] for entry in self._entries).items()))

    def jumped(self, batch: int) -> bool:
        """Whether a batch, by its number, is passed over. Asked at every step."""
        return any(first <= batch <= last for first, last in self._spans)

    def undone(self, seq: int) -> Json | None:
        """The rollback that commit number `seq` was left behind by; None where it is good to go on from."""
        return next((e for e in self.of("rollback") if e["to_seq"] < seq <= e["newest_seq"]), None)


def _spans_of(entries: Iterable[Json]) -> list[tuple[int, int]]:
    passed = (entry for entry in entries if entry["kind"] in ("jump", "rollback"))
    return [(entry["first_batch"], entry["last_batch"]) for entry in passed]


def _key(entry: Json) -> str:
    return json.dumps(entry, sort_keys=True)
