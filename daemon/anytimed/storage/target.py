"""A consumer's folder: versions/<id>, and the symlink `current` that names one of them.

A checkpoint is downloaded into a hidden folder beside the versions (`partial`), renamed into its place once it is
whole and durable, and `current` is flipped in one step; so it always names a whole, verified checkpoint, whatever is
killed in between. A lock is held for the moments that change what is in place, never during a download.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from anytimed.contracts import AnytimedError, ConfigError, CorruptError

from .durable import digest_of, fsync_folder, make_folders
from .manifest import MANIFEST_NAME, CheckpointId, Manifest
from .partial import Partial, Progress, claim, sweep
from .ranges import Budget
from .store import MissingKey, Store
from .strangers import check_folder

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


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
                stat.S_ISREG((path / f.name).lstat().st_mode) and digest_of(path / f.name) == (f.size, f.sha256)
                for f in manifest.files
            )
        except OSError:
            return False

    def take(
        self,
        store: Store,
        manifest: Manifest,
        data: bytes,
        *,
        asked: bool,
        budget: Budget,
        progress: Progress | None,
    ) -> Path:
        """Bring a published checkpoint into place, if it is not there already, and flip `current`; its path.

        `data`: the manifest's bytes. `asked`: flip back to an older one too. Raises MissingKey where it is gone,
        CorruptError where its bytes are wrong, AnytimedError on a local failure, StoreError. What had arrived then is
        kept for the next try, unless the disk failed.
        """
        path = self.version(manifest)
        try:
            if not self._has(manifest, data):
                with self._partial(manifest, data) as partial:
                    self._check_space(manifest, partial.have_bytes)
                    partial.fill(store, budget, progress)
                    check_folder(partial.path, (entry.name for entry in manifest.files))
                    partial.seal(data)
                    self._install(partial.path, manifest, data)
            with self._locked():
                self._flip(manifest, asked)
            self.tidy()
        except OSError as error:
            raise AnytimedError(
                f"{self.path}: {manifest.id} not put in place: {error.strerror or error} ({error.filename or path}); "
                "what was there before still is"
            ) from error
        return path

    def tidy(self) -> None:
        """Remove what has arrived of checkpoints that no running pull brings."""
        with self._locked():
            sweep(self._versions)

    def retain(self, keep: int, also: Collection[str] = ()) -> list[str]:
        """Remove all versions but the newest `keep` by (term, seq), the one in place and those named in `also`; their
        ids. Raises AnytimedError. Who has a file of a removed version open keeps it."""
        try:
            with self._locked():
                sweep(self._versions)
                found = []
                for path in self._versions.iterdir():
                    with contextlib.suppress(ValueError):  # another name is not ours to judge
                        found.append(CheckpointId.parse(path.name))
                found.sort(key=lambda ident: ident.order, reverse=True)
                standing = (self.path / "current").readlink().name
                gone = [str(i) for i in found[keep:] if str(i) != standing and str(i) not in also]
                for ident in gone:
                    # Out of sight in one step; what a kill leaves of it is swept as a pull's leftovers are.
                    (self._versions / ident).rename(self._versions / f".tmp-{ident}")
                sweep(self._versions)
        except FileNotFoundError:
            return []  # nothing in place yet
        except OSError as error:
            raise AnytimedError(f"{self._versions}: old versions are not removed: {error}") from error
        return gone

    # --- within ---

    def _has(self, manifest: Manifest, data: bytes) -> bool:
        path = self.version(manifest)
        try:
            return not path.is_symlink() and (path / MANIFEST_NAME).read_bytes() == data and self.whole(manifest)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _check_space(self, manifest: Manifest, have_bytes: int) -> None:
        free, missing = shutil.disk_usage(self._versions).free, manifest.total_bytes - have_bytes
        if free < missing:
            raise AnytimedError(
                f"{self.path}: {free} bytes free, {missing} of {manifest.id} are missing; free some space. "
                "What was there before still is"
            )

    @contextlib.contextmanager
    def _partial(self, manifest: Manifest, data: bytes) -> Iterator[Partial]:
        with self._locked():
            partial = claim(self._versions, manifest, data)
        try:
            yield partial
        except OSError:
            # A full disk gets its space back; and after a failed fsync what can be read is not what is stored.
            shutil.rmtree(partial.path, ignore_errors=True)
            raise
        finally:
            with self._locked():
                partial.close()

    def _install(self, partial: Path, manifest: Manifest, data: bytes) -> None:
        path = self.version(manifest)
        with self._locked():
            if self._has(manifest, data):  # another pull was quicker
                shutil.rmtree(partial, ignore_errors=True)
                return
            if os.path.lexists(path):  # damaged, or another run's of the same id: what stood there is swept
                exchange(partial, path)
            else:
                partial.rename(path)
            fsync_folder(self._versions)

    def _flip(self, manifest: Manifest, asked: bool) -> None:
        """Point `current` at a version, in one step; not back, where another pull has meanwhile flipped it further."""
        current = self.path / "current"
        if current.exists() and not current.is_symlink():
            raise ConfigError(f"{current}: not a symlink; expected none, or one into versions/: move it away")
        standing = self.current()
        if standing is not None and (standing.id == manifest.id or (standing.order > manifest.order and not asked)):
            return
        if not self.version(manifest).is_dir():
            raise MissingKey(f"{self.version(manifest)}: removed meanwhile, as one that is too old to be kept")
        temporary = self.path / ".tmp-current"  # one name is enough under the lock, and what a killed pull left goes
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(Path("versions") / manifest.id)
        temporary.rename(current)
        fsync_folder(self.path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        make_folders(self._versions)
        file = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)


def exchange(a: Path, b: Path) -> None:
    """Let two names change places in one step, so that neither is ever without a goal. Raises OSError."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None and renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return
    # No such call, or a file system that does not know it: for a moment there is nothing at `b`.
    aside = b.with_name(f".tmp-{b.name}")
    b.rename(aside)
    a.rename(b)
    aside.rename(a)
