"""A tiny daemon in a process of its own, and the moments of its life at which a fault can be injected.

A moment is a question to the run's folder, answered by what lies there; `reached` polls without a pause, for a tiny
commit takes a few milliseconds. `slowly` makes every fsync take a while (strace delays it), so that the steps inside a
commit or an export can be told apart."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from anytimed.contracts import Json
from tests import tiny
from tests.faults import tools

Moment = Callable[[Path], bool]

DEADLINE_S = 120


def status(folder: Path) -> Json:
    """status.json of the run in `folder`; {} before there is one."""
    with contextlib.suppress(FileNotFoundError):
        told: Json = json.loads((folder / "run" / "status.json").read_text())
        return told
    return {}


def owner(folder: Path) -> int:
    """The process that owns the run, or owned it last; 0 for none."""
    with contextlib.suppress(FileNotFoundError):
        return int(json.loads((folder / "run" / "OWNER").read_text())["pid"])
    return 0


def owned_by_another_than(before: int) -> Moment:
    """A new process has taken the run over."""
    return lambda folder: owner(folder) not in (0, before)


def trains(folder: Path) -> bool:
    return bool(owner(folder)) and status(folder).get("pid") == owner(folder)


def starts(folder: Path) -> bool:
    """It has the lock, and trains not yet."""
    return bool(owner(folder)) and not trains(folder)


def waits(folder: Path) -> bool:
    return trains(folder) and status(folder)["state"] == "waiting for data"


def steps(folder: Path) -> bool:
    return trains(folder) and status(folder)["state"] == "training" and status(folder)["step"] > 0


def _names(folder: Path, prefix: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return [entry.name for entry in os.scandir(folder) if entry.name.startswith(prefix)]
    return []


def commits(folder: Path) -> bool:
    return bool(_names(folder / "run" / "commits", ".tmp-"))


def commits_up_to(file: str) -> Moment:
    """Inside a commit, when `file` is the last of its files that was begun."""
    order = ["rank-00000-of-00001.safetensors", "state.json", "MANIFEST.json"]

    def reached(folder: Path) -> bool:
        for name in _names(folder / "run" / "commits", ".tmp-"):
            with contextlib.suppress(FileNotFoundError):
                there = {entry.name for entry in os.scandir(folder / "run" / "commits" / name)}
                return [f for f in order if f in there][-1:] == [file]
        return False

    return reached


def retires(folder: Path) -> bool:
    """A commit is being deleted."""
    return bool(_names(folder / "run" / "commits", ".del-"))


def builds(folder: Path) -> bool:
    """An export is being written into the spool."""
    return bool(_names(folder / "run" / "spool", ".tmp-"))


def uploads(folder: Path) -> bool:
    """An export waits in the spool, whole, or is on its way."""
    return bool(_names(folder / "run" / "spool", "0"))


def reached(process: subprocess.Popen[str], folder: Path, moment: Moment) -> None:
    """Wait until the moment has come."""
    deadline = time.monotonic() + DEADLINE_S
    while not moment(folder):
        assert process.poll() is None, f"ended before the moment came:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.0002)


def stopped_at(process: subprocess.Popen[str], folder: Path, moment: Moment) -> None:
    """SIGSTOP at the moment: when this returns nothing moves any more, and the moment is still there."""
    while True:
        reached(process, folder, moment)
        process.send_signal(signal.SIGSTOP)
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.0005)
        if moment(folder):
            return
        process.send_signal(signal.SIGCONT)  # it was over before the signal came; the next one will do


def slowly(config: Path, milliseconds: int) -> subprocess.Popen[str]:
    """`anytimed run CONFIG` under strace, every fsync of it delayed. Its pid is strace's: signal `owner` instead."""
    strace = tools.needs("strace", "apt-get install strace")
    return subprocess.Popen(
        [
            strace, "-f", "--seccomp-bpf", "-o", "/dev/null",
            "-e", "trace=fsync", "-e", f"inject=fsync:delay_enter={1000 * milliseconds}",
            sys.executable, "-m", "anytimed.cli", "run", str(config),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )  # fmt: skip


def undisturbed(folder: Path, files: int, **changes: dict[str, object]) -> Path:
    """A run that has read all of its `files` and was stopped; its newest commit."""
    tiny.write_text(folder / "data", files)
    process = tiny.start("run", tiny.config(folder, **changes))
    reached(process, folder, waits)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, told
    return tiny.newest_commit(folder)
