"""Objects at a URL, or in a local folder: whole or not there at all.

A local path or file:// URL is a `folder`. Any other goes through fsspec, where one put is one whole object, conditions
are asked of the store and checked by reading back, and every operation has one budget of ours (`patience`).

Errors name URL and key and never carry a password, a key or a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import hashlib
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.local import LocalFileSystem

from anytimed.contracts import AnytimedError, ConfigError, CorruptError
from anytimed.urls import bounded, credentials, told

from . import s3
from .durable import fsync_folder, write_durably
from .folder import Folder
from .patience import passes, patiently
from .web import WholeObject, is_web, read_range, whole

__all__ = ["MissingKey", "Store", "StoreError", "check_key", "fsync_folder", "write_durably"]

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
_DOWNLOAD_BYTES = 16 << 20
"""Asked of a remote store in one request: the cost of a request is small beside it, so is the memory."""
_SMALL_BYTES = 16 << 20
"""What is replaced by compare-and-swap is a pointer or a lease: never more."""
_SLOWEST_BYTES_PER_S = 1 << 20
"""A transfer may take as much longer than the deadline as its bytes take at this rate."""


class StoreError(AnytimedError):
    """A store did not do what was asked; names URL, key and cause."""


class MissingKey(StoreError):
    """There is nothing under that key."""


class PassingError(StoreError):
    """A failure that may pass: a broken connection, no answer in time, 500, 503, SlowDown."""


class NoRanges(StoreError):
    """A part of an object was asked for, and the store sends the whole."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A range that was asked for: `result` waits for its bytes, `cancel` gives it up."""

    result: Callable[[], bytes]
    cancel: Callable[[], object] = lambda: None


def check_key(key: str) -> str:
    """`key`, if it is a relative posix name of plain parts; ValueError otherwise (`..`, absolute, backslash, NUL,
    hidden)."""
    if len(key) > 900 or not all(_SEGMENT.fullmatch(part) for part in key.split("/")):
        raise ValueError(f"{key[:80]!r} is no key; expected plain names of letters, digits and _ . + - joined by /")
    return key


