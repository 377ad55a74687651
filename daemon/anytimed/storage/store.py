"""Objects at a URL, or in a local folder: whole or not there at all.

A local path or file:// URL is a `folder`, any other URL goes through fsspec (`remote`). What is the same for both is
here: keys that cannot lead out, conditions that are checked by reading back, and errors that name URL and key and
never carry a password, a key or a token.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from anytimed.contracts import AnytimedError, ConfigError, CorruptError
from anytimed.urls import bounded, credentials, told

from . import s3
from .folder import Folder
from .patience import passes
from .remote import Answer, Remote
from .web import WholeObject

__all__ = ["Answer", "MissingKey", "NoRanges", "PassingError", "Store", "StoreError", "check_key"]

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
_SMALL_BYTES = 16 << 20
"""What is replaced by compare-and-swap is a pointer or a lease: never more."""


class StoreError(AnytimedError):
    """A store did not do what was asked; names URL, key and cause."""


class MissingKey(StoreError):
    """There is nothing under that key."""


class PassingError(StoreError):
    """A failure that may pass: a broken connection, no answer in time, 500, 503, SlowDown."""


class NoRanges(StoreError):
    """A part of an object was asked for, and the store sends the whole."""


def _is_key(name: str) -> bool:
    return len(name) <= 900 and all(_SEGMENT.fullmatch(part) for part in name.split("/"))


def check_key(key: str) -> str:
    """`key`, if it is a relative posix name of plain parts; ValueError otherwise (`..`, absolute, backslash, NUL,
    hidden)."""
    if not _is_key(key):
        raise ValueError(f"{key[:80]!r} is no key; expected plain names of letters, digits and _ . + - joined by /")
    return key


class Store:
    """A prefix at an fsspec URL, or a local folder. Keys are relative; objects appear whole or not at all.

    `deadline_s` holds for one operation on a remote store, see `Remote`. Nothing is cached, neither listings nor
    instances.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None, *, deadline_s: float = 60.0) -> None:
        """Makes no request. Raises ConfigError on an unknown or chained URL, or where its package is not installed."""
        options = dict(storage_options or {})
        self._secrets = credentials(url, options)
        self.url = self._told(url)
        if "::" in url:
            raise ConfigError(f"{self.url}: chained URLs are not supported, a cache between would serve what is gone")
        try:
            fs, path = fsspec.url_to_fs(
                url,
                **{**bounded(url, s3.options(url, options)), "use_listings_cache": False, "skip_instance_cache": True},
            )
        except (ValueError, ImportError, TypeError) as error:
            raise ConfigError(
                f"{self.url}: {self._told(str(error))}; expected a folder or an fsspec URL "
                "(for s3:// pip install 'anytimed[s3]', for gs:// pip install 'anytimed[gcs]')"
            ) from None
        root = str(path).rstrip("/")
        self._place: Folder | Remote
        if isinstance(fs, LocalFileSystem):
            self._place = Folder(Path(root or "/"))
        else:
            self._place = Remote(fs, root, deadline_s)
        self._traits = {"advisory": isinstance(self._place, Remote) and not self._place.is_s3}

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def hurried(self, deadline_s: float) -> Store:
        """The same store with another deadline."""
        other = copy.copy(self)
        if isinstance(self._place, Remote):
            other._place = self._place.hurried(deadline_s)
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
        with self._names(check_key(key)):
            self._place.put(local, key, copy=False)

    def put_copy(self, local: Path, key: str) -> None:
        """As `put_file`, but always bytes of their own: what rots in one place does not rot in the other."""
        with self._names(check_key(key)):
            self._place.put(local, key, copy=True)

    def create(self, key: str, data: bytes) -> bool:
        """Store an object only if there is none; False if there was one, whoever wrote it.

        On False read it back: identical bytes are a success whose answer was lost. What a remote store answers is
        checked by reading back here too: one that ignores the condition may have let another writer win, and is asked
        first whether there is one.
        """
        if isinstance(self._place, Remote) and self.exists(key):
            return False
        return self.create_unlooked(key, data)

    def create_unlooked(self, key: str, data: bytes) -> bool:
        """`create` by the store's condition alone, as the probe wants it."""
        if isinstance(self._place, Folder):
            with self._names(check_key(key)):
                return self._place.create(key, data)
        refusal: StoreError | None = None
        try:
            with self._names(check_key(key)):
                self._place.create(key, data)
        except _Exists:
            return False
        except StoreError as error:
            # A lost answer looks like a failure, and so do some refusals: what stands there decides.
            refusal = error
        try:
            return self.read(key, len(data)) == data
        except CorruptError:
            return False
        except MissingKey as missing:
            raise refusal or missing from None

    def replace(self, key: str, data: bytes) -> None:
        """Create or replace an object as a whole."""
        with self._names(check_key(key)):
            self._place.replace(key, data)

    def read(self, key: str, max_bytes: int) -> bytes:
        """An object's content. Raises MissingKey, CorruptError where it is longer than `max_bytes`, StoreError."""
        return self.read_versioned(key, max_bytes)[0]

    def read_versioned(self, key: str, max_bytes: int) -> tuple[bytes, str]:
        """An object's content and a text that changes with it, for `swap`. Raises as `read`."""
        with self._names(check_key(key)):
            found = self._place.read(key, max_bytes)
        if found.size > max_bytes:
            raise CorruptError(f"{self.url}/{key}: {found.size} bytes, expected {max_bytes} at most")
        return found.data, found.version

    def swap(self, key: str, data: bytes, version: str | None) -> str | None:
        """Replace an object if it still is `version`, create it if that is None; its new version if it now holds
        `data`, else None.

        Atomic on S3 and in a local folder. Where `advisory` it is a look, a write and a look again. A
        success whose answer was lost is a success. Raises StoreError where what stands there cannot be found out.
        """
        if version is None:
            self.create(key, data)
            return self._holds(key, data)
        if isinstance(self._place, Folder):
            with self._names(check_key(key)):
                return self._place.swap(key, data, version)
        refusal: StoreError | None = None
        try:
            if not self.advisory:
                with self._names(check_key(key)):
                    self._place.replace_if(key, data, version)
            elif self._version(key) == version:
                self.replace(key, data)
        except MissingKey:
            return None
        except StoreError as error:
            refusal = error
        if (now := self._holds(key, data)) is not None:
            return now
        if refusal is not None and self._version(key) == version:
            raise refusal  # nobody else was there: it was no refused condition
        return None

    def download(self, key: str, size: int) -> Iterator[bytes]:
        """The first `size` bytes of an object in chunks, one after the other; fewer where the object is shorter.

        A web server is asked once, for the whole. Raises as `read`.
        """
        with self._names(check_key(key)):
            yield from self._place.chunks(key, size)

    def digest(self, key: str, size: int, arrived: Callable[[int], None] = lambda _: None) -> str:
        """SHA-256 (hex) of the first `size` bytes of an object, read from the store; `arrived(count)` is told of every
        chunk. Raises as `read`."""
        digest = hashlib.sha256()
        for chunk in self.download(key, size):
            digest.update(chunk)
            arrived(len(chunk))
        return digest.hexdigest()

    def begin_range(self, key: str, start: int, end: int) -> Answer:
        """Ask for the bytes `start` up to `end` > `start` of an object; the answer's `result` is waited for.

        It has fewer bytes where the object is shorter. It raises MissingKey, NoRanges where the store sends the whole
        object, PassingError where trying again may help, StoreError. One attempt each.
        """
        check_key(key)
        if isinstance(self._place, Folder):
            answer = Answer(functools.partial(self._place.read_range, key, start, end))
        else:
            answer = self._place.begin_range(key, start, end)
        return Answer(lambda: self._range(key, start, end, answer.result), answer.cancel)

    def list(self, prefix: str = "") -> list[str]:
        """Keys of all objects under a prefix that ends at a part's end, sorted; names that are no keys are left out."""
        try:
            with self._names(check_key(prefix) if prefix else ""):
                return sorted(key for key in self._place.walk(prefix) if _is_key(key))
        except MissingKey:
            return []

    def size(self, key: str) -> int:
        """Bytes of an object. Raises MissingKey, StoreError."""
        with self._names(check_key(key)):
            return self._place.size(key)

    def exists(self, key: str) -> bool:
        """Whether an object is there. Raises StoreError where the store does not answer."""
        try:
            self.size(key)
        except MissingKey:
            return False
        return True

    def delete(self, key: str) -> None:
        """Remove an object, and in a local store the folders that this leaves empty; nothing there is no error."""
        with contextlib.suppress(MissingKey), self._names(check_key(key)):
            self._place.delete(key)

    def sweep(self, older_than_s: float, now_s: float) -> None:
        """Remove temporary files that killed writers left in a local store; remote stores have none."""
        if isinstance(self._place, Folder):
            with self._names(""):
                self._place.sweep(older_than_s, now_s)

    def sweep_uploads(self, prefix: str, older_than_s: float) -> int:
        """Abort multipart uploads under a prefix that were begun so long ago and not completed; how many. S3 only."""
        if not isinstance(self._place, Remote) or not self._place.is_s3:
            return 0
        with self._names(check_key(prefix)):
            return self._place.sweep_uploads(prefix, older_than_s)

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

    def _version(self, key: str) -> str | None:
        try:
            return self.read_versioned(key, _SMALL_BYTES)[1]
        except MissingKey:
            return None

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
        except OSError as error:
            raise StoreError(f"{where}: {self._told(str(error)) or type(error).__name__}") from None

    def _told(self, text: str) -> str:
        """`text` without what must not be read by others."""
        return told(text, self._secrets)


class _Exists(StoreError):
    """A create was refused because there is an object."""
