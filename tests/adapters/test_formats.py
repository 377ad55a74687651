"""What is special to a format: headers, members, row groups, tokens; damage, bombs, files in writing, stores."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.core import url_to_fs

from anytimed.contracts import ConfigError, Finished, Record, Refused, Rejected, StreamUnavailable
from anytimed.testing.streams import digests
from anytimed_adapters.streams.jsonl import JsonLines
from anytimed_adapters.streams.parquet import ParquetFiles
from anytimed_adapters.streams.store import FileStore
from anytimed_adapters.streams.tokens import TokenFiles
from tests.adapters.formats import (
    BIN,
    FORMATS,
    JSONL,
    NPY,
    PARQUET,
    TAR,
    Format,
    archive,
    lines,
    read_all,
    read_with_places,
    table,
    zstd,
)
from tests.security.measured import MIB, measured
from tests.storage.web_server import WebServer

DOCUMENTS = [f"document {i} " + "x" * i for i in range(60)]


def kinds(items: list[Any]) -> str:
    """One letter an item: "r" a record, "x" a rejected one, "." the end of a span."""
    return "".join("r" if isinstance(i, Record) else "x" if isinstance(i, Rejected) else "." for i in items)


def texts(items: list[Any]) -> list[str]:
    return [item.text for item in items if isinstance(item, Record)]


def reasons(items: list[Any]) -> list[str]:
    return [item.reason for item in items if isinstance(item, Rejected)]


def of_ids(tokens: Any) -> str:
    """The digest of a record of tokens."""
    return hashlib.sha256(tokens.dtype.name.encode() + tokens.tobytes()).hexdigest()


# --- the same record in every format ----------------------------------------------------------------------------------


def test_equal_texts_have_equal_digests_and_equal_tokens_too(tmp_path: Path) -> None:
    for name, format in FORMATS.items():
        (tmp_path / f"{name}{format.suffix}").write_bytes(format.content(["same 🙂"]))
    found = {name: read_all(format.stream(str(tmp_path)))[0] for name, format in FORMATS.items()}
    of_text = {item.digest for name, item in found.items() if isinstance(item, Record) and item.tokens is None}
    of_tokens = [item for item in found.values() if isinstance(item, Record) and item.tokens is not None]
    assert of_text == {hashlib.sha256("same 🙂".encode()).hexdigest()}
    assert len({item.digest for item in of_tokens}) == 1 and len(of_tokens) == 2
    assert of_tokens[0].digest == of_ids(of_tokens[0].tokens)


def test_equal_tokens_of_equal_width_are_equal_in_any_file(tmp_path: Path) -> None:
    ids = np.array([5, 0, 70_000], "<i4")
    np.save(tmp_path / "a.npy", ids)
    parquet(tmp_path / "a.parquet", {"tokens": [ids.tolist()]})
    column = PARQUET.stream(str(tmp_path), text_field="tokens")
    found = [read_all(stream)[0] for stream in (NPY.stream(str(tmp_path), split_at=None), column)]
    assert [item.digest for item in found if isinstance(item, Record)] == [of_ids(ids)] * 2


# --- compression ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [lambda data: gzip.compress(data), zstd], ids=["gzip", "zstd"])
def test_many_members_in_a_row_are_one_stream(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    format = FORMATS["jsonl.gz" if pack is not zstd else "jsonl.zst"]
    content = lines(DOCUMENTS)
    parts = [content[i : i + 100] for i in range(0, len(content), 100)]
    between = b"\x50\x2a\x4d\x18\x05\0\0\0abcde" if pack is zstd else b"\0" * 7  # a skippable frame, or padding
    (tmp_path / f"a{format.suffix}").write_bytes(b"".join(pack(part) + between for part in parts))
    assert texts(read_all(format.stream(str(tmp_path)))) == DOCUMENTS


@pytest.mark.parametrize("options", [{}, {"write_content_size": False}, {"write_checksum": True}])
@pytest.mark.parametrize("size", [0, 1, 300, 70_000, 1_000_000])
def test_zstd_frames_of_every_header(tmp_path: Path, options: dict[str, bool], size: int) -> None:
    document = os.urandom(size // 2).hex() + "é"
    (tmp_path / "a.txt.zst").write_bytes(zstandard.ZstdCompressor(**options).compress(document.encode()))
    assert texts(read_all(FORMATS["text.zst"].stream(str(tmp_path)))) == [document]


@pytest.mark.parametrize("name", ["jsonl.gz", "jsonl.zst", "tar.gz", "tar.zst"])
@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_what_decodes_before_a_tear_is_kept_and_the_next_file_goes_on(tmp_path: Path, name: str, how: str) -> None:
    format = FORMATS[name]
    documents = [os.urandom(2000).hex() for _ in range(200)]  # several blocks
    content = bytearray(format.content(documents))
    at = len(content) * 3 // 4
    if how == "cut":
        del content[at:]
    else:
        content[at : at + 4] = b"\xff\0\xff\0"
    (tmp_path / f"a{format.suffix}").write_bytes(content)
    (tmp_path / f"b{format.suffix}").write_bytes(format.content(["next"]))
    taken = read_with_places(format.stream(str(tmp_path)))
    items = [item for item, _ in taken]
    found = texts(items)
    assert found[-1] == "next" and len(found) > 40
    sound = found[:-1] if how == "cut" else found[:40]
    assert sound == documents[: len(sound)]
    assert len(reasons(items)) == 1 or how == "flipped"  # a byte that decodes to another may spoil a line before it
    assert "the rest of the file is not read" in reasons(items)[-1]
    assert kinds(items).endswith("x.r.")
    stream = format.stream(str(tmp_path))
    stream.adopt(stream.discover())
    torn = next(i for i, (item, _) in enumerate(taken) if isinstance(item, Rejected) and "the rest" in item.reason)
    for i in (0, torn - 1, torn, torn + 1):
        assert list(stream.read(json.loads(json.dumps(taken[i][1])))) == taken[i + 1 :]
    assert stream.lag(taken[torn][1]) > stream.lag(taken[-1][1]) == 0
    stream.verify({item.entry: item.digest for item in items if isinstance(item, Finished)})


def test_a_torn_file_that_was_mended_is_refused_where_its_tear_was_passed(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(lines(DOCUMENTS))[:-20])
    stream = FORMATS["jsonl.gz"].stream(str(tmp_path))
    (*_, (item, place), _) = read_with_places(stream)
    assert isinstance(item, Rejected)
    assert kinds([item for item, _ in stream.read(place)]) == "."
    file.write_bytes(gzip.compress(lines(DOCUMENTS), 1))
    with pytest.raises(Refused, match="--fresh"):
        list(stream.read(place))


def bomb(kind: str) -> bytes:
    """A gigabyte of blanks, or of a record that never ends."""
    if kind == "gzip":
        return gzip.compress(b" " * (1 << 30), 9)
    compressor = zstandard.ZstdCompressor()
    return compressor.compress(b" " * (1 << 30))


def peak(kind: str, url: str) -> str:
    format = FORMATS[kind]
    stream = format.adapter(format.adapter.Settings(url=url, settle_s=0, max_record_bytes=1 << 20), "bomb")
    return json.dumps([item.reason if isinstance(item, Rejected) else kinds([item]) for item in read_all(stream)])


@pytest.mark.parametrize("name", ["text.zst", "jsonl.zst", "tar.zst", "jsonl.gz"])
def test_a_bomb_takes_no_memory_and_is_given_up(tmp_path: Path, name: str) -> None:
    file = tmp_path / f"a{FORMATS[name].suffix}"
    content = bomb("gzip" if name.endswith("gz") else "zstd")
    if name == "tar.zst":
        head = tarfile.TarInfo("a.txt")
        head.size = 1 << 30
        content = zstd(head.tobuf()) + content
    file.write_bytes(content)
    cost = measured(peak, name, str(file))
    told = json.loads(cost.said)
    assert told[-1] == "." and len(told) == 2
    assert "max_ratio" in told[0]
    assert cost.grew_bytes < 80 * MIB, cost


def test_a_small_file_of_blanks_is_no_bomb(tmp_path: Path) -> None:
    (tmp_path / "a.txt.zst").write_bytes(zstd(b" " * (8 << 20)))
    assert kinds(read_all(FORMATS["text.zst"].stream(str(tmp_path)))) == "r."


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_nesting_is_judged_the_same_on_any_stack(tmp_path: Path) -> None:
    depths = [1, 98, 99, 100, 101, 700, 900, 990, 5000]
    rows = [f'{{"text": "x", "n": {"[" * n}{"]" * n}}}'.encode() for n in depths]
    rows += [b'{"text": "' + b"[" * 5000 + b'"}', b'{"n": "]]]\\"' + b"{" * 200 + b'", "text": "y"}', b"[" * 990 + b"x"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*rows, b""]))

    def deep(frames: int) -> list[Any]:
        return deep(frames - 1) if frames else read_all(JSONL.stream(str(tmp_path)))

    flat = deep(0)
    assert kinds(flat) == "rrr" + "x" * 6 + "rr" + "x."
    assert all("max_nesting = 100" in reason for reason in reasons(flat))
    assert deep(sys.getrecursionlimit() // 2) == flat


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_records_of_a_fixed_length_are_the_file_cut_up(tmp_path: Path) -> None:
    ids = np.random.default_rng(1).integers(0, 1 << 16, 10_007, dtype=np.uint16)
    ids.tofile(tmp_path / "a.bin")
    np.save(tmp_path / "a.npy", ids.astype("<i4"))
    for name, dtype in (("a.bin", "uint16"), ("a.npy", "int32")):
        stream = TokenFiles(TokenFiles.Settings(url=str(tmp_path / name), record_tokens=1000, settle_s=0), "ids")
        *records, finished = read_all(stream)
        cut = [record.tokens for record in records if isinstance(record, Record) and record.tokens is not None]
        assert [tokens.size for tokens in cut] == [1000] * 10 + [7]
        assert all(tokens.dtype == dtype and not tokens.flags.writeable for tokens in cut)
        assert np.array_equal(np.concatenate(cut), ids)
        each = [of_ids(tokens) for tokens in cut]
        assert [record.digest for record in records if isinstance(record, Record)] == each
        content = (tmp_path / name).read_bytes()
        header = content[: len(content) - sum(tokens.nbytes for tokens in cut)]
        assert isinstance(finished, Finished)
        assert finished.digest == hashlib.sha256(header + b"".join(map(bytes.fromhex, each))).hexdigest()


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("split_at", [None, 7])
def test_a_raw_file_that_grows_by_odd_bytes_gives_every_token_once(
    tmp_path: Path, dtype: str, split_at: int | None
) -> None:
    ids = np.random.default_rng(2).integers(0, 10, 500).astype(dtype)
    content, file = ids.tobytes(), tmp_path / "a.bin"
    made = {"url": str(file), "dtype": dtype, "split_at": split_at, "record_tokens": 16}
    stream, entries, taken = TokenFiles(TokenFiles.Settings.model_validate(made), "ids"), [], []
    for stop in [1, 3, 4, 9, 101, 102, 103, 777, len(content) - 1, len(content)]:
        file.write_bytes(content[:stop])
        os.utime(file, ns=(stop, stop))
        found = stream.discover()
        entries += found
        stream.adopt(found)
        taken += stream.read(taken[-1][1] if taken else None)
    cut = [item.tokens for item, _ in taken if isinstance(item, Record) and item.tokens is not None]
    assert np.array_equal(np.concatenate(cut), ids)
    assert max(tokens.size for tokens in cut) <= 16
    if split_at is not None:
        assert all(split_at not in tokens[:-1] for tokens in cut)
    for i in range(len(taken)):
        again = TokenFiles(TokenFiles.Settings.model_validate(made), "ids")
        again.adopt(entries)
        assert list(again.read(taken[i][1])) == taken[i + 1 :]
    again.verify({item.entry: item.digest for item, _ in taken if isinstance(item, Finished)})


def test_rows_are_records(tmp_path: Path) -> None:
    rows = np.arange(5 * 40, dtype="<u4").reshape(5, 40)
    np.save(tmp_path / "a.npy", rows)
    for most, expected in ((64, [40] * 5), (40, [40] * 5), (16, [16, 16, 8] * 5)):
        url = str(tmp_path / "a.npy")
        stream = TokenFiles(TokenFiles.Settings(url=url, record_tokens=most, split_at=3, settle_s=0), "ids")
        taken = read_with_places(stream)
        found = [item.tokens for item, _ in taken if isinstance(item, Record) and item.tokens is not None]
        assert [tokens.size for tokens in found] == expected
        assert np.array_equal(np.concatenate(found), rows.ravel())
        for i, (_, place) in enumerate(taken):
            assert list(stream.read(place)) == taken[i + 1 :]


def test_blocks_of_a_large_file_join_without_a_seam(tmp_path: Path) -> None:
    """Longer than the bytes that are read at once, locally and elsewhere."""
    ids = np.random.default_rng(3).integers(0, 50_000, 5_000_000, dtype=np.uint32)
    ids.tofile(tmp_path / "a.bin")
    fsspec.filesystem("memory").pipe_file("/seam/a.bin", ids.tobytes())
    for url in (str(tmp_path / "a.bin"), "memory://seam/a.bin"):
        stream = TokenFiles(TokenFiles.Settings(url=url, dtype="uint32", split_at=49_999), "ids")
        found = [item.tokens for item in read_all(stream) if isinstance(item, Record) and item.tokens is not None]
        assert np.array_equal(np.concatenate(found), ids)
        ends = np.flatnonzero(ids == 49_999)
        assert all(tokens[-1] == 49_999 or tokens.size == 65_536 for tokens in found[:-1])
        assert sum(int(tokens[-1]) == 49_999 for tokens in found) == len(ends)


def _saved(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "expected", "told"),
    [
        (_saved(np.array([{"a": 1}], object), allow_pickle=True), "x.", "expected uint16"),
        (_saved(np.zeros(9, np.float32)), "x.", "float32"),
        (_saved(np.zeros(9, ">u2")), "x.", "little endian"),
        (_saved(np.asfortranarray(np.ones((3, 4), "<u2"))), "x.", "fortran_order"),
        (_saved(np.zeros((2, 2, 2), "<u2")), "x.", "(2, 2, 2)"),
        (b"no header at all", "x.", "no header"),
        (_saved(np.zeros(1000, "<u2"))[:-500], "rx.", "expected 2128"),
        (_saved(np.zeros(1000, "<u2")) + b"more", "rx.", "expected 2128"),
        (_saved(np.array([1, -1], "<i4")), "x.", "below 0"),
        (_saved(np.array([1, 1 << 31], "<u4")), "r.", ""),
        (
            b"\x93NUMPY\x01\0\xff\xff{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999999,)}",
            "x.",
            "header",
        ),
        (_saved(np.zeros(0, "<u2")), ".", ""),
    ],
)
def test_an_npy_file_that_is_not_what_it_should_be(tmp_path: Path, content: bytes, expected: str, told: str) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    items = read_all(NPY.stream(str(tmp_path), split_at=None))
    assert kinds(items) == expected
    assert told in "".join(reasons(items))


def test_ids_come_as_they_are_stored_and_larger_than_any_vocabulary(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([1, 1 << 31, (1 << 32) - 1], "<u4"))
    record, _ = read_all(NPY.stream(str(tmp_path), split_at=None))
    assert isinstance(record, Record) and record.tokens is not None
    assert record.tokens.tolist() == [1, 1 << 31, (1 << 32) - 1]


@pytest.mark.parametrize(
    "content",
    [
        _saved(np.arange(3001, dtype="<u4"))[: 128 + 6002],  # a place in it is none in these tokens
        _saved(np.arange(3001, dtype="<i4")),
        _saved(np.arange(1, dtype="<u2")),
        b"no header at all" * 1000,
        _saved(np.zeros(9, np.float32)) + bytes(9000),
    ],
    ids=["other width", "longer", "shorter", "no header", "other type"],
)
def test_an_npy_file_that_is_another_one_at_a_resume_is_refused(tmp_path: Path, content: bytes) -> None:
    np.save(tmp_path / "a.npy", np.arange(3001, dtype="<u2"))
    stream = NPY.stream(str(tmp_path), split_at=None, record_tokens=1001)
    places = [place for item, place in read_with_places(stream) if isinstance(item, Record)]
    assert len(places) == 3
    (tmp_path / "a.npy").write_bytes(content)
    for place in places:
        with pytest.raises(Refused, match="--fresh"):
            next(iter(stream.read(place)))


def test_a_file_that_is_cut_while_it_is_read_is_refused_and_no_fault(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"ab" * (6 << 20))
    stream = BIN.stream(str(tmp_path), split_at=None)
    stream.adopt(stream.discover())
    reading = stream.read(None)
    first, _ = next(reading)
    os.truncate(file, 4096)
    with pytest.raises(Refused, match="expected at least"):
        list(reading)
    assert first.tokens.tobytes() == b"ab" * 65_536, "what was given out stays what it was"


def test_a_local_file_that_cannot_be_read_is_waited_for_and_nothing_of_it_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a handle nor a mapping, which an error of the disk would turn into a signal that ends the process."""
    np.random.default_rng(4).integers(0, 50_000, 3_000_000, dtype=np.uint16).tofile(tmp_path / "held.bin")
    stream = BIN.stream(str(tmp_path), split_at=None)
    stream.adopt(stream.discover())
    whole = list(stream.read(None))
    assert len(whole) == 47
    failures = [0, 1, 0, 1]
    pread = os.pread

    def failing(handle: int, size: int, offset: int) -> bytes:
        if failures and failures.pop(0):
            raise OSError(errno.EIO, "Input/output error")
        return pread(handle, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    taken: list[Any] = []
    for _ in range(2):
        reading = stream.read(taken[-1][1] if taken else None)
        with pytest.raises(StreamUnavailable, match="Input/output error"):
            while True:
                taken.append(next(reading))
    reading = stream.read(taken[-1][1])
    taken.append(next(reading))
    held = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [path for path in [*held, Path("/proc/self/maps").read_text()] if "held.bin" in path]
    assert [*taken, *reading] == whole


def test_compressed_files_of_tokens_are_not_taken_for_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.bin.gz").write_bytes(gzip.compress(b"ab" * 50))
    stream = TokenFiles(TokenFiles.Settings(url=f"{tmp_path}/*"), "ids")
    assert kinds(read_all(stream)) == "x."


# --- Parquet ----------------------------------------------------------------------------------------------------------


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> Any:
    pq.write_table(pa.table(columns), path, **options)
    return PARQUET.stream(str(path.parent))


def test_rows_that_are_no_text_are_rejected_alone(tmp_path: Path) -> None:
    column = pa.array([b"one", None, b"", b"\xff", b"x" * 2000, b"last"], pa.binary())
    for dictionary in (True, False):
        stream = parquet(tmp_path / "a.parquet", {"text": column}, use_dictionary=dictionary, row_group_size=4)
        items = read_all(stream)
        assert kinds(items) == "rxxrrr."
        assert texts(items) == ["one", "\ufffd", "x" * 2000, "last"]
        strict = PARQUET.stream(str(tmp_path), encoding_errors="reject", max_record_bytes=100)
        assert kinds(read_all(strict)) == "rxxxxr."


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("group", [1, 7, 1000])
def test_every_kind_of_text_column(tmp_path: Path, kind: Any, group: int) -> None:
    column = pa.array([*DOCUMENTS, *DOCUMENTS]).cast(kind)
    stream = parquet(tmp_path / "a.parquet", {"n": range(len(column)), "text": column}, row_group_size=group)
    assert texts(read_all(stream)) == [*DOCUMENTS, *DOCUMENTS]


def test_lists_of_integers_are_tokens(tmp_path: Path) -> None:
    rows = [[1, 2, 3], [], None, [4], [-1], [1 << 31], [5, None], [6, 7]]
    for kind in (pa.list_(pa.int64()), pa.large_list(pa.int64())):
        items = read_all(parquet(tmp_path / "a.parquet", {"text": pa.array(rows, kind)}, row_group_size=3))
        assert kinds(items) == "rxxrxxxr."
        found = [item.tokens.tolist() for item in items if isinstance(item, Record) and item.tokens is not None]
        assert found == [[1, 2, 3], [4], [6, 7]]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"body": ["x"]}, "no column 'text'"),
        ({"text": [1.5]}, "double"),
        ({"text": [{"a": 1, "b": 2}]}, "a structure"),
        ({"text": [["a"]]}, "expected integers"),
    ],
)
def test_a_column_that_does_not_fit_costs_its_file(tmp_path: Path, columns: dict[str, Any], told: str) -> None:
    items = read_all(parquet(tmp_path / "a.parquet", columns))
    assert kinds(items) == "x." and told in reasons(items)[0]


