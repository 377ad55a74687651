"""Small disks of a test's own: tmpfs of any size, and ext4 in an image file whose power can be cut.

What a program has written lies in the kernel's cache first; in the image is what had reached the disk. So a copy of the
image's bytes, taken without a sync and mounted elsewhere, shows what is left when the power goes at this moment.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.faults.tools import needs, needs_root

_IMAGE_BYTES = 6 << 20


def _do(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stderr}"
    return done.stdout


@contextlib.contextmanager
def mounted(what: str | Path, on: Path, kind: str, options: str) -> Iterator[Path]:
    """Mount, and unmount whatever happens; lazily where something still has a file open."""
    needs_root("mounting")
    on.mkdir(parents=True, exist_ok=True)
    _do(needs("mount", "apt-get install mount"), "-t", kind, "-o", options, what, on)
    try:
        yield on
    finally:
        if subprocess.run(["umount", on], capture_output=True).returncode != 0:
            subprocess.run(["umount", "-l", on], capture_output=True)


def tmpfs(on: Path, size_bytes: int) -> contextlib.AbstractContextManager[Path]:
    """A disk of that size, rounded up to whole pages."""
    return mounted("tmpfs", on, "tmpfs", f"size={size_bytes},mode=700")


def remount(on: Path, options: str) -> None:
    _do("mount", "-o", f"remount,{options}", on)


class PowerCut:
    """An ext4 image, mounted; `cut` mounts what is left of it when the power goes now."""

    def __init__(self, folder: Path, options: str = "") -> None:
        self._folder, self._options = folder, options
        self._image = folder / "image"
        self._cuts = itertools.count(1)
        self.disk = folder / "disk"
        folder.mkdir()

    @contextlib.contextmanager
    def on(self) -> Iterator[Path]:
        """The filesystem, in use."""
        self._image.touch()
        with self._image.open("r+b") as file:
            file.truncate(_IMAGE_BYTES)
        make = needs("mkfs.ext4", "apt-get install e2fsprogs")
        _do(make, "-q", "-F", "-b", "1024", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", self._image)
        with mounted(self._image, self.disk, "ext4", f"loop,{self._options}".rstrip(",")) as disk:
            self._device = _do("findmnt", "-n", "-o", "SOURCE", disk).strip()
            yield disk

    def again(self) -> contextlib.AbstractContextManager[Path]:
        """The filesystem, mounted once more after it was unmounted."""
        return mounted(self._image, self.disk, "ext4", "loop")

    @contextlib.contextmanager
    def cut(self) -> Iterator[Path]:
        """The disk as the next boot finds it; the one in use goes on."""
        copy = self._folder / f"cut-{next(self._cuts)}"
        while True:
            written = self._written()
            shutil.copyfile(self._image, copy)
            if self._written() == written:
                break  # else the kernel wrote meanwhile: such a mixture was never on the disk
        try:
            with mounted(copy, self._folder / f"{copy.name}-disk", "ext4", "loop") as disk:
                yield disk
        finally:
            copy.unlink()

    def _written(self) -> list[str]:
        """Requests and sectors that the loop device has written, and what is under way."""
        told = Path(f"/sys/class/block/{Path(self._device).name}/stat").read_text().split()
        return [told[4], told[6], told[8]]
