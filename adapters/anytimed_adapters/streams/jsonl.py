"""JSON Lines: every line an object whose text field is a document.

A file may be discovered at any moment of being written, so a span may end inside a line. Such an unfinished line is a
record of the span if it is a whole JSON object already; otherwise its beginning belongs to the next span of the file.
Which it was follows from the bytes and the spans' boundaries alone: a span looks back to the previous newline and
decides the same at every boundary in between, as the spans before it did. So each record comes exactly once.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

from pydantic import Field

from anytimed.contracts import Record, Rejected
from anytimed_adapters.streams.files import Digest, FileSettings, FileStream

_LOOK_BACK_BYTES = 64 << 10
_SHOWN_CHARACTERS = 300
"""Of a line's keys, which may be as long as the line."""


class JsonLines(FileStream):
    """A `Stream` with a document for every line (UTF-8); blank lines count for nothing."""

    class Settings(FileSettings):
        """The settings of all file streams, and the field."""

        text_field: str = Field(default="text", description="The field of a line's object that holds the document.")

    def __init__(self, settings: Settings, name: str) -> None:
        super().__init__(settings, name)
        self._field = settings.text_field

    def _items(self, index: int, at: int, digest: Digest) -> Iterator[tuple[Record | Rejected, int]]:
        span = self._spans[index]
        end = at if at > span.start else self._line_start(index)
        line = _Line(self._settings.max_record_bytes)
        for chunk in self._bytes(span.path, end, span.stop):
            done = 0
            while done < len(chunk):
                newline = chunk.find(b"\n", done)
                stop = newline + 1 if newline >= 0 else len(chunk)
                piece = chunk[done:stop]
                digest.update(piece[max(0, span.start - end) :])
                line.add(piece)
                end += len(piece)
                done = stop
                if newline >= 0:
                    if item := self._item(line, end == line.size):
                        yield item, end
                    line = _Line(self._settings.max_record_bytes)
        if line.content is not None and _is_object(line.content):
            item = self._item(line, end == line.size)
            assert item is not None, "an object is not blank"
            yield item, end

    def _item(self, line: _Line, first: bool) -> Record | Rejected | None:
        """The record of a line; None if it is blank. `first`: of the file, where a byte order mark may stand."""
        if line.content is None:
            return self._too_long(line.size, line.digest())
        strict = self._settings.encoding_errors == "reject"
        try:
            text = line.content.decode("utf-8", "strict" if strict else "replace")
            text = text.removeprefix("\ufeff") if first else text
            if not text.strip():
                return None
            value: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            what = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON"
            return Rejected(f"the line is {what}: {error}", line.digest())
        if not isinstance(value, dict):
            return Rejected(f"the line is {type(value).__name__}, expected an object", line.digest())
        if self._field not in value:
            found = f"{sorted(value)}"[:_SHOWN_CHARACTERS]
            return Rejected(f"no field {self._field!r}, found {found}", line.digest())
        content = value[self._field]
        if not isinstance(content, str) or not content:
            told = "empty" if content == "" else type(content).__name__
            return Rejected(f"field {self._field!r} is {told}, expected text", line.digest())
        return self._record(content)

    def _line_start(self, index: int) -> int:
        """Where the line begins that the span's first byte is part of, as far as no span before has given it out."""
        span = self._spans[index]
        start = self._after_newline(span.path, span.start)
        for boundary in self._boundaries(index, start):
            if boundary - start <= self._settings.max_record_bytes:
                content = b"".join(self._bytes(span.path, start, boundary))
                if _is_object(content):
                    start = boundary
        return start

    def _boundaries(self, index: int, after: int) -> list[int]:
        """Where the span and those before it in its file begin, as far as that is beyond offset `after`; ascending."""
        spans = self._of_path[self._spans[index].path]
        found: list[int] = []
        for known in range(bisect_right(spans, index) - 1, -1, -1):
            if (start := self._spans[spans[known]].start) <= after:
                break
            found.append(start)
        return found[::-1]

    def _after_newline(self, path: str, stop: int) -> int:
        """The offset after the last newline before `stop`; 0 if there is none."""
        while stop > 0:
            start = max(0, stop - _LOOK_BACK_BYTES)
            found = b"".join(self._bytes(path, start, stop)).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            stop = start
        return 0


class _Line:
    """A line as it comes in. `content` is None once it is longer than `most` bytes; then only its hash is kept."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._hash = sha256()
        self.content: bytearray | None = bytearray()
        self.size = 0

    def add(self, piece: bytes) -> None:
        self._hash.update(piece)
        self.size += len(piece)
        if self.content is not None:
            self.content += piece
            # the line's end does not count: a record is as long with it as without
            if self.size - piece.endswith(b"\n") > self._most:
                self.content = None

    def digest(self) -> str:
        return self._hash.hexdigest()


def _is_object(content: bytes | bytearray) -> bool:
    """Whether an unfinished line is a whole JSON object already. Most are not, and most of those do not end in a
    brace."""
    if not content.rstrip().endswith(b"}"):
        return False
    try:
        return isinstance(json.loads(content.decode("utf-8", "replace").removeprefix("\ufeff")), dict)
    except (ValueError, RecursionError):
        return False
