"""One commit on the disk: its manifest, its files, and whether they are what the manifest says.

Reading distinguishes what is wrong with the commit (`Damaged`) from what is wrong with this process for the moment
(no file descriptors, no memory, no permission), which judges nothing.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from pathlib import Path

from anytimed.contracts import AnytimedError, CorruptError, Json

from .durable import digest_of, forget_cached
from .manifest import MANIFEST_BYTES, CommitManifest
from .strangers import read_json

NAME = re.compile(r"([0-9]{6,12})-([0-9]{10,15})")
"""<seq>-<step>, the name of a commit's folder."""
MANIFEST = "MANIFEST.json"
STATE = "state.json"
_STATE_BYTES = 256 << 20
_ROTTEN = getattr(errno, "EUCLEAN", errno.EIO)  # Linux: "structure needs cleaning"
_DAMAGE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.EBADMSG, _ROTTEN})
"""What says that the stored bytes are gone or rotten. Any other error says something about this process or this moment
(no descriptors, no memory, no permission, a file server that is away), and nothing about the commit."""


class Damaged(CorruptError):
    """One file of a commit is not what the manifest says."""

    def __init__(self, path: Path, expected: str, found: str) -> None:
        super().__init__(f"{path}: expected {expected}, found {found}")
        self.path, self.expected, self.found = path, expected, found


@dataclass(frozen=True, slots=True)
class Rejected:
    """A commit that did not verify. `path` is where it lay, `moved_to` where it is kept for a person."""

    path: Path
    expected: str
    found: str
    moved_to: Path | None = None


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit on the disk, with the manifest that was read from it."""

    path: Path
    manifest: CommitManifest

    @property
    def state(self) -> Json:
        """The JSON that was committed beside the tensors. Raises CorruptError."""
        return read_json(self.path / STATE, _STATE_BYTES)

    @property
    def tensor_files(self) -> list[Path]:
        """One safetensors file a rank, by rank."""
        return sorted(self.path / f.name for f in self.manifest.files if f.name.startswith("rank-"))

    def verify(self, *, from_disk: bool = False) -> None:
        """Read every file and compare; `from_disk`: past what memory still holds of them.

        Raises CorruptError naming path, expected and found; AnytimedError where this process cannot read for now. A
        file that the manifest does not name is passed over: nothing reads it.
        """
        for entry in self.manifest.files:
            path = self.path / entry.name
            try:
                size = path.stat().st_size
                found = digest_of(path, from_disk=from_disk) if size == entry.size else (size, "")
            except OSError as error:
                raise unreadable(path, error, f"{entry.size} bytes") from error
            if found[0] != entry.size:
                raise Damaged(path, f"{entry.size} bytes", f"{found[0]} bytes")
            if found[1] != entry.sha256:
                raise Damaged(path, f"SHA-256 {entry.sha256}", found[1])


def read_commit(path: Path, *, from_disk: bool = False) -> Commit:
    """The commit in a folder, its manifest checked, its files not yet. Raises Damaged, NewerFormat, AnytimedError where
    this process cannot read for now."""
    where = path / MANIFEST
    try:
        with where.open("rb") as file:
            if from_disk:
                forget_cached(file.fileno())
            data = file.read(MANIFEST_BYTES)
    except OSError as error:
        raise unreadable(where, error, "a manifest") from error
    try:
        manifest = CommitManifest.from_bytes(data, str(where))
    except CorruptError as error:
        raise Damaged(where, f"a valid {MANIFEST}", str(error)) from error
    expected = f"{manifest.seq:06d}-{manifest.step:010d}"
    if path.name != expected:
        raise Damaged(where, f"the manifest of {path.name}", f"that of {expected}")
    return Commit(path, manifest)


def unreadable(path: Path, error: OSError, expected: str) -> AnytimedError:
    if error.errno not in _DAMAGE:
        raise AnytimedError(f"{path}: cannot be read now: {error.strerror}; nothing was judged or moved") from error
    return Damaged(path, expected, error.strerror or str(error))
