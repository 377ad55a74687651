"""The inbox as a stream, and its log: what crashes and failing disks leave of it."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anytimed.contracts import Acknowledging, Finished, KeepsFiles, Record, Refused, Stream
from anytimed.data import inbox_lines, inbox_log
from anytimed.data.inbox import Inbox
from anytimed.data.inbox_log import InboxLog
from anytimed.service.inbox_file import InboxFile
from anytimed.storage import durable
from anytimed.testing.streams import StreamContract, digests, texts
from tests.faultlog import FULL


def opened(folder: Path, **more: int) -> Inbox:
    stream = Inbox(Inbox.Settings(**more), "mine")
    stream.use_folder(folder / "streams" / "mine")
    return stream


def lines(log: InboxLog, documents: Sequence[str]) -> bytes:
    """One request, to be appended next."""
    synced, number = log.end
    last = len(documents) - 1
    return b"".join(
        inbox_lines.made(number + i, last - i, inbox_lines.text_json(document), synced=synced)
        for i, document in enumerate(documents)
    )


def append(log: InboxLog, *requests: Sequence[str], segment_bytes: int = 1 << 20) -> None:
    """Each request durable by itself."""
    file = InboxFile(log)
    for documents in requests:
        file.prepare(segment_bytes)
        file.append(lines(log, documents), len(documents))
    file.close()


def contents(log: InboxLog) -> list[str]:
    return [inbox_lines.text_of(line) for s in log.spans(0) for line in log.lines(s.start, s.stop)]


class TestInbox(StreamContract):
    """Every name is a segment of its own; the log is opened anew for each stream."""

    segment_bytes = 1

    def stream(self, folder: Path) -> Stream:
        inbox_log._logs.pop(os.path.realpath(folder / "streams" / "mine"), None)
        return opened(folder)

    def write(self, folder: Path, name: str, texts: Sequence[str]) -> None:
        for text in texts:
            append(inbox_log.of(folder / "streams" / "mine"), [text], segment_bytes=self.segment_bytes)

    def append(self, folder: Path, name: str, texts: Sequence[str]) -> None:
        append(inbox_log.of(folder / "streams" / "mine"), texts)

    def rewrite(self, folder: Path, name: str) -> None:
        first = min((folder / "streams" / "mine").iterdir())
        data = bytearray(first.read_bytes())
        text = b',"text":"'
        data[data.index(text) + len(text)] ^= 1
        first.write_bytes(data)


class TestInboxOfOneSegment(TestInbox):
    segment_bytes = 1 << 20


def test_it_is_what_the_service_looks_for(tmp_path: Path) -> None:
    stream = opened(tmp_path)
    assert isinstance(stream, KeepsFiles) and isinstance(stream, Acknowledging)
    assert stream.discover() == []
    assert not (tmp_path / "streams").exists()


# --- deleting ---------------------------------------------------------------------------------------------------------


def test_what_no_commit_needs_is_deleted_and_numbers_go_on(tmp_path: Path) -> None:
    stream = opened(tmp_path, keep_bytes=0)
    log = inbox_log.of(tmp_path / "streams" / "mine")
    append(log, *([f"document {i}"] for i in range(6)), segment_bytes=100)
    entries = stream.discover()
    stream.adopt(entries)
    items = list(stream.read(None))
    assert texts(items) == [f"document {i}" for i in range(6)]
    places = [place for item, place in items if isinstance(item, Record)]
    files = len(list(log.folder.iterdir()))
    assert files > 2

    stream.acknowledge(places[1])
    assert 1 < len(list(log.folder.iterdir())) < files
    stream.acknowledge(places[-1])
    assert len(list(log.folder.iterdir())) == 1, "the newest stays: its name tells how far the numbers are"
    end = log.end

    # After a restart what is kept goes on, and what is not is refused by name.
    del stream, log
    gc.collect()
    again = opened(tmp_path, keep_bytes=0)
    again.adopt(json.loads(json.dumps(entries)))
    again.verify(digests(items))
    assert texts(list(again.read(places[-1]))) == []
    with pytest.raises(Refused, match=rf"'mine'.*byte {places[0]['byte']} of the inbox.*--fresh"):
        list(again.read(places[0]))
    with pytest.raises(Refused, match="--fresh"):
        list(again.read(None))
    log = inbox_log.of(tmp_path / "streams" / "mine")
    assert log.end == end
    append(log, ["one more"])
    again.adopt(again.discover())
    assert texts(list(again.read(places[-1]))) == ["one more"]


def test_a_place_at_the_end_of_a_deleted_segment_goes_on(tmp_path: Path) -> None:
    """Acknowledging that place deletes the segment in which its entry lies."""
    stream = opened(tmp_path, keep_bytes=0)
    append(inbox_log.of(tmp_path / "streams" / "mine"), ["one"], ["two"], segment_bytes=1)
    stream.adopt(stream.discover())
    items = list(stream.read(None))
    stream.acknowledge(items[0][1])
    assert list(stream.read(items[0][1])) == items[1:]


def test_some_of_what_was_read_is_kept_for_senders_who_ask_again(tmp_path: Path) -> None:
    stream = opened(tmp_path, keep_bytes=250)
    log = inbox_log.of(tmp_path / "streams" / "mine")
    append(log, *([f"document {i}"] for i in range(9)), segment_bytes=1)
    stream.adopt(stream.discover())
    *_, (_, place) = stream.read(None)
    stream.acknowledge(place)
    assert 250 <= log.end[0] - log.first < 250 + 200


def test_numbers_never_go_back_behind_what_the_journal_knows(tmp_path: Path) -> None:
    """The folder was lost: what is sent now does not take the place of what was read."""
    stream = opened(tmp_path)
    log = inbox_log.of(tmp_path / "streams" / "mine")
    append(log, ["old"], ["older"])
    stream.adopt(entries := stream.discover())
    *_, (_, place) = stream.read(None)
    (end, record) = log.end
    del stream, log
    gc.collect()
    shutil.rmtree(tmp_path / "streams")
    stream = opened(tmp_path)
    stream.adopt(entries)
    log = inbox_log.of(tmp_path / "streams" / "mine")
    append(log, ["new"])
    assert [(s.start, s.record) for s in log.spans(0)] == [(end, record + 1)]
    stream.adopt(stream.discover())
    assert texts(list(stream.read(place))) == ["new"]
    with pytest.raises(Refused, match="--fresh"):
        list(stream.read(None))


def test_waiting_is_what_was_not_read(tmp_path: Path) -> None:
    stream = opened(tmp_path)
    log = inbox_log.of(tmp_path / "streams" / "mine")
    append(log, ["one"], ["two"], ["three"])
    stream.adopt(stream.discover())
    assert log.waiting == log.end[0] > 0
    reading = stream.read(None)
    _, place = next(reading)
    assert log.waiting == log.end[0] - place["byte"] > 0
    list(reading)
    assert log.waiting == 0
    next(stream.read(place))  # a rollback
    assert log.waiting > 0


# --- what a crash leaves ----------------------------------------------------------------------------------------------

requests = st.lists(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=1, max_size=4),
                    min_size=1, max_size=5)  # fmt: skip


@mock.patch("os.fsync", lambda file: None)  # what a crash leaves is written by the test
@settings(max_examples=60 if FULL else 8, deadline=None)
@given(before=requests, group=requests, segment_bytes=st.sampled_from([1, 200, 1 << 20]))
def test_a_crash_at_every_byte_of_a_write(
    tmp_path_factory: pytest.TempPathFactory, before: list[list[str]], group: list[list[str]], segment_bytes: int
) -> None:
    """What was durable is there; of what was being written, whole requests in their order or nothing; then it goes
    on."""
    folder = tmp_path_factory.mktemp("crash")
    log = InboxLog(folder)
    append(log, *before, segment_bytes=segment_bytes)
    newest = log.newest
    assert newest is not None
    written = b""
    for documents in group:  # one group: nothing of it is durable before all of it is written
        synced, number = log.end
        last = len(documents) - 1
        number += written.count(b"\n")
        written += b"".join(
            inbox_lines.made(number + i, last - i, inbox_lines.text_json(text), synced=synced)
            for i, text in enumerate(documents)
        )
    durable_bytes = newest.path.read_bytes()
    kept = [text for documents in before for text in documents]
    for cut in range(len(written) + 1):
        newest.path.write_bytes(durable_bytes + written[:cut])
        left = InboxLog(folder)
        assert not left.damage
        found = contents(left)
        rest = list(group)
        expected = list(kept)
        while rest and len(expected) < len(found):
            expected += rest.pop(0)
        assert found == expected
        if cut == len(written):
            assert not rest
        assert left.clean == (newest.path.stat().st_size == left.end[0] - newest.byte)
        if cut % 7 == 0:
            append(left, ["what comes after"])
            assert contents(InboxLog(folder)) == [*expected, "what comes after"]
            for path in folder.iterdir():
                if path.name > newest.path.name:
                    path.unlink()


def test_a_hole_where_a_block_never_arrived_is_no_damage(tmp_path: Path) -> None:
    """A power cut may leave the later part of a group and zeros for the earlier one."""
    log = InboxLog(tmp_path)
    append(log, ["durable"])
    assert log.newest is not None
    synced, number = log.end
    group = [inbox_lines.made(number + i, 0, inbox_lines.text_json("x" * 50), synced=synced) for i in range(3)]
    with log.newest.path.open("ab") as file:
        file.write(bytes(len(group[0])) + group[1] + group[2])
    left = InboxLog(tmp_path)
    assert (left.damage, left.clean, contents(left)) == ("", False, ["durable"])
    append(left, ["next"])
    assert contents(InboxLog(tmp_path)) == ["durable", "next"]


def test_damage_before_what_is_durable_is_refused_and_nothing_is_written_over_it(tmp_path: Path) -> None:
    stream = opened(tmp_path)
    log = inbox_log.of(tmp_path / "streams" / "mine")
    append(log, ["one"], ["two"], ["three"])
    assert log.newest is not None
    path = log.newest.path
    data = path.read_bytes()
    path.write_bytes(data.replace(b"two", b"tow"))
    del stream, log
    gc.collect()
    stream = opened(tmp_path)
    with pytest.raises(Refused, match=r"'mine'.*not as it was written.*--fresh"):
        stream.discover()
    with pytest.raises(Refused, match="not as it was written"):
        append(inbox_log.of(tmp_path / "streams" / "mine"), ["four"])
    path.write_bytes(data)


# --- a disk that fails ------------------------------------------------------------------------------------------------


def fail(monkeypatch: pytest.MonkeyPatch, name: str, code: int, *, after: int = 0) -> None:
    """The next call of os.NAME by the file's code fails; a write first writes `after` bytes."""
    real = getattr(os, name)
    left = [1]

    def failing(*arguments: object) -> object:
        if left[0]:
            left[0] -= 1
            if after and name == "write":
                left[0] = 1
                monkeypatch.setattr(
                    durable.os, name, lambda *a: (_ for _ in ()).throw(OSError(code, os.strerror(code)))
                )
                return real(arguments[0], arguments[1][:after])  # type: ignore[index]
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(durable.os, name, failing)


