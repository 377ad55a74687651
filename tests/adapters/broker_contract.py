"""The contract of a stream for brokers. Data in them cannot be rewritten: it expires, or its log is made anew, and both
are refused by name. What the daemon needs beyond that: a broker that does not answer is waited for, in bounded time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anytimed.contracts import Acknowledging, Finished, Json, Record, Refused, Stream, StreamUnavailable
from anytimed.testing.streams import StreamContract, digests, texts

CHUNKS = st.lists(
    st.tuples(st.lists(st.text(min_size=1, max_size=20), max_size=6), st.booleans()), min_size=1, max_size=5
)
"""Documents that are added at once, and whether the stream is asked for new ones after them."""


class BrokerContract(StreamContract):
    rewritable = False

    @abstractmethod
    def append(self, folder: Path, name: str, texts: Sequence[str]) -> None:
        """Add documents to the log that belongs to `folder`."""

    @abstractmethod
    def expire(self, folder: Path) -> None:
        """Make all messages that are there vanish as retention does."""

    @abstractmethod
    def replace(self, folder: Path) -> Stream:
        """A new stream, nothing adopted, over a log of the same name that was made anew and has fewer messages."""

    def write(self, folder: Path, name: str, texts: Sequence[str]) -> None:
        self.append(folder, name, texts)

    def rewrite(self, folder: Path, name: str) -> None:
        raise NotImplementedError("a message never changes")

    test_refuses_finished_data_that_was_rewritten = None
    test_refuses_to_resume_behind_data_that_was_rewritten = None

    # --- what is gone -------------------------------------------------------------------------------------------------

    def test_messages_that_expired_unread_are_refused_by_name(self, folder: Path) -> None:
        entries = self.stream(folder).discover()
        _, place = next(iter(self.adopted(folder, entries).read(None)))
        self.expire(folder)
        for at in (None, place):
            with pytest.raises(Refused, match=r"expired: .* wants .* oldest is .*--fresh"):
                list(self.adopted(folder, entries).read(at))

    def test_messages_that_expired_after_they_were_read_are_not_missed(self, folder: Path) -> None:
        entries = self.stream(folder).discover()
        items = list(self.adopted(folder, entries).read(None))
        self.expire(folder)
        resumed = self.adopted(folder, entries)
        resumed.verify(digests(items))
        assert list(resumed.read(items[-1][1])) == []
        last_record = max(i for i, (item, _) in enumerate(items) if isinstance(item, Record))
        assert list(resumed.read(items[last_record][1])) == items[last_record + 1 :]

    def test_a_log_that_was_made_anew_is_refused(self, folder: Path) -> None:
        entries = self.stream(folder).discover()
        items = list(self.adopted(folder, entries).read(None))
        for use in (
            lambda stream: stream.discover(),
            lambda stream: stream.verify(digests(items)),
            lambda stream: list(stream.read(items[0][1])),
        ):
            stream = self.replace(folder)
            stream.adopt(entries)
            with pytest.raises(Refused, match=r"is not the one that was read: .*--fresh"):
                use(stream)

    # --- positions ----------------------------------------------------------------------------------------------------

    @given(data=st.data(), chunks=CHUNKS)
    @settings(
        max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors], deadline=None
    )
    def test_any_documents_any_spans_any_interruption_equal_the_undisturbed_stream(
        self, data: st.DataObject, chunks: list[tuple[list[str], bool]]
    ) -> None:
        folder = Path(uuid.uuid4().hex)
        self.append(folder, "a", ["the first"])
        stream = self.stream(folder)
        discoveries: list[list[Json]] = []
        for documents, asked in [*chunks, ([], True)]:
            self.append(folder, "a", documents)
            if asked:
                discoveries.append(json.loads(json.dumps(stream.discover())))
                stream.adopt(discoveries[-1])
        undisturbed = list(stream.read(None))
        assert texts(undisturbed) == ["the first", *(text for documents, _ in chunks for text in documents)]
        assert sorted(digests(undisturbed)) == list(range(sum(map(len, discoveries))))

        # Read some of what was known at some moment, stop, and go on in another process that knows everything.
        known = data.draw(st.integers(0, len(discoveries)), label="discoveries that were adopted")
        taken = data.draw(st.integers(0, len(undisturbed)), label="items that were taken")
        first = self.stream(folder)
        for entries in discoveries[:known]:
            first.adopt(entries)
        items = [item for item, _ in zip(first.read(None), range(taken), strict=False)]
        if known < len(discoveries) and data.draw(st.booleans(), label="goes on in the same process"):
            resumed = first
        else:
            known, resumed = 0, self.stream(folder)
        for entries in discoveries[known:]:
            resumed.adopt(entries)
        place = json.loads(json.dumps(items[-1][1])) if items else None
        assert resumed.lag(place) >= 0
        assert [*items, *resumed.read(place)] == undisturbed

    def test_acknowledging_every_place_loses_nothing(self, folder: Path) -> None:
        entries = self.stream(folder).discover()
        undisturbed = list(self.adopted(folder, entries).read(None))
        stream = self.adopted(folder, entries)
        assert isinstance(stream, Acknowledging)
        items = []
        for item, place in stream.read(None):
            items.append((item, place))
            stream.acknowledge(place)
            stream.acknowledge(place)  # again, as after a restart
            rest = list(self.adopted(folder, entries).read(place))
            assert [*items, *rest] == undisturbed
        self.append(folder, "b", ["appended"])
        stream.adopt(stream.discover())
        assert texts(list(stream.read(items[-1][1]))) == ["appended"]


def read_through(stream: Stream, place: Json | None, within_s: float = 60) -> list[tuple[object, Json]]:
    """All items after `place`; where the broker does not answer it is asked again, as the daemon does."""
    items: list[tuple[object, Json]] = []
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            for item, at in stream.read(place):
                items.append((item, at))
                place = at
            return items
        except StreamUnavailable:
            time.sleep(0.1)
    raise AssertionError(f"no answer within {within_s} s, after {len(items)} items")


def answers_again(stream: Stream, within_s: float = 60) -> list[Json]:
    """What is discovered as soon as the broker answers."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            return stream.discover()
        except StreamUnavailable:
            time.sleep(0.1)
    raise AssertionError(f"no answer within {within_s} s")


def refuses_to_hang(stream: Stream, place: Json, within_s: float) -> str:
    """What is said while the broker does not answer: each call in time."""
    said = ""
    for use in (
        lambda: stream.discover(),
        lambda: stream.verify({0: ""}),
        lambda: next(iter(stream.read(place))),
        lambda: stream.acknowledge(place),  # type: ignore[attr-defined]
    ):
        began = time.monotonic()
        with pytest.raises(StreamUnavailable) as error:
            use()
        assert time.monotonic() - began < within_s
        said += f"{error.value}\n"
    return said


def finished(items: list[tuple[object, Json]]) -> list[int]:
    return [item.entry for item, _ in items if isinstance(item, Finished)]


def keeps_no_process(stream: Stream, settings: dict[str, Any], first: str, kill: Callable[[], None]) -> None:
    """A process that has read the `first` document of such a stream ends by itself after its broker was killed, and has
    nothing to say."""
    adapter = type(stream)
    program = (
        f"from {adapter.__module__} import {adapter.__name__} as Adapter\n"
        f"stream = Adapter(Adapter.Settings(**{settings!r}), 'fed')\n"
        "stream.adopt(stream.discover()); print(next(iter(stream.read(None)))[0].text, flush=True); input()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == f"{first}\n"
    finally:
        kill()
    _, said = process.communicate("\n", timeout=10)
    assert (process.returncode, said) == (0, "")