def test_row_groups_before_a_damaged_page_are_kept(tmp_path: Path) -> None:
    content = bytearray(table(DOCUMENTS, group=10, write_page_checksum=True, compression="none", use_dictionary=False))
    content[content.index(b"document 35")] ^= 1
    (tmp_path / "a.parquet").write_bytes(content)
    (tmp_path / "b.parquet").write_bytes(table(["next"]))
    items = read_all(PARQUET.stream(str(tmp_path)))
    assert texts(items) == [*DOCUMENTS[:30], "next"]
    assert kinds(items) == "r" * 30 + "x.r."


def _bomb(path: str) -> None:
    """A million rows of one value of a megabyte, in a file of some kilobytes."""
    values = pa.array(["x" * (1 << 20)])
    indices = pa.array(np.zeros(1_000_000, np.int32))
    column = pa.DictionaryArray.from_arrays(indices, values)
    pq.write_table(pa.table({"text": column}), path, compression="zstd")


def first_rows(path: str) -> str:
    stream = ParquetFiles(ParquetFiles.Settings(url=path, settle_s=0), "bomb")
    stream.adopt(stream.discover())
    reading = stream.read(None)
    return json.dumps([kinds([next(reading)[0]]) for _ in range(50)])


def test_a_value_that_a_million_rows_repeat_is_kept_once(tmp_path: Path) -> None:
    _bomb(str(tmp_path / "a.parquet"))
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    cost = measured(first_rows, str(tmp_path / "a.parquet"))
    assert json.loads(cost.said) == ["r"] * 50
    assert cost.grew_bytes < 150 * MIB, cost


