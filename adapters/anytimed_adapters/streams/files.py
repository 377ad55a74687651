"""Files behind any fsspec URL as a stream of spans: what all file formats share.

`discover` lists the files of a glob without any cache and says what is new: a new file is one span, a file that grew
is a span from where the last one stopped. `adopt` appends spans to the list; `read` goes through it, and a format
gives the records of each span with the places between them. A place inside a span carries the digest of what lies
before it, and a finished span has its own. These digests are how rewritten data is recognised: when a place is
resumed, when a file's size or version (modification time, or the store's etag) is not the one that was journalled, and
when a file grew (its last finished span, so that a growing log costs no more than reading it twice; the whole of it at
the next start).

A format whose files make no sense before they are whole says that it `_settles`: where a store shows files that are
still being written, such a file is discovered once nothing has changed it for `settle_s`.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, ClassVar, Protocol

from fsspec.utils import glob_translate
from pydantic import BaseModel, ConfigDict, Field, field_validator

from anytimed.contracts import Finished, Json, Record, Rejected
from anytimed_adapters.streams.records import Errors
from anytimed_adapters.streams.spans import Fingerprints, Spans
from anytimed_adapters.streams.store import FileStore, Vanished
from anytimed_adapters.streams.walk import Listing, Version

AT_END = -1
"""The offset of a place behind all items of a span that could not be read to its end."""
_LISTING_KEEPS_S = 30.0
"""How long the listing of a start serves the first `discover` too."""


class Digest(Protocol):
    """The part of a hashlib object that a reader of items needs."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


Items = Generator[tuple[Record | Rejected, Json], None, str]
"""Items of one span, each with the place after it; returns the digest of the span."""


