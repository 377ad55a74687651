"""Files behind any fsspec URL as a stream of spans: what text and JSON Lines share.

`discover` lists the files of a glob without any cache and says what is new: a new file is one span, a file that grew
is a span from where the last one stopped. `adopt` appends spans to the list; `read` goes through it and hashes every
byte on the way, so that a place inside a span carries the digest of what lies before it, and a finished span its own.
These digests are how rewritten data is recognised: when a place is resumed, when a file's signature (size and
modification time, or the store's etag) is not the one that was journalled, and when a file grew (its last finished
span, so that a growing log costs no more than reading it twice; the whole of it at the next start).

Bytes come in ranges of bounded size. No handle is held between two items: a file that vanishes or a store that does not
answer is StreamUnavailable, and reading goes on at the same byte later.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate
from pydantic import BaseModel, ConfigDict, Field, field_validator

from anytimed.contracts import ConfigError, Finished, Json, Record, Refused, Rejected, StreamUnavailable
from anytimed.urls import bounded, credentials, told

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_RANGE_BYTES = 4 << 20
_WEB = ("http://", "https://")
_REMEDY = "Restore the file as it was (new data goes into new files, or at the end), or start over with --fresh"

# Errors of store drivers that are no OSError. Looked up only in modules that a driver has already loaded.
_DRIVER_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)

_logger = logging.getLogger(__name__)


class Digest(Protocol):
    """The part of a hashlib object that a reader of items needs."""

    def update(self, data: bytes, /) -> None: ...


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
    max_record_bytes: int = Field(default=16 << 20, gt=0, description="Longer records are set aside in quarantine.")
    encoding_errors: Literal["replace", "reject"] = Field(
        default="replace",
        description="What is not UTF-8: replaced by U+FFFD, or the record is set aside in quarantine.",
    )

    @field_validator("exclude")
    @classmethod
    def _globs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            glob_translate(pattern)  # ValueError says what is wrong
        return value


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [start, stop) of a file. path: relative to the glob's base. signature: of the file when it was
    discovered."""

    path: str
    start: int
    stop: int
    signature: str


