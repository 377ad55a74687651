"""Fault 42: the consumer's disk is full. What was in place stays in place, what had arrived is given back to the disk,
the error says so; once there is space, the next pull succeeds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from anytimed.contracts import AnytimedError
from tests.faultlog import FULL, Injected
from tests.faults.pull_world import World, leftovers, remount, small_ranges, tmpfs
from tests.faults.reader import Reader
from tests.storage.material import tensor, tree

pytestmark = pytest.mark.fault(42)

PAGE = 4096
TENSORS = {f"model.layers.{n}.weight": tensor(range(6 * PAGE // 4)) for n in range(3)}
"""18 pages in one file; the four small files take one each."""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, str(tmp_path / "published"), tensors=TENSORS)


def used_pages(disk: Path) -> int:
    return shutil.disk_usage(disk).used // PAGE


def fails(world: World, to: Path, **named: object) -> str:
    """The message of a pull that must fail and leave what was there."""
    before = tree(to)
    with Reader(to), pytest.raises(AnytimedError) as caught:
        world.pull(to, **named)
    assert tree(to) == before and leftovers(to) == []
    return str(caught.value)


def succeeds(world: World, to: Path) -> None:
    with Reader(to):
        assert world.pull(to).manifest == world.second.manifest
    assert tree(to / "current") == tree(world.second.path) and leftovers(to) == []


def test_a_disk_of_any_size(world: World, tmp_path: Path, injected: Injected) -> None:
    with tmpfs(tmp_path / "disk", "size=1m") as disk:
        to = world.fresh(disk / "to")
        used = used_pages(disk)
        sizes = [0, 1, 5, 18, 19, 20, 21, 22] if not FULL else range(24)
        for pages in sizes:
            remount(disk, f"size={(used + pages) * PAGE}")
            if world.second.manifest.total_bytes > pages * PAGE:
                assert "bytes free" in fails(world, to)
            else:
                # The sum of the bytes fits, their pages may not: found out while writing.
                try:
                    succeeds(world, to)
                except AnytimedError as error:
                    assert "No space left" in str(error) and leftovers(to) == []
            injected(42, f"tmpfs with {pages} pages free")
            remount(disk, "size=1m")
            succeeds(world, to)
            world.fresh(to)


def test_a_disk_that_fills_meanwhile(world: World, tmp_path: Path, injected: Injected) -> None:
    with tmpfs(tmp_path / "disk", "size=1m") as disk:
        to, filler = world.fresh(disk / "to"), disk / "filler"
        calls: list[int] = []
        world.pull(tmp_path / "elsewhere", progress=lambda done, total: calls.append(done))
        for n in range(len(calls) - 1):
            met: list[int] = []

            def others_write(done: int, total: int, n: int = n, met: list[int] = met) -> None:
                met.append(done)
                if len(met) == n + 1:
                    filler.write_bytes(bytes(shutil.disk_usage(disk).free))

            assert "No space left" in fails(world, to, progress=others_write)
            assert shutil.disk_usage(disk).free >= calls[n]  # what had arrived was given back
            filler.unlink()
            succeeds(world, to)
            world.fresh(to)
            injected(42, f"filled by others after {calls[n]} bytes")


def test_a_disk_without_room_for_names(world: World, tmp_path: Path, injected: Injected) -> None:
    """Inodes run out: at the folder, at each file, at the manifest, at the link."""
    with tmpfs(tmp_path / "disk", "size=1m,nr_inodes=1000") as disk:
        to = world.fresh(disk / "to")
        used = sum(1 for _ in disk.rglob("*")) + 1
        for inodes in range(8):
            remount(disk, f"size=1m,nr_inodes={used + inodes}")
            with Reader(to) as reader, pytest.raises(AnytimedError, match="No space left"):
                world.pull(to)
            assert reader.seen == [world.first.manifest.order] and leftovers(to) == []
            remount(disk, "size=1m,nr_inodes=1000")
            succeeds(world, to)
            world.fresh(to)
            injected(42, f"{inodes} inodes free")


@pytest.mark.timeout(1800)
def test_at_every_call(tmp_path: Path, injected: Injected) -> None:
    """ENOSPC from the kernel's side at each call that can answer it."""
    world = World(tmp_path, str(tmp_path / "published"))
    to = world.fresh(tmp_path / "to")
    calls = ("write", "fsync", "openat", "mkdir", "symlink", "rename")
    points = [point for point in world.points(to) if point[0].startswith(calls)]
    met = 0
    with small_ranges():
        for name, path, n in points if FULL else points[:: len(points) // 4]:
            world.fresh(to)
            with Reader(to):
                done = world.traced(to, "-P", path, "-o", "/dev/null", "-e", f"inject={name}:error=ENOSPC:when={n}")
                assert "Traceback" not in done.stderr and done.returncode in (0, 1), done
                assert done.returncode == 0 or "No space left" in done.stdout, done
                assert world.bytes_there(to) == 0
                met += done.returncode
            succeeds(world, to)
            injected(42, f"{name} {n} of {Path(path).name}")
    assert met >= (len(points) * 0.8 if FULL else 3)
