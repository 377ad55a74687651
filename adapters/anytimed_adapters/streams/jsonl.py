"""JSON Lines: every line an object whose text field is a document.

A plain file may be discovered at any moment of being written, so a span may end inside a line. Such an unfinished line
is a record of the span if it is a whole JSON object already; otherwise its beginning belongs to the next span of the
file. Which it was follows from the bytes and the spans' boundaries alone: a span looks back to the previous newline and
decides the same at every boundary in between, as the spans before it did. So each record comes exactly once.

A span of a compressed file is whole members or frames: its lines are its own, and its end is the end of a line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from anytimed.contracts import Record, Rejected
from anytimed_adapters.streams.compression import compression
from anytimed_adapters.streams.content import Content, ContentSettings, ContentStream
from anytimed_adapters.streams.json_text import DEEPEST, field_of, is_object
from anytimed_adapters.streams.records import of_text, sha256, too_long

_LOOK_BACK_BYTES = 64 << 10


class JsonLines(ContentStream):
    """A `Stream` with a document for every line (UTF-8), plain or compressed (.gz, .zst); blank lines count for
    nothing."""

    class Settings(ContentSettings):
        """The settings of all file streams, and the field."""

        text_field: str = Field(default="text", description="The field of a line's object that holds the document.")
        max_nesting: int = Field(
            default=100, gt=0, le=DEEPEST, description="Lines that nest deeper are set aside in quarantine."
        )

    _settings: Settings

    def __init__(self, settings: Settings, name: str, **clocks: Any) -> None:
        super().__init__(settings, name, **clocks)
        self._errors = "strict" if settings.encoding_errors == "reject" else "replace"

    def _records(self, index: int, content: Content, at: int) -> Iterator[tuple[Record | Rejected, int]]:
        span = self._spans[index]
        most = self._settings.max_record_bytes
        line = _Line(most)
        if not at and span.start and not compression(span.path):
            for piece in self._store.ranges(span.path, self._line_start(index), span.start):
                line.add(piece)
        update = content.digest.update
        end, first = at, at == span.start == 0
        for piece in content:
            done = 0
            while newline := piece.find(b"\n", done) + 1:
                taken = piece[done:newline]
                done = newline
                update(taken)
                end += len(taken)
                if line.size:
                    line.add(taken)
                    item = self._item_of(line, first)
                    line = _Line(most)
                elif len(taken) > most + 1:
                    item = too_long(len(taken), most, sha256(taken))
                else:
                    item = self._item(taken, first)
                first = False
                if item:
                    yield item, end
            if done < len(piece):
                taken = piece[done:]
                update(taken)
                end += len(taken)
                line.add(taken)
        is_whole = compression(span.path) or (line.content is not None and is_object(line.content))
        if line.size and is_whole and (item := self._item_of(line, first)):
            yield item, end

    def _item_of(self, line: _Line, first: bool) -> Record | Rejected | None:
        if line.content is None:
            return too_long(line.size, self._settings.max_record_bytes, line.digest())
        return self._item(bytes(line.content), first)

    def _item(self, line: bytes, first: bool) -> Record | Rejected | None:
        """The record of a line; None if it is blank. `first`: of the file, where a byte order mark may stand."""
        try:
            text = line.decode("utf-8", self._errors)
        except UnicodeDecodeError as error:
            told = f"the line is not UTF-8: {error.reason} at byte {error.start}"
            return Rejected(told, sha256(line))
        if first:
            text = text.removeprefix("\ufeff")
        if not text or text.isspace():
            return None
        try:
            content = field_of(text, self._settings.text_field, self._settings.max_nesting)
        except ValueError as error:
            return Rejected(f"the line is {error}", sha256(line))
        return of_text(content, self._settings.encoding_errors)

    def _line_start(self, index: int) -> int:
        """Where the line begins that the span's first byte is part of, as far as no span before has given it out."""
        span = self._spans[index]
        start = self._after_newline(span.path, span.start)
        for boundary in self._boundaries(index, start):
            if boundary - start <= self._settings.max_record_bytes:
                content = b"".join(self._store.ranges(span.path, start, boundary))
                if is_object(content):
                    start = boundary
        return start

    def _boundaries(self, index: int, after: int) -> list[int]:
        """Where the span and those before it in its file begin, as far as that is beyond offset `after`; ascending."""
        found: list[int] = []
        for known in self._spans.of_file(index):
            if (start := self._spans[known].start) <= after:
                break
            found.append(start)
        return found[::-1]

    def _after_newline(self, path: str, stop: int) -> int:
        """The offset after the last newline before `stop`; 0 if there is none."""
        while stop > 0:
            start = max(0, stop - _LOOK_BACK_BYTES)
            found = b"".join(self._store.ranges(path, start, stop)).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            stop = start
        return 0


class _Line:
    """A line that comes in pieces. `content` is None once it is longer than `most` bytes; then only its hash is
    kept."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._hash = hashlib.sha256()
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
