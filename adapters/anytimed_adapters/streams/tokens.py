"""Files of token ids: raw `.bin` (little endian) and `.npy`, in records of a fixed length or split at an end token.

A raw file may grow: its spans may begin and end inside a token, which belongs to the span with its last byte. An `.npy`
file is what its header says, one row of tokens or rows that are records each; it is never unpickled and does not grow.

Local files are mapped into memory and copied once, into the int32 of the records; others are read in ranges.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap
from tokenize import TokenError
from typing import Any, Literal

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray
from pydantic import Field

from anytimed.contracts import Json, Record, Rejected
from anytimed_adapters.streams.compression import Torn, compression
from anytimed_adapters.streams.files import AT_END, Digest, FileSettings, FileStream, Items, sha256, torn
from anytimed_adapters.streams.spans import Span
from anytimed_adapters.streams.store import RANGE_BYTES, FileStore, Vanished

_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4"), "int32": np.dtype("<i4")}
_HEADER_BYTES = 8 << 10
"""The header is parsed as a Python literal; numpy takes up to 10,000 bytes for safe."""
_BAD_HEADER = (ValueError, TypeError, LookupError, SyntaxError, TokenError, MemoryError, RecursionError)


class TokenFiles(FileStream):
    """A `Stream` with records of tokens, from .npy files and (all other names) raw ones."""

    class Settings(FileSettings):
        """The settings of all file streams, and how tokens become records."""

        dtype: Literal["uint16", "uint32"] = Field(default="uint16", description="Of raw files; .npy files say it.")
        record_tokens: int = Field(
            default=65_536, gt=0, le=1 << 24, description="The most tokens of a record; a longer document is cut there."
        )
        split_at: int | None = Field(
            default=None, ge=0, description="The id that ends a document, where records are to be documents."
        )

    _settings: Settings

    def _items(self, index: int, at: Json | None) -> Items:
        span = self._spans[index]
        digest = hashlib.sha256()
        try:
            source = _Source(self._store, span)
            layout = self._layout(span, source)
            offset = span.start
            if at:
                source.hash(digest, offset, at["offset"])
                offset = at["offset"]
        except Vanished:
            if at is None or at["offset"] < span.stop:
                raise
            return str(at["digest"])  # read to its last byte before it was deleted: nothing is missing
        except Torn as reason:
            whole = self._digest(index)
            yield torn(f"{reason}", whole), {"entry": index, "offset": AT_END, "digest": whole}
            return whole
        if at and digest.hexdigest() != at["digest"]:
            told = f"bytes {span.start} to {offset} with digest {at['digest']}"
            raise self._store.rewritten(span.path, told, digest.hexdigest())
        if not at:
            source.hash(digest, offset, min(layout.first, span.stop))  # a header
            offset = layout.first  # before the span where it begins inside a token
        for block, cuts in self._blocks(source, layout, offset):
            raw, tokens = memoryview(block), np.frombuffer(block, layout.dtype)
            width, done = layout.dtype.itemsize, 0
            for cut in cuts:
                source.check()
                digest.update(raw[max(done * width, span.start - offset) : cut * width])
                item = _record(tokens[done:cut])
                done = cut
                yield item, {"entry": index, "offset": offset + cut * width, "digest": digest.hexdigest()}
            offset += done * width
        source.hash(digest, max(offset, span.start), span.stop)
        whole = digest.hexdigest()
        if layout.wrong:
            yield torn(layout.wrong, whole), {"entry": index, "offset": AT_END, "digest": whole}
        return whole

    def _blocks(self, source: _Source, layout: _Layout, offset: int) -> Iterator[tuple[bytes | memoryview, list[int]]]:
        """Bytes from `offset` (where a record begins) on, each with the ends of the records in it, in tokens; a block
        begins where the last record ended."""
        width, most = layout.dtype.itemsize, self._settings.record_tokens
        step = max(RANGE_BYTES // width, most) * width
        while offset < layout.last:
            block = source.read(offset, min(offset + step, layout.last))
            count = len(block) // width
            ends = self._natural_ends(np.frombuffer(block, layout.dtype), layout, (offset - layout.first) // width)
            cuts, at = [], 0
            for end in ends:
                cuts += [*range(at + most, end, most), end]
                at = end
            cuts += range(at + most, count + 1, most)
            if offset + len(block) == layout.last and (not cuts or cuts[-1] < count):
                cuts.append(count)
            yield block, cuts
            offset += cuts[-1] * width

    def _natural_ends(self, tokens: NDArray[Any], layout: _Layout, before: int) -> list[int]:
        """Where documents or rows end among the tokens. before: how many tokens of the file precede them."""
        if layout.row:
            return list(range(layout.row - before % layout.row, len(tokens) + 1, layout.row))
        if self._settings.split_at is None:
            return []
        ends: list[int] = (np.flatnonzero(tokens == self._settings.split_at) + 1).tolist()
        return ends

    def _layout(self, span: Span, source: _Source) -> _Layout:
        if compression(span.path):
            raise Torn("files of tokens are not read compressed")
        if span.path.lower().endswith(".npy"):
            return _npy_layout(bytes(source.read(0, min(_HEADER_BYTES, span.stop))), span.stop)
        dtype = _DTYPES[self._settings.dtype]
        return _Layout(dtype, span.start - span.start % dtype.itemsize, span.stop - span.stop % dtype.itemsize)

    def _bytes_read(self, index: int, at: Json) -> int:
        return 0 if at["offset"] == AT_END else max(0, at["offset"] - self._spans[index].start)

    def _grows(self, path: str) -> bool:
        return not path.lower().endswith(".npy")

    def _settles(self, path: str) -> bool:
        return not self._grows(path)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Bytes [first, last) of the file are whole tokens. row: tokens of a row, 0 for none. wrong: about what follows."""

    dtype: np.dtype[Any]
    first: int
    last: int
    row: int = 0
    wrong: str = ""


