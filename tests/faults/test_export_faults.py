"""Faults 23 to 28, 32, 36: what happens between an export and its store, one request at a time, on real S3 servers.

A reader pulls in a loop all the while (`reading`): it never sees what is torn, mixed or older.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from anytimed.storage.pull import pull
from anytimed.storage.store import Store
from tests.faultlog import FULL, Injected
from tests.faults import servers
from tests.faults.exporting import KILLED, Exporter
from tests.faults.proxy import Do, Proxy, Seen, cutting, proxy
from tests.faults.reading import Reader
from tests.faults.servers import BUCKET, Server

URL = f"s3://{BUCKET}/prefix"


class World:
    """A moto server, a proxy in front of it, an exporter behind that, and a reader that goes to the server itself."""

    def __init__(self, folder: Path, server: Server, between: Proxy, exporter: Exporter, reader: Reader) -> None:
        self.folder, self.server, self.proxy, self.exporter, self.reader = folder, server, between, exporter, reader
        self.store = Store(URL, server.options())
        self.step = 0

    def latest(self) -> int:
        """The step that latest.json names; what it names is there, and so are its files."""
        told = json.loads(self.store.read("latest.json", 1 << 20))
        manifest = json.loads(self.store.read(f"checkpoints/{told['id']}/manifest.json", 1 << 20))
        for entry in manifest["files"]:
            assert self.store.size(f"checkpoints/{told['id']}/{entry['name']}") == entry["size"]
        return int(told["step"])

    def publish(self, *, plan: Callable[[Seen], Do] = lambda _: Do(), port: int | None = None, **order: object) -> int:
        """Have the next step exported while the plan does its harm; the exporter's exit code."""
        self.step += 1
        self.exporter.prepare(step=self.step, port=port or self.proxy.port, **order)
        self.proxy.play(plan)
        return self.exporter.go()

    def recover(self) -> None:
        """What the next start does, undisturbed: afterwards the newest export is the latest, and nothing is left."""
        self.step += 1
        assert self.exporter.run(step=self.step, port=self.server.port) == 0, self.exporter.told
        assert self.latest() == self.step
        assert self.store.list("_probe") == []


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with (
        servers.moto(tmp_path) as server,
        proxy(server.port) as between,
        Exporter(tmp_path / "run", URL) as exporter,
    ):
        made = World(tmp_path, server, between, exporter, None)  # type: ignore[arg-type]
        made.recover()
        with Reader(tmp_path / "pulled", URL, server.port) as made.reader:
            yield made
        assert made.reader.got, "the reader pulled nothing"


def requests_of_a_publication(world: World) -> list[Seen]:
    assert world.publish() == 0, world.exporter.told
    return list(world.proxy.seen)


