"""Fault 40: a pull is killed, at every system call that it makes on the consumer's folder, and while it receives."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faultlog import FULL, Injected
from tests.faults import servers
from tests.faults.pull_world import ROOT, World, small_ranges
from tests.faults.reader import Reader
from tests.faults.tools import needs
from tests.storage.material import flip, tensor, tree

pytestmark = pytest.mark.fault(40)


@pytest.fixture(autouse=True)
def ranges() -> Iterator[None]:
    with small_ranges():
        yield


def messy(world: World, to: Path) -> Path:
    """A consumer's folder after a bad day: the new checkpoint damaged in place, a pull of it cut, a leftover."""
    world.fresh(to)
    shutil.copytree(world.second.path, to / "versions" / world.second.id)
    flip(to / "versions" / world.second.id / "model.safetensors", -1)
    killed = subprocess.run(world.puller(to), cwd=ROOT, env=world.environment(KILL_AT="900"), check=False)
    assert killed.returncode == -signal.SIGKILL and world.bytes_there(to) >= 900
    left = to / "versions" / ".partial-00009-000001-0000000001-0123456789abcdef.0"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    return to


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("state", ["old in place", "messy"] if FULL else ["messy"])
def test_at_every_call_current_is_whole_and_the_next_pull_goes_on(
    tmp_path: Path, injected: Injected, state: str
) -> None:
    world = World(tmp_path, str(tmp_path / "published"))
    template, to = tmp_path / "template", tmp_path / "to"
    (messy if state == "messy" else World.fresh)(world, template)

    def prepare() -> None:
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(template, to, symlinks=True)

    prepare()
    points = world.points(to)
    assert tree(to / "current") == tree(world.second.path)
    names = {name for name, _, _ in points}
    assert {"write", "fsync", "openat", "flock"} < names and any("rename" in name for name in names)
    assert len(points) > 40
    killed = 0
    for point in points if FULL else points[:: len(points) // 6]:
        prepare()
        with Reader(to) as reader:
            if world.killed(to, point):
                killed += 1
                world.check_resumed(to)
                injected(40, f"{state}: {point[0]} {point[2]} of {os.path.relpath(point[1], to)}")
        assert reader.looks > 0
    # A call that another thread makes may come out elsewhere in the order; nearly all are met.
    assert killed >= len(points) * 0.9 if FULL else killed >= 5


@pytest.mark.timeout(1800)
def test_another_runs_checkpoint_of_the_same_id_gives_way_in_one_step(tmp_path: Path, injected: Injected) -> None:
    """`current` leads to the very folder that is exchanged: killed around that, it is never without a goal."""
    ours = World(tmp_path / "a", str(tmp_path / "a" / "published"))
    theirs = World(tmp_path / "b", str(tmp_path / "b" / "published"), tensors={"w": tensor([9.0] * 200)})
    assert ours.second.id == theirs.second.id
    theirs.asked = theirs.second.id
    template, to = ours.fresh(tmp_path / "template"), tmp_path / "to"
    ours.pull(template)
    shutil.copytree(template, to, symlinks=True)
    points = theirs.points(to)
    assert tree(to / "current") == tree(theirs.second.path)
    around = next(i for i, point in enumerate(points) if point[0] == "renameat2")
    for point in points if FULL else points[around - 1 : around + 3]:
        shutil.rmtree(to)
        shutil.copytree(template, to, symlinks=True)
        with Reader(to) as reader:
            if theirs.killed(to, point):
                theirs.check_resumed(to)
                injected(40, f"the same id: {point[0]} {point[2]} of {os.path.relpath(point[1], to)}")
        assert reader.looks > 0


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("server", ["moto", "rclone"] if FULL else ["rclone"])
def test_while_it_receives_from_a_server(tmp_path: Path, injected: Injected, server: str) -> None:
    with getattr(servers, server)(tmp_path) as running:
        world = World(tmp_path, f"s3://{servers.BUCKET}/run", running.options())
        to = tmp_path / "to"
        total = world.second.manifest.total_bytes
        for kill_at in range(1, total, 150 if FULL else 1200):
            world.fresh(to)
            with Reader(to):
                environment = world.environment(KILL_AT=str(kill_at))
                killed = subprocess.run(world.puller(to), cwd=ROOT, env=environment, check=False)
                assert killed.returncode == -signal.SIGKILL and world.bytes_there(to) >= kill_at
                world.check_resumed(to)
            injected(40, f"{server}: at byte {kill_at}")
        for n in range(3, 60, 3) if FULL else ():
            world.fresh(to)
            with Reader(to):
                done = world.traced(to, "-o", os.devnull, "-e", f"inject=recvfrom:signal=SIGKILL:when={n}")
                if done.returncode == -signal.SIGKILL:
                    world.check_resumed(to)
                    injected(40, f"{server}: at receive {n}")


def test_a_pull_that_is_stopped_does_not_stop_the_next(tmp_path: Path, injected: Injected) -> None:
    """SIGSTOP at a write: what it holds stays its own, another pull goes its own way, and the woken one ends well."""
    world = World(tmp_path, str(tmp_path / "published"))
    to = world.fresh(tmp_path / "to")
    strace = [needs("strace", "apt-get install strace"), "-f", "-qq", "-o", str(tmp_path / "log")]
    stop = f"inject=write:signal=SIGSTOP:when={_writes_before(world, to) + 4}"
    world.fresh(to)
    with Reader(to):
        stopped = subprocess.Popen(
            [*strace, "-e", stop, *world.puller(to)],
            cwd=ROOT,
            env=world.environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            pid = _stopped(tmp_path / "log", stopped)
            assert world.pull(to).manifest == world.second.manifest
            os.kill(pid, signal.SIGCONT)
            assert stopped.communicate()[0].strip() == world.second.id
        finally:
            stopped.kill()
        world.check_resumed(to)
    injected(40, "SIGSTOP at the fourth write")


def _writes_before(world: World, to: Path) -> int:
    log = world.folder / "trace"
    world.traced(to, "-o", str(log), "-e", "trace=write,rmdir")
    return log.read_text().partition("begin-here")[0].count(" write(")


def _stopped(log: Path, process: subprocess.Popen[str]) -> int:
    """Wait until strace says that its process is stopped; the process."""
    while process.poll() is None:
        for line in log.read_text().splitlines() if log.exists() else ():
            if "stopped by SIGSTOP" in line:
                return int(line.split()[0])
    raise AssertionError("it was not stopped")
