"""A copy of a journal says what the journal says, and leaves the file alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anytimed.contracts import Refused
from anytimed.storage.journal import Journal
from anytimed.storage.journal_copy import JournalCopy

ENTRIES = st.lists(st.tuples(st.sampled_from(["data", "void", "training"]), st.integers(0, 9)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(stored=ENTRIES, added=ENTRIES)
def test_it_says_what_a_journal_says_after_the_same_appends(
    tmp_path_factory: pytest.TempPathFactory, stored: list[tuple[str, int]], added: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    path = folder / "journal.jsonl"
    journal = Journal(path)
    for scope, value in stored:
        journal.append(scope, {"kind": "some", "value": value, "pair": (value, "ä")})
    before = path.read_bytes()
    copy = JournalCopy(path)
    for scope, value in added:
        copy.append(scope, {"kind": "more", "value": value, "pair": (value, "ö")})
    assert path.read_bytes() == before
    assert [p.name for p in folder.iterdir()] == ["journal.jsonl"]
    for scope, value in added:
        journal.append(scope, {"kind": "more", "value": value, "pair": (value, "ö")})
    for scope in ("data", "void", "training", "none"):
        length = journal.length(scope)
        assert copy.length(scope) == length
        assert copy.digest(scope) == journal.digest(scope)
        for at in range(length + 1):
            assert copy.digest(scope, at) == journal.digest(scope, at)
            assert copy.entries(scope, at) == journal.entries(scope, at)
            for stop in range(at, length + 2):
                assert copy.entries(scope, at, stop) == journal.entries(scope, at, stop)
        with pytest.raises(IndexError):
            copy.digest(scope, length + 1)
    journal.close()


def test_there_need_not_be_a_journal_and_none_is_made(tmp_path: Path) -> None:
    copy = JournalCopy(tmp_path / "run" / "journal.jsonl")
    assert copy.entries("data") == []
    assert copy.digest("data") == ""
    copy.append("data", {"kind": "some"})
    assert copy.entries("data") == [{"kind": "some"}]
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_is_being_written_is_passed_over_and_left_there(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append("data", {"kind": "first"})
    with path.open("ab") as file:
        file.write(b'{"scope":"data","n":2,"dig')
    whole = path.read_bytes()
    assert JournalCopy(path).entries("data") == [{"kind": "first"}]
    assert path.read_bytes() == whole
    journal.close()


def test_a_broken_line_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for kind in ("first", "second"):
        journal.append("data", {"kind": kind})
    journal.close()
    path.write_bytes(path.read_bytes().replace(b"first", b"fIrst"))
    with pytest.raises(Refused, match=r"journal\.jsonl line 1"):
        JournalCopy(path)