def some(points: int, few: int) -> list[int]:
    """Every point of 1..points, or in the bounded form a few spread over them."""
    return (
        list(range(1, points + 1))
        if FULL or points <= few
        else sorted({1 + i * (points - 1) // (few - 1) for i in range(few)})
    )


@pytest.mark.fault(23, 32)
@pytest.mark.timeout(3600 if FULL else 300)
def test_killed_after_every_request(world: World, injected: Injected) -> None:
    seen = requests_of_a_publication(world)
    names = [f"{s.method} {s.path.rsplit('/')[-1] or s.query[:20]}" for s in seen]
    manifest = next(i for i, s in enumerate(seen, 1) if s.method == "PUT" and s.path.endswith("manifest.json"))
    pointer = next(i for i, s in enumerate(seen, 1) if s.method == "PUT" and s.path.endswith("latest.json"))
    points = set(some(len(seen), 12)) | set(range(manifest, pointer))
    for n in sorted(points):
        before = world.step
        world.step += 1
        pid = world.exporter.prepare(step=world.step, port=world.proxy.port)
        world.proxy.play(lambda s, n=n, pid=pid: Do(kill=pid) if s.n == n else Do())  # type: ignore[misc]
        ended = world.exporter.go()
        assert ended in (KILLED, 0), (n, world.exporter.told)
        assert world.latest() in (before, world.step), n
        published = world.step
        # The next start, without an export of its own, finishes what was begun.
        assert world.exporter.run(port=world.server.port) == 0, world.exporter.told
        assert world.latest() in (before, published)
        injected(23, f"after request {n} of {len(seen)}, {names[n - 1] if n <= len(names) else 'retention'}")
        if manifest <= n < pointer:
            assert world.latest() == published, "a manifest stands: the next start makes it the latest"
            injected(32, f"after request {n}, {names[n - 1]}")
        world.recover()


@pytest.mark.fault(32)
@pytest.mark.timeout(3600 if FULL else 300)
def test_killed_between_manifest_and_latest_on_every_road(world: World, injected: Injected) -> None:
    """The same with files of another size, and with a pointer that has to be made anew."""
    roads = [(elements, lost) for elements in (10, 10_000, 300_000) for lost in (False, True)]
    for elements, lost in roads if FULL else roads[1:3]:
        for method, name in (("PUT", "manifest.json"), ("GET", "latest.json")):
            if lost:
                world.store.delete("latest.json")
            world.step += 1
            pid = world.exporter.prepare(step=world.step, port=world.proxy.port, elements=elements)
            named: list[str] = []

            def plan(s: Seen, pid: int = pid, at: tuple[str, str] = (method, name), named: list[str] = named) -> Do:
                if s.method == "PUT" and s.path.endswith("/manifest.json"):
                    named.append(s.path)
                return Do(kill=pid) if named and s.method == at[0] and s.path.endswith(at[1]) else Do()

            world.proxy.play(plan)
            assert world.exporter.go() == KILLED, world.exporter.told
            assert world.exporter.run(port=world.server.port) == 0, world.exporter.told
            assert world.latest() == world.step
            injected(32, f"{elements} elements, pointer lost: {lost}, killed at {method} {name}")


@pytest.mark.fault(24)
@pytest.mark.timeout(3600 if FULL else 300)
def test_connection_reset_at_every_64_kib(world: World, injected: Injected) -> None:
    """An upload of 1.2 MB, broken at every multiple of 64 KiB of the connection that carries it."""
    elements = 300_000
    for k in some(20, 4):
        broken: list[int] = []

        def cut(_: int, k: int = k, broken: list[int] = broken) -> int | None:
            # each connection until one has carried so much; the later ones are whole
            return k << 16 if len(broken) < 2 and not broken.append(1) else None  # type: ignore[func-returns-value]

        with cutting(world.server.port, cut) as port:
            assert world.publish(port=port, elements=elements, deadline_s=20.0) == 0, world.exporter.told
        assert world.latest() == world.step
        injected(24, f"{k} x 64 KiB")


@pytest.mark.fault(24)
@pytest.mark.timeout(3600 if FULL else 300)
def test_download_reset_at_every_64_kib(world: World, injected: Injected, tmp_path: Path) -> None:
    assert world.publish(elements=300_000) == 0
    for k in some(18, 4):
        cut: list[int] = []

        def plan(s: Seen, k: int = k, cut: list[int] = cut) -> Do:
            if s.method == "GET" and s.path.endswith(".safetensors") and not cut:
                cut.append(1)
                return Do(cut_download=k << 16)
            return Do()

        world.proxy.play(plan)
        pulled = pull(URL, tmp_path / f"to-{k}", storage_options=world.server.options(world.proxy.port))
        assert pulled.manifest.step == world.step and not pulled.fell_back and cut
        injected(24, f"download, {k} x 64 KiB")


@pytest.mark.fault(25)
@pytest.mark.timeout(3600 if FULL else 300)
def test_the_answer_to_each_put_is_lost(world: World, injected: Injected) -> None:
    puts = [s.n for s in requests_of_a_publication(world) if s.method in ("PUT", "DELETE", "POST")]
    for n in (puts[i - 1] for i in some(len(puts), 6)):
        told = ""

        def plan(s: Seen, n: int = n) -> Do:
            nonlocal told
            if s.n == n:
                told = f"{s.method} {s.path.rsplit('/')[-1]}"
                return Do(after=True)
            return Do()

        assert world.publish(plan=plan) == 0, (n, told, world.exporter.told)
        assert world.latest() == world.step
        injected(25, f"request {n}, {told}")


@pytest.mark.fault(26)
@pytest.mark.timeout(3600 if FULL else 300)
def test_a_black_hole_from_every_request_on(world: World, injected: Injected) -> None:
    """Nothing is answered from the n-th request on. The exporter gives up by its own deadline, the export waits in the
    spool, and goes out when the store answers again."""
    seen = requests_of_a_publication(world)
    for n in some(len(seen), 4):
        before = world.latest()
        ended = world.publish(plan=lambda s, n=n: Do(swallow=s.n >= n), deadline_s=0.6, ttl_s=1.8, patience_s=1.2)  # type: ignore[misc]
        assert ended in (0, 1), world.exporter.told
        assert world.latest() in (before, world.step)
        world.proxy.play(lambda _: Do())
        assert world.exporter.run(port=world.server.port) == 0, world.exporter.told
        assert world.latest() in (before, world.step)
        injected(26, f"from request {n} of {len(seen)} on")


@pytest.mark.fault(27)
@pytest.mark.timeout(3600 if FULL else 300)
@pytest.mark.parametrize("status", [500, 503])
def test_every_request_refused_once(world: World, injected: Injected, status: int) -> None:
    seen = requests_of_a_publication(world)
    for n in some(len(seen), 4):
        assert world.publish(plan=lambda s, n=n: Do(refuse=status if s.n == n else None)) == 0, (n, world.exporter.told)  # type: ignore[misc]
        assert world.latest() == world.step
        injected(27, f"{status} to request {n}")


@pytest.mark.fault(27)
@pytest.mark.timeout(3600 if FULL else 300)
def test_a_storm(world: World, injected: Injected) -> None:
    """A third of all requests is refused, at random."""
    for seed in range(30 if FULL else 3):
        draw = random.Random(seed)

        def plan(s: Seen, draw: random.Random = draw) -> Do:
            return Do(refuse=draw.choice([500, 503])) if draw.random() < 0.33 else Do()

        assert world.publish(plan=plan, patience_s=60.0, deadline_s=20.0, ttl_s=60.0) == 0, world.exporter.told
        assert world.latest() == world.step
        injected(27, f"storm {seed}, {len(world.proxy.seen)} requests")


@pytest.mark.fault(28)
@pytest.mark.timeout(3600 if FULL else 300)
def test_credentials_that_expire(world: World, injected: Injected) -> None:
    """From some request on everything is denied: said at once and by name, nothing lost; new ones go on."""
    seen = requests_of_a_publication(world)
    for n in some(len(seen), 3):
        before = world.latest()
        ended = world.publish(plan=lambda s, n=n: Do(refuse=403 if s.n >= n else None), until_error=True)  # type: ignore[misc]
        assert ended in (0, 1), world.exporter.told
        if ended == 1:
            assert "injected" in str(world.exporter.told) or "Forbidden" in str(world.exporter.told), (
                world.exporter.told
            )
        assert world.latest() in (before, world.step)
        assert world.exporter.run(port=world.server.port) == 0, world.exporter.told
        injected(28, f"from request {n} on")


@pytest.mark.fault(36)
@pytest.mark.timeout(3600 if FULL else 300)
def test_the_server_stores_other_bytes(world: World, injected: Injected) -> None:
    """A bit is turned on the way into the store: the writer reads back, sends again; nothing wrong is ever named."""
    seen = requests_of_a_publication(world)
    puts = [s.n for s in seen if s.method == "PUT" and s.size and "/checkpoints/" in s.path]
    for n in (puts[i - 1] for i in some(len(puts), 4)):
        for times in (1, 2):
            turned: list[str] = []

            def plan(s: Seen, n: int = n, times: int = times, turned: list[str] = turned) -> Do:
                if s.method == "PUT" and "/checkpoints/" in s.path and s.n >= n and len(turned) < times:
                    turned.append(s.path.rsplit("/")[-1])
                    return Do(turn=True)
                return Do()

            ended = world.publish(plan=plan, patience_s=30.0)
            assert ended == 0, (turned, world.exporter.told)
            assert world.latest() == world.step
            injected(36, f"request {n}, {times} times, {turned}")
