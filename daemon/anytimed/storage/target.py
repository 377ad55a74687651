"""A consumer's folder: versions/<id>, and the symlink `current` that names one of them.

A checkpoint is downloaded into a folder of its own beside the versions, digested while it is written, fsynced,
renamed into its place, and `current` is flipped in one step; so it always names a whole, verified checkpoint,
whatever is killed in between. A lock is held for the moments that change what is in place, never during a download.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from anytimed.contracts import AnytimedError, ConfigError, CorruptError

from .durable import digest_of, fsync_folder, make_folders, write_all, write_new
from .manifest import CHECKPOINTS, MANIFEST_NAME, FileEntry, Manifest
from .store import Store
from .strangers import check_folder

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


class Target:
    """The folder that a pull fills."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._versions = self.path / "versions"

    def current(self) -> Manifest | None:
        """The manifest that `current` leads to; None where there is none, or one that cannot be read."""
        try:
            return Manifest.from_bytes((self.path / "current" / MANIFEST_NAME).read_bytes(), f"{self.path}/current")
        except (OSError, CorruptError):
            return None

    def version(self, manifest: Manifest) -> Path:
        """Where a checkpoint lies, or will."""
        return self._versions / manifest.id

    def whole(self, manifest: Manifest) -> bool:
        """Whether every file of the manifest is in place with its size and digest; reads them all."""
        path = self.version(manifest)
        try:
            return all(
                (path / f.name).stat().st_size == f.size and digest_of(path / f.name)[1] == f.sha256
                for f in manifest.files
            )
        except OSError:
            return False

    def take(self, store: Store, manifest: Manifest, data: bytes, *, asked: bool, progress: Progress | None) -> Path:
        """Bring a published checkpoint into place, if it is not there already, and flip `current`; its path.

        `data`: the manifest's bytes. `asked`: flip back to an older one too. Raises MissingKey where it is gone,
        CorruptError where its bytes are wrong, AnytimedError on a local failure, StoreError.
        """
        path = self.version(manifest)
        try:
            if not self._has(manifest, data):
                with self._attempt(manifest.id) as attempt:
                    self._check_space(manifest)
                    _download(store, manifest, attempt, progress)
                    check_folder(attempt, (entry.name for entry in manifest.files))
                    write_new(attempt / MANIFEST_NAME, data)
                    fsync_folder(attempt)
                    self._install(attempt, manifest, data)
            with self._locked():
                self._flip(manifest, asked)
        except OSError as error:
            raise AnytimedError(
                f"{self.path}: {manifest.id} not put in place: {error.strerror or error} ({error.filename or path}); "
                "what was there before still is"
            ) from error
        return path

    # --- within ---

    def _has(self, manifest: Manifest, data: bytes) -> bool:
        try:
            return (self.version(manifest) / MANIFEST_NAME).read_bytes() == data and self.whole(manifest)
        except FileNotFoundError:
            return False

    def _check_space(self, manifest: Manifest) -> None:
        free = shutil.disk_usage(self._versions).free
        if free < manifest.total_bytes:
            raise AnytimedError(
                f"{self.path}: {free} bytes free, {manifest.id} has {manifest.total_bytes}; free some space. "
                "What was there before still is"
            )

    def _install(self, attempt: Path, manifest: Manifest, data: bytes) -> None:
        path = self.version(manifest)
        with self._locked():
            if self._has(manifest, data):  # another pull was quicker
                return
            if (
                path.exists()
            ):  # damaged, or another run's of the same id: only here is `current` without a goal for a moment
                aside = self._versions / f".tmp-old-{secrets.token_hex(4)}"
                path.rename(aside)
                attempt.rename(path)
                shutil.rmtree(aside, ignore_errors=True)
            else:
                attempt.rename(path)
            fsync_folder(self._versions)

    def _flip(self, manifest: Manifest, asked: bool) -> None:
        """Point `current` at a version, in one step; not back, where another pull has meanwhile flipped it further."""
        current = self.path / "current"
        if current.exists() and not current.is_symlink():
            raise ConfigError(f"{current}: not a symlink; expected none, or one into versions/: move it away")
        standing = self.current()
        if standing is not None and (standing.id == manifest.id or (standing.order > manifest.order and not asked)):
            return
        temporary = self.path / ".tmp-current"  # one name is enough under the lock, and what a killed pull left goes
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(Path("versions") / manifest.id)
        temporary.rename(current)
        fsync_folder(self.path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        make_folders(self._versions)
        file = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    @contextlib.contextmanager
    def _attempt(self, ident: str) -> Iterator[Path]:
        """A folder of our own to download into, locked while we live. Folders of killed pulls are removed."""
        with self._locked():
            for leftover in self._versions.glob(".tmp-*"):
                _remove_unless_locked(leftover)
            folder = self._versions / f".tmp-{ident}-{secrets.token_hex(4)}"
            folder.mkdir()
            mine = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(mine, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            os.close(mine)
            shutil.rmtree(folder, ignore_errors=True)


def _remove_unless_locked(path: Path) -> None:
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        pass  # a pull that runs now
    finally:
        os.close(folder)


def _download(store: Store, manifest: Manifest, folder: Path, progress: Progress | None) -> None:
    done, total = 0, manifest.total_bytes
    for entry in manifest.files:
        for count in _fetch(store, f"{CHECKPOINTS}/{manifest.id}/{entry.name}", entry, folder / entry.name):
            done += count
            if progress is not None:
                progress(done, total)


def _fetch(store: Store, key: str, entry: FileEntry, path: Path) -> Iterator[int]:
    """Download one file, fsynced; bytes as they arrive. Raises CorruptError where size or digest are not as told."""
    digest = hashlib.sha256()
    size = 0
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for chunk in store.download(key, entry.size):
            digest.update(chunk)
            write_all(file, memoryview(chunk))
            size += len(chunk)
            yield len(chunk)
        if (size, digest.hexdigest()) != (entry.size, entry.sha256):
            raise CorruptError(
                f"{store.url}/{key}: {size} bytes with SHA-256 {digest.hexdigest()}, "
                f"the manifest says {entry.size} bytes with {entry.sha256}"
            )
        os.fsync(file)
    finally:
        os.close(file)