class FileSettings(BaseModel):
    """Which files, and what a record may be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(description='The files: an fsspec URL or a path, with wildcards: "s3://bucket/data/**/*.jsonl".')
    exclude: tuple[str, ...] = Field(
        default=(),
        description='Globs of files to leave out, relative to the part of `url` before its first wildcard: "**/*.bak". '
        'Names that begin with "." or end in ".tmp" or ".part", folders included, are always left out.',
    )
    storage_options: dict[str, Any] = Field(
        default_factory=dict, repr=False, description="Passed to the fsspec filesystem: endpoint, credentials."
    )
    settle_s: float = Field(
        default=5.0,
        ge=0,
        description="A file that cannot be read in parts (compressed, Parquet, .npy, tar) is taken once it has not "
        "changed for this long, in seconds; only where the store shows files that are still being written.",
    )
    max_record_bytes: int = Field(default=16 << 20, gt=0, description="Longer records are set aside in quarantine.")
    encoding_errors: Errors = Field(
        default="replace",
        description="What is not UTF-8: replaced by U+FFFD, or the record is set aside in quarantine.",
    )

    @field_validator("exclude")
    @classmethod
    def _globs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            glob_translate(pattern)  # ValueError says what is wrong
        return value


class FileStream(ABC):
    """A `Stream` over spans of files; a format says with `_items` what the records of one span are.

    passing_settings: those whose change makes no other source of it. clock, wall_clock: seconds, for `settle_s`."""

    passing_settings: ClassVar[frozenset[str]] = frozenset({"url", "exclude", "settle_s"})

    def __init__(
        self,
        settings: FileSettings,
        name: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._name = name
        self._clock, self._wall_clock = clock, wall_clock
        self._store = FileStore(settings.url, settings.exclude, settings.storage_options, name)
        self._spans = Spans()
        self._finished = Fingerprints()
        self._unsettled: dict[str, tuple[int, Version, float]] = {}
        self._start_listing: tuple[Listing, float] | None = None  # of what differed at `verify`

    # --- Stream -------------------------------------------------------------------------------------------------------

    def prepare(self, place: Json | None, done: Callable[[], None]) -> None:
        """Begin to list the files, where that takes long."""
        if self._has_start_listing():
            done()
        else:
            self._store.begin_list(place["entry"] if place else 0, done)

    def forget(self) -> None:
        """The next list is as new as can be, but for the one that a start made."""
        self._store.forget_list()

    def close(self) -> None:
        """End a list that was begun."""
        self._store.close()

    def discover(self) -> list[Any]:
        """Rows [path, start, stop, version] of new and grown files, by path. Raises StreamUnavailable; Refused on a
        shrunk or rewritten file."""
        listing = self._listing_of_start() or self._store.list(self._changed)
        new: list[Any] = []
        before, self._unsettled = self._unsettled, {}
        for path, size, version in sorted(listing.rows(), key=itemgetter(0)):
            start = 0
            if (last := self._spans.last(path)) is not None:
                start = self._spans[last].stop
                if not self._spans.is_checked(last, size, version):
                    if size > start and not self._grows(path):
                        raise self._store.rewritten(path, f"{start} bytes, for such a file cannot grow", f"{size}")
                    self._require(last, size)
                    self._spans.note_checked(last, size, version)
            if size > start and self._has_settled(path, size, version, before.get(path)):
                new.append([path, start, size, version])
        return new

    def adopt(self, entries: Sequence[Any]) -> None:
        self._spans.adopt(entries)

    def read(self, place: Json | None) -> Iterator[tuple[Record | Rejected | Finished, Json]]:
        """Items after `place`: {"entry", where in the entry, "digest" of what lies before that}."""
        index = place["entry"] if place else 0
        at = place if place and place["digest"] else None
        while index < len(self._spans):
            if at is not None and at["offset"] == AT_END:
                digest = self._digest(index)
                self._compare(index, at["digest"], digest)
            else:
                digest = yield from self._items(index, at)
            if (known := self._finished.get(index)) is not None:  # read again, in a second pass say
                self._compare(index, known, digest)
            self._finished.put(index, digest)
            yield Finished(index, digest), {"entry": index + 1, "offset": 0, "digest": ""}
            index, at = index + 1, None

    def verify(self, finished: Mapping[int, str]) -> None:
        """Compare spans whose file has another version than journalled, by content; a file that is gone is fine."""
        self._finished.give(finished)
        grown = Listing()  # and the same as before

        def changed(part: Listing) -> Listing:
            rows = set(self._spans.changed(part))
            grown.extend(part.of(row for row in self._spans.grown(part) if row not in rows))
            return part.of(sorted(rows))

        listing = self._store.list(changed)
        for path, size, version in (*listing.rows(), *grown.rows()):
            last = self._spans.last(path)
            for index in sorted(self._spans.of_file(last)) if last is not None else ():
                span = self._spans[index]
                if index in finished and (size, version) != (span.stop, span.version):
                    self._require(index, size)
            if last is not None and last in finished:
                self._spans.note_checked(last, size, version)
        self._start_listing = (listing, self._clock())

    def lag(self, place: Json | None) -> int:
        """Bytes adopted and not yet read, after `place`."""
        if place is None:
            return self._spans.bytes_from(0)
        index = int(place["entry"])
        if index >= len(self._spans):
            return 0
        return self._spans.bytes_from(index) - (self._bytes_read(index, place) if place["digest"] else 0)

    def describe(self, place: Json | None) -> str:
        """The file that is read next, and how much of it is left, as far as a format knows that."""
        index, begun = (place["entry"], bool(place["digest"])) if place else (0, False)
        left = self.lag(place) - self.lag({"entry": index + 1, "offset": 0, "digest": ""})
        if begun and not left:
            index, begun = index + 1, False
        if index >= len(self._spans):
            return ""
        span, at = self._spans[index], f"entry {index + 1:,} of {len(self._spans):,}"
        size = span.stop - span.start
        rest = "" if not begun else f", its last {left:,} of {size:,} bytes" if left < size else ", begun"
        return f"{span.path}{rest} ({at})"

    # --- what a format says -------------------------------------------------------------------------------------------

    @abstractmethod
    def _items(self, index: int, at: Json | None) -> Items:
        """Items of span `index` after the place `at`, one of those given before; None: all of them.

        Raises StreamUnavailable, and Refused where what lies before `at` has not its digest any more."""

    def _digest(self, index: int) -> str:
        """What `_items` returns for the whole span, without the items."""
        span, digest = self._spans[index], hashlib.sha256()
        for chunk in self._store.ranges(span.path, span.start, span.stop):
            digest.update(chunk)
        return digest.hexdigest()

    def _bytes_read(self, index: int, at: Json) -> int:
        """How many of the span's bytes lie before a place in it, as far as that is known; less otherwise."""
        return 0

    def _grows(self, path: str) -> bool:
        """Whether such a file may get longer: what is appended is then a span that can be read by itself."""
        return True

    def _settles(self, path: str) -> bool:
        """Whether such a file is left alone until it is no longer written to."""
        return False

    # --- comparing ----------------------------------------------------------------------------------------------------

    def _compare(self, index: int, expected: str, found: str) -> None:
        if expected != found:
            span = self._spans[index]
            told = f"bytes {span.start} to {span.stop} with digest {expected}"
            raise self._store.rewritten(span.path, told, found)

    def _require(self, index: int, size: int) -> None:
        """Raise Refused unless the span, in a file of `size` bytes, has its content; what was not read is taken as
        is."""
        span = self._spans[index]
        if size < span.stop:
            raise self._store.rewritten(span.path, f"at least {span.stop} bytes", f"{size} bytes")
        if (expected := self._finished.get(index)) is None:
            return
        try:
            found = self._digest(index)
        except Vanished:
            return
        self._compare(index, expected, found)

    def _has_start_listing(self) -> bool:
        return self._start_listing is not None and self._clock() - self._start_listing[1] < _LISTING_KEEPS_S

    def _changed(self, part: Listing) -> Listing:
        return part.of(self._spans.changed(part))

    def _listing_of_start(self) -> Listing | None:
        kept, fits, self._start_listing = self._start_listing, self._has_start_listing(), None
        return kept[0] if kept is not None and fits else None

    def _has_settled(self, path: str, size: int, version: Version, before: tuple[int, Version, float] | None) -> bool:
        settle_s = self._settings.settle_s
        if not (settle_s and self._store.shows_unfinished_files and self._settles(path)):
            return True
        if isinstance(version, int) and self._wall_clock() - version / 1e9 >= settle_s:
            return True
        # A clock that was set, or a copy that keeps the time of its original: then our own watching says it.
        since = before[2] if before and before[:2] == (size, version) else self._clock()
        self._unsettled[path] = (size, version, since)
        return self._clock() - since >= settle_s


def torn(reason: str, digest: str) -> Rejected:
    """What stands for the rest of a span that cannot be read on."""
    return Rejected(f"the rest of the file is not read: {reason}", digest)
