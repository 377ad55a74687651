"""Files of token ids: raw `.bin` (little endian) and `.npy`, in records of a fixed length or split at an end token.

A raw file may grow: its spans may begin and end inside a token, which belongs to the span with its last byte. An `.npy`
file is what its header says, one row of tokens or rows that are records each; it is never unpickled and does not grow.

Records carry the tokens as they are stored: views, nobody's to write to, of the block of bytes that was read, which
lives as long as one of them. Files are read, not mapped (design/012). Each byte is hashed once. The digest of a record
is SHA-256 over the name of its type ("uint16") and its bytes in little endian: equal tokens of equal width are equal in
any file. The digest of a place and of a finished span is SHA-256 over what lies before: the bytes of the header, the
digests of the records (32 bytes each), the bytes behind the last whole token. A file that cannot be read as tokens has
the digest of its bytes.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from tokenize import TokenError
from typing import Any, Literal

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray
from pydantic import Field

from anytimed.contracts import Json, Record, Rejected
from anytimed_adapters.streams.compression import Torn, compression
from anytimed_adapters.streams.files import AT_END, Digest, FileSettings, FileStream, Items, torn
from anytimed_adapters.streams.spans import Span
from anytimed_adapters.streams.store import RANGE_BYTES, Vanished

_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4"), "int32": np.dtype("<i4")}
_BLOCK_BYTES = 1 << 20
"""What is read of a local file at once, unless a record is longer: still in the processor's cache when it is hashed."""
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
        span, chain = self._spans[index], hashlib.sha256()
        try:
            layout = self._layout(span)
            self._hash(chain, span, layout, at["offset"] if at else layout.first)
        except Vanished:
            if at is None or at["offset"] < span.stop:
                raise
            return str(at["digest"])  # read to its last byte before it was deleted: nothing is missing
        except Torn as reason:
            if at:
                raise self._store.rewritten(span.path, "a file of tokens", f"{reason}") from None
            whole = super()._digest(index)
            yield torn(f"{reason}", whole), {"entry": index, "offset": AT_END, "digest": whole}
            return whole
        if at and chain.hexdigest() != at["digest"]:
            told = f"bytes {span.start} to {at['offset']} with digest {at['digest']}"
            raise self._store.rewritten(span.path, told, chain.hexdigest())
        signed = layout.dtype.kind == "i"
        for tokens, digest, after in self._records(span, layout, at["offset"] if at else layout.first, layout.last):
            chain.update(digest)
            below = signed and tokens.min() < 0
            item = Rejected("token ids below 0", digest.hex()) if below else Record("", digest.hex(), tokens)
            yield item, {"entry": index, "offset": after, "digest": chain.hexdigest()}
        self._hash_rest(chain, span, layout)
        whole = chain.hexdigest()
        if layout.wrong:
            yield torn(layout.wrong, whole), {"entry": index, "offset": AT_END, "digest": whole}
        return whole

    def _digest(self, index: int) -> str:
        span, chain = self._spans[index], hashlib.sha256()
        try:
            layout = self._layout(span)
        except Torn:
            return super()._digest(index)
        self._hash(chain, span, layout, layout.last)
        self._hash_rest(chain, span, layout)
        return chain.hexdigest()

    def _hash(self, chain: Digest, span: Span, layout: _Layout, stop: int) -> None:
        """Update `chain` with the header, if there is one, and the digests of the records that end by `stop`."""
        for chunk in self._store.ranges(span.path, span.start, min(layout.first, span.stop)):
            chain.update(chunk)
        stop -= (stop - layout.first) % layout.dtype.itemsize  # off a token: the header is another one, and tells
        for _, digest, _ in self._records(span, layout, layout.first, stop):
            chain.update(digest)

    def _hash_rest(self, chain: Digest, span: Span, layout: _Layout) -> None:
        """Update `chain` with the bytes behind the last token."""
        for chunk in self._store.ranges(span.path, max(layout.last, span.start), span.stop):
            chain.update(chunk)

    def _records(
        self, span: Span, layout: _Layout, offset: int, stop: int
    ) -> Iterator[tuple[NDArray[np.integer[Any]], bytes, int]]:
        """The records from byte `offset`, where one begins, to `stop`: tokens, digest, and the offset after them."""
        named, width = hashlib.sha256(layout.dtype.name.encode()), layout.dtype.itemsize
        for block, tokens, cuts in self._blocks(span, layout, offset, stop):
            content, done = memoryview(block), 0
            for cut in cuts:
                hashed = named.copy()
                hashed.update(content[done * width : cut * width])
                yield tokens[done:cut], hashed.digest(), offset + cut * width
                done = cut
            offset += done * width

    def _blocks(
        self, span: Span, layout: _Layout, offset: int, stop: int
    ) -> Iterator[tuple[bytes, NDArray[np.integer[Any]], list[int]]]:
        """Bytes from `offset`, where a record begins, to `stop`, their tokens, and the ends of the records among these;
        a block begins where the last record ended."""
        width, most = layout.dtype.itemsize, self._settings.record_tokens
        step = max((_BLOCK_BYTES if self._store.is_local else RANGE_BYTES) // width, most) * width
        while offset < stop:
            end = min(offset + step, stop)
            block = self._read(span, offset, end)
            tokens = np.frombuffer(block, layout.dtype)
            cuts: list[int] = []
            at = 0
            for natural in self._natural_ends(tokens, layout, (offset - layout.first) // width):
                if natural - at > most:
                    cuts += range(at + most, natural, most)
                cuts.append(natural)
                at = natural
            cuts += range(at + most, len(tokens) + 1, most)
            if end == stop and (not cuts or cuts[-1] < len(tokens)):
                cuts.append(len(tokens))
            yield block, tokens, cuts
            offset += cuts[-1] * width

    def _read(self, span: Span, start: int, stop: int) -> bytes:
        """All of the bytes [start, stop). Raises Refused where the file is shorter."""
        return b"".join(self._store.ranges(span.path, start, stop))

    def _natural_ends(self, tokens: NDArray[Any], layout: _Layout, before: int) -> list[int]:
        """Where documents or rows end among the tokens. before: how many tokens of the file precede them."""
        if layout.row:
            return list(range(layout.row - before % layout.row, len(tokens) + 1, layout.row))
        if self._settings.split_at is None:
            return []
        ends: list[int] = (np.flatnonzero(tokens == self._settings.split_at) + 1).tolist()
        return ends

    def _layout(self, span: Span) -> _Layout:
        if compression(span.path):
            raise Torn("files of tokens are not read compressed")
        if span.path.lower().endswith(".npy"):
            return _npy_layout(self._read(span, 0, min(_HEADER_BYTES, span.stop)), span.stop)
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
