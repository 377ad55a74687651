"""How bytes become durable on the local disk.

A file appears whole or not at all: written beside its place under a temporary name, fsynced, renamed, and the folder
fsynced. A name that was made, renamed or removed is durable only once its folder was fsynced too.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

CHUNK_BYTES = 4 << 20
"""What goes to a hash and to the disk at a time: large enough that both release the GIL for long."""


def write_all(file: int, data: memoryview) -> None:
    """os.write until everything is written: a write may be short where a disk fills or a signal arrives."""
    while data.nbytes:
        data = data[os.write(file, data) :]


def fsync_folder(path: Path) -> None:
    """Make names made, renamed or removed in the folder durable."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def make_folders(path: Path, mode: int = 0o777) -> None:
    """Create the folder and its missing parents, each made durable in its own parent."""
    if path.is_dir():
        return
    make_folders(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode)
    fsync_folder(path.parent)


def write_new(path: Path, data: bytes) -> tuple[int, str]:
    """Write a new file (O_EXCL), fsynced; size in bytes and SHA-256 (hex). The name is durable after `fsync_folder`."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_all(file, memoryview(data))
        os.fsync(file)
    finally:
        os.close(file)
    return len(data), hashlib.sha256(data).hexdigest()


def write_durably(path: Path, data: bytes) -> tuple[int, str]:
    """Create or replace a file as a whole; size in bytes and SHA-256 (hex). Raises OSError; the old content then
    stands."""
    with beside(path) as temporary:
        written = write_new(temporary, data)
        temporary.rename(path)
    fsync_folder(path.parent)
    return written


def append_line(path: Path, line: bytes) -> None:
    """Append a line as a whole, or nothing of it; not fsynced. Raises OSError. For figures and notes: half a line on a
    full disk would spoil the next one as well."""
    # For the owner's eyes, and never through a link that somebody planted.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o600), "ab", buffering=0) as file:
        at = file.seek(0, os.SEEK_END)
        if file.write(line) != len(line):
            file.truncate(at)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def forget_cached(file: int) -> None:
    """Ask the kernel to drop what memory holds of an open file, so that the next read is of the disk. What is not
    written back yet stays."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def digest_of(path: Path, *, from_disk: bool = False) -> tuple[int, str]:
    """Size in bytes and SHA-256 (hex) of a file's content. `from_disk`: not from what memory still holds of it."""
    with path.open("rb") as file:
        if from_disk:
            forget_cached(file.fileno())
        digest = hashlib.file_digest(file, "sha256")
        return file.tell(), digest.hexdigest()


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A name for a temporary file in the same folder; what is left under it is removed."""
    temporary = path.with_name(f".tmp-{path.name[:100]}-{secrets.token_hex(6)}")
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):  # what stays is swept at the next start
            temporary.unlink(missing_ok=True)
