"""The cache beside a journal: what it spares, and that nothing wrong with it ever shows."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import threading
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from anytimed.contracts import AnytimedError, CorruptError, Json, Refused, chain
from anytimed.storage import journal as journal_module
from anytimed.storage.journal import Journal
from anytimed.storage.journal_index import Index
from anytimed.storage.journal_lines import made
from tests.storage import faults
from tests.storage.material import flip

LINES = 2_100


def entry(number: int) -> Json:
    return {"number": number, "name": f"part-{number:05d}"}


def scope_of(number: int) -> str:
    return "training" if number % 7 == 3 else "data"


ENTRIES = {s: [entry(i) for i in range(LINES) if scope_of(i) == s] for s in ("data", "training")}
DIGESTS = {scope: reduce(lambda all, one: [*all, chain(all[-1], one)], told, [""]) for scope, told in ENTRIES.items()}


def content() -> bytes:
    at = dict.fromkeys(ENTRIES, 0)
    lines = []
    for number in range(LINES):
        scope = scope_of(number)
        at[scope] += 1
        text = json.dumps(entry(number), separators=(",", ":"))
        lines.append(made(scope, at[scope], DIGESTS[scope][at[scope]], text))
    return b"".join(lines)


CONTENT = content()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A long journal with its cache."""
    path = tmp_path / "journal.jsonl"
    path.write_bytes(CONTENT)
    Journal(path).close()
    assert cache(path).exists()
    return path


def cache(path: Path) -> Path:
    return path.with_name("journal.checked")


