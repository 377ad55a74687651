"""Spans that are read from their first byte to their last: what text, JSON Lines and tar share.

A span's content is its bytes, decompressed where the file's name says so. A place in it is the offset after an item
(in the file where it is plain, in the span's decompressed bytes otherwise) and the SHA-256 of the content before it. To
resume, the content before is read again, hashed and compared. The digest of a finished span is of its bytes as they
are stored.

Where the content cannot be decoded on, the items before are good; one `Rejected` stands for the rest of the span.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator

from pydantic import Field

from anytimed.contracts import Json, Record, Rejected
from anytimed_adapters.streams.compression import Torn, compression, decompressed
from anytimed_adapters.streams.files import AT_END, Digest, FileSettings, FileStream, Items, torn
from anytimed_adapters.streams.store import Vanished


class ContentSettings(FileSettings):
    """The settings of file streams that may be compressed."""

    max_ratio: float = Field(
        default=1000.0,
        ge=1,
        description="A compressed file that expands to more than this many times its size (beyond the first 16 MiB) is "
        "read no further.",
    )


class Content:
    """The content of a span from its start, in pieces. `digest` is of the content up to the item given last: whoever
    takes pieces updates it."""

    def __init__(self, raw: Iterator[bytes], kind: str, max_ratio: float) -> None:
        self.digest = hashlib.sha256()
        self._raw_digest = hashlib.sha256() if kind else self.digest
        self._raw = _hashed(raw, self._raw_digest) if kind else raw
        self._pieces = decompressed(self._raw, kind, max_ratio)
        self._left = memoryview(b"")

    def __iter__(self) -> Iterator[bytes]:
        left, self._left = self._left, memoryview(b"")
        if left:
            yield bytes(left)
        yield from self._pieces

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end; the digest covers them. Raises Torn."""
        taken, self._left = bytes(self._left[:size]), self._left[size:]
        if len(taken) < size:
            found, missing = [taken], size - len(taken)
            while missing > 0 and (piece := next(self._pieces, b"")):
                found.append(piece[:missing])
                self._left = memoryview(piece)[missing:]
                missing -= len(piece)
            taken = b"".join(found)
        self.digest.update(taken)
        return taken

    def skip(self, size: int) -> int:
        """Read up to `size` bytes and keep nothing; how many there were. Raises Torn."""
        left = size
        while left > 0:
            piece = self._left or memoryview(next(self._pieces, b""))
            if not piece:
                break
            taken, self._left = piece[:left], piece[left:]
            self.digest.update(taken)
            left -= len(taken)
        return size - left

    def finish(self) -> str:
        """Read what is left of the stored bytes; the digest of all of them."""
        if self._raw_digest is self.digest:
            self.digest.update(self._left)
        for piece in self._raw:
            if self._raw_digest is self.digest:
                self.digest.update(piece)
        return self._raw_digest.hexdigest()


class ContentStream(FileStream):
    """A `Stream` over spans of bytes; a format says with `_records` what is in them."""

    _settings: ContentSettings

    @abstractmethod
    def _records(self, index: int, content: Content, at: int) -> Iterator[tuple[Record | Rejected, int]]:
        """Items of span `index`, each with the offset in the content after it.

        `content` begins at offset `at`, which is 0 or was given before. Before an item is yielded, the content's digest
        covers all up to the item's offset. Raises Torn."""

    def _items(self, index: int, at: Json | None) -> Items:
        span = self._spans[index]
        kind = compression(span.path)
        # Of a plain file the offset in the file is said, for people; of a compressed one there is none.
        base = 0 if kind else span.start
        skipped = at["offset"] - base if at else 0
        content = Content(self._store.ranges(span.path, span.start, span.stop), kind, self._settings.max_ratio)
        if at:
            try:
                self._skip(index, content, skipped, at["digest"])
            except Vanished:
                if kind or at["offset"] < span.stop:
                    raise
                return str(at["digest"])  # read to its last byte before it was deleted: nothing is missing
        digest = content.digest
        try:
            for item, end in self._records(index, content, skipped):
                yield item, {"entry": index, "offset": base + end, "digest": digest.hexdigest()}
        except Torn as reason:
            whole = content.finish()
            yield torn(f"{reason}", whole), {"entry": index, "offset": AT_END, "digest": whole}
            return whole
        return content.finish()

    def _skip(self, index: int, content: Content, size: int, expected: str) -> None:
        try:
            found = f"{content.skip(size)} bytes"
        except Torn as reason:
            found = f"bytes that cannot be read: {reason}"
        else:
            if content.digest.hexdigest() == expected:
                return
            found = f"{found} with digest {content.digest.hexdigest()}"
        raise self._store.rewritten(self._spans[index].path, f"{size} bytes with digest {expected}", found)

    def _bytes_read(self, index: int, at: Json) -> int:
        """Of a compressed span nothing is known until it is finished."""
        span = self._spans[index]
        return 0 if compression(span.path) or at["offset"] == AT_END else max(0, at["offset"] - span.start)

    def _settles(self, path: str) -> bool:
        return bool(compression(path))


def _hashed(raw: Iterator[bytes], digest: Digest) -> Iterator[bytes]:
    for chunk in raw:
        digest.update(chunk)
        yield chunk