class Store:
    """A prefix at an fsspec URL, or a local folder. Keys are relative; objects appear whole or not at all.

    `deadline_s` holds for one operation on a remote store that fsspec drives asynchronously (S3, GCS, Azure, HTTP),
    retries included; transfers get more by their size. What is under way at its end is cancelled, so that a late
    answer cannot overwrite what came after it. Nothing is cached, neither listings nor instances.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None, *, deadline_s: float = 60.0) -> None:
        """Makes no request. Raises ConfigError on an unknown or chained URL, or where its package is not installed."""
        options = dict(storage_options or {})
        self._secrets = credentials(url, options)
        self._deadline_s = deadline_s
        self.url = self._told(url)
        if "::" in url:
            raise ConfigError(f"{self.url}: chained URLs are not supported, a cache between would serve what is gone")
        try:
            self._fs, root = fsspec.url_to_fs(
                url,
                **{**bounded(url, s3.options(url, options)), "use_listings_cache": False, "skip_instance_cache": True},
            )
        except (ValueError, ImportError, TypeError) as error:
            raise ConfigError(
                f"{self.url}: {self._told(str(error))}; expected a folder or an fsspec URL "
                "(for s3:// pip install 'anytimed[s3]', for gs:// pip install 'anytimed[gcs]')"
            ) from None
        self._root = str(root).rstrip("/")
        self._folder = Folder(Path(self._root or "/")) if isinstance(self._fs, LocalFileSystem) else None
        self._s3 = s3.is_s3(self._fs)
        if self._s3:
            s3.try_once(self._fs)
        self._traits = {"advisory": not (self._s3 or self._folder is not None)}

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def hurried(self, deadline_s: float) -> Store:
        """The same store with another deadline."""
        other = copy.copy(self)
        other._deadline_s = deadline_s
        return other

    @property
    def advisory(self) -> bool:
        """Whether two writers have to look out for each other, because the store does not keep them apart. An S3
        server that ignores conditions is found out by `probe` only, which sets this, for every copy of this store."""
        return self._traits["advisory"]

    @advisory.setter
    def advisory(self, value: bool) -> None:
        self._traits["advisory"] = value

    def put_file(self, local: Path, key: str) -> None:
        """Store a finished, fsynced file as it is; whatever stood under the key is replaced as a whole.

        In a local store on the same file system this is a second name for the same bytes, nothing is copied.
        """
        with self._names(key):
            if self._folder is not None:
                self._folder.put(local, check_key(key), copy=False)
                return
            size = local.stat().st_size
            self._call("put_file", str(local), self._at(key), transfer_bytes=size)
            stored = self._call("info", self._at(key)).get("size")
        if stored not in (None, size):
            raise StoreError(f"{self.url}/{key}: the store holds {stored} bytes after {size} were uploaded")

    def put_copy(self, local: Path, key: str) -> None:
        """As `put_file`, but always bytes of their own: what rots in one place does not rot in the other."""
        if self._folder is None:
            self.put_file(local, key)
            return
        with self._names(key):
            self._folder.put(local, check_key(key), copy=True)

    def create(self, key: str, data: bytes) -> bool:
        """Store an object only if there is none; False if there was one, whoever wrote it.

        On False read it back: identical bytes are a success whose answer was lost. What a remote store answers is
        checked by reading back here too: one that ignores the condition may have let another writer win, and is asked
        first whether there is one.
        """
        if self._folder is not None:
            return self.create_unlooked(key, data)
        return not self.exists(key) and self.create_unlooked(key, data)

    def create_unlooked(self, key: str, data: bytes) -> bool:
        """`create` by the store's condition alone, as the probe wants it."""
        if self._folder is not None:
            with self._names(key):
                return self._folder.create(check_key(key), data)
        refusal: StoreError | None = None
        try:
            with self._names(key):
                self._call("pipe_file", self._at(key), data, mode="create", transfer_bytes=len(data))
        except _Exists:
            return False
        except StoreError as error:
            # A refusal has many spellings (412, 409), and a lost answer looks like a failure: what stands there
            # decides.
            refusal = error
        try:
            return self.read(key, len(data)) == data
        except CorruptError:
            return False
        except MissingKey as missing:
            raise refusal or missing from None

    def replace(self, key: str, data: bytes) -> None:
        """Create or replace an object as a whole."""
        with self._names(key):
            if self._folder is None:
                self._call("pipe_file", self._at(key), data, transfer_bytes=len(data))
            else:
                self._folder.replace(check_key(key), data)

    def read(self, key: str, max_bytes: int) -> bytes:
        """An object's content. Raises MissingKey, CorruptError where it is longer than `max_bytes`, StoreError."""
        if self._s3:
            return self.read_versioned(key, max_bytes)[0]
        with self._names(key):
            if self._folder is None:
                size = self._call("info", self._at(key)).get("size") or 0
                data = b"" if size > max_bytes else self._call("cat_file", self._at(key), transfer_bytes=size)
            else:
                size, data = self._folder.read(check_key(key), max_bytes)
        if max(size, len(data)) > max_bytes:
            raise CorruptError(f"{self.url}/{key}: {max(size, len(data))} bytes, expected {max_bytes} at most")
        return bytes(data)

    def read_versioned(self, key: str, max_bytes: int) -> tuple[bytes, str]:
        """An object's content and a text that changes with it, for `swap`. Raises as `read`."""
        if not self._s3:
            data = self.read(key, max_bytes)
            return data, hashlib.sha256(data).hexdigest()
        with self._names(key):
            data, version = self._await(s3.read_versioned, self._fs, self._at(key), max_bytes)
        if len(data) > max_bytes:
            raise CorruptError(f"{self.url}/{key}: more than {max_bytes} bytes, expected {max_bytes} at most")
        return bytes(data), version

    def swap(self, key: str, data: bytes, version: str | None) -> str | None:
        """Replace an object if it still is `version`, create it if that is None; its new version if it now holds
        `data`, else None.

        Atomic on S3 and in a local folder. Where `advisory` it is a look, a write and a look again. A
        success whose answer was lost is a success. Raises StoreError where what stands there cannot be found out.
        """
        if version is None:
            self.create(key, data)
            return self._holds(key, data)
        if self._folder is not None:
            with self._names(key):
                swapped = self._folder.swap(check_key(key), data, version)
            return hashlib.sha256(data).hexdigest() if swapped else None
        refusal: StoreError | None = None
        try:
            if not self.advisory:
                with self._names(key):
                    self._await(s3.replace_if, self._fs, self._at(key), data, version, transfer_bytes=len(data))
            elif self._version(key, _SMALL_BYTES) == version:
                self.replace(key, data)
        except MissingKey:
            return None
        except StoreError as error:
            refusal = error
        if (now := self._holds(key, data)) is not None:
            return now
        if refusal is not None and self._version(key, _SMALL_BYTES) == version:
            raise refusal  # nobody else was there: it was no refused condition
        return None

    def download(self, key: str, size: int) -> Iterator[bytes]:
        """The first `size` bytes of an object in chunks, one after the other; fewer where the object is shorter.

        A web server is asked once, for the whole. Raises as `read`.
        """
        if size > 0 and is_web(self._fs):
            with self._names(key):
                for chunk in whole(self._fs, self._at(key), self._deadline_s):
                    yield chunk[:size]
                    size -= len(chunk)
                    if size <= 0:
                        return
            return
        if self._folder is not None:
            with self._names(key):
                yield from self._folder.chunks(check_key(key), size)
            return
        at = 0
        while at < size:
            end = min(at + _DOWNLOAD_BYTES, size)
            with self._names(key):
                chunk = self._call("cat_file", self._at(key), start=at, end=end, transfer_bytes=end - at)
            if at == 0 and len(chunk) > end:  # a store that knows no ranges answers with everything
                yield chunk[:size]
                return
            yield chunk
            at += len(chunk)
            if len(chunk) < end - at + len(chunk):
                return

    def begin_range(self, key: str, start: int, end: int) -> Answer:
        """Ask for the bytes `start` up to `end` > `start` of an object; the answer's `result` is waited for.

        It has fewer bytes where the object is shorter. It raises MissingKey, NoRanges where the store sends the whole
        object, PassingError where trying again may help, StoreError. Only a store that fsspec drives asynchronously is
        asked at once; any other, when `result` is called. One attempt each.
        """
        if self._folder is not None:
            get = functools.partial(self._folder.read_range, check_key(key), start, end)
            return Answer(lambda: self._range(key, start, end, get))
        if not isinstance(self._fs, AsyncFileSystem):
            ask = functools.partial(self._fs.cat_file, self._at(key), start=start, end=end)
            return Answer(lambda: self._range(key, start, end, ask))
        if is_web(self._fs):
            reading = read_range(self._fs, self._at(key), start, end)
        else:
            reading = self._fs._cat_file(self._at(key), start=start, end=end)
        deadline_s = self._deadline_s + (end - start) / _SLOWEST_BYTES_PER_S
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(reading, deadline_s), self._fs.loop)
        return Answer(lambda: self._range(key, start, end, future.result), future.cancel)

    def list(self, prefix: str = "") -> list[str]:
        """Keys of all objects under a prefix that ends at a part's end, sorted; names that are no keys are left out."""
        top = f"{self._root}/{check_key(prefix)}" if prefix else self._root
        try:
            with self._names(prefix):
                found = self._folder.walk(prefix) if self._folder is not None else self._call("find", top or "/")
                keys = [path[len(self._root) :].lstrip("/") for path in found]
        except MissingKey:
            return []
        return sorted(key for key in keys if all(_SEGMENT.fullmatch(part) for part in key.split("/")))

    def size(self, key: str) -> int:
        """Bytes of an object. Raises MissingKey, StoreError."""
        with self._names(key):
            if self._folder is not None:
                return self._folder.size(check_key(key))
            return int(self._call("info", self._at(key))["size"])

    def exists(self, key: str) -> bool:
        """Whether an object is there. Raises StoreError where the store does not answer."""
        try:
            self.size(key)
        except MissingKey:
            return False
        return True

    def delete(self, key: str) -> None:
        """Remove an object, and in a local store the folders that this leaves empty; nothing there is no error."""
        with contextlib.suppress(MissingKey), self._names(key):
            if self._folder is None:
                self._call("rm_file", self._at(key))
            else:
                self._folder.delete(check_key(key))

    def sweep(self, older_than_s: float, now_s: float) -> None:
        """Remove temporary files that killed writers left in a local store; remote stores have none."""
        if self._folder is not None:
            with self._names(""):
                self._folder.sweep(older_than_s, now_s)

    def sweep_uploads(self, prefix: str, older_than_s: float) -> int:
        """Abort multipart uploads under a prefix that were begun so long ago and not completed; how many. S3 only."""
        if not self._s3:
            return 0
        with self._names(prefix):
            begun = self._await(s3.unfinished_uploads, self._fs, f"{self._at(prefix)}/")
            old = [u for u in begun if (datetime.now(UTC) - u[2]).total_seconds() >= older_than_s]
            for path, upload_id, _ in old:
                with contextlib.suppress(FileNotFoundError):  # completed or aborted meanwhile
                    self._await(s3.abort_upload, self._fs, path, upload_id)
        return len(old)

    # --- within ---

    def _range(self, key: str, start: int, end: int, get: Callable[[], bytes]) -> bytes:
        """What `get` answers for a range, its failures sorted by whether trying again may help."""
        may_pass = False
        try:
            with self._names(key):
                try:
                    data = get()
                except WholeObject:
                    raise NoRanges(f"{self.url}/{key}: the server sends whole objects only") from None
                except OSError as error:
                    may_pass = passes(error)
                    raise
                except AnytimedError:
                    raise
                except Exception as error:  # noqa: BLE001 - as in _call
                    may_pass = passes(error)
                    raise OSError(f"{type(error).__name__}: {error}") from None
        except MissingKey:
            raise
        except StoreError as error:
            if may_pass:
                raise PassingError(str(error)) from None
            # Many stores answer a range that begins behind the end with an error.
            if start > 0 and not isinstance(error, NoRanges) and self.size(key) <= start:
                return b""
            raise
        if len(data) > end - start:
            raise NoRanges(f"{self.url}/{key}: {len(data)} bytes for the {end - start} asked for")
        return data

    def _holds(self, key: str, data: bytes) -> str | None:
        """The version of an object that holds just this; None where it does not."""
        try:
            found, version = self.read_versioned(key, len(data))
        except (MissingKey, CorruptError):
            return None
        return version if found == data else None

    def _version(self, key: str, max_bytes: int) -> str | None:
        try:
            return self.read_versioned(key, max_bytes)[1]
        except MissingKey:
            return None

    def _at(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def _call(self, name: str, *arguments: Any, transfer_bytes: int = 0, **options: Any) -> Any:
        """The file system's method, tried again within the budget where fsspec drives it asynchronously."""
        if isinstance(self._fs, AsyncFileSystem):
            method = functools.partial(getattr(self._fs, f"_{name}"), **options)
            return self._await(method, *arguments, transfer_bytes=transfer_bytes)
        return self._as_os_error(functools.partial(getattr(self._fs, name), *arguments, **options))

    def _await(self, method: Callable[..., Awaitable[Any]], *arguments: Any, transfer_bytes: int = 0) -> Any:
        budget_s = self._deadline_s + transfer_bytes / _SLOWEST_BYTES_PER_S
        ends = time.monotonic() + budget_s

        def attempt() -> Any:
            return sync(self._fs.loop, method, *arguments, timeout=max(ends - time.monotonic(), 0.01))

        return self._as_os_error(lambda: patiently(attempt, budget_s))

    @staticmethod
    def _as_os_error(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - every backend has a family of its own (botocore, aiohttp, google)
            raise OSError(f"{type(error).__name__}: {error}") from None

    @contextlib.contextmanager
    def _names(self, key: str) -> Iterator[None]:
        """Whatever the store raises becomes one of ours, with URL and key, without credentials and without its
        chain."""
        where = f"{self.url}/{key}" if key else self.url
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise MissingKey(f"{where}: not there") from None
        except FileExistsError:
            raise _Exists(f"{where}: there is one already") from None
        except TimeoutError:
            raise StoreError(f"{where}: no answer within the deadline of {self._deadline_s:g} s") from None
        except OSError as error:
            raise StoreError(f"{where}: {self._told(str(error)) or type(error).__name__}") from None

    def _told(self, text: str) -> str:
        """`text` without what must not be read by others."""
        return told(text, self._secrets)


class _Exists(StoreError):
    """A create was refused because there is an object."""
