"""The daemon itself on a disk that is full, broken or read-only: it goes on training, says what is wrong, and is well
again when the disk is; where it stays broken for too long, it ends with 1 and says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from anytimed.contracts import Json
from anytimed.storage.commits import Commits
from anytimed.storage.journal import Journal
from tests import tiny
from tests.faultlog import Injected
from tests.faults.state_disks import mounted, remount, tmpfs
from tests.faults.tools import needs
from tests.service.test_daemon import status
from tests.storage.material import acquired

SECONDS = 150
"""How long something may take on a machine that does much else."""


@contextlib.contextmanager
def daemon(config: Path, log: Path) -> Iterator[subprocess.Popen[str]]:
    """`anytimed run`, its output in a file."""
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "anytimed.cli", "run", str(config)],
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class Watched:
    """A daemon that is watched through its socket, which needs no disk."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder = process, folder

    def now(self) -> Json:
        return status(self._folder)

    def until(self, told: Callable[[Json], bool]) -> Json:
        deadline = time.monotonic() + SECONDS
        while not told(now := self.now()):
            assert self._process.poll() is None, f"ended with {self._process.returncode}: {now}"
            assert time.monotonic() < deadline, f"never happened: {now}"
            time.sleep(0.05)
        return now

    def degraded(self, text: str) -> Json:
        return self.until(lambda s: any(text in problem for problem in s.get("degraded", [])))

    def trains_on(self, steps: int = 10) -> Json:
        step = self.now()["step"]
        return self.until(lambda s: s["step"] >= step + steps or s["state"] == "waiting for data")

    def well_again(self) -> Json:
        """Nothing degraded, and a commit of now."""
        step = self.until(lambda s: s["step"] > 0)["step"]
        return self.until(lambda s: s.get("degraded") == [] and (s["commit"] or {}).get("step", 0) >= step)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(SECONDS) == 0


def fill(disk: Path) -> Path:
    """A file that takes all the space that is left, to the last byte."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0")
    return ballast


@contextlib.contextmanager
def read_only(folder: Path, aside: Path) -> Iterator[None]:
    """Mount a folder read-only over itself; made so elsewhere first, for here it may be in use at any moment."""
    with mounted(folder, aside, "none", "bind"):
        remount(aside, "bind,ro")
        with mounted(aside, folder, "none", "bind"):
            yield


def assert_all_there(folder: Path, last: Json) -> None:
    """What was acknowledged is there: the newest commit is the last one that was told, or a later one, and whole."""
    with acquired(folder / "run") as run:
        journal = Journal(run.journal)
        assert "discovered" in [entry["kind"] for entry in journal.entries("data")]
        journal.close()
        commits = Commits(run)
        newest = commits.newest()
        assert newest is not None and newest.manifest.step >= last["commit"]["step"] and not commits.rejected


def journalled(folder: Path) -> int:
    """How many of the data's entries the journal holds."""
    told = [json.loads(line)["entry"] for line in (folder / "run" / "journal.jsonl").read_text().splitlines()]
    return sum(len(entry["entries"]) for entry in told if entry["kind"] == "discovered")


@pytest.mark.fault(3)
def test_a_full_disk_does_not_end_the_daemon(tmp_path: Path, injected: Injected) -> None:
    """Commits, exports, the journal, status and the log itself meet a full disk. It trains on what has been decided;
    what the journal cannot take is not adopted, and waited for."""
    tiny.write_text(tmp_path / "data", 600, words=600)
    with tmpfs(tmp_path / "disk", 48 << 20) as disk:
        config = tiny.config(tmp_path, run={"directory": str(disk / "run")}, exports={"every_steps": 20})
        (tmp_path / "run").symlink_to(disk / "run")
        with daemon(config, disk / "log") as process:
            watched = Watched(process, tmp_path)
            watched.until(lambda s: s["commit"] is not None and s["step"] >= 8)
            ballast = fill(disk)
            full = watched.degraded("bytes free, a commit needs")
            injected(3, "the daemon: commit")
            tiny.write_text(tmp_path / "data", 200, prefix="more", words=20)
            process.send_signal(signal.SIGUSR1)
            for point in ("entry not written: No space", "status.json: [Errno 28]", "export not built: No space"):
                watched.degraded(point)
                injected(3, f"the daemon: {point}")
            later = watched.trains_on()
            assert later["state"] == "training" or "journal.jsonl: entry not written" in later["reason"]
            assert later["commit"] == full["commit"] and later["last_commit_age_s"] > full["last_commit_age_s"]
            # A first handful may have found room in the journal's last page; what it refused is not adopted.
            assert 600 <= watched.now()["sources"]["main"]["entries"] == journalled(tmp_path) < 800
            ballast.unlink()
            watched.until(lambda s: s["sources"]["main"]["entries"] == 800)
            last = watched.well_again()
            assert last["commit"]["step"] > full["commit"]["step"]
            watched.stop()
        assert_all_there(tmp_path, last)


@pytest.mark.fault(5, 6)
def test_a_disk_that_fails_for_a_while_degrades_the_daemon(tmp_path: Path, injected: Injected) -> None:
    """First the commits' folder is read-only, then every fsync of the running process fails."""
    tiny.write_text(tmp_path / "data", 600, words=600)
    config = tiny.config(tmp_path, exports={"every_steps": 1000})
    with daemon(config, tmp_path / "log") as process:
        watched = Watched(process, tmp_path)
        watched.until(lambda s: s["commit"] is not None and s["step"] >= 8)
        with read_only(tmp_path / "run" / "commits", tmp_path / "aside"):
            watched.degraded("Read-only file system")
            watched.trains_on()
            injected(6, "the daemon: commits")
        watched.well_again()

        strace = subprocess.Popen(
            [needs("strace", "apt-get install strace"), "-f", "-q", "-o", "/dev/null", "-e", "trace=fsync,fdatasync",
             "-e", "inject=fsync,fdatasync:error=EIO", "-p", str(process.pid)],
        )  # fmt: skip
        try:
            tiny.write_text(tmp_path / "data", 20, prefix="more")
            watched.degraded("Input/output error")
            injected(5, "the daemon: commit")
            watched.degraded("journal.jsonl: ")
            injected(5, "the daemon: journal")
            watched.trains_on(10)
        finally:
            strace.send_signal(signal.SIGINT)  # it lets go of the daemon
            strace.wait()
        watched.until(lambda s: s["sources"]["main"]["entries"] == 620)
        last = watched.well_again()
        watched.stop()
    assert_all_there(tmp_path, last)


@pytest.mark.fault(5)
def test_a_disk_that_fails_for_too_long_ends_the_daemon_with_1(tmp_path: Path, injected: Injected) -> None:
    tiny.write_text(tmp_path / "data", 600, words=600)
    config = tiny.config(tmp_path, commits={"give_up_after_s": 3.0}, exports={"every_steps": 1000})
    with daemon(config, tmp_path / "log") as process:
        watched = Watched(process, tmp_path)
        last = watched.until(lambda s: s["commit"] is not None and s["step"] >= 8)
        strace = subprocess.Popen(
            [needs("strace", "apt-get install strace"), "-f", "-q", "-o", "/dev/null", "-e", "trace=fsync,fdatasync",
             "-e", "inject=fsync,fdatasync:error=EIO", "-p", str(process.pid)],
        )  # fmt: skip
        assert process.wait(SECONDS) == 1
        strace.wait()
    told = (tmp_path / "log").read_text()
    assert "give_up_after_s" in told and "Input/output error" in told and "Traceback" not in told, told[-2000:]
    assert_all_there(tmp_path, last)
    injected(5, "the daemon: gives up")
