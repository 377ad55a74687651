"""Many bytes from a store, in order: the objects are cut into ranges, and several ranges are under way at a time.

`stream` asks for ranges ahead of the one that is due and hands them out in order, so what a reader has written is
always a beginning of what it wants, and its length says all that there is to say about how far it came. How many are
under way grows while answers come quickly and falls when they do not: a slow line is not asked for more than it
carries within a deadline. A range that failed is asked for again, within one budget for the whole. A store that knows
no ranges is read object by object.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass

from tenacity import Retrying, retry_if_exception_type, stop_before_delay, wait_random_exponential

from .store import Answer, NoRanges, PassingError, Store

RANGE_BYTES = 8 << 20
"""Asked for at a time: the cost of a request is small beside it."""
UNDER_WAY = 8
"""Ranges asked for and not handed out yet, at most: this times RANGE_BYTES bounds the memory."""
QUICK_S = 5.0
"""A range that is waited for no longer than this lets one more be under way. Eight of them that share a line of that
rate take 40 s each, less than the deadline that each has."""


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes `start` up to `end` of the object under `key`."""

    key: str
    start: int
    end: int


class Budget:
    """What a whole pull may lose to failures that pass: `seconds`, in waiting for answers that failed and in pauses."""

    def __init__(self, seconds: float = 120.0, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.left_s = seconds
        self._sleep = sleep

    def patiently(self, attempt: Callable[[], bytes]) -> bytes:
        """The result of `attempt`, repeated while it fails with PassingError and something is left. Raises the last
        failure."""
        retrying = Retrying(
            retry=retry_if_exception_type(PassingError),
            stop=stop_before_delay(self.left_s),
            wait=wait_random_exponential(multiplier=0.2, max=5.0),
            sleep=self._sleep,
            reraise=True,
        )
        began = time.monotonic()
        try:
            return retrying(attempt)
        finally:
            if retrying.statistics.get("attempt_number", 1) > 1:
                self.left_s -= time.monotonic() - began


def stream(store: Store, spans: Iterable[Span], budget: Budget) -> Generator[tuple[str, bytes], None, None]:
    """The bytes of the spans in order, each chunk with its key; after an object that is shorter than its span nothing
    more comes. Raises MissingKey, StoreError. Close it when done: what is under way is cancelled."""
    wanted = list(spans)
    todo = (
        Span(span.key, at, min(at + RANGE_BYTES, span.end))
        for span in wanted
        for at in range(span.start, span.end, RANGE_BYTES)
    )
    under_way: deque[tuple[Span, Answer]] = deque()
    most = 1
    try:
        while True:
            while len(under_way) < most and (following := next(todo, None)) is not None:
                under_way.append((following, store.begin_range(following.key, following.start, following.end)))
            if not under_way:
                return
            due, answer = under_way[0]
            began = time.monotonic()
            try:
                data = budget.patiently(_again(store, due, answer))
            except NoRanges:
                _cancel(under_way)
                yield from _one_by_one(store, _from(due, wanted))
                return
            under_way.popleft()
            quick = time.monotonic() - began < QUICK_S
            most = min(most + 1, UNDER_WAY) if quick else max(most - 1, 1)
            yield due.key, data
            if len(data) < due.end - due.start:
                return
    finally:
        _cancel(under_way)


def _again(store: Store, due: Span, answer: Answer) -> Callable[[], bytes]:
    """The answer that is under way; called again, a new one."""
    answers = [answer]

    def attempt() -> bytes:
        return (answers.pop() if answers else store.begin_range(due.key, due.start, due.end)).result()

    return attempt


def _cancel(under_way: deque[tuple[Span, Answer]]) -> None:
    while under_way:
        under_way.popleft()[1].cancel()


def _from(due: Span, wanted: list[Span]) -> list[Span]:
    """What is left of the spans, from the range that is due."""
    at = next(i for i, span in enumerate(wanted) if span.key == due.key and span.start <= due.start < span.end)
    return [Span(due.key, due.start, wanted[at].end), *wanted[at + 1 :]]


def _one_by_one(store: Store, spans: list[Span]) -> Iterator[tuple[str, bytes]]:
    """The same from a store that sends whole objects only: what comes before a span's start is passed over."""
    for span in spans:
        at = 0
        for chunk in store.download(span.key, span.end):
            fresh = chunk[max(span.start - at, 0) :]
            at += len(chunk)
            if fresh:
                yield span.key, fresh
        if at < span.end:
            yield span.key, b""
            return
