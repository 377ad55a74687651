"""Every source that was ever in the mixture: where it stands, and what is decided about it.

In order: a source is opened when a mixture first needs it, and goes on where it was when it comes back; a draw takes a
record from one; one with nothing to read is waited for, left out, or read again, by its rule; a poll asks all of them
for new data and those left out whether they can be drawn from again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from anytimed.contracts import ConfigError, Json, Position, SourcePosition, SourceRule, Stream
from anytimed.data.cursor import Cursor, Taken
from anytimed.data.digests import Digests
from anytimed.data.fold import Fold
from anytimed.data.mixture import Mixture

OpenStream = Callable[[str, SourceRule], Stream]
"""A new stream by the source's name and rule. Raises ConfigError."""

OpenCursor = Callable[[Stream, Json | None], Cursor]
"""A cursor by stream and place."""

Decide = Callable[[Json], None]
"""Makes a decision about a source durable, with the draw before which it is taken; it may take effect when this
returns. Raises Undecided."""

ENTRIES_A_LINE = 10_000
"""Of what was discovered: a line of the journal stays short."""


class Undecided(Exception):
    """The journal cannot take a decision for now, so it did not take effect; it is taken again later."""


class Unanswered(Exception):
    """A replay needs a source that does not answer for now; its name."""


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
        require_same_sources(mixture.rules, self.positions())
        for name, rule in mixture.rules.items():
            tally = self._tallies.setdefault(name, Tally(SourcePosition()))
            if name not in self._cursors:
                stream = self._open_stream(name, rule)
                self._cursors[name] = self._open_cursor(stream, tally.frozen().place)
                tally.at = replace(tally.at, identity=rule.identity)
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
        """Close every stream that can be closed; the last to be called."""
        # They are the pipeline's: without them nothing here leads back to it, and all goes when its owner lets it go.
        # Left to the collector, which seldom looks at what is old, the buffers of many reloads would pile up.
        self._open_stream = self._open_cursor = _closed
        for cursor in self._cursors.values():
            cursor.close()

    def acknowledge(self, position: Json) -> None:
        """No commit resumes before this position, as JSON: records before it are not needed any more, but those of
        sources that are to be read again from their beginning."""
        again = {name for name, rule in position["mixture"].items() if rule["when_dry"] == "replay"}
        places = {name: at["place"] for name, at in position["sources"].items() if at["place"] and name not in again}
        for name, cursor in self.active():
            if name in places:
                cursor.acknowledge(places[name])

    def status(self) -> Json:
        """Per source of the mixture: entries adopted, what is not yet read, records, its rule, what is wrong."""
        told: Json = {}
        for name, cursor in self.active():
            at, rule = self._tallies[name].frozen(), self.mixture.rules[name]
            told[name] = {
                "entries": cursor.entries,
                "lag_bytes": cursor.lag(),
                "lag_unit": cursor.lag_unit,
                "records": at.records,
                "held_out": at.held_out,
                "rejected": at.rejected,
                "tokens": at.tokens,
                "place": at.place,
                "share": self.mixture.share(name),
                "when_dry": rule.when_dry,
                "pass_number": at.pass_number,
                "dry": at.dry,
                "suspended": self.suspended(name),
                "unavailable": cursor.undiscovered,
                "unacknowledged": cursor.unacknowledged,
            }
        return told

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

    # --- decisions ----------------------------------------------------------------------------------------------------

    def prepare(self, done: Callable[[], None]) -> None:
        """Begin what `discover` will need; `done` is called, from any thread, when it need not wait."""
        cursors = [cursor for _, cursor in self.active()]
        waiting = len(cursors) + 1  # and for this function itself
        counting = threading.Lock()

        def prepared() -> None:
            nonlocal waiting
            with counting:
                waiting -= 1
                last = waiting == 0
            if last:
                done()

        for cursor in cursors:
            cursor.prepare(prepared)
        prepared()

    def forget(self) -> None:
        """What was prepared is not to be used."""
        for _, cursor in self.active():
            cursor.forget()

    def discover(self, decide: Decide) -> tuple[int, str | None]:
        """Ask for new data, and whether those left out can be drawn from again. How many new entries there are, and
        sources that are back; what could not be decided for now. Raises Refused where read data has changed."""
        found, undecided = 0, None
        for name, cursor in self.active():
            entries = cursor.discover()
            try:
                for first in range(0, len(entries), ENTRIES_A_LINE):
                    some = entries[first : first + ENTRIES_A_LINE]
                    decide({"kind": "discovered", "source": name, "entries": some})
                    cursor.adopt(some)
                    found += len(some)
            except Undecided as error:
                # A full disk, say: what was not decided is found again by the next poll.
                undecided = f"source {name}: {len(entries)} new entries wait: {error}"
        for name in self._left_out():
            if self.suspended(name) is None and self._cursors[name].ready:
                try:
                    decide({"kind": "back", "source": name})
                except Undecided as error:
                    undecided = f"source {name} can be drawn from again: {error}"
                    continue
                self._set_dry(name, dry=False)
                found += 1
        return found, undecided

    def without(self, name: str, decide: Decide) -> bool:
        """Decide about a source that has nothing, by its rule: read it again, or leave it out. False where it is to be
        waited for. Raises Undecided."""
        if self._may_be_replayed(name):
            decide({"kind": "replayed", "source": name})
            self._replay(name)
            return True
        if self._may_be_left_out(name):
            decide({"kind": "left_out", "source": name})
            self._set_dry(name, dry=True)
            return True
        return False

    def decided(self, entry: Json) -> None:
        """A decision of the journal takes effect again. Raises ValueError where it does not fit what is read,
        Unanswered where that cannot be told for now."""
        name, cursor = entry["source"], self._cursors[entry["source"]]
        match entry["kind"]:
            case "discovered":
                cursor.adopt(entry["entries"])
            case "left_out" | "back":
                self._set_dry(name, dry=entry["kind"] == "left_out")
            case "replayed":
                if cursor.ready:
                    raise ValueError(f"records of source {name!r} that were not read")
                if not cursor.exhausted:
                    raise Unanswered(name)
                self._replay(name)
            case kind:
                raise ValueError(f"no decision of this version: {kind!r}")

    def _may_be_left_out(self, name: str) -> bool:
        """Whether draws fall to other sources while this one has nothing, by its rule, and there are others."""
        others = [other for other in self.mixture.rules if other != name and not self._tallies[other].at.dry]
        return self.mixture.rules[name].when_dry == "others" and bool(others)

    def _may_be_replayed(self, name: str) -> bool:
        """Whether a source that was read to its end is to be read again, by its rule."""
        rule, at = self.mixture.rules[name], self._tallies[name].frozen()
        read = at.records + at.held_out > 0
        return rule.when_dry == "replay" and at.pass_number < rule.passes and read and self._cursors[name].exhausted

    def _set_dry(self, name: str, *, dry: bool) -> None:
        """Draw from this source no more (`dry`), or again."""
        tally = self._tallies[name]
        tally.at = replace(tally.frozen(), dry=dry)
        self._leave_out()

    def _replay(self, name: str) -> None:
        """Begin a source again."""
        tally = self._tallies[name]
        tally.at = replace(tally.frozen(), place=None, pass_number=tally.at.pass_number + 1)
        self._cursors[name].restart()

    def _left_out(self) -> list[str]:
        return [name for name in self.mixture.rules if self._tallies[name].at.dry]

    def _leave_out(self) -> None:
        out = frozenset(self._left_out())
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


def require_same_sources(rules: Mapping[str, SourceRule], positions: Mapping[str, SourcePosition]) -> None:
    """Raise ConfigError where a source of the rules is another one than it was under that name."""
    for name, rule in rules.items():
        if name in positions and positions[name].identity not in ("", rule.identity):
            raise ConfigError(
                f"source {name!r} reads something else than before: {json.dumps(rule.reads, sort_keys=True)}. Give "
                "the new data a source of its own under another name, or restore the old settings"
            )


def same_mixture(one: Json, other: Json) -> bool:
    """Whether two mixtures, as JSON, draw by the same rules from the same sources, however those are opened."""
    plain = [{name: {**rule, "reads": None} for name, rule in rules.items()} for rules in (one, other)]
    return plain[0] == plain[1]


def _closed(*_: object) -> NoReturn:
    raise AssertionError("the sources are closed")
