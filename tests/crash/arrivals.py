"""Shards that arrive while somebody reads them, in every format, and which records they hold in what order.

`Shards.arrive` puts a few records more into a source: a new file under a temporary name and then its own, or, where
the format grows, more bytes at the end of a file. `Shards.read_in_order` says what a reader that adopted rows
[path, start, stop, version] has to have read, from the bytes that were written alone: each in the row that holds its
last byte. It fails unless the rows tile every file.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.adapters.formats import JSONL, PARQUET, TAR, zstd
from tests.crash.test_random_kills import HELD_OUT, unique

END = 256
"""The end token of the tokenizer of bytes: token files hold it themselves."""


def of_text(content: bytes) -> bytes:
    """What a record's digest is of."""
    return content


def of_tokens(content: bytes) -> bytes:
    return b"uint16" + np.array([*content, END], "<u2").tobytes()


def ids(contents: Sequence[bytes]) -> Any:
    return np.array([token for content in contents for token in (*content, END)], "<u2")


def npy(contents: Sequence[bytes]) -> bytes:
    file = io.BytesIO()
    np.save(file, ids(contents), allow_pickle=False)
    return file.getvalue()


def texts(encode: Callable[[Sequence[str]], bytes]) -> Callable[[Sequence[bytes]], bytes]:
    return lambda contents: encode([content.decode() for content in contents])


@dataclass(frozen=True)
class Kind:
    """A format. source: the settings that read it; encode: bytes of a file, or of what is appended to one. lines: an
    append may be torn between two polls. hashed: see `of_text`."""

    suffix: str
    source: dict[str, Any]
    encode: Callable[[Sequence[bytes]], bytes]
    grows: bool = False
    lines: bool = False
    hashed: Callable[[bytes], bytes] = of_text

    def held_out(self, content: bytes) -> bool:
        return int.from_bytes(hashlib.sha256(self.hashed(content)).digest()[:8], "big") < HELD_OUT * 2**64


SETTLE_S = 0.2
_SETTLES: dict[str, Any] = {"settle_s": SETTLE_S}
_TOKENS: dict[str, Any] = {"type": "tokens", "split_at": END}

_lines, _table, _archive = texts(JSONL.encode), texts(PARQUET.encode), texts(TAR.encode)
_gzipped = JSONL.compressed("gzip").pack

KINDS = {
    "text": Kind(".txt", {"type": "text"}, b"".join, grows=True),
    "jsonl": Kind(".jsonl", {"type": "jsonl"}, _lines, grows=True, lines=True),
    "jsonl.gz": Kind(".jsonl.gz", {"type": "jsonl", **_SETTLES}, lambda c: _gzipped(_lines(c)), grows=True),
    "jsonl.zst": Kind(".jsonl.zst", {"type": "jsonl", **_SETTLES}, lambda c: zstd(_lines(c)), grows=True),
    "parquet": Kind(".parquet", {"type": "parquet", **_SETTLES}, _table),
    "bin": Kind(".bin", _TOKENS, lambda c: ids(c).tobytes(), grows=True, hashed=of_tokens),
    "npy": Kind(".npy", {**_TOKENS, **_SETTLES}, npy, hashed=of_tokens),
    "tar": Kind(".tar", {"type": "webdataset", **_SETTLES}, _archive),
    "tar.zst": Kind(".tar.zst", {"type": "webdataset", **_SETTLES}, lambda c: zstd(_archive(c))),
}


@dataclass
class Shards:
    """The files of one source. `numbers`: of its records, from 0 on in steps that leave room for other sources."""

    kind: Kind
    folder: Path
    draw: random.Random
    numbers: Iterator[int]
    ends: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)
    """Per file, in order: where a record's last byte ends, and the record."""
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def source(self) -> dict[str, Any]:
        return {**self.kind.source, "url": f"{self.folder}/**/*{self.kind.suffix}"}

    def arrive(self, new: bool | None = None) -> None:
        """A few records more. new: in a file of their own; None: as it comes."""
        if new is None:
            new = not self.kind.grows or not self.ends or self.draw.random() < 0.4
        contents = [unique(next(self.numbers), self.draw) for _ in range(self._count())]
        if new:
            self._file(contents)
        else:
            self._append(self.draw.choice(sorted(self.ends)), contents)

    def _count(self) -> int:
        return 1 if self.kind.source["type"] == "text" else self.draw.randint(1, 3)

    def _file(self, contents: Sequence[bytes]) -> None:
        path = f"{self.draw.randrange(3)}/{self.draw.randrange(1 << 32):08x}{self.kind.suffix}"
        full, data = self.folder / path, self.kind.encode(contents)
        full.parent.mkdir(parents=True, exist_ok=True)
        beside = full.with_name(f"{full.name}.tmp")
        beside.write_bytes(data)
        beside.rename(full)
        self._note(path, contents, data)

    def _append(self, path: str, contents: Sequence[bytes]) -> None:
        data = self.kind.encode(contents)
        torn = self.draw.randrange(len(data)) if self.kind.lines and self.draw.random() < 0.5 else 0
        with (self.folder / path).open("ab", buffering=0) as file:
            if torn:
                file.write(data[:torn])
                time.sleep(self.draw.uniform(0.0, 0.25))  # time for a poll, or two
            file.write(data[torn:])
        self._note(path, contents, data)

    def _note(self, path: str, contents: Sequence[bytes], data: bytes) -> None:
        """A record of lines ends before its newline: a whole object is a record by then. A record of anything else is
        found where all of its file, or of what was appended, is."""
        base = self.sizes.get(path, 0)
        found = self.ends.setdefault(path, [])
        for i, content in enumerate(contents):
            upto = len(self.kind.encode(contents[: i + 1])) - 1 if self.kind.lines else len(data)
            found.append((base + upto, content))
        self.sizes[path] = base + len(data)

    def read_in_order(self, rows: Sequence[Sequence[Any]]) -> list[list[bytes]]:
        """By row the records that it holds."""
        read, found = dict.fromkeys(self.sizes, 0), []
        for path, start, stop, _ in rows:
            assert start == read[path] < stop, f"{path}: bytes {start} to {stop} adopted after {read[path]}"
            read[path] = stop
            held = [content for end, content in self.ends[path] if start < end <= stop]
            # Of a text file, what a poll found is one document.
            found.append([b"".join(held)] if self.kind.source["type"] == "text" and held else held)
        assert read == self.sizes, "not all that was written was read"
        return found


def decisions(run: Path) -> list[dict[str, Any]]:
    """The entries of a run's journal that decide about its data."""
    told = map(json.loads, (run / "journal.jsonl").read_text().splitlines())
    return [line["entry"] for line in told if line["scope"] == "data"]


def rows_of(entries: Sequence[dict[str, Any]], source: str) -> list[Any]:
    found = [entry for entry in entries if entry["kind"] == "discovered" and entry["source"] == source]
    return [row for entry in found for row in entry["entries"]]
