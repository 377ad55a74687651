"""Local files listed by a process of their own: the same list, and whatever becomes of that process."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anytimed.contracts import Record, Refused, StreamUnavailable
from anytimed.testing.streams import digests
from anytimed_adapters.streams import lister as lister_module
from anytimed_adapters.streams import walk
from anytimed_adapters.streams.jsonl import JsonLines
from anytimed_adapters.streams.lister import Lister
from anytimed_adapters.streams.listing import selection
from anytimed_adapters.streams.walk import Listing, Selection, walked
from tests.adapters.formats import lines

Row = tuple[str, int, int]


@pytest.fixture(autouse=True)
def every_list_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lister_module, "MANY", 0)


@pytest.fixture
def here_never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is listed was listed by another process."""

    def refuse(selected: Selection) -> Listing:
        raise AssertionError(f"{selected.base} was listed here")

    monkeypatch.setattr(lister_module, "walked", refuse)


def rows(listing: Listing) -> list[Row]:
    return sorted(listing.rows())


def listed(lister: Lister) -> list[Row]:
    return rows(lister.list(lambda part: part))


def listed_here(chosen: Selection) -> list[Row]:
    return sorted(row for part in walked(chosen) for row in part.rows())


def tree(folder: Path) -> None:
    for path in (
        "a.txt",
        "b/c.txt",
        "b/.hidden.txt",
        "b/d.txt.tmp",
        "e.part/f.txt",
        "new\nline.txt",
        "ä/é.txt",
        "b/g.bak",
    ):
        full = folder / path
        full.parent.mkdir(parents=True, exist_ok=True)
        full.write_text(path)
    (folder / "empty.txt").touch()
    (folder / "again").symlink_to(folder / "b")
    (folder / "nowhere.txt").symlink_to(folder / "nothing")
    (folder / "b" / "up").symlink_to(folder)
    Path(os.fsdecode(os.fsencode(folder) + b"/latin-\xe9.txt")).write_text("its name is no UTF-8")


@pytest.mark.usefixtures("here_never")
@pytest.mark.parametrize("glob", ["**", "**/*.txt", "*/*.txt", "*.txt", "a.txt", "nothing/*"])
@pytest.mark.parametrize("exclude", [(), ("b/*", "**/*.bak")])
def test_the_list_is_the_one_made_here(tmp_path: Path, glob: str, exclude: Sequence[str]) -> None:
    tree(tmp_path)
    chosen = selection(f"{tmp_path}/{glob}", exclude)
    if glob.startswith("nothing"):
        with pytest.raises(FileNotFoundError) as found:
            listed(Lister(chosen))
        assert found.value.errno == errno.ENOENT and found.value.filename == f"{tmp_path}/nothing"
        return
    told = listed(Lister(chosen))
    unnamed, chosen.unnamed = chosen.unnamed, set()
    assert told == listed_here(chosen) and told
    assert unnamed == chosen.unnamed and len(unnamed) == (glob in ("**", "**/*.txt", "*.txt"))


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1),
            *[st.integers(-(2**63), 2**63 - 1)] * 2,
        ),
        min_size=1,
    ),
    st.data(),
)
def test_a_part_arrives_as_it_was_sent(told: list[Row], data: st.DataObject) -> None:
    listing = Listing(*map(list, zip(*told, strict=True)))
    sent = io.BytesIO()
    walk.send({}, sent, listing)
    frame = sent.getvalue()[walk.SIZE_BYTES :]
    assert int(sent.getvalue()[: walk.SIZE_BYTES], 16) == len(frame)
    _, part = walk.received(frame)
    assert part is not None and list(part.rows()) == told
    with pytest.raises((ValueError, LookupError, TypeError)):
        walk.received(frame[: data.draw(st.integers(0, len(frame) - 1))])


def test_the_end_of_a_list_and_its_error() -> None:
    for told in ({"unnamed": ["\udcff"]}, {"errno": 5, "strerror": "bad", "path": "x"}):
        sent = io.BytesIO()
        walk.send(told, sent)
        frame = sent.getvalue()[walk.SIZE_BYTES :]
        if "errno" in told:
            with pytest.raises(OSError, match="bad"):
                walk.received(frame)
        else:
            assert walk.received(frame) == (told, None)


def other_program(monkeypatch: pytest.MonkeyPatch, path: Path, source: str) -> None:
    path.write_text(source)
    monkeypatch.setattr(walk, "__file__", str(path))


