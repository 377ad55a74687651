"""Objects behind an fsspec file system: one put is one whole object, and every operation has one budget of ours.

A call is tried again while its failure may pass and the budget lasts (`patience`); what is under way at the end is
cancelled, so that a late answer cannot overwrite what came after it. Everything raises OSError, whatever family of
errors the backend has; `store` makes its errors of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem, sync

from anytimed.urls import BadAnswer

from . import s3
from .folder import Content
from .patience import passes, patiently
from .web import WholeObject, is_web, read_range, read_small, whole

_DOWNLOAD_BYTES = 16 << 20
"""Asked for in one request: the cost of a request is small beside it, so is the memory."""
_SLOWEST_BYTES_PER_S = 1 << 20
"""A transfer may take as much longer than the deadline as its bytes take at this rate."""

_DEEPEST = 8
"""Folders below folders that are looked into, so that a server cannot make a listing endless."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A range that was asked for: `result` waits for its bytes, `cancel` gives it up."""

    result: Callable[[], bytes]
    cancel: Callable[[], object] = lambda: None


class Remote:
    """Objects below `root` of a file system. Keys were checked: relative names of plain parts.

    `deadline_s` holds for one operation on a file system that fsspec drives asynchronously (S3, GCS, Azure, HTTP),
    retries included; transfers get more by their size.
    """

    def __init__(self, fs: Any, root: str, deadline_s: float) -> None:
        self.fs, self._root, self._deadline_s = fs, root, deadline_s
        self.is_s3 = s3.is_s3(fs)
        if self.is_s3:
            s3.try_once(fs)

    def hurried(self, deadline_s: float) -> Remote:
        """The same with another deadline."""
        other = copy.copy(self)
        other._deadline_s = deadline_s
        return other

    def put(self, local: Path, key: str, *, copy: bool) -> None:
        """Store a file; `copy` or not, the bytes are the store's own."""
        size = local.stat().st_size
        self._call("put_file", str(local), self._at(key), transfer_bytes=size)
        stored = self._call("info", self._at(key)).get("size")
        if stored not in (None, size):
            raise OSError(f"the store holds {stored} bytes after {size} were uploaded")

    def create(self, key: str, data: bytes) -> None:
        """Store an object under the condition that there is none. Raises FileExistsError, or any OSError: a refusal
        has many spellings (412, 409)."""
        self._call("pipe_file", self._at(key), data, mode="create", transfer_bytes=len(data))

    def replace(self, key: str, data: bytes) -> None:
        """Create or replace an object."""
        self._call("pipe_file", self._at(key), data, transfer_bytes=len(data))

    def replace_if(self, key: str, data: bytes, version: str) -> None:
        """Replace an object that still has that version. Raises OSError where it has another, or is gone. S3 only."""
        self._await(s3.replace_if, self.fs, self._at(key), data, version, transfer_bytes=len(data))

    def read(self, key: str, max_bytes: int) -> Content:
        """An object, unless it is longer than `max_bytes`: then its size says so."""
        if self.is_s3:
            return Content(*self._await(s3.read_versioned, self.fs, self._at(key), max_bytes))
        if is_web(self.fs):
            size, data = self._await(read_small, self.fs, self._at(key), max_bytes)
            return Content(max(size, len(data)), data, hashlib.sha256(data).hexdigest())
        size = self._call("info", self._at(key)).get("size") or 0
        data = b"" if size > max_bytes else bytes(self._call("cat_file", self._at(key), transfer_bytes=size))
        return Content(max(size, len(data)), data, hashlib.sha256(data).hexdigest())

    def chunks(self, key: str, size: int) -> Iterator[bytes]:
        """The first `size` bytes in chunks, one request after the other; fewer where the object is shorter. A web
        server is asked once, for the whole."""
        if is_web(self.fs):
            with self._os_errors():
                yield from _up_to(size, whole(self.fs, self._at(key), self._deadline_s))
            return
        at = 0
        while at < size:
            end = min(at + _DOWNLOAD_BYTES, size)
            chunk = self._call("cat_file", self._at(key), start=at, end=end, transfer_bytes=end - at)
            if at == 0 and len(chunk) > end:  # a store that knows no ranges answers with everything
                yield chunk[:size]
                return
            yield chunk
            at += len(chunk)
            if at < end:
                return

    def begin_range(self, key: str, start: int, end: int) -> Answer:
        """Ask for the bytes `start` up to `end` of an object, once. Only a file system that fsspec drives
        asynchronously is asked at once; any other, when `result` is called.

        `result` raises WholeObject where the server sends whole objects only, OSError; `passes` tells of each whether
        trying again may help."""
        if not isinstance(self.fs, AsyncFileSystem):
            ask = functools.partial(self.fs.cat_file, self._at(key), start=start, end=end)
            return Answer(lambda: bytes(self._as_os_error(ask)))
        if is_web(self.fs):
            reading = read_range(self.fs, self._at(key), start, end)
        else:
            reading = self.fs._cat_file(self._at(key), start=start, end=end)
        deadline_s = self._deadline_s + (end - start) / _SLOWEST_BYTES_PER_S
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(reading, deadline_s), self.fs.loop)
        return Answer(lambda: bytes(self._as_os_error(future.result)), future.cancel)

    def walk(self, prefix: str) -> Iterator[str]:
        """Keys of all objects below a prefix, "" for all. A folder that cannot be listed is an error, never empty."""
        top = f"{self._root}/{prefix}".rstrip("/") or "/"
        for path in self._call("find", top) if _has_own_find(self.fs) else self._files(top):
            yield path[len(self._root) :].lstrip("/")

    def size(self, key: str) -> int:
        return int(self._call("info", self._at(key))["size"])

    def delete(self, key: str) -> None:
        self._call("rm_file", self._at(key))

    def sweep_uploads(self, prefix: str, older_than_s: float) -> int:
        """Abort multipart uploads under a prefix that were begun so long ago; how many. S3 only."""
        begun = self._await(s3.unfinished_uploads, self.fs, f"{self._at(prefix)}/")
        old = [upload for upload in begun if (datetime.now(UTC) - upload[2]).total_seconds() >= older_than_s]
        for path, upload_id, _ in old:
            with contextlib.suppress(FileNotFoundError):  # completed or aborted meanwhile
                self._await(s3.abort_upload, self.fs, path, upload_id)
        return len(old)

    # --- within ---

    def _files(self, top: str, depth: int = 0) -> Iterator[str]:
        """Paths of all files below a folder, that of no file more than _DEEPEST folders down."""
        for info in self._call("ls", top, detail=True):
            path = str(info["name"]).rstrip("/")
            if path == top.rstrip("/"):  # some backends list the folder itself too
                continue
            if info["type"] != "directory":
                yield path
            elif depth < _DEEPEST:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    yield from self._files(path, depth + 1)

    def _at(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _call(self, name: str, *arguments: Any, transfer_bytes: int = 0, **options: Any) -> Any:
        """The file system's method, tried again within the budget where fsspec drives it asynchronously."""
        if isinstance(self.fs, AsyncFileSystem):
            method = functools.partial(getattr(self.fs, f"_{name}"), **options)
            return self._await(method, *arguments, transfer_bytes=transfer_bytes)
        return self._as_os_error(functools.partial(getattr(self.fs, name), *arguments, **options))

    def _await(self, method: Callable[..., Awaitable[Any]], *arguments: Any, transfer_bytes: int = 0) -> Any:
        budget_s = self._deadline_s + transfer_bytes / _SLOWEST_BYTES_PER_S
        ends = time.monotonic() + budget_s

        def attempt() -> Any:
            return sync(self.fs.loop, method, *arguments, timeout=max(ends - time.monotonic(), 0.01))

        return self._as_os_error(lambda: patiently(attempt, budget_s))

    def _as_os_error(self, call: Callable[[], Any]) -> Any:
        with self._os_errors():
            return call()

    @contextlib.contextmanager
    def _os_errors(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise OSError(f"no answer within the deadline of {self._deadline_s:g} s") from None
        except (OSError, WholeObject):
            raise
        except Exception as error:  # noqa: BLE001 - every backend has a family of its own (botocore, aiohttp, google)
            kind = OSError if passes(error) else BadAnswer
            raise kind(f"{type(error).__name__}: {error}") from None


def _has_own_find(fs: Any) -> bool:
    """Whether a backend lists trees by itself. fsspec's way of its own passes over folders that cannot be listed."""
    if isinstance(fs, AsyncFileSystem):
        return type(fs)._find is not AsyncFileSystem._find
    return type(fs).find is not AbstractFileSystem.find


def _up_to(size: int, chunks: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in chunks if size > 0 else ():
        yield chunk[:size]
        size -= len(chunk)
        if size <= 0:
            return
