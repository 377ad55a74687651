"""Faults 39 and 43: retention deletes what a pull reads; two pulls fill one folder."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anytimed.contracts import AnytimedError
from anytimed.storage.exports import SpoolItem
from anytimed.storage.store import Store
from tests.faultlog import FULL, Injected
from tests.faults import servers
from tests.faults.pull_world import ROOT, World, leftovers, small_ranges
from tests.faults.reader import Reader
from tests.storage.material import tree


@pytest.fixture(autouse=True)
def ranges() -> Iterator[None]:
    with small_ranges():
        yield


# --- 39 ---------------------------------------------------------------------------------------------------------------


class Retention:
    """Publishes the next checkpoint and deletes all others, manifest and data, when its moment has come."""

    def __init__(self, world: World, at: int) -> None:
        self.calls = 0
        self.item: SpoolItem | None = None
        self._world, self._at = world, at

    def progress(self, done: int, total: int) -> None:
        if self.calls == self._at:
            self.strike()
        self.calls += 1

    def strike(self) -> None:
        site = self._world.site
        site.clock.now_s += 10_000
        self.item = site.publish(3, loss_x=None)
        for _ in range(2):  # the manifest, then the data, without any grace
            site.publisher.retain(keep=1, longest_pull_s=0, grace_s=0)


@contextlib.contextmanager
def prefixes(kind: str, folder: Path) -> Iterator[Any]:
    """Worlds, each at a prefix of its own."""
    if kind == "local":
        yield lambda name: World(folder / name, str(folder / name / "published"), loss_x=None)
        return
    with servers.moto(folder) as server:
        yield lambda name: World(folder / name, f"s3://{servers.BUCKET}/{name}", server.options(), loss_x=None)


@pytest.mark.fault(39)
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["local", "moto"] if FULL else ["local"])
def test_retention_at_any_moment_of_a_pull(tmp_path: Path, injected: Injected, kind: str) -> None:
    with prefixes(kind, tmp_path) as make:
        moments: list[int] = []
        make("counted").pull(tmp_path / "counted" / "to", progress=lambda done, total: moments.append(done))
        assert len(moments) > 8
        for n in range(len(moments)) if FULL else range(0, len(moments), 2):
            world = make(f"p{n}")
            to = world.fresh(tmp_path / "to")
            retention = Retention(world, n)
            with Reader(to) as reader:
                pulled = world.pull(to, progress=retention.progress)
                assert retention.item is not None and not pulled.fell_back
                # All that was needed had arrived, or the next one was taken.
                assert pulled.manifest in (world.second.manifest, retention.item.manifest)
                assert world.pull(to).manifest == retention.item.manifest
            assert leftovers(to) == [] and reader.seen[-1] == (1, 3)
            injected(39, f"{kind}: after {moments[n]} bytes")


@pytest.mark.fault(39)
@pytest.mark.parametrize("look", [1, 2, 3])
def test_retention_between_pointer_and_manifest(
    tmp_path: Path, injected: Injected, monkeypatch: pytest.MonkeyPatch, look: int
) -> None:
    """1: before latest.json is read; 2: between it and the manifest; 3: right after the manifest."""
    world = World(tmp_path, str(tmp_path / "published"), loss_x=None)
    to = world.fresh(tmp_path / "to")
    retention = Retention(world, 0)
    read, looks = Store.read, 0

    def struck(store: Store, key: str, max_bytes: int) -> bytes:
        nonlocal looks
        if store is world.site.store:
            return read(store, key, max_bytes)
        looks += 1
        if looks == look < 3:
            retention.strike()
        data = read(store, key, max_bytes)
        if look == 3 and looks == 2:
            retention.strike()
        return data

    monkeypatch.setattr(Store, "read", struck)
    with Reader(to):
        pulled = world.pull(to)
    assert retention.item is not None and pulled.manifest == retention.item.manifest and not pulled.fell_back
    injected(39, f"look {look}")


@pytest.mark.fault(39)
def test_a_writer_that_never_rests(tmp_path: Path, injected: Injected) -> None:
    """Every checkpoint is deleted as soon as the next is there, while pulls go on without a pause."""
    world = World(tmp_path, str(tmp_path / "published"), loss_x=None)
    to = world.fresh(tmp_path / "to")
    over = threading.Event()
    last: list[SpoolItem] = []

    def write() -> None:
        for step in range(3, 203 if FULL else 23):
            world.site.clock.now_s += 10_000
            item = world.site.publish(step, loss_x=None)
            world.site.publisher.retain(keep=1, longest_pull_s=0, grace_s=0)
            last[:] = [item]
        over.set()

    writer = threading.Thread(target=write)
    with Reader(to) as reader:
        writer.start()
        taken: set[str] = set()
        while not over.is_set():
            with contextlib.suppress(AnytimedError):  # each time it was gone: nothing was changed, as the reader sees
                pulled = world.pull(to)
                assert not pulled.fell_back
                taken.add(pulled.manifest.id)
        writer.join()
        assert world.pull(to).manifest == last[0].manifest
    assert reader.seen[-1] == last[0].manifest.order
    for ident in taken:
        injected(39, f"beside a writer that never rests, {ident}")


# --- 43 ---------------------------------------------------------------------------------------------------------------


class Pullers:
    """Two processes that pull when they are told to, at the same time."""

    def __init__(self, world: World) -> None:
        self._processes = [
            subprocess.Popen(
                [*world.puller(Path("-"))[:3], "-"],
                cwd=ROOT,
                env=world.environment(RANGE_BYTES="50"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]

    def __enter__(self) -> Pullers:
        for process in self._processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def pull(self, *orders: str) -> list[str]:
        """Both at once; their answers."""
        for process, order in zip(self._processes, orders, strict=True):
            assert process.stdin is not None
            process.stdin.write(f"{order}\n")
            process.stdin.flush()
        return [process.stdout.readline().strip() for process in self._processes if process.stdout is not None]


@pytest.mark.fault(43)
def test_two_pull_the_same(tmp_path: Path, injected: Injected) -> None:
    world = World(tmp_path, str(tmp_path / "published"))
    to = world.fresh(tmp_path / "to")
    with Pullers(world) as pullers, Reader(to):
        for n in range(100 if FULL else 6):
            item = world.site.publish(3 + n)
            assert pullers.pull(*[f"{world.url} {to}"] * 2) == [item.id] * 2
            assert (to / "current").readlink().name == item.id and leftovers(to) == []
            injected(43, f"the same, round {n}")


@pytest.mark.fault(43)
def test_two_pull_different_ones(tmp_path: Path, injected: Injected) -> None:
    world = World(tmp_path, str(tmp_path / "published"))
    with Pullers(world) as pullers:
        for n in range(50 if FULL else 4):
            to = tmp_path / f"to-{n}"
            with Reader(to, may_go_back=True):
                told = pullers.pull(f"{world.url} {to} {world.first.id}", f"{world.url} {to}")
            # Each stands whole beside the other; `current` is that of the one that came last.
            assert set(told) <= {world.first.id, world.second.id} and told[0] == world.first.id
            assert tree(to / "versions" / world.second.id) == tree(world.second.path) or told[1] == world.first.id
            assert (to / "current").readlink().name in told and leftovers(to) == []
            injected(43, f"different ones, round {n}")


@pytest.mark.fault(43)
def test_one_of_two_is_killed(tmp_path: Path, injected: Injected) -> None:
    """The other one ends well, and what is left is gone on with or removed."""
    world = World(tmp_path, str(tmp_path / "published"))
    chance = random.Random(43)
    for _ in range(20 if FULL else 2):
        to = world.fresh(tmp_path / "to")
        kill_at = chance.randrange(1, world.second.manifest.total_bytes)
        with Reader(to):
            both = [
                subprocess.Popen(
                    world.puller(to), cwd=ROOT, env=world.environment(**more), stdout=subprocess.PIPE, text=True
                )
                for more in ({"KILL_AT": str(kill_at), "RANGE_BYTES": "50"}, {"RANGE_BYTES": "60"})
            ]
            told = [process.communicate()[0].strip() for process in both]
            # The victim may have come late, and found everything there.
            assert both[0].returncode in (0, -signal.SIGKILL)
            assert told[1] == world.second.id and (to / "current").readlink().name == world.second.id
            assert world.pull(to).manifest == world.second.manifest
        assert leftovers(to) == []
        injected(43, f"one killed at byte {kill_at}")
