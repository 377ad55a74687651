"""Spans of a broker's log as a stream: what Kafka, JetStream and Redis Streams share.

An entry is a span of the log, as a short JSON list whose meaning is the broker's own; `discover` finds the span from
where the last one stopped up to the newest message. `read` goes through the spans message by message and chains their
digests, so that a place has a constant size and no message before it is ever needed again: brokers forget. The chain's
end is the digest of a finished span: a replay that reads other messages than the run did is refused by the journal.

The position is ours, and the broker's is only told: nothing here joins a group, follows a consumer's offset or starts
somewhere because the wanted message is gone. A message that the broker no longer holds is refused by name (`expired`),
a log that is not the one that was read as well (`replaced`). A broker that does not answer is StreamUnavailable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any, ClassVar

from anytimed.contracts import Finished, Json, Record, Refused, Rejected, StreamUnavailable
from anytimed.urls import told
from anytimed_adapters.streams.messages import MessageSettings, document

_NOTHING = sha256(b"").hexdigest()
_REMEDY = (
    "Take the source out and add it again under another name (it begins at the oldest message that is held), or start "
    "over with --fresh"
)

Entry = list[Any]
"""A span, as it stands in the journal."""


class BrokerStream(ABC):
    """A `Stream` over spans of a log; an adapter says how they are found and read. `secrets`: never to be told.

    passing_settings: those whose change makes no other source of it."""

    passing_settings: ClassVar[frozenset[str]] = frozenset({"url", "timeout_s"})
    lag_unit: ClassVar[str] = "messages"

    def __init__(self, settings: MessageSettings, name: str, secrets: Sequence[str]) -> None:
        self._message_settings = settings
        self._name = name
        self._secrets = secrets
        self._spans: list[Entry] = []
        self._ends: list[int] = [0]  # messages adopted up to and including a span; one longer than the spans

    # --- Stream -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def discover(self) -> list[Entry]:
        """Spans beyond the adopted ones. Raises StreamUnavailable; Refused where unread messages have expired, or the
        log was replaced."""

    def adopt(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._spans.append(list(entry))
            self._ends.append(self._ends[-1] + self._size(entry))

    def read(self, place: Json | None) -> Iterator[tuple[Record | Rejected | Finished, Json]]:
        """Items after `place`: {"entry", "offset" after the message (None: the span's start), "read": messages of the
        span so far, "digest": their chain}."""
        index, offset, read, chain = (0, None, 0, _NOTHING) if place is None else _parts(place)
        while index < len(self._spans):
            for value, after in self._messages(self._spans[index], offset, read):
                item = document(value, self._message_settings)
                offset, read = after, read + 1
                chain = sha256(f"{chain} {after} {item.digest}".encode()).hexdigest()
                yield item, {"entry": index, "offset": offset, "read": read, "digest": chain}
            digest, (index, offset, read, chain) = chain, (index + 1, None, 0, _NOTHING)
            yield Finished(index - 1, digest), {"entry": index, "offset": offset, "read": read, "digest": chain}

    def verify(self, finished: Mapping[int, str]) -> None:
        """Messages never change, so it is asked whether the log is the one that was read. Raises Refused."""
        if finished:
            self._require_same_log()

    def lag(self, place: Json | None) -> int:
        """Messages adopted and not yet read, after `place`; those that the broker has deleted count until their span
        is finished."""
        if place is None:
            return self._ends[-1]
        index = int(place["entry"])
        return self._ends[-1] - self._ends[index] - int(place["read"])

    # --- what a broker says -------------------------------------------------------------------------------------------

    @abstractmethod
    def _size(self, entry: Entry) -> int:
        """The most messages that a span can have."""

    @abstractmethod
    def _messages(self, entry: Entry, offset: Any, read: int) -> Iterator[tuple[bytes | None, Any]]:
        """Values of the span's messages after `offset` (None: from its start), `read` of which were read before; each
        with the offset after it. What was deleted inside is passed over. Raises StreamUnavailable, Refused."""

    @abstractmethod
    def _require_same_log(self) -> object:
        """Raise Refused unless the broker's log is the one that the adopted spans are of."""

    # --- what a person reads ------------------------------------------------------------------------------------------

    def _told(self, text: str) -> str:
        return told(text, self._secrets)

    def _unavailable(self, what: str, error: BaseException | str) -> StreamUnavailable:
        why = (error if isinstance(error, str) else f"{type(error).__name__}: {error}").rstrip(":. ")
        return StreamUnavailable(f"source {self._name!r}: {self._told(f'{what}: {why}')}. It is tried again")

    def _expired(self, what: str, wanted: object, oldest: object) -> Refused:
        return Refused(
            f"source {self._name!r}: expired: {self._told(what)} wants {wanted}, the broker's oldest is {oldest}. What "
            f"lies between was never read and is gone; let the broker keep messages for longer. {_REMEDY}"
        )

    def _replaced(self, what: str, expected: object, found: object) -> Refused:
        return Refused(
            f"source {self._name!r}: {self._told(what)} is not the one that was read: expected {expected}, found "
            f"{found}. It was made anew, restored from an older state, or the settings name another one: point them to "
            f"the one that was read. {_REMEDY}"
        )


def fingerprint(*parts: object) -> str:
    """Eight hexadecimal digits that tell one log from another in every span."""
    return sha256("\n".join(map(str, parts)).encode()).hexdigest()[:8]


def _parts(place: Json) -> tuple[int, Any, int, str]:
    return place["entry"], place["offset"], place["read"], place["digest"]