def test_a_column_of_blanks_is_a_bomb(tmp_path: Path) -> None:
    blanks = pa.array([" " * (8 << 20)] * 8)
    items = read_all(parquet(tmp_path / "a.parquet", {"text": blanks}, compression="zstd", use_dictionary=False))
    assert kinds(items) == "x." and "max_ratio" in reasons(items)[0]


# --- tar --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar(tmp_path: Path, form: int) -> None:
    (tmp_path / "a.tar").write_bytes(archive(DOCUMENTS, form=form))
    assert texts(read_all(TAR.stream(str(tmp_path)))) == DOCUMENTS


def test_members_that_are_no_records_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("d.txt", tarfile.DIRTYPE), ("l.txt", tarfile.SYMTYPE), ("h.txt", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for name, data in (
            ("dir/._x.txt", b"hidden"),
            ("x.TXT", b"upper"),
            ("e.txt", b""),
            ("b.txt", b"\xff"),
            ("long.txt", b"x" * 5000),
            (f"{'deep/' * 80}y.txt", b"last"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    items = read_all(TAR.stream(str(tmp_path), encoding_errors="reject", max_record_bytes=4000))
    assert texts(items) == ["upper", "last"]
    assert kinds(items) == "rxxxr."


def test_json_members_are_objects_with_a_text(tmp_path: Path) -> None:
    bodies = [json.dumps({"text": "one"}), "[1]", "{", json.dumps({"other": 1})]
    (tmp_path / "a.tar").write_bytes(archive(bodies, extension="json"))
    items = read_all(TAR.stream(str(tmp_path), extension="json"))
    assert kinds(items) == "rxxx." and texts(items) == ["one"]


def test_archives_in_a_row_are_one_and_a_plain_one_does_not_grow(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(archive(["one"]) + archive(["two"]))
    stream = TAR.stream(str(tmp_path))
    assert texts(read_all(stream)) == ["one", "two"]
    with (tmp_path / "a.tar").open("ab") as file:
        file.write(archive(["three"]))
    with pytest.raises(Refused, match="cannot grow"):
        stream.discover()


# --- files in writing -------------------------------------------------------------------------------------------------


class Clocks:
    """Both at once, by hand."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("name", ["text.gz", "jsonl.zst", "parquet", "npy", "tar"])
def test_a_file_in_writing_is_not_read(tmp_path: Path, name: str) -> None:
    format, file = FORMATS[name], tmp_path / f"a{FORMATS[name].suffix}"
    clock, wall = Clocks(50.0), Clocks(1e9)
    stream = format.stream(str(tmp_path), settle_s=5, clock=clock, wall_clock=wall)
    content = format.content(["one"])
    for part in (content[:20], content):  # nothing of it while it changes
        file.write_bytes(part)
        os.utime(file, (wall.now, wall.now))
        assert stream.discover() == []
        clock.now += 4
        wall.now += 4
        assert stream.discover() == []
    wall.now += 1
    assert [row[2] for row in stream.discover()] == [len(content)], "five seconds by the file's time"


def test_a_file_with_a_time_that_says_nothing_is_watched(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    clock = Clocks(50.0)
    stream = PARQUET.stream(str(tmp_path), settle_s=5, clock=clock, wall_clock=Clocks(0.0))
    file.write_bytes(table(["one"]))
    assert stream.discover() == []
    clock.now += 4.9
    file.write_bytes(table(["one", "two"]))
    assert stream.discover() == []
    clock.now += 4.9
    assert stream.discover() == []
    clock.now += 0.1
    assert len(stream.discover()) == 1


def test_plain_lines_and_tokens_are_read_as_they_are_written(tmp_path: Path) -> None:
    for format in (JSONL, BIN, FORMATS["text"]):
        (tmp_path / f"a{format.suffix}").write_bytes(format.content(["one"]))
        assert len(format.stream(str(tmp_path), settle_s=5, wall_clock=Clocks(0.0)).discover()) == 1


def test_a_store_of_whole_objects_is_not_waited_for(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/whole/a.parquet", table(["one"]))
    assert len(PARQUET.stream("memory://whole", settle_s=5, clock=Clocks(0.0)).discover()) == 1


def test_a_parquet_file_that_changed_its_size_is_refused(tmp_path: Path) -> None:
    stream = parquet(tmp_path / "a.parquet", {"text": ["one"]})
    read_all(stream)
    parquet(tmp_path / "a.parquet", {"text": ["one", "two"]})
    with pytest.raises(Refused, match="cannot grow"):
        stream.discover()


# --- starts -----------------------------------------------------------------------------------------------------------


def test_verify_and_the_first_discover_share_one_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(lines([name]))
    stream = JSONL.stream(str(tmp_path))
    entries = stream.discover()
    stream.adopt(entries)
    finished = digests(list(stream.read(None)))
    (tmp_path / "d.jsonl").write_bytes(lines(["new"]))
    listed = []
    of_store = FileStore.list
    monkeypatch.setattr(FileStore, "list", lambda self, *select: (listed.append(1), of_store(self, *select))[1])
    clock = Clocks(0.0)
    again = JSONL.stream(str(tmp_path), clock=clock)
    again.adopt(entries)
    again.verify(finished)
    assert [row[0] for row in again.discover()] == ["d.jsonl"] and len(listed) == 1
    assert [row[0] for row in again.discover()] == ["d.jsonl"] and len(listed) == 2
    again.verify(finished)
    clock.now += 60
    again.discover()
    assert len(listed) == 4, "a listing that is a minute old serves nobody"


def test_a_file_behind_a_link_keeps_its_own_path(tmp_path: Path) -> None:
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "a.jsonl").write_bytes(lines(["one"]))
    (tmp_path / "a").symlink_to(tmp_path / "z")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "nothing.jsonl").symlink_to("nowhere")
    assert [row[0] for row in JSONL.stream(str(tmp_path)).discover()] == ["z/a.jsonl"]


# --- stores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [PARQUET, NPY, FORMATS["jsonl.zst"], FORMATS["tar.gz"]], ids=lambda f: f.suffix)
def test_over_http(tmp_path: Path, format: Format) -> None:
    name = f"a{format.suffix}"
    (tmp_path / name).write_bytes(format.content(["one", "two"]))
    local = read_with_places(format.stream(str(tmp_path)))
    with WebServer(tmp_path) as server:
        stream = format.adapter(
            format.adapter.Settings.model_validate({"url": f"{server.url}/{name}", **dict(format.settings)}), "web"
        )
        taken = read_with_places(stream)
        assert taken == local
        for i, (_, place) in enumerate(taken):
            assert list(stream.read(place)) == taken[i + 1 :]
        server.failures = ["503"] * 50
        with pytest.raises(Exception, match="tried again"):
            list(stream.read(taken[0][1]))
        server.failures = []
        assert list(stream.read(taken[0][1])) == taken[1:]


def test_parquet_reads_no_other_column(tmp_path: Path) -> None:
    other = [os.urandom(1 << 20).hex() for _ in range(30)]
    pq.write_table(pa.table({"other": other, "text": ["x"] * 30}), tmp_path / "a.parquet", row_group_size=3)
    with WebServer(tmp_path) as server:
        stream = ParquetFiles(ParquetFiles.Settings(url=f"{server.url}/a.parquet"), "web")
        assert kinds(read_all(stream)) == "r" * 30 + "."
        assert sum(stop - start for _, start, stop in server.asked) < 1 << 20


def test_hugging_face_urls_are_understood_without_the_network() -> None:
    fs, path = url_to_fs("hf://datasets/owner/name/**/*.parquet")
    assert type(fs).__name__ == "HfFileSystem"
    store = FileStore("hf://datasets/owner/name@main/data/*.parquet", (), {}, "hub")
    assert path == "datasets/owner/name/**/*.parquet"
    assert store.full("a.parquet") == "datasets/owner/name@main/data/a.parquet"
    assert not store.shows_unfinished_files and not store.is_local


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("hf", "huggingface_hub")])
def test_a_driver_that_is_missing_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, scheme: str, package: str
) -> None:
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)  # loaded already
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    extra = {"s3": "s3", "gs": "gcs", "hf": "hf"}[scheme]
    with pytest.raises(ConfigError, match=rf"pip install 'anytimed\[{extra}\]'"):
        JsonLines(JsonLines.Settings(url=f"{scheme}://bucket/*.jsonl"), "far")
