"""Text and JSON Lines, and what files can do to them; the contract is in test_formats_contract.py."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from anytimed.contracts import ConfigError, Finished, Json, Record, Refused, Rejected, Stream, StreamUnavailable
from anytimed.testing.streams import digests, texts
from anytimed_adapters.streams.jsonl import JsonLines
from anytimed_adapters.streams.spans import Fingerprints
from anytimed_adapters.streams.text import TextFiles


def jsonl(folder: Path | str, **more: object) -> JsonLines:
    return JsonLines(JsonLines.Settings.model_validate({"url": f"{folder}/**/*.jsonl", **more}), "lines")


def text(folder: Path | str, **more: object) -> TextFiles:
    return TextFiles(TextFiles.Settings.model_validate({"url": f"{folder}/**/*.txt", **more}), "texts")


def lines(*documents: str) -> bytes:
    return b"".join(json.dumps({"text": document}).encode() + b"\n" for document in documents)


def read_all(stream: Stream) -> list[Record | Rejected | Finished]:
    stream.adopt(stream.discover())
    return [item for item, _ in stream.read(None)]


def flip(file: Path, at: int = -10) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    before = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # a clock tick, whatever the clock's resolution


# --- lines and the moments at which they are discovered ---------------------------------------------------------------

CONTENT = (
    lines("one", "two 🙂")
    + b'\n  \r\n{"text": "three"}\r\n{"text": ["not text"]}\n[1]\n{"text": ""}\n{"other": 1}\n{"text": "four {}}"}\n'
    + b'{"text": "five"} {"text": "six"}\nnonsense }\n{"text": "\xff seven"}\n'
    + b'{"text": "\\ud800 eight"}\n{"text": "last"}'
)


BETWEEN = CONTENT.index(b' {"text": "six"}')


@given(st.lists(st.integers(1, len(CONTENT) - 1), max_size=12))
@example([BETWEEN])
@example([BETWEEN + 1, BETWEEN + 4, BETWEEN + 9])
@example(list(range(1, len(CONTENT))))
@settings(max_examples=60, deadline=None)
def test_each_line_comes_once_whatever_the_moments_of_discovery(
    tmp_path_factory: pytest.TempPathFactory, moments: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("moments")
    file = folder / "a.jsonl"
    stream, found, place, taken = jsonl(folder), [], None, []
    for stop in [*sorted(set(moments)), len(CONTENT)]:
        file.write_bytes(CONTENT[:stop])
        entries = stream.discover()
        assert [(path, end) for path, _, end, _ in entries] == [("a.jsonl", stop)]
        stream.adopt(entries)
        found += entries
        for item, after in stream.read(place):
            place = after
            taken.append((item, after))
    records = [item for item, _ in taken if isinstance(item, Record)]
    wanted = ["one", "two 🙂", "three", "four {}}", "\ufffd seven", "\ufffd eight", "last"]
    # two objects on one line are no line of JSON, unless the first was a whole line when it was discovered; what was
    # then appended to it is a line of its own
    apart = bool({BETWEEN, BETWEEN + 1} & set(moments))
    if apart:
        wanted[4:4] = ["five", "six"]
    assert [record.text for record in records] == wanted
    reasons = [item.reason for item, _ in taken if isinstance(item, Rejected)]
    assert len(reasons) == (5 if apart else 6), reasons

    # and from every place, with all that was adopted by then and later, the rest comes again
    for i in range(0, len(taken), 1 + len(taken) // 30):
        again = jsonl(folder)
        again.adopt(found)
        assert list(again.read(taken[i][1])) == taken[i + 1 :]


def test_says_why_a_line_is_rejected_and_names_it_by_the_digest_of_its_bytes(tmp_path: Path) -> None:
    deep = b"[" * 100_000
    bad = [
        b"{",
        b"[1]",
        b'{"body": "x"}',
        b'{"text": 1}',
        b'{"text": ""}',
        b'{"text": "\xff"}',
        b'{"text": "\\udc00"}',
        deep,
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*bad, b""]))
    *items, finished = read_all(jsonl(tmp_path, encoding_errors="reject"))
    assert isinstance(finished, Finished)
    reasons = [item.reason for item in items if isinstance(item, Rejected)]
    told = [
        "not JSON",
        "list, expected an object",
        "'body'",
        "int, expected",
        "empty",
        "not UTF-8",
        "not Unicode",
        "not JSON",
    ]
    assert len(reasons) == len(items) == len(told)
    for reason, part in zip(reasons, told, strict=True):
        assert part in reason
    assert len({item.digest for item in items if isinstance(item, Rejected)}) == len(told)


@pytest.mark.parametrize("excess", [0, 1])
def test_a_record_longer_than_allowed_is_rejected_whole(tmp_path: Path, excess: int) -> None:
    big = "x" * (1000 + excess - len('{"text": ""}'))
    (tmp_path / "a.jsonl").write_bytes(lines("before", big, "after"))
    items = read_all(jsonl(tmp_path, max_record_bytes=1000))
    kinds = [type(item) for item in items]
    assert kinds == [Record, Rejected if excess else Record, Record, Finished]

    (tmp_path / "a.txt").write_bytes(b"x" * (1000 + excess))
    item, _ = read_all(text(tmp_path, max_record_bytes=1000))
    assert isinstance(item, Rejected if excess else Record)


def test_a_line_longer_than_allowed_is_rejected_once_over_many_spans(tmp_path: Path) -> None:
    stream, place, items = jsonl(tmp_path, max_record_bytes=10), None, []
    for size in range(1, 200, 7):
        (tmp_path / "a.jsonl").write_bytes((b"x" * 100 + b"\n" + lines("a") * 5)[:size])
        stream.adopt(stream.discover())
        for item, after in stream.read(place):
            items.append(item)
            place = after
    kinds = [type(item) for item in items if not isinstance(item, Finished)]
    assert kinds == [Rejected] * 6, "the long line once, and five lines of 14 bytes"
    assert len({item.digest for item in items if isinstance(item, Rejected)}) == 2


def test_equal_text_has_equal_digest_in_either_format(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("same 🙂".encode())
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 7, "text": "same \\ud83d\\ude42"}\n')
    assert read_all(text(tmp_path))[0] == read_all(jsonl(tmp_path))[0]


def test_a_byte_order_mark_belongs_to_no_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines("one", "two"))
    assert [item.text for item in read_all(jsonl(tmp_path)) if isinstance(item, Record)] == ["one", "two"]


# --- which files ------------------------------------------------------------------------------------------------------


def test_lists_by_path_and_leaves_out_what_is_unfinished_hidden_excluded_or_empty(tmp_path: Path) -> None:
    for name in [
        "b/z.txt",
        "b.txt",
        "a/1.txt",
        "a/.2.txt",
        ".git/3.txt",
        "x.txt.tmp",
        "x.part",
        "old/4.txt",
        "a/5.bak.txt",
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "c.txt").symlink_to(tmp_path / "b.txt")
    stream = TextFiles(TextFiles.Settings(url=f"file://{tmp_path}/**", exclude=("old/*", "**/*.bak.txt")), "texts")
    entries = stream.discover()
    assert [entry[0] for entry in entries] == ["a/1.txt", "b.txt", "b/z.txt", "c.txt"]
    stat = (tmp_path / "a/1.txt").stat()
    assert entries[0] == ["a/1.txt", 0, 7, stat.st_mtime_ns]


def test_a_url_without_wildcard_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("text")
    stream = TextFiles(TextFiles.Settings(url=str(tmp_path / "only.txt")), "texts")
    assert [entry[0] for entry in stream.discover()] == ["only.txt"]


def test_a_name_that_cannot_be_journalled_is_left_out_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("text")
    (tmp_path / "good.txt").write_text("text")
    assert [entry[0] for entry in text(tmp_path).discover()] == ["good.txt"]
    assert "not UTF-8" in caplog.text


def test_an_empty_span_gives_no_record_and_is_finished() -> None:
    stream = text("/nowhere")
    stream.adopt([["a.txt", 0, 0, 0]])
    assert [type(item) for item, _ in stream.read(None)] == [Finished]


@pytest.mark.parametrize(("url", "told"), [("nosuch://x/*.txt", "nosuch"), ("/data/**.txt", "entire path component")])
def test_a_url_that_cannot_be_opened_is_a_configuration_error(url: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        TextFiles(TextFiles.Settings(url=url), "texts")


# --- what happens to files after they were found ----------------------------------------------------------------------


def prepared(tmp_path: Path) -> tuple[list[Json], dict[int, str]]:
    (tmp_path / "a.jsonl").write_bytes(lines("one", "two"))
    (tmp_path / "b.jsonl").write_bytes(lines("three"))
    stream = jsonl(tmp_path)
    entries = stream.discover()
    stream.adopt(entries)
    return entries, digests(list(stream.read(None)))


def test_a_touched_file_and_a_vanished_one_are_fine_once_finished(tmp_path: Path) -> None:
    entries, finished = prepared(tmp_path)
    os.utime(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").unlink()
    stream = jsonl(tmp_path)
    stream.adopt(entries)
    stream.verify(finished)
    assert stream.discover() == []


def test_a_file_deleted_after_its_last_byte_was_read_is_finished(tmp_path: Path) -> None:
    entries, finished = prepared(tmp_path)
    stream = jsonl(tmp_path)
    stream.adopt(entries)
    reading = [place for item, place in stream.read(None) if isinstance(item, Record)]
    (tmp_path / "b.jsonl").unlink()
    assert [item for item, _ in stream.read(reading[-1])] == [Finished(1, finished[1])]


@pytest.mark.parametrize("how", ["rewritten", "shrunk", "rewritten and grown"])
def test_a_running_stream_refuses_a_finished_file_that_changed(tmp_path: Path, how: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines("one", "two"))
    stream = jsonl(tmp_path)
    read_all(stream)
    if how == "shrunk":
        (tmp_path / "a.jsonl").write_bytes(lines("one"))
    else:
        flip(tmp_path / "a.jsonl")
    if how == "rewritten and grown":
        with (tmp_path / "a.jsonl").open("ab") as file:
            file.write(lines("three"))
    with pytest.raises(Refused, match=r"a\.jsonl changed .* expected .* found .*Restore the file") as refused:
        stream.discover()
    assert refused.value.exit_code == 3


def test_a_file_that_shrank_before_it_was_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines("one", "two"))
    stream = jsonl(tmp_path)
    stream.adopt(stream.discover())
    (tmp_path / "a.jsonl").write_bytes(lines("one"))
    with pytest.raises(Refused, match="expected at least"):
        list(stream.read(None))


def test_waits_for_a_file_that_vanished_and_goes_on_at_the_same_record(tmp_path: Path) -> None:
    entries, _ = prepared(tmp_path)
    stream = jsonl(tmp_path)
    stream.adopt(entries)
    (tmp_path / "b.jsonl").rename(tmp_path / "away")
    items: list[tuple[Record | Rejected | Finished, Json]] = []
    with pytest.raises(StreamUnavailable, match=r"b\.jsonl is not there"):
        items.extend(stream.read(None))  # keeps what came before the error
    (tmp_path / "away").rename(tmp_path / "b.jsonl")
    items += stream.read(items[-1][1])
    assert texts(items) == ["one", "two", "three"]


def test_a_folder_that_is_not_there_is_unavailable_and_not_empty(tmp_path: Path) -> None:
    with pytest.raises(StreamUnavailable, match="missing"):
        jsonl(tmp_path / "missing").discover()


@contextmanager
def nobody() -> Iterator[None]:
    """Root may read everything; for a moment, be someone who may not."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_folder_that_may_not_be_listed_is_unavailable() -> None:
    with tempfile.TemporaryDirectory() as base:  # not pytest's, whose own folder is closed to others
        Path(base).chmod(0o755)
        closed = Path(base) / "closed"
        closed.mkdir(mode=0o000)
        stream = jsonl(base)
        with nobody(), pytest.raises(StreamUnavailable, match="Permission"):
            stream.discover()