class FileStream(ABC):
    """A `Stream` over spans of files; a format says with `_items` what the records of one span are."""

    def __init__(self, settings: FileSettings, name: str) -> None:
        self._settings = settings
        self._name = name
        self._secrets = credentials(settings.url, settings.storage_options)
        # A query (a signature, a token) is no part of a file's name: it would stand in the journal, and the next
        # signature would make another file of it.
        url, _, query = settings.url.partition("?") if settings.url.startswith(_WEB) else (settings.url, "", "")
        self._query = f"?{query}" if query else ""
        try:
            fs, pattern = url_to_fs(url, **bounded(url, settings.storage_options))
            glob_translate(pattern)
        except (ImportError, ValueError, TypeError) as error:
            raise ConfigError(
                f"source {name!r}: url = {self._told(settings.url)!r} cannot be opened: {self._told(str(error))}. "
                "Expected a path or an fsspec URL whose driver is installed (s3://: pip install 'anytimed[s3]', "
                "gs://: pip install 'anytimed[gcs]')"
            ) from None
        self._fs: AbstractFileSystem = fs
        self._pattern: str = pattern
        self._base = _base(pattern)
        self._excluded = [re.compile(glob_translate(glob)) for glob in settings.exclude]
        self._spans: list[Span] = []
        self._ends: list[int] = [0]  # bytes adopted up to and including a span; one longer than the spans
        self._of_path: dict[str, list[int]] = {}
        self._finished: dict[int, str] = {}
        self._checked: dict[str, str] = {}  # path: the newest signature under which its content was found unchanged
        self._unnamed: set[str] = set()

    # --- Stream -------------------------------------------------------------------------------------------------------

    def discover(self) -> list[Json]:
        """Spans of new and grown files, by path. Raises StreamUnavailable; Refused on a shrunk or rewritten file."""
        new = []
        for path, (size, signature) in sorted(self._list().items()):
            known = self._of_path.get(path)
            last = self._spans[known[-1]] if known else Span(path, 0, 0, "")
            if known and signature != self._checked[path]:
                self._require(known[-1], size)
                self._checked[path] = signature
            if size > last.stop:
                new.append(asdict(Span(path, last.stop, size, signature)))
        return new

    def adopt(self, entries: Sequence[Json]) -> None:
        for entry in entries:
            span = Span(**entry)
            self._of_path.setdefault(span.path, []).append(len(self._spans))
            self._checked[span.path] = span.signature
            self._spans.append(span)
            self._ends.append(self._ends[-1] + span.stop - span.start)

    def read(self, place: Json | None) -> Iterator[tuple[Record | Rejected | Finished, Json]]:
        """Items after `place`: {"entry", "offset" in the file, "digest" of the span's bytes before the offset}."""
        index, offset, digest = (place["entry"], place["offset"], place["digest"]) if place else (0, 0, "")
        while index < len(self._spans):
            yield from self._read_span(index, offset, digest)
            index, offset, digest = index + 1, 0, ""

    def verify(self, finished: Mapping[int, str]) -> None:
        """Compare spans whose file has another signature than journalled, by content; a file that is gone is fine."""
        self._finished.update(finished)
        found = self._list()
        for index in sorted(finished):
            span = self._spans[index]
            if span.path in found:
                size, signature = found[span.path]
                if signature != span.signature:
                    self._require(index, size)
                if index == self._of_path[span.path][-1]:
                    self._checked[span.path] = signature

    def lag(self, place: Json | None) -> int:
        """Bytes adopted and not yet read, after `place`."""
        if place is None:
            return self._ends[-1]
        index = int(place["entry"])
        if index >= len(self._spans):
            return 0
        into = max(0, int(place["offset"]) - self._spans[index].start)
        return self._ends[-1] - self._ends[index] - into

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
    def _items(self, index: int, at: int, digest: Digest) -> Iterator[tuple[Record | Rejected, int]]:
        """Records of span `index` from byte `at` of its file on, each with the offset after it.

        `at` is the span's start or an offset given before. Before yielding an item, `digest` has been given the bytes
        from `at` up to the item's offset; at the end, all up to the span's stop.
        """

    def _record(self, text: str) -> Record | Rejected:
        """A record of the text; its digest is of the text in UTF-8, so that equal texts are equal in any file
        format."""
        try:
            content = text.encode()
        except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell
            if self._settings.encoding_errors == "reject":
                return Rejected(f"the text is not Unicode: {error}", _sha256(text.encode("utf-8", "surrogatepass")))
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            content = text.encode()
        return Record(text, _sha256(content))

    def _too_long(self, size: int, digest: str) -> Rejected:
        return Rejected(f"{size} bytes, the most is max_record_bytes = {self._settings.max_record_bytes}", digest)

    def _bytes(self, path: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) of a file, in ranges. Raises StreamUnavailable, Refused where the file is shorter."""
        while start < stop:
            length = min(_RANGE_BYTES, stop - start)
            chunk = self._range(path, start, start + length)
            if len(chunk) < length:
                raise self._rewritten(path, f"at least {stop} bytes", f"{start + len(chunk)} bytes")
            yield chunk
            start += length

    # --- reading and comparing ----------------------------------------------------------------------------------------

    def _read_span(self, index: int, offset: int, prefix: str) -> Iterator[tuple[Record | Rejected | Finished, Json]]:
        span = self._spans[index]
        digest = hashlib.sha256()
        at = max(offset, span.start)
        if at > span.start:
            try:
                for chunk in self._bytes(span.path, span.start, at):
                    digest.update(chunk)
            except _Vanished:
                if at < span.stop:
                    raise
                # read to its last byte before it was deleted: nothing is missing
                yield Finished(index, prefix), {"entry": index + 1, "offset": 0, "digest": ""}
                return
            if digest.hexdigest() != prefix:
                raise self._rewritten(span.path, f"{_range(span.start, at)} with digest {prefix}", digest.hexdigest())
        for item, end in self._items(index, at, digest):
            yield item, {"entry": index, "offset": end, "digest": digest.hexdigest()}
        self._finished[index] = digest.hexdigest()
        yield Finished(index, digest.hexdigest()), {"entry": index + 1, "offset": 0, "digest": ""}

    def _require(self, index: int, size: int) -> None:
        """Raise Refused unless the span, in a file of `size` bytes, has its content; what was not read is taken as
        is."""
        span = self._spans[index]
        if size < span.stop:
            raise self._rewritten(span.path, f"at least {span.stop} bytes", f"{size} bytes")
        if (expected := self._finished.get(index)) is None:
            return
        digest = hashlib.sha256()
        try:
            for chunk in self._bytes(span.path, span.start, span.stop):
                digest.update(chunk)
        except _Vanished:
            return
        if digest.hexdigest() != expected:
            told = f"{_range(span.start, span.stop)} with digest {expected}"
            raise self._rewritten(span.path, told, digest.hexdigest())

    def _rewritten(self, path: str, expected: str, found: str) -> Refused:
        return Refused(
            f"source {self._name!r}: {self._told(self._full(path))} changed after it was taken into the run: "
            f"expected {expected}, found {found}. {_REMEDY}"
        )

    # --- the store ----------------------------------------------------------------------------------------------------

    def _full(self, path: str) -> str:
        return f"{self._base}/{path}{self._query}"

    def _told(self, text: str) -> str:
        return told(text, self._secrets)

    def _list(self) -> dict[str, tuple[int, str]]:
        """Size in bytes and signature of every file of the glob that is not left out and not empty, by relative
        path."""
        with self._answering(self._settings.url):
            listed = self._listed_locally() if isinstance(self._fs, LocalFileSystem) else self._listed_by_store()
            return {path: (size, f"{size}-{version}") for path, size, version in listed if size}

    def _listed_by_store(self) -> Iterator[tuple[str, int, str]]:
        self._fs.invalidate_cache()
        if self._pattern.startswith(_WEB) and not set(self._pattern) & set("*["):
            # A glob takes a file that must not be read for one that is not there; asked for by name it is an error.
            url = self._pattern + self._query
            found = {url: self._fs.info(url)}
        else:
            found = self._fs.glob(self._pattern + self._query, detail=True)
        for full, info in found.items():
            path = full[len(self._base) + 1 :].removesuffix(self._query)
            if info["type"] != "directory" and not self._left_out(path):
                if info["size"] is None:
                    raise OSError(f"{path}: its size is not told, or it is sent compressed; expected a plain file")
                yield path, info["size"], _version(info)

    def _listed_locally(self) -> Iterator[tuple[str, int, str]]:
        """fsspec's glob takes a folder below the first that it cannot list for an empty one, rounds the modification
        time, and does not look through links; so local files are walked here, by the same translation of the glob."""
        matches = re.compile(glob_translate(self._pattern)).match
        rest = self._pattern[len(self._base) + 1 :]
        deepest = None if "**" in rest else rest.count("/")
        seen: set[tuple[int, int]] = set()  # folders, so that a link to one above ends the walk there
        for folder, folders, files in os.walk(self._base, onerror=_raise, followlinks=True):
            stat = Path(folder).stat()
            depth = len(Path(folder).relative_to(self._base).parts)
            if (stat.st_dev, stat.st_ino) in seen or (deepest is not None and depth >= deepest):
                folders.clear()
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            for full in (f"{folder}/{name}" for name in files):
                path = full[len(self._base) + 1 :]
                if matches(full) and not self._left_out(path):
                    stat = Path(full).stat()
                    if S_ISREG(stat.st_mode):
                        yield path, stat.st_size, str(stat.st_mtime_ns)

    def _left_out(self, path: str) -> bool:
        parts = path.split("/")
        if any(part.startswith(".") or part.endswith((".tmp", ".part")) for part in parts):
            return True
        if any(glob.match(path) for glob in self._excluded):
            return True
        try:
            path.encode()
        except UnicodeEncodeError:
            if path not in self._unnamed:
                self._unnamed.add(path)
                _logger.warning(
                    "source %r: %r is left out: its name is not UTF-8 and cannot be journalled", self._name, path
                )
            return True
        return False

    def _range(self, path: str, start: int, stop: int) -> bytes:
        full = self._full(path)
        with self._answering(full):
            chunk: bytes = self._fs.cat_file(full, start=start, end=stop)
            return chunk

    @contextmanager
    def _answering(self, what: str) -> Iterator[None]:
        loaded = [(sys.modules.get(module), error) for module, error in _DRIVER_ERRORS]
        errors = tuple(getattr(module, error) for module, error in loaded if hasattr(module, error))
        try:
            yield
        except FileNotFoundError as error:
            said = f"{what} is not there: {error}"
            raise _Vanished(f"source {self._name!r}: {self._told(said)}. Put it back; reading goes on") from None
        except (OSError, *errors) as error:
            said = f"{what} cannot be read: {type(error).__name__}: {error}"
            raise StreamUnavailable(f"source {self._name!r}: {self._told(said)}. It is tried again") from None


class _Vanished(StreamUnavailable):
    """A file is not there (any more)."""


def _raise(error: OSError) -> None:
    raise error


def _base(pattern: str) -> str:
    """The folder before the first wildcard; the file's own folder where there is none."""
    parts = pattern.split("/")
    wild = (i for i, part in enumerate(parts) if set(part) & set("*?["))
    return "/".join(parts[: next(wild, len(parts) - 1)])


def _version(info: Mapping[str, Any]) -> str:
    """What a store says changes with an object's content or with every write of it; "" where it says nothing."""
    for key in (
        "ETag",
        "etag",
        "md5Hash",
        "generation",
        "mtime",
        "LastModified",
        "last_modified",
        "updated",
        "created",
    ):
        if info.get(key):
            return str(info[key]).strip('"')
    return ""


def _range(start: int, stop: int) -> str:
    return f"bytes {start} to {stop}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
