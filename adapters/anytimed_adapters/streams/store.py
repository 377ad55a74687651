"""The files behind one fsspec URL: the only place that talks to a filesystem.

`FileStore` opens the URL, lists its files without any cache (see listing.py), and reads ranges of bounded size. No
handle is held between two ranges. Every failure of a store comes out as one of three: a file that is not there
(`Vanished`), a store that does not answer (StreamUnavailable), and a file shorter than what was taken into the run
(Refused). Credentials stay out of every message.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from anytimed.contracts import ConfigError, Refused, StreamUnavailable
from anytimed.urls import bounded, credentials, told
from anytimed_adapters.streams import lister
from anytimed_adapters.streams.listing import listed_by_store, selection
from anytimed_adapters.streams.walk import Listing

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

log = logging.getLogger(__name__)

RANGE_BYTES = 4 << 20
_WEB = ("http://", "https://")
_REMEDY = "Restore the file as it was (new data goes into new files, or at the end), or start over with --fresh"

# Filesystems on which a file can be seen while it is being written. Object stores show an object once it is whole.
_IN_PLACE = frozenset({"file", "local", "sftp", "ssh", "smb", "ftp", "hdfs", "webhdfs", "arrow_hdfs", "dir"})

# Errors of store drivers that are no OSError. Looked up only in modules that a driver has already loaded.
_DRIVER_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
    ("huggingface_hub.errors", "HfHubHTTPError"),
    ("httpx", "HTTPError"),
    ("requests", "RequestException"),
)


class Vanished(StreamUnavailable):
    """A file is not there (any more)."""


class FileStore:
    """The files of a glob. Paths are relative to the folder before its first wildcard.

    Raises ConfigError where the URL cannot be opened."""

    def __init__(self, url: str, exclude: Sequence[str], options: Mapping[str, Any], name: str) -> None:
        self._url = url
        self._name = name
        self._secrets = credentials(url, options)
        # A query (a signature, a token) is no part of a file's name: it would stand in the journal, and the next
        # signature would make another file of it.
        plain, _, query = url.partition("?") if url.startswith(_WEB) else (url, "", "")
        self._query = f"?{query}" if query else ""
        try:
            fs, pattern = url_to_fs(plain, **bounded(plain, options))
            self._selection = selection(pattern, exclude)
        except (ImportError, ValueError, TypeError) as error:
            raise ConfigError(
                f"source {name!r}: url = {self.told(url)!r} cannot be opened: {self.told(str(error))}. "
                "Expected a path or an fsspec URL whose driver is installed (s3://: pip install 'anytimed[s3]', "
                "gs://: pip install 'anytimed[gcs]', hf://: pip install 'anytimed[hf]')"
            ) from None
        self._fs: AbstractFileSystem = fs
        self._pattern = pattern
        self._warned: set[str] = set()  # of paths that cannot be journalled
        self._lister = lister.Lister(self._selection)
        self._listing = threading.Lock()  # one list at a time
        self._begun: Future[Listing] | None = None
        self.is_local = isinstance(fs, LocalFileSystem)
        protocols = fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,)
        self.shows_unfinished_files = bool(_IN_PLACE & set(protocols))

    def begin_list(self, count: int, done: Callable[[], None]) -> None:
        """Begin the next `list` in a thread, if that takes long; about `count` files were there once. `done` is called,
        from any thread, when `list` need not wait."""
        if self.is_local:
            self._lister.count = max(self._lister.count, count)
            self._lister.begin(done)
            return
        if not self._fs.async_impl:  # others are not made for two threads
            done()
            return
        if self._begun is None:
            self._begun = Future()
            threading.Thread(target=self._answer, args=[self._begun], name="anytimed-list", daemon=True).start()
        self._begun.add_done_callback(lambda _: done())

    def forget_list(self) -> None:
        """The next `list` is to be as new as can be, whatever has been begun."""
        self._begun = None
        self._lister.forget()

    def list(self, select: Callable[[Listing], Listing] = lambda part: part) -> Listing:
        """Every file of the glob that is neither left out nor empty, now or at `begin_list`; what is wanted of them,
        part by part. Raises StreamUnavailable, and what `select` raises."""
        begun, self._begun = self._begun, None
        if self.is_local:
            with self._answering(self._url):
                found = self._lister.list(select)
        else:
            found = select(begun.result() if begun is not None else self._listed())
        for path in sorted(self._selection.unnamed - self._warned):
            self._warned.add(path)
            log.warning("source %r: %r is left out: its name is not UTF-8 and cannot be journalled", self._name, path)
        return found

    def _answer(self, begun: Future[Listing]) -> None:
        try:
            begun.set_result(self._listed())
        except BaseException as error:  # noqa: BLE001 - raised where it is asked for
            begun.set_exception(error)

    def _listed(self) -> Listing:
        with self._listing, self._answering(self._url):
            web = self._pattern.startswith(_WEB)
            return listed_by_store(self._fs, self._pattern, self._selection, self._query, by_name=web)

    def close(self) -> None:
        """End what `begin_list` began."""
        self.forget_list()

    def full(self, path: str) -> str:
        """The path as the filesystem takes it, query included."""
        return f"{self._selection.base}/{path}{self._query}"

    def range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer where the file is shorter. Raises Vanished, StreamUnavailable."""
        full = self.full(path)
        with self._answering(full):
            if self.is_local:
                return _local_range(full, start, stop)
            try:
                chunk: bytes = self._fs.cat_file(full, start=start, end=stop)
            except Exception:
                # S3 and HTTP answer 416 where a range begins at the end or behind it, and each driver tells that in
                # its own way.
                if not self._ends_by(full, start):
                    raise
                return b""
            return chunk

    def _ends_by(self, full: str, at: int) -> bool:
        """Whether the file, asked now and not from what was listed, has at most so many bytes. False where the store
        does not say: then what the read itself met is what is told."""
        with suppress(Exception):  # each driver has its own
            self._fs.invalidate_cache(self._fs._parent(full))
            size = self._fs.size(full)
            return size is not None and size <= at
        return False

    def ranges(self, path: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) of a file, piece by piece. Raises StreamUnavailable, Refused where the file is
        shorter."""
        while start < stop:
            length = min(RANGE_BYTES, stop - start)
            chunk = self.range(path, start, start + length)
            if len(chunk) < length:
                raise self.rewritten(path, f"at least {stop} bytes", f"{start + len(chunk)} bytes")
            yield chunk
            start += length

    def rewritten(self, path: str, expected: str, found: str) -> Refused:
        """The error to raise for a file whose content is not the one taken into the run."""
        return Refused(
            f"source {self._name!r}: {self.told(self.full(path))} changed after it was taken into the run: "
            f"expected {expected}, found {found}. {_REMEDY}"
        )

    def told(self, text: str) -> str:
        return told(text, self._secrets)

    @contextmanager
    def _answering(self, what: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            said = f"{what} is not there: {error}"
            raise Vanished(f"source {self._name!r}: {self.told(said)}. Put it back; reading goes on") from None
        except Exception as error:
            if not isinstance(error, (OSError, *_driver_errors())):
                raise
            said = f"{what} cannot be read: {type(error).__name__}: {error}"
            raise StreamUnavailable(f"source {self._name!r}: {self.told(said)}. It is tried again") from None


def _driver_errors() -> tuple[type[BaseException], ...]:
    loaded = [(sys.modules.get(module), error) for module, error in _DRIVER_ERRORS]
    return tuple(getattr(module, error) for module, error in loaded if hasattr(module, error))


def _local_range(path: str, start: int, stop: int) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        chunk = os.pread(handle, stop - start, start)
        while chunk and len(chunk) < stop - start:
            more = os.pread(handle, stop - start - len(chunk), start + len(chunk))
            if not more:
                break
            chunk += more
        return chunk
    finally:
        os.close(handle)
