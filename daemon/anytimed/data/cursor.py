"""The place in one source, and what was read ahead of it.

Records are taken one at a time. They are read ahead in groups, whose texts are handed to the tokenizing while earlier
groups are still being used up. What comes next in a source does not depend on when it is asked for, so reading ahead
decides nothing: whatever was read and not taken is simply read again after a restart.

That an entry was finished counts only with the next record of the source: when one asks a dry source depends on the
clock, and nothing that stands in a position may.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anytimed.contracts import (
    Acknowledging,
    AnytimedError,
    Closable,
    Finished,
    Json,
    Preparing,
    Record,
    Refused,
    Rejected,
    Stream,
    StreamUnavailable,
    Tokens,
)
from anytimed.data.encoding import Closed, size
from anytimed.data.tokenizing import Pending, Tokenizing

GROUP_RECORDS = 128
GROUP_CHARACTERS = 256 << 10
"""A group ends with the record that brings it to one of these; most are one piece for the tokenizer then."""


class Interrupted(Exception):
    """Nothing is to be read or decided any more."""


@dataclass(slots=True)
class Taken:
    """A record of the source. tokens: its own, without an end token (None for one that was rejected); place: after it;
    finished: entries that ended on the way to it, with their digests; whole: the end token stands in `tokens`."""

    item: Record | Rejected
    place: Json
    finished: Mapping[int, str]
    tokens: NDArray[np.integer[Any]] | None = None
    whole: bool = False


@dataclass(slots=True)
class _Group:
    """Records that were read together; `pending` gives the tokens of those that are texts. characters: `size` of
    these, or tokens of records that hold them."""

    taken: deque[Taken] = field(default_factory=deque)
    texts: list[str] = field(default_factory=list)
    pending: Pending | None = None
    characters: int = 0

    def settle(self, tokenizing: Tokenizing) -> None:
        """Give every text its tokens; waits for them. A text that cannot be encoded is a rejected record."""
        if self.pending is None:
            return
        try:
            tokens: list[Tokens | Exception] = [*self.pending.result()]
        except (Refused, Closed):
            raise
        except Exception:  # noqa: BLE001 - one after the other they tell which text it was
            tokens = [_alone(text, tokenizing) for text in self.texts]
        found = iter(tokens)
        for taken in self.taken:
            if isinstance(taken.item, Record) and taken.item.tokens is None:
                told = next(found)
                if isinstance(told, Exception):
                    taken.item = Rejected(f"it cannot be encoded: {type(told).__name__}: {told}", taken.item.digest)
                else:
                    taken.tokens = told
        self.pending = None


def _alone(text: str, tokenizing: Tokenizing) -> Tokens | Exception:
    """The tokens of one text, or why there are none."""
    try:
        return tokenizing.submit([text]).result()[0]
    except (Refused, Closed):
        raise
    except Exception as error:  # noqa: BLE001 - whatever a tokenizer raises about a text makes it a bad record
        return error


class Cursor:
    """One source, read record by record.

    `reason` says why the last `take` gave nothing; `exhausted` that it was because every adopted entry has been read,
    and not because the source did not answer. `undiscovered` and `unacknowledged` are why the last `discover` and the
    last `acknowledge` failed, None if they did not. `entries` have been adopted.
    """

    def __init__(
        self,
        stream: Stream,
        place: Json | None,
        tokenizing: Tokenizing,
        *,
        vocab_size: int,
        stop: threading.Event,
    ) -> None:
        self._stream = stream
        self._tokenizing = tokenizing
        self._vocab_size = vocab_size
        self._stop = stop
        self._read = self.place = place
        self._unverified: Mapping[int, str] = {}
        self._items: Iterator[tuple[Record | Rejected | Finished, Json]] | None = None
        self._riding: dict[int, str] = {}
        self._groups: deque[_Group] = deque()
        self._ahead = 0  # characters in the groups
        self._due = True
        self._failure: AnytimedError | None = None
        self._told = -1  # the last entry whose end was told; a second pass tells nothing new
        self.entries = 0
        self.exhausted = False
        self.reason = ""
        self.undiscovered: str | None = None
        self.unacknowledged: str | None = None
        if place is not None:
            self.prepare(lambda: None)  # for `verify`

    def prepare(self, done: Callable[[], None]) -> None:
        """Begin what `discover` will need; `done` is called, from any thread, when it need not be waited for."""
        if isinstance(self._stream, Preparing):
            self._stream.prepare(self.place, done)
        else:
            done()

    def forget(self) -> None:
        """What was prepared is not to be used."""
        if isinstance(self._stream, Preparing):
            self._stream.forget()

    def finished_before(self, finished: Mapping[int, str]) -> None:
        """Entries, adopted already, that were read to their end before the place; they are checked, now or when the
        stream answers. Raises Refused where one has changed."""
        self._unverified = finished
        self._told = max(finished, default=-1)
        self.verify()

    def adopt(self, entries: Sequence[Any]) -> None:
        if entries:
            self._stream.adopt(entries)
            self.entries += len(entries)

    def discover(self) -> list[Any]:
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

    @property
    def ready(self) -> bool:
        """Whether `take` would give a record now."""
        if not self._groups:
            self._fill()
        return bool(self._groups)

    def take(self) -> Taken | None:
        """The next record, with everything that comes with it; None when there is none now. Raises what reading it
        raises, Interrupted."""
        if self._due:
            # Once a group, not once a record: a source that has ended, or does not answer, is not asked every time.
            self._due = False
            while (not self._groups or self._ahead < self._tokenizing.ahead) and self._fill():
                pass
        if not self._groups:
            self._due = True
            if self._failure is not None:
                raise self._failure
            return None
        group = self._groups[0]
        try:
            group.settle(self._tokenizing)
        except Closed:
            raise Interrupted from None
        taken = group.taken.popleft()
        if not group.taken:
            self._ahead -= self._groups.popleft().characters
            self._due = True
        self.place = taken.place
        return taken

    def restart(self) -> None:
        """Go back to the beginning of the source, which has been read to its end."""
        assert self.exhausted and not self._groups, "a source is read again only from its end"
        self._read, self._items, self.exhausted = None, None, False

    def acknowledge(self, place: Json) -> None:
        """Tell the source that no commit needs what lies before `place`."""
        if isinstance(self._stream, Acknowledging):
            self.unacknowledged = None
            try:
                self._stream.acknowledge(place)
            except StreamUnavailable as error:
                self.unacknowledged = str(error)

    def close(self) -> None:
        """Drop what was read ahead, and close the stream, if it can be closed."""
        self._groups.clear()
        self._items = None
        if isinstance(self._stream, Closable):
            self._stream.close()

    @property
    def lag_unit(self) -> str:
        """What `lag` counts."""
        return str(getattr(self._stream, "lag_unit", "bytes"))

    def lag(self) -> int:
        """What is adopted and not yet taken."""
        return self._stream.lag(self.place)

    # --- reading ahead ------------------------------------------------------------------------------------------------

    def _fill(self) -> bool:
        """Read one group more; False where nothing was read."""
        if self._failure is not None or not self.verify():
            return False
        group, characters = _Group(), 0
        try:
            self._items = self._items or self._stream.read(self._read)
            for item, place in self._items:
                if self._stop.is_set():
                    raise Interrupted
                self._read = place
                if isinstance(item, Finished):
                    if item.entry > self._told:
                        self._told = item.entry
                        self._riding[item.entry] = item.digest
                    continue
                riding, self._riding = self._riding, {}
                group.taken.append(self._taken(item, place, riding, group.texts))
                if isinstance(item, Record):
                    characters += size(item.text) if item.tokens is None else item.tokens.size
                if len(group.taken) >= GROUP_RECORDS or characters >= GROUP_CHARACTERS:
                    break
            else:
                self._items = None  # ended: what is adopted later needs a new call of read
                self.exhausted = True
                self.reason = (
                    f"all of its {self.entries} entries have been read" if self.entries else "nothing was found yet"
                )
        except StreamUnavailable as error:
            self._items = None
            self.exhausted, self.reason = False, str(error)
        except AnytimedError as error:
            self._failure = error  # what was read before it is good
        if not group.taken:
            return False
        if group.texts:
            try:
                group.pending = self._tokenizing.submit(group.texts)
            except Closed:
                raise Interrupted from None
        group.characters = characters
        self._ahead += characters
        self._groups.append(group)
        return True

    def _taken(self, item: Record | Rejected, place: Json, finished: Mapping[int, str], texts: list[str]) -> Taken:
        if isinstance(item, Rejected):
            return Taken(item, place, finished)
        if item.tokens is None:
            texts.append(item.text)
            return Taken(item, place, finished)
        tokens = item.tokens
        if not tokens.size or tokens.max() >= self._vocab_size or (tokens.dtype.kind == "i" and tokens.min() < 0):
            found = f"tokens from {tokens.min()} to {tokens.max()}" if tokens.size else "no token"
            return Taken(Rejected(f"{found}, expected 0 to {self._vocab_size - 1}", item.digest), place, finished)
        return Taken(item, place, finished, tokens, whole=True)
