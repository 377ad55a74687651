"""What the faults of a pull are made of: a site with an old and a new checkpoint, pulls under strace, small disks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from anytimed.storage import ranges
from anytimed.storage.pull import Pulled, pull
from tests.faults.tools import needs, needs_root
from tests.storage.material import Site, content, tree

ROOT = Path(__file__).parents[2]
RANGE_BYTES = 300
"""A pull of a test's export, about 1.7 kB in 5 files, takes about 9 ranges of these."""

CHANGING = (
    "write", "pwrite64", "fsync", "rename", "renameat", "renameat2", "openat", "mkdir", "mkdirat", "symlink",
    "symlinkat", "unlink", "unlinkat", "rmdir", "ftruncate", "link", "linkat", "flock",
)  # fmt: skip
"""The system calls that change what is on the disk, and those that open or lock it."""

Point = tuple[str, str, int]
"""The n-th call (from 1) of a name on a path."""


class World:
    """A published prefix with an old checkpoint, which `old` holds, and a new one; `changes` to what is exported."""

    def __init__(self, folder: Path, url: str, options: Mapping[str, Any] | None = None, **changes: Any) -> None:
        self.folder = folder
        self.site = Site(folder / "writer", url, options)
        self.url, self.options = url, self.site.options
        self.first = self.site.publish(1, **changes)
        self.old = folder / "old"
        self.pull(self.old)
        self.asked: str | None = None
        """The checkpoint that a puller asks for; None for the newest."""
        self.second = self.site.spool.build(content(2, **changes))
        self.site.publisher.publish(self.second)

    def pull(self, to: Path, **named: Any) -> Pulled:
        return pull(self.url, to, storage_options=self.options, **named)

    def fresh(self, to: Path) -> Path:
        """The folder of a consumer who has the old checkpoint."""
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(self.old, to, symlinks=True)
        return to

    def environment(self, **more: str) -> dict[str, str]:
        return {
            **os.environ,
            "OPTIONS": json.dumps(self.options),
            "RANGE_BYTES": str(RANGE_BYTES),
            "PYTHONDONTWRITEBYTECODE": "1",
            **more,
        }

    def puller(self, to: Path) -> list[str]:
        return [sys.executable, "-m", "tests.faults.puller", self.url, str(to), *filter(None, [self.asked])]

    def traced(self, to: Path, *strace: str) -> subprocess.CompletedProcess[str]:
        """A pull in a process of its own under strace."""
        command = [needs("strace", "apt-get install strace"), "-f", "-qq", *strace, *self.puller(to)]
        return subprocess.run(command, cwd=ROOT, env=self.environment(), capture_output=True, text=True)

    def points(self, to: Path) -> list[Point]:
        """Every call on something under `to` that a pull into it makes."""
        log = self.folder / "trace"
        done = self.traced(to, "-y", "-o", str(log), "-e", f"trace={','.join('?' + name for name in CHANGING)}")
        assert done.returncode == 0, done.stderr
        lines = log.read_text().splitlines()
        began = next(i for i, line in enumerate(lines) if '"begin-here"' in line)
        counts: Counter[tuple[str, str]] = Counter()
        for line in lines[began + 1 :]:
            found = re.match(r'\d+ +(\w+)\((?:\d+<([^>]*)>|AT_FDCWD<[^>]*>, "([^"]*)"|"([^"]*)")', line)
            if found and (path := next(filter(None, found.groups()[1:]), "")).startswith(str(to)):
                counts[found[1], path] += 1
        return [(name, path, n) for (name, path), calls in counts.items() for n in range(1, calls + 1)]

    def killed(self, to: Path, point: Point) -> bool:
        """Pull, with a SIGKILL at that call; whether it came to that."""
        name, path, n = point
        done = self.traced(to, "-P", path, "-o", os.devnull, "-e", f"inject={name}:signal=SIGKILL:when={n}")
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode != 0

    def bytes_there(self, to: Path) -> int:
        """What a cut pull of the new checkpoint left, in bytes; the manifest is not counted."""
        left = to.glob(f"versions/.partial-{self.second.id}-*/*")
        return sum(path.stat().st_size for path in left if path.name != "manifest.json")

    def check_resumed(self, to: Path) -> None:
        """The following pull takes what is there and ends with the new checkpoint."""
        had = self.bytes_there(to)
        told: list[int] = []
        pulled = self.pull(to, checkpoint=self.asked, progress=lambda done, total: told.append(done))
        assert pulled.manifest == self.second.manifest and not pulled.fell_back
        assert told == [] or told[0] == had, (told, had)
        assert tree(to / "current") == tree(self.second.path)
        assert leftovers(to) == []


def leftovers(to: Path) -> list[Path]:
    return [p for p in to.rglob(".*") if p.name != ".lock"]


@contextlib.contextmanager
def small_ranges() -> Iterator[None]:
    """Ranges in this process as in the pullers'."""
    before, ranges.RANGE_BYTES = ranges.RANGE_BYTES, RANGE_BYTES
    try:
        yield
    finally:
        ranges.RANGE_BYTES = before


@contextlib.contextmanager
def tmpfs(on: Path, options: str) -> Iterator[Path]:
    """A file system in memory, mounted while this is open."""
    needs_root("mounting a tmpfs")
    on.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(on)], check=True)
    try:
        yield on
    finally:
        subprocess.run(["umount", "-l", str(on)], check=True)


def remount(on: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(on)], check=True)