def test_links_are_followed_once_and_a_link_to_a_folder_above_ends_there(tmp_path: Path) -> None:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "sub" / "a.jsonl").write_bytes(lines("one"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jsonl").write_bytes(lines("two"))
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "sub" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "dangling.jsonl.part").symlink_to(tmp_path / "nowhere")
    found = jsonl(tmp_path / "data").discover()
    assert [entry[0] for entry in found] == ["linked/b.jsonl", "sub/a.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", ["a.jsonl"]),
        ("*/*.jsonl", ["x/b.jsonl"]),
        ("x/*.jsonl", ["b.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "x/b.jsonl", "x/y/c.jsonl"]),
        ("x/**/c.jsonl", ["y/c.jsonl"]),
        ("?.jsonl", ["a.jsonl"]),
        ("[!b].jsonl", ["a.jsonl"]),
        ("a.jsonl", ["a.jsonl"]),
    ],
)
def test_a_glob_means_what_fsspec_says_it_means(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    for name in ("a.jsonl", "x/b.jsonl", "x/y/c.jsonl", "x/y/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(lines(name))
    url = f"{tmp_path}/{pattern}"
    stream = JsonLines(JsonLines.Settings(url=url), "s")
    found = [entry[0] for entry in stream.discover()]
    assert found == expected
    assert len(found) == len([p for p in fsspec.filesystem("file").glob(url) if p.endswith(".jsonl")])


# --- what is known of spans that were read ----------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.integers(0, 5)), max_size=30))
@example([(False, 9, 1), (False, 2, 2), (True, 9, 3), (True, 2, 4)])
def test_digests_of_spans_are_those_told_last(told: list[tuple[bool, int, int]]) -> None:
    """Given at a start, or put after reading, in any order."""
    known: dict[int, str] = {}
    fingerprints = Fingerprints()
    for given_at_once, index, number in told:
        digest = f"{number:064x}"
        if given_at_once:
            some = {index + i: digest for i in range(3)}
            known.update(some)
            fingerprints.give(some)
        else:
            known[index] = digest
            fingerprints.put(index, digest)
    assert {i: found for i in range(50) if (found := fingerprints.get(i)) is not None} == known


def test_a_folder_of_many_files_is_listed_as_if_one_were_asked_after_the_other(tmp_path: Path) -> None:
    """Longer than what is taken at a time, with something peculiar in the first part, the last, or nowhere."""
    for i in range(300):
        (tmp_path / f"{i:03d}.txt").write_text("x" * (i + 1))
    expected = {f"{i:03d}.txt": i + 1 for i in range(300)}

    def listed(**more: object) -> dict[str, int]:
        listing = text(tmp_path, **more)._store.list()
        assert len(set(listing.paths)) == len(listing.paths) == len(listing.sizes) == len(listing.versions)
        assert listing.versions == [(tmp_path / path).stat().st_mtime_ns for path in listing.paths]
        return dict(zip(listing.paths, listing.sizes, strict=True))

    assert listed() == expected
    (tmp_path / "other").write_text("no text file")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "ä.txt").write_text("x")
    expected["inside/ä.txt"] = 1
    assert listed() == expected
    (tmp_path / "empty.txt").touch()
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "twice.txt").symlink_to(tmp_path / "000.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    assert listed() == {**expected, "twice.txt": 1}
    excluded = {path: size for path, size in expected.items() if not path.startswith("01")}
    assert listed(exclude=["01*"]) == {**excluded, "twice.txt": 1}