@pytest.mark.parametrize("after", [0, 1, 40])
def test_a_full_disk_takes_nothing_and_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    log = InboxLog(tmp_path)
    append(log, ["before"])
    file = InboxFile(log)
    file.prepare(1 << 20)
    with monkeypatch.context() as patch:
        fail(patch, "write", errno.ENOSPC, after=after)
        with pytest.raises(OSError, match="No space"):
            file.append(lines(log, ["lost"]), 1)
    assert contents(log) == contents(InboxLog(tmp_path)) == ["before"]
    file.prepare(1 << 20)
    file.append(lines(log, ["after"]), 1)
    assert contents(log) == contents(InboxLog(tmp_path)) == ["before", "after"]
    assert len(list(tmp_path.iterdir())) == 1
    file.close()


@pytest.mark.parametrize("before", [[], [["before"]]])
@pytest.mark.parametrize("truncates", [True, False])
def test_after_a_failed_fsync_the_file_is_never_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[list[str]], truncates: bool
) -> None:
    log = InboxLog(tmp_path)
    append(log, *before)
    file = InboxFile(log)
    file.prepare(1 << 20)
    newest = log.newest
    assert newest is not None
    old = tmp_path / "old"
    old.hardlink_to(newest.path)  # the name of another file does not match
    with monkeypatch.context() as patch:
        fail(patch, "fsync", errno.EIO)
        if not truncates:
            fail(patch, "ftruncate", errno.EIO)
        with pytest.raises(OSError, match="Input/output"):
            file.append(lines(log, ["lost"]), 1)
    kept = [text for documents in before for text in documents]
    assert contents(log) == kept
    file.prepare(1 << 20)
    file.append(lines(log, ["after"]), 1)
    assert contents(log) == contents(InboxLog(tmp_path)) == [*kept, "after"]
    assert log.newest is not None and not log.newest.path.samefile(old)
    file.close()


def test_a_digest_is_of_the_text(tmp_path: Path) -> None:
    """As in any other source: the same text is held out wherever it comes from."""
    append(inbox_log.of(tmp_path / "streams" / "mine"), ["a ü 🙂"])
    stream = opened(tmp_path)
    stream.adopt(stream.discover())
    (record, _), (end, _) = stream.read(None)
    assert isinstance(record, Record) and isinstance(end, Finished)
    assert record.digest == hashlib.sha256("a ü 🙂".encode()).hexdigest()
