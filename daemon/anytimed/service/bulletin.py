"""What just happened, for everybody who listens: `GET /events`.

The loop posts records (as metrics.jsonl gets them) and statuses, and never waits; each listener has a short queue of
its own in the server's event loop. One that does not keep up loses the oldest records and is told so: it looks at
`/history` again. Of statuses only the newest counts, and at most one a second is sent. The newest events stay here,
for a listener that comes back and says which it heard last.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field

from anytimed.contracts import Json

KINDS = ("status", "step", "evaluation", "event")
KEPT = 1000
"""Events that are kept for who comes back, and records that wait for a listener."""
STATUS_EVERY_S = 1.0
PING_S = 15.0
MOST_LISTENERS = 32
"""Fewer than the connections that the server takes: commands get through."""


@dataclass
class _Listener:
    loop: asyncio.AbstractEventLoop
    kinds: Collection[str]
    something: asyncio.Event = field(default_factory=asyncio.Event)
    records: deque[Json] = field(default_factory=lambda: deque(maxlen=KEPT))
    lost: int = 0
    status: Json | None = None
    closed: bool = False


class Bulletin:
    """Any thread may post; listeners live in one event loop each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: list[_Listener] = []
        self._events: deque[Json] = deque(maxlen=KEPT)
        self._status: Json | None = None
        self._closed = False

    def post(self, record: Json) -> None:
        """A record; its `kind` is one of KINDS."""
        with self._lock:
            if record["kind"] == "event":
                self._events.append(record)
            for listener in self._listeners:
                if record["kind"] in listener.kinds:
                    listener.lost += len(listener.records) == KEPT
                    listener.records.append(record)
                    self._wake(listener)

    def show(self, status: Json) -> None:
        """The newest status."""
        with self._lock:
            self._status = status
            for listener in self._listeners:
                if "status" in listener.kinds:
                    listener.status = status
                    self._wake(listener)

    def close(self) -> None:
        """Every listener comes to its end."""
        with self._lock:
            self._closed = True
            for listener in self._listeners:
                listener.closed = True
                self._wake(listener)

    @property
    def crowded(self) -> bool:
        """As many listen as may."""
        with self._lock:
            return len(self._listeners) >= MOST_LISTENERS

    async def listen(self, kinds: Collection[str], after: str | None = None) -> AsyncIterator[bytes]:
        """Server-sent events, without end: the status first, events later than the one with the id `after`, then what
        comes."""
        listener = _Listener(asyncio.get_running_loop(), kinds)
        with self._lock:
            if "status" in kinds:
                listener.status = self._status
            if after is not None and "event" in kinds:
                listener.records.extend(later(self._events, after))
            listener.closed = self._closed
            self._listeners.append(listener)
        try:
            yield b"retry: 2000\n\n"  # so that the answer's head leaves at once
            sent = -STATUS_EVERY_S
            while True:
                async for chunk in self._taken(listener):
                    yield chunk
                wait = PING_S
                if listener.status is not None:
                    wait = sent + STATUS_EVERY_S - time.monotonic()
                    if wait <= 0:
                        sent, status, listener.status = time.monotonic(), listener.status, None
                        yield _message("status", status)
                        continue
                if listener.closed:
                    return
                try:
                    await asyncio.wait_for(listener.something.wait(), wait)
                except TimeoutError:
                    if wait == PING_S:
                        yield b": ping\n\n"
        finally:
            with self._lock:
                self._listeners.remove(listener)

    async def _taken(self, listener: _Listener) -> AsyncIterator[bytes]:
        with self._lock:
            listener.something.clear()
            records, lost = list(listener.records), listener.lost
            listener.records.clear()
            listener.lost = 0
        if lost:
            yield _message("lost", {"records": lost})
        for record in records:
            yield _message(record["kind"], record)

    def _wake(self, listener: _Listener) -> None:
        try:
            listener.loop.call_soon_threadsafe(listener.something.set)
        except RuntimeError:  # its loop has ended, and it with it
            listener.closed = True


def order(ident: str) -> tuple[int, int]:
    """(term, number) of an event's id; (0, 0) for what is none."""
    term, _, number = ident.partition("-")
    plain = term.isascii() and term.isdigit() and number.isascii() and number.isdigit() and len(ident) < 40
    return (int(term), int(number)) if plain else (0, 0)


def later(events: Collection[Json], after: str) -> list[Json]:
    """The events after the one with this id."""
    return [event for event in events if order(event["id"]) > order(after)]


def _message(kind: str, value: Json) -> bytes:
    ident = f"id: {value['id']}\n" if kind == "event" else ""
    return f"{ident}event: {kind}\ndata: {json.dumps(value, separators=(',', ':'))}\n\n".encode()