@pytest.mark.parametrize(
    "program",
    [
        "",
        "raise SystemExit(3)",
        "print('no list')",
        "print('[]')",
        "import os; os.kill(os.getpid(), 9)",
        "print('0000000000000003[]', end='')",
        "print('00000000000000ff[]', end='')",
        "print('ffffffffffffffff[]', end='')",
        """print('0000000000000022{"files": 1, "path_bytes": 1}\\nx' + '0' * 15, end='')""",
    ],
)
def test_a_process_that_comes_to_nothing_costs_nothing(
    tmp_path: Path, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path / "data")
    other_program(monkeypatch, tmp_path / "other.py", program)
    chosen = selection(f"{tmp_path}/data/**", ())
    assert listed(Lister(chosen)) == listed_here(chosen)


def test_no_process_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    chosen = selection(f"{tmp_path}/**", ())
    assert listed(Lister(chosen)) == listed_here(chosen)


def test_times_that_no_column_holds(tmp_path: Path) -> None:
    """Beyond the year 2262; not every filesystem keeps such a time."""
    (tmp_path / "a.jsonl").write_bytes(lines(["early"]))
    (tmp_path / "b.jsonl").write_bytes(lines(["late"]))
    os.utime(tmp_path / "b.jsonl", ns=(0, 10 * 10**18))
    stream = JsonLines(JsonLines.Settings(url=f"{tmp_path}/*.jsonl"), "main")
    entries = stream.discover()
    stream.adopt(entries)
    assert len(entries) == 2 and stream.discover() == []
    os.utime(tmp_path / "a.jsonl", ns=(0, 10 * 10**18))
    assert stream.discover() == []


def test_a_process_that_was_begun_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_program(monkeypatch, tmp_path / "other.py", "import time; time.sleep(3600)")
    begun: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def noted(*arguments: object, **more: object) -> subprocess.Popen[bytes]:
        begun.append(real(*arguments, **more))  # type: ignore[call-overload]
        return begun[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    stream = JsonLines(JsonLines.Settings(url=f"{tmp_path}/*.jsonl"), "main")
    done = threading.Semaphore(0)
    for _ in range(2):
        stream.prepare({"entry": 10, "offset": 0, "digest": ""}, lambda: done.release() and None)
    while not begun:
        time.sleep(0.01)
    assert [process.poll() for process in begun] == [None] and not done.acquire(blocking=False)
    stream.close()
    assert done.acquire(timeout=60) and done.acquire(timeout=60), "both are told"
    assert begun[0].returncode is not None


@pytest.mark.usefixtures("here_never")
def test_a_stream_starts_goes_on_and_refuses_as_ever(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(["a"]))
    (tmp_path / "b.jsonl").write_bytes(lines(["b"]))
    first = JsonLines(JsonLines.Settings(url=f"{tmp_path}/*.jsonl"), "main")
    entries = first.discover()
    first.adopt(entries)
    items = list(first.read(None))
    finished = digests(items)

    def started() -> JsonLines:
        stream = JsonLines(JsonLines.Settings(url=f"{tmp_path}/*.jsonl"), "main")
        stream.prepare(items[-1][1], lambda: None)
        stream.adopt(entries)
        return stream

    (tmp_path / "c.jsonl").write_bytes(lines(["c"]))
    with (tmp_path / "b.jsonl").open("ab") as file:
        file.write(lines(["more"]))
    again = started()
    again.verify(finished)
    more = again.discover()
    assert [row[0] for row in more] == ["b.jsonl", "c.jsonl"]
    again.adopt(more)
    assert [item.text for item, _ in again.read(items[-1][1]) if isinstance(item, Record)] == ["more", "c"]
    again.close()

    (tmp_path / "a.jsonl").write_bytes(lines(["x"]))
    changed = started()
    with pytest.raises(Refused, match=r"a\.jsonl changed"):
        changed.verify(finished)
    changed.close()


def test_a_folder_that_is_gone_is_a_source_that_does_not_answer(tmp_path: Path) -> None:
    stream = JsonLines(JsonLines.Settings(url=f"{tmp_path}/gone/*.jsonl"), "main")
    with pytest.raises(StreamUnavailable, match="gone"):
        stream.discover()


def test_what_was_prepared_is_used_once_and_may_be_forgotten(tmp_path: Path) -> None:
    stream = JsonLines(JsonLines.Settings(url=f"{tmp_path}/*.jsonl"), "main")
    place = {"entry": 10, "offset": 0, "digest": ""}

    def prepared(name: str) -> None:
        """And then there is a new file."""
        done = threading.Event()
        stream.prepare(place, done.set)
        assert done.wait(60)
        (tmp_path / f"{name}.jsonl").write_bytes(lines([name]))

    def found() -> list[str]:
        return [row[0] for row in stream.discover()]

    prepared("a")
    assert found() == [] and found() == ["a.jsonl"]
    prepared("b")
    stream.forget()
    assert found() == ["a.jsonl", "b.jsonl"]
    stream.close()