class _Source:
    """Bytes of a span's file: of a mapping where it is local."""

    def __init__(self, store: FileStore, span: Span) -> None:
        self._store, self._span = store, span
        self._mapped: mmap | None = store.map(span.path) if store.is_local else None

    def read(self, start: int, stop: int) -> bytes | memoryview:
        """All of the bytes [start, stop). Raises Refused where the file is shorter."""
        if self._mapped is None:
            return b"".join(self._store.ranges(self._span.path, start, stop))
        self.check()
        return memoryview(self._mapped)[start:stop]

    def check(self) -> None:
        """Raise Refused where the file is shorter than the span: touching a mapping beyond the end of its file would
        end the process. To be called again whenever others had their turn."""
        if self._mapped is not None and (size := min(self._mapped.size(), len(self._mapped))) < self._span.stop:
            raise self._store.rewritten(self._span.path, f"at least {self._span.stop} bytes", f"{size} bytes")

    def hash(self, digest: Digest, start: int, stop: int) -> None:
        while start < stop:
            digest.update(self.read(start, min(start + RANGE_BYTES, stop)))
            start += RANGE_BYTES


def _npy_layout(head: bytes, size: int) -> _Layout:
    """Raises Torn where the file is not one of tokens."""
    file = io.BytesIO(head)
    try:
        version = npy_format.read_magic(file)
        read = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"format version {version}")
        shape, fortran_order, dtype = read(file, max_header_size=_HEADER_BYTES)
    except _BAD_HEADER as error:
        raise Torn(f"no header of an .npy file: {str(error)[:200]}") from None
    if dtype not in _DTYPES.values() or fortran_order or len(shape) not in (1, 2) or min(shape, default=0) < 0:
        told = "uint16, uint32 or int32, little endian, in one row or rows in C order"
        raise Torn(f"an array of {dtype} with shape {shape}, fortran_order={fortran_order}; expected {told}")
    first, width = file.tell(), dtype.itemsize
    count = shape[0] * (shape[1] if len(shape) == 2 else 1)
    wrong = "" if first + count * width == size else f"{size} bytes, expected {first + count * width}"
    last = min(first + count * width, size - (size - first) % width)
    return _Layout(dtype, first, last, shape[1] if len(shape) == 2 else 0, wrong)


def _record(raw: NDArray[Any]) -> Record | Rejected:
    """The tokens as int32 of their own."""
    tokens = raw.astype(np.int32)
    digest = sha256(tokens.data.cast("B"))
    if raw.itemsize == 4 and tokens.size and tokens.min() < 0:
        return Rejected("token ids below 0 or of 2**31 and above", digest)
    return Record("", digest, tokens)
