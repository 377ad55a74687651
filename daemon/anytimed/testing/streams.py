"""The contract of a `Stream`, for its author to inherit.

    class TestMyStream(StreamContract):
        def stream(self, folder): return MyStream(MyStream.Settings(url=str(folder)), "mine")
        def write(self, folder, name, texts): ...
        def append(self, folder, name, texts): ...
        def rewrite(self, folder, name): ...

What is tested, in order: discovery repeats itself and adds nothing by itself; a resume at every place gives what the
undisturbed stream gave; appended and new data is seen, each record once; what was read and rewritten is refused; places
keep their size; lag falls to nothing; and, for `cases` generated histories of documents, appends and new data, all of
this again. Needs pytest and hypothesis.

Where data never changes but expires (a broker), say `rewritable = False` and define `expire` in place of `rewrite`.
Where records carry tokens, say with `documents` which texts they were made of.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anytimed.contracts import Finished, Json, Record, Refused, Rejected, Stream

Items = list[tuple[Record | Rejected | Finished, Json]]

FIRST = ("the first document", "the second, with an emoji 🙂", "the third\nof two lines")
SECOND = ("a document of the other name", "and one more")

_SOME = st.sampled_from(
    ["\n", "\n\n", "\r\n", " ", "\t", "\0", "\\", '"', "{}", "[[", "\ufeff", "\u2028", "é", "🙂", "\U0010ffff"]
)
DOCUMENTS = st.lists(st.text(max_size=12) | _SOME, min_size=1, max_size=4).map("".join).filter(bool)
"""Texts as data has them: empty lines, brackets, quotes, characters of every plane. Never empty."""


class StreamContract(ABC):
    """Inherit in a test module; say how data of this kind comes to be in a folder."""

    rewritable: ClassVar[bool] = True
    """Whether what was read can be changed. If not it can expire."""
    cases: ClassVar[int] = 200
    """How many histories are generated; fewer where each costs requests."""

    @abstractmethod
    def stream(self, folder: Path) -> Stream:
        """A new stream over the folder, with nothing adopted."""

    @abstractmethod
    def write(self, folder: Path, name: str, texts: Sequence[str]) -> None:
        """Make new data `name` with these documents in this order. It sorts by its name."""

    @abstractmethod
    def append(self, folder: Path, name: str, texts: Sequence[str]) -> None:
        """Add documents at the end of `name`, or beside it so that they come after it."""

    def rewrite(self, folder: Path, name: str) -> None:
        """Change a byte of the first document of `name` and leave its length as it is."""
        raise NotImplementedError("define rewrite, or set rewritable = False and define expire")

    def expire(self, folder: Path) -> None:
        """Let all data vanish as the source's own retention does."""
        raise NotImplementedError("define expire where rewritable = False")

    def documents(self, items: Items) -> list[str]:
        """The documents that the records among the items were made of."""
        return texts(items)

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        self.write(tmp_path, "a", FIRST)
        self.write(tmp_path, "b", SECOND)
        return tmp_path

    def adopted(self, folder: Path, *discoveries: list[Any]) -> Stream:
        """A new stream that adopted these, as they come back from the journal."""
        stream = self.stream(folder)
        for entries in discoveries or (stream.discover(),):
            stream.adopt(json.loads(json.dumps(entries)))
        return stream

    def test_discovery_repeats_itself_until_it_is_adopted(self, folder: Path) -> None:
        stream = self.stream(folder)
        entries = stream.discover()
        assert entries
        assert stream.discover() == entries == self.stream(folder).discover()
        assert list(stream.read(None)) == []
        stream.adopt(entries)
        assert stream.discover() == []

    def test_gives_every_document_once_and_tells_of_every_entry_that_it_finished(self, folder: Path) -> None:
        stream = self.stream(folder)
        entries = stream.discover()
        stream.adopt(entries)
        items = list(stream.read(None))
        assert self.documents(items) == [*FIRST, *SECOND]
        assert [item.entry for item, _ in items if isinstance(item, Finished)] == list(range(len(entries)))

    def test_resume_at_every_place_equals_the_undisturbed_stream(self, folder: Path) -> None:
        undisturbed = list(self.adopted(folder).read(None))
        for i, (_, place) in enumerate(undisturbed):
            resumed = list(self.adopted(folder).read(json.loads(json.dumps(place))))
            assert resumed == undisturbed[i + 1 :], f"resumed after item {i}, at {place}"

    def test_sees_appended_and_new_data_where_it_had_ended(self, folder: Path) -> None:
        stream = self.stream(folder)
        first = stream.discover()
        stream.adopt(first)
        before = list(stream.read(None))
        place = before[-1][1]
        assert list(stream.read(place)) == []

        self.append(folder, "b", ["appended"])
        self.write(folder, "c", ["new"])
        second = stream.discover()
        stream.adopt(second)
        after = list(stream.read(place))
        assert self.documents(after) == ["appended", "new"]
        assert list(self.adopted(folder, first, second).read(None)) == before + after

    def test_adopting_in_the_middle_of_reading_changes_nothing_before(self, folder: Path) -> None:
        stream = self.adopted(folder)
        reading = stream.read(None)
        items = [next(reading)]
        self.write(folder, "c", ["new"])
        stream.adopt(stream.discover())
        items += reading
        items += stream.read(items[-1][1])
        assert self.documents(items) == [*FIRST, *SECOND, "new"]

    def test_refuses_finished_data_that_was_rewritten(self, folder: Path) -> None:
        entries = self.stream(folder).discover()
        finished = digests(list(self.adopted(folder, entries).read(None)))
        self.adopted(folder, entries).verify(finished)
        self.append(folder, "b", ["appended"])
        self.adopted(folder, entries).verify(finished)  # appending rewrites nothing
        if not self.rewritable:
            self.expire(folder)
            self.adopted(folder, entries).verify(finished)  # what was read is needed no more
            return
        self.rewrite(folder, "a")
        with pytest.raises(Refused, match="--fresh"):
            self.adopted(folder, entries).verify(finished)

    def test_refuses_to_resume_behind_data_that_was_rewritten(self, folder: Path) -> None:
        entries = self.stream(folder).discover()
        item, place = next(iter(self.adopted(folder, entries).read(None)))
        assert isinstance(item, Record)
        if self.rewritable:
            self.rewrite(folder, "a")
        else:
            self.expire(folder)
        with pytest.raises(Refused, match="--fresh"):
            list(self.adopted(folder, entries).read(place))

    def test_place_keeps_its_size_as_data_grows(self, folder: Path) -> None:
        for i in range(20):
            self.write(folder, f"c{i:02}", [f"document {i}"])
        sizes = [len(json.dumps(place)) for _, place in self.adopted(folder).read(None)]
        # numbers gain digits (and the place between two entries may have none): nothing else may grow
        assert max(sizes) <= max(sizes[:4]) + 8

    def test_lag_falls_with_every_record_and_ends_at_nothing(self, folder: Path) -> None:
        stream = self.adopted(folder)
        lags = [stream.lag(None), *(stream.lag(place) for _, place in stream.read(None))]
        assert lags[0] > 0 == lags[-1]
        assert lags == sorted(lags, reverse=True)

    def test_every_history_is_read_once_and_the_same_from_every_place(self, tmp_path: Path) -> None:
        numbers = count()

        @settings(max_examples=self.cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(DOCUMENTS, min_size=1, max_size=4), st.lists(st.tuples(st.booleans(), DOCUMENTS), max_size=3))
        def check(first: list[str], later: list[tuple[bool, str]]) -> None:
            folder = tmp_path / f"{tmp_path.name}-{next(numbers)}"
            folder.mkdir()
            self.check_history(folder, first, later)

        check()

    def check_history(self, folder: Path, first: list[str], later: Sequence[tuple[bool, str]]) -> None:
        """Documents in new data; then each of `later`, appended or (True) as new data, read as soon as it is there."""
        stream, name = self.stream(folder), "a"
        discoveries: list[list[Any]] = []
        taken: Items = []
        self.write(folder, name, first)
        for i in range(len(later) + 1):
            if i:
                is_new, document = later[i - 1]
                name = f"b{i}" if is_new else name
                (self.write if is_new else self.append)(folder, name, [document])
            discoveries.append(json.loads(json.dumps(stream.discover())))
            stream.adopt(discoveries[-1])
            taken += stream.read(taken[-1][1] if taken else None)
        assert self.documents(taken) == [*first, *(document for _, document in later)]
        assert not [item for item, _ in taken if isinstance(item, Rejected)]
        assert len(digests(taken)) == sum(map(len, discoveries))
        assert list(self.adopted(folder, *discoveries).read(None)) == taken
        for i, (_, place) in enumerate(taken):
            resumed = list(self.adopted(folder, *discoveries).read(json.loads(json.dumps(place))))
            assert resumed == taken[i + 1 :], f"resumed after item {i}, at {place}"
        stream = self.adopted(folder, *discoveries)
        stream.verify(digests(taken))
        assert stream.discover() == []
        if self.rewritable:
            self.rewrite(folder, "a")
            with pytest.raises(Refused, match="--fresh"):
                self.adopted(folder, *discoveries).verify(digests(taken))
            with pytest.raises(Refused, match="--fresh"):
                list(self.adopted(folder, *discoveries).read(taken[0][1]))


def texts(items: Items) -> list[str]:
    """The documents among the items."""
    return [item.text for item, _ in items if isinstance(item, Record)]


def digests(items: Items) -> dict[int, str]:
    """What `verify` takes, of the entries that the items finished."""
    return {item.entry: item.digest for item, _ in items if isinstance(item, Finished)}