def taken_apart(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where every line was that was checked in full."""
    seen: list[str] = []
    checked = journal_module.checked

    def spy(where: str, *rest: Any) -> tuple[str, str]:
        seen.append(where)
        return checked(where, *rest)

    monkeypatch.setattr(journal_module, "checked", spy)
    return seen


def assert_whole(journal: Journal) -> None:
    for scope, told in ENTRIES.items():
        assert journal.entries(scope) == told and journal.length(scope) == len(told)
        assert [journal.digest(scope, n) for n in (0, 1, 2, 150, len(told))] == [
            DIGESTS[scope][n] for n in (0, 1, 2, 150, len(told))
        ]
    assert journal.size == len(CONTENT)


def test_what_was_checked_is_not_taken_apart_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = taken_apart(monkeypatch)
    journal = Journal(path)
    assert_whole(journal)
    assert seen == []
    journal.append("data", entry(LINES))
    again = Journal(path)
    assert seen == [f"{path} line {LINES + 1}"]
    assert again.entries("data")[-1] == entry(LINES) and again.digest("data") == journal.digest("data")
    cache(path).unlink()
    anew = Journal(path)
    assert len(seen) == LINES + 2 and anew.digest("data") == again.digest("data")


def test_any_part_of_a_scope_is_read(path: Path) -> None:
    journal = Journal(path)
    for start, stop in ((0, None), (5, None), (7, 9), (1_790, 1_900), (1_800, None), (3, 3), (9, 7), (9_999, None)):
        assert journal.entries("data", start, stop) == ENTRIES["data"][start:stop]
    assert journal.entries("none", 0, 5) == []
    journal.close()
    assert journal.entries("training", 12, 14) == ENTRIES["training"][12:14]


def test_a_flipped_byte_is_refused_by_line_all_the_same(path: Path) -> None:
    for at in (0, 11, len(CONTENT) // 2, len(CONTENT) - 300, len(CONTENT) - 1):
        flip(path, at)
        line = CONTENT[:at].count(b"\n") + 1
        with pytest.raises(Refused, match=rf"journal\.jsonl line {line}:"):
            Journal(path)
        path.write_bytes(CONTENT)
    assert_whole(Journal(path))


def test_lines_lost_within_what_was_checked(path: Path) -> None:
    path.write_bytes(CONTENT[:-5])
    journal = Journal(path)
    assert journal.length("data") + journal.length("training") == LINES - 1
    path.write_bytes(CONTENT + CONTENT[:40])
    assert_whole(Journal(path))
    assert path.read_bytes() == CONTENT


def other_journal(tmp_path: Path) -> bytes:
    path = tmp_path / "other" / "journal.jsonl"
    path.parent.mkdir()
    digest, lines = "", []
    for n in range(1, LINES + 1):
        digest = chain(digest, [n])
        lines.append(made("data", n, digest, f"[{n}]"))
    path.write_bytes(b"".join(lines))
    Journal(path)
    return cache(path).read_bytes()


def test_a_cache_that_is_damaged_or_of_another_journal_is_none(path: Path, tmp_path: Path) -> None:
    good = cache(path).read_bytes()
    bad = [b"", b"\0" * len(good), good[:-1], good + b"x", good[: len(good) // 2], other_journal(tmp_path), CONTENT]
    flips = (0, 30, 60, len(good) // 3, len(good) - 1)
    bad += [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in flips]
    for data in bad:
        cache(path).write_bytes(data)
        assert_whole(Journal(path))
        assert cache(path).read_bytes() == good  # and another takes its place


def sealed(form: bytes, header: bytes, rest: bytes) -> bytes:
    body = form + b"\n" + header + b"\n" + rest
    return body + hashlib.sha256(body).digest()


def test_a_cache_that_lies_is_none(path: Path) -> None:
    """Its own digest is right each time; what it says is not."""
    form, header, rest = cache(path).read_bytes()[:-32].split(b"\n", 2)
    told = json.loads(header)
    swap = rest[8:16] + rest[:8] + rest[16:]
    later = rest[: 8 * LINES] + rest[8 * LINES + 4 :] + b"\xff\xff\xff\xff"
    lies: list[tuple[Any, bytes]] = [
        ({**told, "size": told["size"] - 1}, rest),
        ({**told, "size": 2**80}, rest),
        ({**told, "lines": -1}, rest),
        ({**told, "lines": 10**12}, rest),
        ({**told, "scopes": []}, rest),
        ({**told, "scopes": [["data", LINES, DIGESTS["data"][-1]]]}, rest),
        ({**told, "scopes": [[s, n, "0" * 64] for s, n, _ in told["scopes"]]}, rest),
        ({**told, "scopes": [["data", n, d] for _, n, d in told["scopes"]]}, rest),
        ({**told, "scopes": [[["x"], n, d] for _, n, d in told["scopes"]]}, rest),
        ({"size": 0, "lines": 0, "scopes": [], "sha256": hashlib.sha256().hexdigest()}, b""),
        (told, swap),
        (told, later),
        ([], rest),
        (None, rest),
    ]
    for header_told, data in lies:
        cache(path).write_bytes(sealed(form, json.dumps(header_told).encode(), data))
        assert_whole(Journal(path))
    cache(path).write_bytes(sealed(form, b"[" * 200_000, rest))
    assert_whole(Journal(path))


def test_what_is_no_file_is_no_cache(path: Path, tmp_path: Path) -> None:
    good = cache(path).read_bytes()
    cache(path).unlink()
    os.mkfifo(cache(path))
    assert_whole(Journal(path))
    cache(path).unlink(missing_ok=True)
    (tmp_path / "planted").write_bytes(good)
    cache(path).symlink_to(tmp_path / "planted")
    assert_whole(Journal(path))
    assert not cache(path).is_symlink()
    cache(path).unlink()
    cache(path).mkdir()
    (cache(path) / "x").touch()
    assert_whole(Journal(path))
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_sealed_cache_with_other_ends_never_gives_other_entries(path: Path) -> None:
    """The bytes are those that it names and the last lines are right, so it is taken; reading finds the lie."""
    form, header, rest = cache(path).read_bytes()[:-32].split(b"\n", 2)
    end = int.from_bytes(rest[80:88], "little")
    cache(path).write_bytes(sealed(form, header, rest[:80] + (end - 3).to_bytes(8, "little") + rest[88:]))
    with pytest.raises(CorruptError, match=r"journal\.jsonl line 1[12]: was entry \d+ of (data|training)"):
        journal = Journal(path)
        journal.entries("data")
        journal.entries("training")


def test_a_short_journal_has_no_cache(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for number in range(20):
        journal.append("data", entry(number))
    journal.close()
    assert [p.name for p in tmp_path.iterdir()] == ["journal.jsonl"]


def test_it_is_written_while_the_journal_grows_and_when_it_is_closed(path: Path) -> None:
    def lines() -> int:
        return Index.load(cache(path), path).lines

    journal = Journal(path)
    journal.append("data", {"long": "x" * (600 << 10)})
    assert lines() == LINES
    journal.append("data", {"long": "x" * (600 << 10)})
    assert lines() == LINES + 2
    journal.append("data", {"long": "x" * (1 << 20)})
    assert lines() == LINES + 2  # the thirty-second part of what there is more is too little
    journal.close()
    assert lines() == LINES + 3


@pytest.mark.parametrize("name", ["open", "write", "rename"])
def test_a_disk_that_takes_no_cache_costs_nothing_else(
    path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache(path).unlink()
    real = getattr(os, name)

    def full(*arguments: Any, **options: Any) -> Any:
        if name == "write" or "journal.checked" in str(arguments[0]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    monkeypatch.setattr(os, name, full)
    with caplog.at_level("INFO"):
        opened = Journal(path)
    monkeypatch.undo()
    assert "not written: No space left" in caplog.text
    assert_whole(opened)
    assert [p.name for p in path.parent.iterdir()] == ["journal.jsonl"]


def test_bytes_that_change_under_an_open_journal_are_named(path: Path) -> None:
    journal = Journal(path)
    flip(path, len(CONTENT) // 2)
    line = CONTENT[: len(CONTENT) // 2].count(b"\n") + 1
    with pytest.raises(CorruptError, match=rf"line {line}: was entry"):
        journal.entries("data")
        journal.entries("training")
    os.truncate(path, 40)
    with pytest.raises(CorruptError, match="line 3: was entry 3 of data"):
        journal.entries("data", 2)
    journal.close()
    path.unlink()
    with pytest.raises(AnytimedError, match="cannot be read: No such file"):
        journal.entries("data")


def test_entries_are_read_where_no_file_can_be_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    journal = Journal(path)
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr("io.open", refuse)
    assert_whole(journal)


def test_entries_are_read_while_others_are_added_and_the_file_is_renewed(path: Path) -> None:
    journal = Journal(path)
    stop, wrong = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            if journal.entries("data", 100, 1_500) != ENTRIES["data"][100:1_500]:
                wrong.append(True)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(20):
            with (
                faults.at_call(2, faults.error(errno.EIO), thread=threading.get_ident()),
                contextlib.suppress(AnytimedError),
            ):
                journal.append("data", entry(number))
            journal.append("data", entry(number))
    finally:
        stop.set()
        reader.join()
    assert not wrong and journal.entries("data", 1_800) == [entry(number) for number in range(20)]


def test_a_long_journal_is_renewed_after_a_failed_fsync(path: Path) -> None:
    journal = Journal(path)
    with faults.at_call(2, faults.error(errno.EIO)), pytest.raises(AnytimedError, match="not durable"):
        journal.append("data", entry(LINES))
    inode = path.stat().st_ino
    journal.append("data", entry(LINES))
    assert path.stat().st_ino != inode and path.stat().st_mode & 0o777 == 0o600
    assert journal.entries("data", 1_799) == [*ENTRIES["data"][1_799:], entry(LINES)]
    assert Journal(path).digest("data") == journal.digest("data")
