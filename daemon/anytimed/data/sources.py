"""Every source that was ever in the mixture: where it stands, and what is decided about it.

In order: a source is opened when a mixture first needs it, and goes on where it was when it comes back; a draw takes a
record from one; one with nothing to read is waited for, left out, or read again, by its rule; a poll asks all of them
for new data and those left out whether they can be drawn from again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from anytimed.contracts import ConfigError, Json, Position, SourcePosition, SourceRule, Stream
from anytimed.data.cursor import Cursor, Taken
from anytimed.data.digests import Digests
from anytimed.data.fold import Fold
from anytimed.data.mixture import Mixture

OpenStream = Callable[[str, Json], Stream]
"""A new stream by the source's name and what it `reads`. Raises ConfigError."""

OpenCursor = Callable[[Stream, Json | None], Cursor]
"""A cursor by stream and place."""

ENTRIES_A_LINE = 10_000
"""Of what was discovered: a line of the journal stays short."""


@dataclass(slots=True)
class Tally:
    """A `SourcePosition` that counts."""

    at: SourcePosition
    records: int = 0
    held_out: int = 0
    rejected: int = 0
    tokens: int = 0
    place: Json | None = None

    def frozen(self) -> SourcePosition:
        """The position now."""
        if self.place is not None:
            self.at = replace(
                self.at,
                place=self.place,
                records=self.at.records + self.records,
                held_out=self.at.held_out + self.held_out,
                rejected=self.at.rejected + self.rejected,
                tokens=self.at.tokens + self.tokens,
            )
            self.records = self.held_out = self.rejected = self.tokens = 0
            self.place = None
        return self.at


class Sources:
    """The sources of a pipeline; those of `mixture` are drawn from."""

    def __init__(self, position: Position, open_stream: OpenStream, open_cursor: OpenCursor) -> None:
        self._adopted: dict[str, list[Any]] = {}
        self._finished: dict[str, Digests] = {}
        self._open_stream, self._open_cursor = open_stream, open_cursor
        self._tallies = {name: Tally(at) for name, at in position.sources.items()}
        self._cursors: dict[str, Cursor] = {}
        self._mixture: Mixture | None = None
        self._recalling = True

    @property
    def mixture(self) -> Mixture:
        """The mixture in force."""
        assert self._mixture is not None, "a mixture is in force from the first block on"
        return self._mixture

    def put_in_force(self, mixture: Mixture) -> None:
        """Draw by these rules from now on. Sources that were never opened are; those not in it stay where they are."""
        require_same_reads(mixture.rules, self.positions())
        for name, rule in mixture.rules.items():
            tally = self._tallies.setdefault(name, Tally(SourcePosition()))
            if name not in self._cursors:
                stream = self._open_stream(name, rule.reads)
                self._cursors[name] = self._open_cursor(stream, tally.frozen().place)
                tally.at = replace(tally.at, reads=reads_digest(rule))
                if not self._recalling:
                    self._settle(name)
        self._mixture = mixture
        self._leave_out()

    def recall(self, folds: Iterable[Fold]) -> None:
        """Take in what the journal says of the time before the position: entries adopted, and finished. A mixture that
        was in force is in force already. Raises Refused where an entry that was read has changed."""
        for fold in folds:
            for name, rows in fold.adopted.items():
                if name in self._cursors:
                    self._cursors[name].adopt(rows)
                else:
                    self._adopted.setdefault(name, []).extend(rows)
            for name, part in fold.finished.items():
                self._finished.setdefault(name, Digests()).put(part.indices, part.digests)
        self._recalling = False
        for name in self._cursors:
            self._settle(name)

    def _settle(self, name: str) -> None:
        """Give a cursor what is known of its source."""
        cursor = self._cursors[name]
        cursor.adopt(self._adopted.pop(name, []))
        cursor.finished_before(self._finished.pop(name, {}))

    def positions(self) -> dict[str, SourcePosition]:
        return {name: tally.frozen() for name, tally in self._tallies.items()}

    def active(self) -> Iterator[tuple[str, Cursor]]:
        """The sources of the mixture in force, by name; none before the first."""
        for name in self._mixture.rules if self._mixture else ():
            yield name, self._cursors[name]

    def cursor(self, name: str) -> Cursor:
        return self._cursors[name]

    def tally(self, name: str) -> Tally:
        return self._tallies[name]

    def close(self) -> None:
        """Close every stream that can be closed."""
        for cursor in self._cursors.values():
            cursor.close()

    # --- one draw -----------------------------------------------------------------------------------------------------

    def take(self, name: str) -> Taken | None:
        """The next record of a source; None where it has none, and the cursor says why."""
        cursor = self._cursors[name]
        if why := self.suspended(name):
            cursor.exhausted, cursor.reason = False, why
            return None
        return cursor.take()

    def suspended(self, name: str) -> str | None:
        """Why a source is not read for the records that could not be read so far; None if it is."""
        tally, rule = self._tallies[name], self.mixture.rules[name]
        rejected = tally.at.rejected + tally.rejected
        if rejected <= rule.rejected_records:
            return None
        return beyond_budget(
            rule, rejected, rejected + tally.at.records + tally.records + tally.at.held_out + tally.held_out
        )

    def may_be_left_out(self, name: str) -> bool:
        """Whether draws fall to other sources while this one has nothing, by its rule, and there are others."""
        others = [other for other in self.mixture.rules if other != name and not self._tallies[other].at.dry]
        return self.mixture.rules[name].when_dry == "others" and bool(others)

    def may_be_replayed(self, name: str) -> bool:
        """Whether a source that was read to its end is to be read again, by its rule."""
        rule, at = self.mixture.rules[name], self._tallies[name].frozen()
        read = at.records + at.held_out > 0
        return rule.when_dry == "replay" and at.turn < rule.passes and read and self._cursors[name].exhausted

    # --- decisions that took effect -----------------------------------------------------------------------------------

    def leave_out(self, name: str, *, dry: bool) -> None:
        """Draw from this source no more (`dry`), or again."""
        tally = self._tallies[name]
        tally.at = replace(tally.frozen(), dry=dry)
        self._leave_out()

    def replay(self, name: str) -> None:
        """Begin a source again."""
        tally = self._tallies[name]
        tally.at = replace(tally.frozen(), place=None, turn=tally.at.turn + 1)
        self._cursors[name].restart()

    def left_out(self) -> list[str]:
        return [name for name in self.mixture.rules if self._tallies[name].at.dry]

    def _leave_out(self) -> None:
        out = frozenset(self.left_out())
        if out == self.mixture.rules.keys():
            # The others that it was left out for are gone: somebody has to be waited for.
            for name in out:
                self._tallies[name].at = replace(self._tallies[name].at, dry=False)
            out = frozenset()
        self.mixture.leave_out(out)


