"""Plain, gzip and zstd bytes, piece by piece, in bounded memory whatever they say they hold.

The name's suffix says which it is. Several gzip members or zstd frames in a row are one stream. A decoder gives all
that it can decode; then, where the bytes end too early, are damaged, or expand beyond `max_ratio`, it raises `Torn`.
What comes out, and in which pieces, follows from the bytes alone.

zstd is decoded block by block. A block is at most 128 KiB, and its header says how long it is compressed, so that
neither a bomb of repeated bytes nor a frame without an end can take more memory than one block and the window.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import zstandard

_PIECE_BYTES = 64 << 10
_OUTPUT_BYTES = 1 << 20
_FREE_BYTES = 16 << 20
"""Decompressed bytes of a span that count for nothing in the ratio: a small file may well be all blanks."""
_WINDOW_BYTES = 128 << 20
"""As `zstd -d` allows without being asked."""
_BLOCK_BYTES = 128 << 10
_GZIP_WBITS = 31
_ZSTD_MAGIC = 0xFD2FB528
_ZSTD_SKIPPABLE = 0x184D2A50
_RLE, _RESERVED = 1, 3

SUFFIXES = {".gz": "gzip", ".zst": "zstd"}


class Torn(Exception):
    """The bytes cannot be decoded further; the text says why."""


def compression(path: str) -> str:
    """ "gzip", "zstd", or "" for plain, by the suffix of the name."""
    return next((kind for suffix, kind in SUFFIXES.items() if path.lower().endswith(suffix)), "")


def uncompressed_name(path: str) -> str:
    """The name without the suffix of its compression."""
    return path[: path.rindex(".")] if compression(path) else path


def decompressed(raw: Iterator[bytes], kind: str, max_ratio: float) -> Iterator[bytes]:
    """The bytes that `raw` holds, in pieces of about a megabyte at most. Raises Torn."""
    if not kind:
        yield from raw
        return
    produced = 0
    for piece, consumed in (_gunzipped if kind == "gzip" else _unzstd)(raw):
        produced += len(piece)
        if produced > _FREE_BYTES + max_ratio * consumed:
            raise Torn(f"it decompresses to more than max_ratio = {max_ratio:g} times its size")
        if piece:
            yield piece


# --- gzip -------------------------------------------------------------------------------------------------------------


def _gunzipped(raw: Iterator[bytes]) -> Iterator[tuple[bytes, int]]:
    """Pieces, each with the compressed bytes given to the decoder so far."""
    inflate = zlib.decompressobj(_GZIP_WBITS)
    consumed, members, inside = 0, 0, False
    for chunk in raw:
        for start in range(0, len(chunk), _PIECE_BYTES):
            left = chunk[start : start + _PIECE_BYTES]
            consumed += len(left)
            while left:
                if not inside and members and not (left := left.lstrip(b"\0")):  # padding between members
                    break
                inside = True
                while True:
                    before = inflate.copy()
                    try:
                        piece = inflate.decompress(left, _OUTPUT_BYTES)
                    except zlib.error as error:
                        yield from ((found, consumed) for found in _up_to_the_damage(before, left))
                        raise Torn(f"damaged gzip: {error}") from None
                    yield piece, consumed
                    left = inflate.unconsumed_tail
                    if inflate.eof or (not left and len(piece) < _OUTPUT_BYTES):
                        break
                if inflate.eof:
                    left, inside, members = inflate.unused_data, False, members + 1
                    inflate = zlib.decompressobj(_GZIP_WBITS)
    if inside:
        raise Torn("it ends inside a gzip member")


def _up_to_the_damage(inflate: zlib._Decompress, damaged: bytes) -> Iterator[bytes]:
    """What the decoder still gives of bytes in which it fails, which it keeps to itself when it is given all."""
    for i in range(len(damaged)):
        try:
            piece = inflate.decompress(damaged[i : i + 1])
        except zlib.error:
            return
        if piece:
            yield piece


# --- zstd -------------------------------------------------------------------------------------------------------------


def _unzstd(raw: Iterator[bytes]) -> Iterator[tuple[bytes, int]]:
    """Pieces, each with the compressed bytes given to the decoder so far."""
    source = _Source(raw)
    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
    while magic := source.take(4, whole=False):
        number = int.from_bytes(magic, "little") if len(magic) == 4 else 0
        if number & ~0xF == _ZSTD_SKIPPABLE:
            source.skip(int.from_bytes(source.take(4), "little"))
        elif number == _ZSTD_MAGIC:
            yield from _frame(source, decompressor, magic)
        else:
            raise Torn(f"no zstd frame begins with {magic.hex()}")


def _frame(source: _Source, decompressor: zstandard.ZstdDecompressor, magic: bytes) -> Iterator[tuple[bytes, int]]:
    descriptor = source.take(1)
    kind = descriptor[0]
    single_segment, has_checksum = bool(kind & 0x20), bool(kind & 0x04)
    size_bytes = (int(single_segment), 2, 4, 8)[kind >> 6]
    rest = source.take((not single_segment) + (0, 1, 2, 4)[kind & 3] + size_bytes)
    decoder = decompressor.decompressobj()
    try:
        decoder.decompress(magic + descriptor + rest)
        last = False
        while not last:
            header = source.take(3)
            told = int.from_bytes(header, "little")
            last, block, size = bool(told & 1), told >> 1 & 3, told >> 3
            if block == _RESERVED or size > _BLOCK_BYTES:
                raise Torn("damaged zstd: a block that cannot be")
            yield decoder.decompress(header + source.take(1 if block == _RLE else size)), source.taken
        if has_checksum:
            decoder.decompress(source.take(4))
    except zstandard.ZstdError as error:
        raise Torn(f"damaged zstd: {error}") from None
    if not decoder.eof:
        raise Torn("damaged zstd: a frame does not end where its last block does")


class _Source:
    """Bytes in the amounts that are asked for. `taken`: how many."""

    def __init__(self, raw: Iterator[bytes]) -> None:
        self._raw = raw
        self._chunk, self._at = b"", 0
        self.taken = 0

    def take(self, size: int, *, whole: bool = True) -> bytes:
        """The next `size` bytes. Fewer at the end if not `whole`, else Torn."""
        while len(self._chunk) - self._at < size:
            more = next(self._raw, None)
            if more is None:
                if whole:
                    raise Torn("it ends inside a zstd frame")
                size = len(self._chunk) - self._at
                break
            self._chunk, self._at = self._chunk[self._at :] + more, 0
        found = self._chunk[self._at : self._at + size]
        self._at += size
        self.taken += size
        return found

    def skip(self, size: int) -> None:
        while size > 0:
            step = min(size, _PIECE_BYTES)
            self.take(step)
            size -= step
