"""Text files: one span, one document. A file that grew gives what was appended as a document of its own.

A writer who needs a file read as a whole writes it under a name that ends in ".tmp" or ".part" and renames it.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

from anytimed.contracts import Record, Rejected
from anytimed_adapters.streams.content import Content, ContentSettings, ContentStream
from anytimed_adapters.streams.records import of_bytes, too_long


class TextFiles(ContentStream):
    """A `Stream` with a document for every text file (UTF-8), plain or compressed (.gz, .zst)."""

    class Settings(ContentSettings):
        """The settings of all file streams."""

    def _records(self, index: int, content: Content, at: int) -> Iterator[tuple[Record | Rejected, int]]:
        text, whole, size = bytearray(), sha256(), 0
        for piece in content:
            content.digest.update(piece)
            whole.update(piece)
            size += len(piece)
            if size <= self._settings.max_record_bytes:
                text += piece
        if size > self._settings.max_record_bytes:
            yield too_long(size, self._settings.max_record_bytes, whole.hexdigest()), at + size
        elif size:
            yield of_bytes(text, self._settings.encoding_errors, self._spans[index].path), at + size