def beyond_budget(rule: SourceRule, rejected: int, total: int) -> str | None:
    """Why a source is not read any further after `rejected` of `total` records could not be read; None if it is."""
    if rejected <= rule.rejected_records or rejected <= rule.rejected_fraction * total:
        return None
    return (
        f"{rejected} of {total} records could not be read, more than rejected_records = {rule.rejected_records} "
        f"and rejected_fraction = {rule.rejected_fraction:g} allow; look at them in quarantine/records, raise the "
        "limits, or take the source out, and reload"
    )


def require_same_reads(rules: Mapping[str, SourceRule], positions: Mapping[str, SourcePosition]) -> None:
    """Raise ConfigError where a source of the rules reads something else than it did under that name."""
    for name, rule in rules.items():
        if name in positions and positions[name].reads not in ("", reads_digest(rule)):
            raise ConfigError(
                f"source {name!r} reads something else than before: {json.dumps(rule.reads, sort_keys=True)}. Give "
                "the new data a source of its own under another name, or restore the old settings"
            )


def identity(reads: Json) -> Json:
    """What makes a source the one it is: all that it reads but the place. Data that was moved is the same, and
    fingerprints tell if it is not."""
    return {key: value for key, value in reads.items() if key != "url"}


def reads_digest(rule: SourceRule) -> str:
    """SHA-256 (hex) of a source's identity."""
    return hashlib.sha256(json.dumps(identity(rule.reads), sort_keys=True).encode()).hexdigest()


def same_mixture(one: Json, other: Json) -> bool:
    """Whether two mixtures, as JSON, draw by the same rules from the same sources, wherever those lie."""
    plain = [
        {name: {**rule, "reads": identity(rule["reads"])} for name, rule in rules.items()} for rules in (one, other)
    ]
    return plain[0] == plain[1]
