"""Faults 29, 30, 31, 33, 35, 37, 38: who may write, what stands in the store, and what is fit to be published."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from anytimed.storage.lease import LEASE
from anytimed.storage.probe import probe
from anytimed.storage.pull import pull
from anytimed.storage.store import Store
from tests import tiny
from tests.faultlog import FULL, Injected
from tests.faults import servers
from tests.faults.exporting import Exporter
from tests.faults.proxy import Do, Proxy, Seen, proxy
from tests.faults.reading import Reader, check_whole
from tests.faults.servers import BUCKET, Server

URL = f"s3://{BUCKET}/prefix"
LONG = pytest.mark.timeout(3600 if FULL else 300)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with servers.moto(tmp_path) as made:
        yield made


@pytest.fixture
def between(server: Server) -> Iterator[Proxy]:
    with proxy(server.port) as made:
        yield made


def latest(store: Store) -> dict[str, Any]:
    """latest.json, and what it names is there."""
    told: dict[str, Any] = json.loads(store.read("latest.json", 1 << 20))
    manifest = json.loads(store.read(f"checkpoints/{told['id']}/manifest.json", 1 << 20))
    assert manifest["step"] == told["step"]
    return told


@pytest.mark.fault(29)
@LONG
@pytest.mark.parametrize("kind", [servers.rclone, servers.localbucket], ids=["rclone", "localbucket"])
def test_a_store_that_ignores_conditions_is_found_out_and_two_writers_are_kept_apart(
    tmp_path: Path, kind: Any, injected: Injected
) -> None:
    with kind(tmp_path) as server:
        store = Store(URL, server.options())
        ability = probe(store, "a" * 32)
        assert not ability.compare_and_swap and store.advisory and "does not enforce" in ability.told
        assert ability.create_only is (kind is servers.localbucket)
        with (
            Exporter(tmp_path / "one", URL) as one,
            Exporter(tmp_path / "two", URL) as two,
            Reader(tmp_path / "pulled", URL, server.port) as reader,
        ):
            for step in range(1, 2 * (5 if FULL else 1), 2):
                one.prepare(step=step, port=server.port, hold=True, ttl_s=3.0)
                one.begin()
                one.wait_held()
                assert two.run(step=step + 1, port=server.port, ttl_s=3.0) == 3, two.told
                assert "another writer is alive" in two.told[-1]
                assert latest(store)["step"] == step
                assert one.go() == 0, one.told
                # Given up properly, the other need not wait, and has a term above.
                assert two.run(step=step + 1, port=server.port, ttl_s=3.0) == 0, two.told
                assert latest(store)["step"] == step + 1
                injected(29, f"{kind.__name__}, round {step}")
        assert reader.got


@pytest.mark.fault(30)
@LONG
def test_two_daemons_on_one_prefix_exactly_one_exports(
    tmp_path: Path, server: Server, between: Proxy, injected: Injected
) -> None:
    """The second one trains until it has seen the first one's lease change, then exits 3, within the lease's time."""
    lease_s = 12.0
    for round_ in range(3 if FULL else 1):
        prefix = f"s3://{BUCKET}/two-{round_}"
        daemons: list[subprocess.Popen[str]] = []
        try:
            for name, port in (("first", server.port), ("second", between.port)):
                folder = tmp_path / f"{round_}-{name}"
                tiny.write_text(folder / "data", 1500)
                exports = {
                    "url": prefix,
                    "every_steps": 20,
                    "lease_s": lease_s,
                    "storage_options": servers.options(port),
                    "drain_s": 1.0,
                }
                between.play(lambda _: Do())
                daemons.append(tiny.start("run", tiny.config(folder, exports=exports)))
                if name == "first":
                    store = Store(prefix, server.options())
                    _until(lambda store=store: store.exists("latest.json"), daemons[0])  # type: ignore[misc]
            told, _ = daemons[1].communicate(timeout=120)
            assert daemons[1].returncode == 3, told
            assert "Traceback" not in told
            # By the daemon's own log: how long it watched the lease before it knew, whatever the machine was doing.
            watched, refused = (_said_at(told, what) for what in ("it is watched", "another writer is alive"))
            assert refused - watched < lease_s, told
            runs = {json.loads(store.read(k, 1 << 20))["run_id"] for k in store.list() if k.endswith("/manifest.json")}
            assert len(runs) == 1, "only the first one may have published"
            assert daemons[0].poll() is None
            second = tmp_path / f"{round_}-second"
            assert int(tiny.newest_commit(second).name[-10:]) > 0, "what it trained is kept"
            injected(30, f"round {round_}")
        finally:
            for daemon in daemons:
                daemon.kill()
                daemon.communicate()


def _said_at(log: str, what: str) -> float:
    """Seconds since 1970 at which a log line first said that."""
    line = next(line for line in log.splitlines() if what in line)
    return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()


def _until(told: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not told():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.fault(31)
@LONG
def test_a_holder_paused_past_its_time_finds_the_lease_gone(
    tmp_path: Path, server: Server, between: Proxy, injected: Injected
) -> None:
    """Stopped at some request of a publication, for longer than its lease; another takes over and publishes; woken, it
    writes nothing that counts."""
    store = Store(URL, server.options())
    ttl_s = 2.0
    with (
        Exporter(tmp_path / "one", URL) as one,
        Exporter(tmp_path / "two", URL) as two,
    ):
        assert one.run(step=1, port=between.port, ttl_s=ttl_s) == 0, one.told
        between.play(lambda _: Do())
        assert one.run(step=2, port=between.port, ttl_s=ttl_s) == 0, one.told
        requests = len(between.seen)
        with Reader(tmp_path / "pulled", URL, server.port) as reader:
            step = 2
            taken = next(s.n for s in between.seen if s.method == "PUT" and s.path.endswith(LEASE))
            points = range(taken, requests + 1)
            for n in points if FULL else (points[4], points[len(points) // 2], points[-12]):
                pid = one.prepare(step=step + 1, port=between.port, ttl_s=ttl_s, elements=10)
                stopped: list[int] = []

                def plan(s: Seen, n: int = n, pid: int = pid, stopped: list[int] = stopped) -> Do:
                    if s.n == n:
                        stopped.append(n)
                        return Do(stop=pid)
                    return Do()

                between.play(plan)
                one.begin()
                deadline = time.monotonic() + 15
                while not stopped and time.monotonic() < deadline:
                    time.sleep(0.01)
                if not stopped:  # this publication needed fewer requests
                    assert one.end() == 0, one.told
                    step += 1
                    continue
                assert two.run(step=step + 2, port=server.port, ttl_s=ttl_s, elements=10) == 0, two.told
                theirs = latest(store)
                assert theirs["step"] == step + 2
                os.kill(pid, signal.SIGCONT)
                ended = one.end()
                assert ended in (0, 1, 3), one.told
                now = latest(store)
                if ended == 0:
                    # The other had given the lease up already, and what the woken one published is older than that.
                    assert now["id"] >= theirs["id"]
                assert now["id"] >= theirs["id"], "latest never goes back to what was paused"
                step += 2
                injected(31, f"stopped after request {n} of {requests}")
        assert reader.got


GARBLED = [b"", b"{", b"null", b"[]", b'"text"', b"\x00" * 100, b"\xff\xfe", b'{"format_version": 1}', b"<html></html>"]


@pytest.mark.fault(33)
@LONG
def test_latest_lost_garbled_dangling(tmp_path: Path, server: Server, injected: Injected) -> None:
    store = Store(URL, server.options())
    with Exporter(tmp_path / "run", URL) as exporter, Reader(tmp_path / "pulled", URL, server.port) as reader:
        for step in (1, 2):
            assert exporter.run(step=step, port=server.port) == 0, exporter.told
        good = store.read("latest.json", 1 << 20)
        told = json.loads(good)
        dangling = {**told, "id": "00099-000001-0000000009", "step": 9}
        other = {**told, "manifest_sha256": "0" * 64}
        cases: list[tuple[str, bytes | None]] = [
            ("lost", None),
            *((f"garbled: {text[:20]!r}", text) for text in GARBLED),
            *((f"cut at {at}", good[:at]) for at in range(10, len(good) - 10, 40)),
            ("dangling", json.dumps(dangling).encode()),
            ("names another manifest's digest", json.dumps(other).encode()),
        ]
        for name, data in cases if FULL else [cases[0], cases[2], cases[-2], cases[-1]]:
            for asked in ("pull", "start"):
                store.delete("latest.json") if data is None else store.replace("latest.json", data)
                if asked == "pull":
                    pulled = pull(URL, tmp_path / "to", storage_options=server.options())
                    assert pulled.manifest.step == 2 and check_whole(tmp_path / "to")
                else:
                    assert exporter.run(port=server.port) == 0, exporter.told
                    if data != cases[-1][1]:
                        assert latest(store)["step"] == 2
                injected(33, f"{asked}: {name}")
            store.replace("latest.json", good)
    assert reader.got


@pytest.mark.fault(35)
@LONG
def test_an_error_while_building_leaves_nothing_and_the_next_goes_out(tmp_path: Path, injected: Injected) -> None:
    published = tmp_path / "published"
    with Exporter(tmp_path / "run", str(published)) as exporter:
        assert exporter.run(step=1) == 0, exporter.told
        good, step, harmed = 1, 1, 0
        for call in range(1, 40) if FULL else (1, 3, 8, 14, 20):
            number = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)[call % 4]
            step += 1
            assert exporter.run(step=step, build_fault={"call": call, "errno": number}) == 0, exporter.told
            now = json.loads((published / "latest.json").read_bytes())["step"]
            assert now in (good, step)
            if now != step:
                assert "not built" in str(exporter.told), exporter.told
                assert not [p for p in (tmp_path / "run/spool").iterdir() if not p.name.startswith(".")]
                harmed += 1
                injected(35, f"call {call}: {errno.errorcode[number]}")
                step += 1
                assert exporter.run(step=step) == 0, exporter.told
                assert json.loads((published / "latest.json").read_bytes())["step"] == step
            good = step
        # The calls after the last of a build harm nothing.
        assert harmed >= (10 if FULL else 3)


@pytest.mark.fault(37)
@LONG
def test_nan_in_x_is_refused_kept_aside_and_the_previous_stays_latest(tmp_path: Path, injected: Injected) -> None:
    published, aside = tmp_path / "published", tmp_path / "run" / "quarantine" / "exports"
    with Exporter(tmp_path / "run", str(published)) as exporter, Reader(tmp_path / "to", str(published), 0) as reader:
        assert exporter.run(step=1) == 0, exporter.told
        step = 1
        places = [("w.first", 0), ("w.first", 500), ("w.first", 999), ("w.second", 0), ("w.second", 99)]
        cases = [(tensor, index, value) for tensor, index in places for value in ("nan", "inf", "-inf")]
        for tensor, index, value in cases if FULL else cases[::5]:
            step += 1
            poison = {"tensor": tensor, "index": index, "value": value}
            assert exporter.run(step=step, poison=poison) == 0, exporter.told
            assert f"x is not finite: {tensor}" in str(exporter.told) and f"flat index {index}" in str(exporter.told)
            assert json.loads((published / "latest.json").read_bytes())["step"] == step - 1
            kept = sorted(p for p in aside.iterdir() if not p.name.startswith("."))
            assert 1 <= len(kept) <= 2 and kept[-1].name.endswith(f"{step:010d}"), "kept for a person to look at"
            step += 1
            assert exporter.run(step=step) == 0, exporter.told
            assert json.loads((published / "latest.json").read_bytes())["step"] == step
            injected(37, f"{value} in {tensor} at {index}")
    assert reader.got


@pytest.mark.fault(38)
@LONG
def test_unfinished_uploads_are_swept(tmp_path: Path, server: Server, between: Proxy, injected: Injected) -> None:
    store = Store(URL, server.options())
    fs = store._place.fs
    with Exporter(tmp_path / "run", URL) as exporter:
        assert exporter.run(step=1, port=server.port) == 0, exporter.told
        elsewhere = fs.call_s3("create_multipart_upload", Bucket=BUCKET, Key="prefix-of-another/checkpoints/a")
        for parts in range(10 if FULL else 2):
            key = f"prefix/checkpoints/00001-{parts + 2:06d}-0000000009/model.safetensors"
            begun = fs.call_s3("create_multipart_upload", Bucket=BUCKET, Key=key)
            for number in range(1, parts + 1):
                fs.call_s3(
                    "upload_part", Bucket=BUCKET, Key=key, UploadId=begun["UploadId"], PartNumber=number, Body=b"half"
                )
            assert exporter.run(port=server.port) == 0, exporter.told
            assert _unfinished(fs) == [elsewhere["UploadId"]], "those of others stay"
            injected(38, f"{parts} parts")
        # And one that a killed upload of 120 MB left.
        pid = exporter.prepare(step=2, port=between.port, elements=30_000_000, max_shard_bytes=1 << 30)
        between.play(lambda s: Do(kill=pid) if "partNumber" in s.query else Do())
        assert exporter.go() == -signal.SIGKILL, exporter.told
        assert len(_unfinished(fs)) == 2
        assert exporter.run(port=server.port, patience_s=120.0) == 0, exporter.told
        assert _unfinished(fs) == [elsewhere["UploadId"]]
        injected(38, "an upload killed in its midst")
        assert latest(store)["step"] == 2


def _unfinished(fs: Any) -> list[str]:
    return [u["UploadId"] for u in fs.call_s3("list_multipart_uploads", Bucket=BUCKET).get("Uploads", [])]
