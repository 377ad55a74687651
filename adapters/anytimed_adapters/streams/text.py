"""Text files: one span, one document. A file that grew gives what was appended as a document of its own.

A writer who needs a file read as a whole writes it under a name that ends in ".tmp" or ".part" and renames it.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

from anytimed.contracts import Record, Rejected
from anytimed_adapters.streams.files import Digest, FileSettings, FileStream


class TextFiles(FileStream):
    """A `Stream` with a document for every text file (UTF-8)."""

    class Settings(FileSettings):
        """The settings of all file streams."""

    def __init__(self, settings: Settings, name: str) -> None:
        super().__init__(settings, name)

    def _items(self, index: int, at: int, digest: Digest) -> Iterator[tuple[Record | Rejected, int]]:
        span = self._spans[index]
        size = span.stop - at
        if not size:
            return
        fits = size <= self._settings.max_record_bytes
        content, whole = bytearray(), sha256()
        for chunk in self._bytes(span.path, at, span.stop):
            digest.update(chunk)
            whole.update(chunk)
            if fits:
                content += chunk
        if not fits:
            yield self._too_long(size, whole.hexdigest()), span.stop
            return
        try:
            text = content.decode("utf-8", "strict" if self._settings.encoding_errors == "reject" else "replace")
        except UnicodeDecodeError as error:
            yield Rejected(f"{span.path} is not UTF-8: {error}", whole.hexdigest()), span.stop
        else:
            yield self._record(text), span.stop
