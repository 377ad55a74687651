"""Objects in a local folder, with the means of `durable`: whole or not there at all, durable when a call returns.

Create-only is a hard link, so that two writers cannot both win; compare-and-swap is a look and a rename under a file
lock. Everything raises OSError as the kernel gives it; `store` makes its errors of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .durable import CHUNK_BYTES, beside, fsync_folder, make_folders, write_durably, write_new


@dataclass(frozen=True, slots=True)
class Content:
    """What was read of an object. `size`: its bytes, those that were not read included; `version`: a text that changes
    with them."""

    size: int
    data: bytes
    version: str


class Folder:
    """Objects below `root`. Keys were checked: relative names of plain parts."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, local: Path, key: str, *, copy: bool) -> None:
        """Store a finished, fsynced file; unless `copy`, as a second name for the same bytes where that is possible."""
        path = self._root / key
        make_folders(path.parent)
        with beside(path) as temporary:
            try:
                if copy:
                    raise OSError  # bytes of their own are wanted
                os.link(local, temporary)
            except OSError:  # another file system, or one without links
                shutil.copyfile(local, temporary)
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
            temporary.rename(path)
        fsync_folder(path.parent)

    def create(self, key: str, data: bytes) -> bool:
        """Store an object unless there is one; whether it was stored."""
        path = self._root / key
        make_folders(path.parent)
        with beside(path) as temporary:
            write_new(temporary, data)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
        fsync_folder(path.parent)
        return True

    def replace(self, key: str, data: bytes) -> None:
        """Create or replace an object."""
        path = self._root / key
        make_folders(path.parent)
        write_durably(path, data)

    def swap(self, key: str, data: bytes, version: str) -> str | None:
        """Replace an object that still has that version; the new one, or None where it has another, or is gone."""
        file = os.open(self._root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                with (self._root / key).open("rb") as standing:
                    found = hashlib.file_digest(standing, "sha256").hexdigest()
            except FileNotFoundError:
                return None
            if found != version:
                return None
            return write_durably(self._root / key, data)[1]
        finally:
            os.close(file)

    def read(self, key: str, max_bytes: int) -> Content:
        """An object, at most `max_bytes` + 1 of its bytes; its version is their SHA-256 (hex)."""
        with (self._root / key).open("rb") as file:
            size, data = os.fstat(file.fileno()).st_size, file.read(max_bytes + 1)
        return Content(max(size, len(data)), data, hashlib.sha256(data).hexdigest())

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """The bytes `start` up to `end`; fewer where the object is shorter."""
        with (self._root / key).open("rb", buffering=0) as file:
            file.seek(start)
            return file.read(end - start)

    def chunks(self, key: str, size: int) -> Iterator[bytes]:
        """The first `size` bytes in chunks; fewer where the object is shorter."""
        with (self._root / key).open("rb") as file:
            while size > 0 and (chunk := file.read(min(CHUNK_BYTES, size))):
                size -= len(chunk)
                yield chunk

    def size(self, key: str) -> int:
        return (self._root / key).stat().st_size

    def walk(self, prefix: str) -> Iterator[str]:
        """Keys of all objects below a prefix, "" for all."""
        for folder, _, files in os.walk(self._root / prefix):
            inner = Path(folder).relative_to(self._root)
            yield from (str(inner / name) for name in files)

    def delete(self, key: str) -> None:
        """Remove an object, and the folders that this leaves empty."""
        path = self._root / key
        path.unlink()
        fsync_folder(path.parent)
        with contextlib.suppress(OSError):  # not empty
            for parent in path.relative_to(self._root).parents[:-1]:
                (self._root / parent).rmdir()

    def sweep(self, older_than_s: float, now_s: float) -> None:
        """Remove temporary files that killed writers left."""
        for path in self._root.rglob(".tmp-*"):
            if path.is_file() and now_s - path.stat().st_ctime > older_than_s:
                path.unlink()
