"""The journal: durable, chained, and what an interrupted or damaged one leads to."""

from __future__ import annotations

import errno
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anytimed.contracts import AnytimedError, Refused, chain
from anytimed.contracts import Journal as JournalProtocol
from anytimed.storage.journal import Journal
from tests.storage import faults
from tests.storage.material import flip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def written(path: Path, n: int = 3) -> Journal:
    journal = Journal(path)
    for i in range(n):
        journal.append("data", {"draw": i})
    journal.append("guard", {"step": 9, "loss": float("inf")})
    return journal


def test_scopes_are_numbered_and_chained_apart(path: Path) -> None:
    journal: JournalProtocol = written(path)
    again = Journal(path)
    for j in (journal, again):
        assert isinstance(j, Journal)
        assert j.entries("data") == [{"draw": 0}, {"draw": 1}, {"draw": 2}]
        assert j.entries("guard") == [{"step": 9, "loss": float("inf")}]
        assert (j.length("data"), j.length("none"), j.digest("none")) == (3, 0, "")
        assert j.digest("guard") == chain("", {"step": 9, "loss": float("inf")})
        assert j.digest("data", 0) == "" and j.digest("data", 1) == chain("", {"draw": 0})
        assert j.digest("data", 2) == chain(j.digest("data", 1), {"draw": 1})
    with pytest.raises(IndexError):
        again.digest("data", 4)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.lists(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), json_values, max_size=3), max_size=4)
)
def test_any_entries_come_back(tmp_path_factory: pytest.TempPathFactory, entries: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("j") / "journal.jsonl"
    journal = Journal(path)
    for entry in entries:
        journal.append("s", entry)
    again = Journal(path)
    assert again.entries("s") == entries and again.digest("s") == journal.digest("s")


def test_what_callers_do_to_entries_stays_with_them(path: Path) -> None:
    journal = Journal(path)
    entry: dict[Any, Any] = {"files": ["a"], 7: "seven"}
    journal.append("s", entry)
    entry["files"].append("b")
    journal.entries("s")[0]["files"].append("c")
    assert journal.entries("s") == [{"files": ["a"], "7": "seven"}]
    assert Journal(path).digest("s") == journal.digest("s")


@pytest.mark.parametrize("cut", [1, 2, 20, 60])
def test_a_torn_last_line_is_dropped_and_said(path: Path, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    written(path).append("data", {"draw": 3, "why": "x" * 60})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with caplog.at_level(logging.WARNING):
        journal = Journal(path)
    assert journal.length("data") == 3 and "line 5 was torn" in caplog.text
    journal.append("data", {"draw": 3, "why": "x" * 60})
    assert path.read_bytes() == whole


def test_blocks_that_never_arrived_are_a_torn_line(path: Path) -> None:
    written(path)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(40) + b'"}\n')
    assert Journal(path).length("data") == 3
    assert path.read_bytes() == whole


def test_a_damaged_line_is_refused_by_number_and_kept(path: Path) -> None:
    written(path)
    whole = path.read_bytes()
    ends = [i for i, b in enumerate(whole) if b == ord("\n")]
    for at in {*range(0, len(whole), 3), *ends}:
        flip(path, at)
        with pytest.raises(Refused, match=r"line [1-4]:") as caught:
            Journal(path)
        assert str(path) in str(caught.value)
        path.write_bytes(whole)


def test_a_missing_line_breaks_the_chain(path: Path) -> None:
    written(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], *lines[2:]]))
    with pytest.raises(Refused, match=r"line 2: entry 3 of data .* expected entry 2"):
        Journal(path)


def test_appends_from_many_threads_keep_the_chain(path: Path) -> None:
    journal = Journal(path)

    def append(scope: str) -> None:
        for n in range(10):
            journal.append(scope, {"i": n})

    threads = [threading.Thread(target=append, args=(str(i % 2),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = Journal(path)
    assert (again.length("0"), again.length("1")) == (20, 20)


def test_a_full_disk_loses_that_entry_only(path: Path) -> None:
    journal = written(path)
    whole = path.read_bytes()
    with faults.at_call(1, faults.error(errno.ENOSPC)), pytest.raises(AnytimedError, match="No space left"):
        journal.append("data", {"draw": 3})
    assert path.read_bytes() == whole and journal.length("data") == 3
    journal.append("data", {"draw": 4})
    assert Journal(path).entries("data")[-1] == {"draw": 4}


def test_after_a_failed_fsync_the_file_is_replaced_not_written_again(path: Path) -> None:
    journal = written(path)
    whole, inode = path.read_bytes(), path.stat().st_ino
    with faults.at_call(2, faults.error(errno.EIO)), pytest.raises(AnytimedError, match="not durable"):
        journal.append("data", {"draw": 3})
    with faults.at_call(1, faults.error(errno.ENOSPC)), pytest.raises(AnytimedError, match="no new file"):
        journal.append("data", {"draw": 4})
    assert (path.read_bytes(), path.stat().st_ino) == (whole, inode)
    for draw in (5, 6):
        journal.append("data", {"draw": draw})
    assert path.stat().st_ino != inode and path.read_bytes().startswith(whole)
    assert [entry["draw"] for entry in Journal(path).entries("data")] == [0, 1, 2, 5, 6]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_that_is_no_longer_what_was_written_is_not_copied(path: Path) -> None:
    journal = written(path)
    with faults.at_call(2, faults.error(errno.EIO)), pytest.raises(AnytimedError):
        journal.append("data", {"draw": 3})
    flip(path, 10)
    for _ in range(2):
        with pytest.raises(AnytimedError, match="no longer what was written"):
            journal.append("data", {"draw": 3})


def test_a_zero_byte_that_no_block_explains_is_damage(path: Path) -> None:
    journal = written(path)
    journal.append("data", {"why": "x" * 100})
    at = path.read_bytes().rindex(b"xx")
    at -= at % 512 == 0
    whole = bytearray(path.read_bytes())
    whole[at] = 0
    path.write_bytes(whole)
    with pytest.raises(Refused, match="line 5:"):
        Journal(path)


def test_closed_is_closed(path: Path) -> None:
    journal = written(path)
    journal.close()
    journal.close()
    with pytest.raises(AnytimedError):
        journal.append("data", {})
