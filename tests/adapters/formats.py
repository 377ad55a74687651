"""How documents come to be in files of every format, for the contract and for what is done to them."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from anytimed.contracts import Finished, Json, Record, Rejected, Stream
from anytimed_adapters.streams.jsonl import JsonLines
from anytimed_adapters.streams.parquet import ParquetFiles
from anytimed_adapters.streams.text import TextFiles
from anytimed_adapters.streams.tokens import TokenFiles
from anytimed_adapters.streams.webdataset import TarFiles

Item = Record | Rejected | Finished
END = 0
"""The token that ends a document in these files."""


def lines(texts: Sequence[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "n": 1}).encode() + b"\n" for text in texts)


def table(texts: Sequence[str], *, group: int = 2, **options: Any) -> bytes:
    file = io.BytesIO()
    columns = {"id": range(len(texts)), "text": pa.array(texts, pa.string()), "more": ["x" * 50] * len(texts)}
    columns["tokens"] = [tokens_of([text], "<i4").tolist() for text in texts]
    pq.write_table(pa.table(columns), file, row_group_size=group, **options)
    return file.getvalue()


def archive(texts: Sequence[str], *, extension: str = "txt", form: int = tarfile.PAX_FORMAT) -> bytes:
    """Members of other extensions between them, and names that no one should follow."""
    file = io.BytesIO()
    letters = 20 if form == tarfile.USTAR_FORMAT else 60  # a header of its own for the name, where there can be one
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for i, text in enumerate(texts):
            for name, data in ((f"../../{i:04}.cls", b"7"), (f"/etc/{'é' * letters}{i:04}.{extension}", text.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def tokens_of(texts: Sequence[str], dtype: str) -> Any:
    ids = b"\0".join(text.encode("utf-16-le").hex().encode() for text in texts) + b"\0"
    return np.frombuffer(ids, np.uint8).astype(dtype)


def text_of(tokens: Any) -> str:
    """The inverse, of one record."""
    return bytes.fromhex(bytes(tokens.astype(np.uint8)).rstrip(b"\0").decode()).decode("utf-16-le")


def npy(texts: Sequence[str], dtype: str = "<u2") -> bytes:
    file = io.BytesIO()
    np.save(file, tokens_of(texts, dtype), allow_pickle=False)
    return file.getvalue()


def gunzip(content: bytes) -> bytes:
    return gzip.decompress(content)


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def unzstd(content: bytes) -> bytes:
    with zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True) as reader:
        return reader.read()


def same(content: bytes) -> bytes:
    return content


@dataclass(frozen=True)
class Format:
    """`encode` gives a file's bytes. appends: whether more of them may follow in the same file. one: document a
    file."""

    adapter: Any
    suffix: str
    encode: Callable[[Sequence[str]], bytes]
    appends: bool = True
    one: bool = False
    pack: Callable[[bytes], bytes] = same
    unpack: Callable[[bytes], bytes] = same
    settings: tuple[tuple[str, Any], ...] = ()

    def stream(self, base: str, **more: Any) -> Any:
        told = {"url": f"{base}/**/*{self.suffix}", "settle_s": 0, **dict(self.settings), **more}
        clocks = {key: told.pop(key) for key in ("clock", "wall_clock") if key in told}
        return self.adapter(self.adapter.Settings.model_validate(told), "source", **clocks)

    def content(self, texts: Sequence[str]) -> bytes:
        return self.pack(self.encode(texts))

    def compressed(self, kind: str) -> Format:
        pack, unpack, suffix = {"gzip": (_gzip, gunzip, ".gz"), "zstd": (zstd, unzstd, ".zst")}[kind]
        return Format(
            self.adapter, self.suffix + suffix, self.encode, True, self.one, pack, unpack, settings=self.settings
        )


def _gzip(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def _utf8(texts: Sequence[str]) -> bytes:
    return "".join(texts).encode()


TEXT = Format(TextFiles, ".txt", _utf8, one=True)
JSONL = Format(JsonLines, ".jsonl", lines)
PARQUET = Format(ParquetFiles, ".parquet", table, appends=False)
BIN = Format(TokenFiles, ".bin", lambda texts: tokens_of(texts, "<u2").tobytes(), settings=(("split_at", END),))
NPY = Format(TokenFiles, ".npy", npy, appends=False, settings=(("split_at", END),))
TAR = Format(TarFiles, ".tar", archive, appends=False)

FORMATS = {
    "text": TEXT,
    "text.gz": TEXT.compressed("gzip"),
    "text.zst": TEXT.compressed("zstd"),
    "jsonl": JSONL,
    "jsonl.gz": JSONL.compressed("gzip"),
    "jsonl.zst": JSONL.compressed("zstd"),
    "parquet": PARQUET,
    "bin": BIN,
    "npy": NPY,
    "tar": TAR,
    "tar.gz": TAR.compressed("gzip"),
    "tar.zst": TAR.compressed("zstd"),
}


def write_again(file: Path, content: bytes) -> None:
    """With the time of a later tick, whatever the clock's resolution."""
    before = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def read_all(stream: Stream) -> list[Item]:
    stream.adopt(stream.discover())
    return [item for item, _ in stream.read(None)]


def read_with_places(stream: Stream) -> list[tuple[Item, Json]]:
    stream.adopt(stream.discover())
    return list(stream.read(None))
