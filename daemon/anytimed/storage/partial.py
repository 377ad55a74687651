"""What has arrived of a checkpoint: a hidden folder beside the versions, which outlives the pull that fills it.

`claim` finds the folder of this checkpoint (its id and its manifest's digest are in the name), takes the lock on it,
and removes whatever is not a beginning of one of the manifest's files. `fill` downloads what is missing. A file grows
in order, so its length is the whole record of what is there: a killed pull loses what was under way and no more. It
counts once its SHA-256, taken over all of it while it arrives, is the manifest's. `seal` makes the folder durable.

Links that somebody planted are removed, never followed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import logging
import os
import shutil
import stat
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Self

from anytimed.contracts import CorruptError

from .durable import CHUNK_BYTES, write_all, write_new
from .manifest import CHECKPOINTS, MANIFEST_NAME, FileEntry, Manifest
from .ranges import Budget, Span, stream
from .store import Store

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all; first with what an earlier pull had left."""

_PREFIX = ".partial-"
_NO_LINKS = os.O_NOFOLLOW | os.O_CLOEXEC
_SYNCING = 8
"""Finished files that may wait for the disk, each with an open descriptor."""


class Partial:
    """The folder of one checkpoint, ours while this object is open."""

    def __init__(self, path: Path, folder: int, manifest: Manifest) -> None:
        self.path = path
        self._manifest = manifest
        self._folder = folder
        self._have = _beginnings(folder, {entry.name: entry.size for entry in manifest.files})

    @property
    def have_bytes(self) -> int:
        """What need not be downloaded."""
        return sum(self._have.values())

    def fill(self, store: Store, budget: Budget, progress: Progress | None) -> None:
        """Download what is missing; every file verified and fsynced.

        Raises MissingKey, CorruptError where a file's bytes are not the manifest's (that file is gone then, the others
        stay), StoreError, OSError where the local disk fails.
        """
        done, total = self.have_bytes, self._manifest.total_bytes
        if progress is not None:
            progress(done, total)

        def arrived(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, total)

        missing = {}
        with ThreadPoolExecutor(1) as hashing, _Syncing() as syncing:
            for entry in self._manifest.files:
                if self._have.get(entry.name, 0) < entry.size:
                    missing[f"{CHECKPOINTS}/{self._manifest.id}/{entry.name}"] = entry
                else:
                    syncing.add(self._grown(entry, (), str(self.path / entry.name), hashing, arrived))
            spans = [Span(key, self._have.get(entry.name, 0), entry.size) for key, entry in missing.items()]
            with contextlib.closing(stream(store, spans, budget)) as arriving:
                for key, chunks in itertools.groupby(arriving, itemgetter(0)):
                    data = (chunk for _, chunk in chunks)
                    syncing.add(self._grown(missing.pop(key), data, f"{store.url}/{key}", hashing, arrived))
        assert not missing, missing

    def seal(self, data: bytes) -> None:
        """Add the manifest, whose bytes are `data`, and make the folder durable."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(MANIFEST_NAME, dir_fd=self._folder)
        write_new(self.path / MANIFEST_NAME, data)
        os.fsync(self._folder)

    def close(self) -> None:
        """Give the folder up, for another pull to go on with; an empty one is removed. The caller holds the target's
        lock."""
        with contextlib.suppress(OSError):  # not there, not empty
            if os.path.samestat(self.path.lstat(), os.fstat(self._folder)):
                self.path.rmdir()
        os.close(self._folder)

    # --- within ---

    def _grown(
        self,
        entry: FileEntry,
        chunks: Iterable[bytes],
        where: str,
        hashing: ThreadPoolExecutor,
        arrived: Callable[[int], None],
    ) -> int:
        """The open file of an entry, after `chunks` from `where` were added to what was there; verified."""
        file = os.open(entry.name, os.O_RDWR | os.O_CREAT | _NO_LINKS, 0o666, dir_fd=self._folder)
        try:
            digest = hashlib.sha256()
            while chunk := os.read(file, CHUNK_BYTES):
                digest.update(chunk)
            for chunk in chunks:
                hashed = hashing.submit(digest.update, chunk)
                write_all(file, memoryview(chunk))
                hashed.result()
                arrived(len(chunk))
            found = (os.fstat(file).st_size, digest.hexdigest())
            if found != (entry.size, entry.sha256):
                os.unlink(entry.name, dir_fd=self._folder)
                self._have.pop(entry.name, None)
                raise CorruptError(
                    f"{where}: {found[0]} bytes with SHA-256 {found[1]}, "
                    f"the manifest says {entry.size} bytes with {entry.sha256}"
                )
        except BaseException:
            os.close(file)
            raise
        return file


def claim(versions: Path, manifest: Manifest, data: bytes) -> Partial:
    """The folder of the checkpoint whose manifest has the bytes `data`, the first that no running pull holds.

    What no running pull holds of other checkpoints is removed. One at a time: the caller holds the target's lock.
    """
    stem = f"{_PREFIX}{manifest.id}-{hashlib.sha256(data).hexdigest()[:16]}"
    n = 0
    while True:
        path = versions / f"{stem}.{n}"
        if not path.is_dir() or path.is_symlink():
            _remove(path)
            path.mkdir()
        if (folder := _lock(path)) is not None:
            try:
                sweep(versions, path)
                return Partial(path, folder, manifest)
            except BaseException:
                os.close(folder)
                raise
        n += 1


def sweep(versions: Path, but: Path | None = None) -> None:
    """Remove what killed pulls left and no running pull holds. The caller holds the target's lock."""
    for path in versions.iterdir():
        if path == but or not path.name.startswith((_PREFIX, ".tmp-")):
            continue
        if path.is_symlink() or not path.is_dir():
            _remove(path)
        elif (folder := _lock(path)) is not None:
            _remove(path)
            os.close(folder)


def _lock(path: Path) -> int | None:
    """An open folder, locked; None where another process, or another pull of this one, holds it."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _NO_LINKS)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        return None
    return folder


def _remove(path: Path) -> None:
    """A folder with all that is in it, a file, a link; nothing there is no error, and what cannot go stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _beginnings(folder: int, sizes: dict[str, int]) -> dict[str, int]:
    """Bytes there of each file; what can be no beginning of one of them is removed."""
    have = {}
    for name in os.listdir(folder):
        told = os.stat(name, dir_fd=folder, follow_symlinks=False)
        # A second name of a file elsewhere must not be written through, as little as a link.
        if stat.S_ISREG(told.st_mode) and told.st_nlink == 1 and told.st_size <= sizes.get(name, -1):
            have[name] = told.st_size
        elif stat.S_ISDIR(told.st_mode):
            shutil.rmtree(name, dir_fd=folder)
        else:
            os.unlink(name, dir_fd=folder)
    return have


class _Syncing:
    """Finished files on their way to the disk, beside the download of the next ones."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def add(self, file: int) -> None:
        """Fsync and close a file. Raises OSError where an earlier one failed."""
        self._waiting.append(self._pool.submit(self._sync, file))
        if len(self._waiting) > _SYNCING:
            self._waiting.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        while kind is None and self._waiting:
            self._waiting.popleft().result()

    @staticmethod
    def _sync(file: int) -> None:
        try:
            os.fsync(file)
        finally:
            os.close(file)
