"""Faults for the process of state_process.py: a child of it is traced by strace, and meets a fault at its n-th call.

`Victim.run` forks a child, attaches strace with the injection to it, lets it go, and answers an `Outcome`: how it
ended, what it had promised by then, and which system calls it made, the last of them the one that met the fault.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from anytimed.storage.commits import Commit, Commits
from anytimed.storage.run_directory import RunDirectory
from anytimed.storage.tensors import read_header
from tests.faultlog import FULL
from tests.faults.tools import needs
from tests.storage.material import acquired, snapshot, weights

T = TypeVar("T")

ROOT = Path(__file__).parents[2]

CHANGING = "write,fsync,fdatasync,rename,mkdir,unlink,unlinkat,rmdir,ftruncate,chmod,fchmod,link,symlink,openat"
"""The calls that change a disk, or open what is changed."""

FILES = f"{CHANGING},newfstatat,close,read,getdents64,lseek,ioctl,fcntl,flock"
"""Every call about files: all that the protocols make, but for memory, random numbers and the process itself."""

Point = tuple[str, int]
"""The n-th call (from 1) of that name, which is how strace counts."""

_CALL = re.compile(r"^(\w+)\(")
_ABOUT = re.compile(r'"([^"]+)"|<([^>]+)>')


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a child ended: its exit code, or minus the signal. `told`: its promises. `calls`: strace's lines."""

    code: int
    told: list[str]
    calls: list[str]

    @property
    def killed(self) -> bool:
        return self.code == -9

    @property
    def hit(self) -> str:
        """The call that met the fault: its name and what it was about."""
        lines = [line for line in self.calls if "(INJECTED)" in line] or self.calls[-1:]
        return named(lines[-1]) if lines else "nothing"

    def last(self, promise: str) -> int | None:
        """The number of the last promise of that kind."""
        return last(self.told, promise)


def last(told: Sequence[str], promise: str) -> int | None:
    """The number of the last promise of that kind, as in "committed 7"."""
    numbers = [int(line.split()[1]) for line in told if line.split()[0] == promise]
    return numbers[-1] if numbers else None


def named(line: str) -> str:
    """A line of strace in short: the call, and the name of the file that it is about."""
    call, about = _CALL.match(line), [path or quoted for quoted, path in _ABOUT.findall(line.replace("AT_FDCWD<", ""))]
    files = [name for name in about if name.startswith("/")] or about
    return f"{call[1] if call else line} {Path(files[0]).name if files else ''}".strip()


class Victim:
    """The parent process; one child at a time."""

    def __init__(self, scratch: Path) -> None:
        self._strace = needs("strace", "apt-get install strace")
        self._scratch = scratch
        scratch.mkdir(parents=True, exist_ok=True)
        self._runs = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.state_process"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def here(self, action: str, folder: Path) -> None:
        """Do it in the parent."""
        self._send(["here", action, str(folder)])
        self._answer()

    def run(
        self,
        action: str,
        folder: Path,
        *inject: str,
        trace: str = CHANGING,
        before: Callable[[int], object] = lambda pid: None,
        during: Callable[[int, Iterator[str], Path], object] | None = None,
    ) -> Outcome:
        """Let a child do the action under strace. `inject`: as `strace -e inject=` takes them. `before` is called with
        the pid before it begins; `during` with pid, strace's lines as they come, and the file of promises, while it
        runs."""
        self._runs += 1
        told, traced = self._scratch / f"told-{self._runs}", self._scratch / f"traced-{self._runs}"
        self._send(["fork", action, str(folder), str(told)])
        pid = self._answer()
        os.mkfifo(traced)
        command = [self._strace, "-p", str(pid), "-y", "-s", "16", "-o", str(traced), "-e", f"trace={trace}"]
        command += [argument for fault in inject for argument in ("-e", f"inject={fault}")]
        strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            with traced.open() as lines:
                assert strace.stderr is not None
                attached = strace.stderr.readline()
                assert "attached" in attached, attached + strace.stderr.read()
                before(pid)
                self._send(["go", pid])
                if during is not None:
                    during(pid, iter(lines), told)
                calls = [line for line in lines if _CALL.match(line)]
                code = self._answer()
        except BaseException:
            os.kill(pid, signal.SIGKILL)  # stopped, perhaps: it would never end
            raise
        finally:
            strace.kill()
            strace.communicate()
            traced.unlink()
        promises = told.read_text().splitlines() if told.exists() else []
        told.unlink(missing_ok=True)
        assert code != 1, f"the child failed by itself: {promises}"
        return Outcome(code, promises, calls)

    def _send(self, command: list[Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process of the faults has ended"
        return int(json.loads(line))


def calls_of(outcome: Outcome, names: str) -> list[Point]:
    """The calls of these names that an action made, in order."""
    seen: Counter[str] = Counter()
    found = []
    for line in outcome.calls:
        call = _CALL.match(line)
        if call is not None and call[1] in names.split(","):
            seen[call[1]] += 1
            found.append((call[1], seen[call[1]]))
    return found


def points(undisturbed: Outcome, few: int, names: str) -> list[Point]:
    """Where a fault can meet an action: at every one of its calls in the full form, else at `few` of them."""
    return some(calls_of(undisturbed, names), few)


def some(of: Sequence[T], few: int) -> list[T]:
    """All of them in the full form, else `few`, spread evenly, the first and the last included."""
    if FULL or len(of) <= few:
        return list(of)
    return [of[round(i * (len(of) - 1) / (few - 1))] for i in range(few)]


def assert_whole(commit: Commit) -> None:
    """Every file is what the manifest says, and everything in them is of one step: nothing torn, nothing mixed."""
    commit.verify()
    step = commit.manifest.step
    assert commit.state == {"step": step, "window": [step, 0.5]}
    (file,) = commit.tensor_files
    header, body = read_header(file), file.read_bytes()
    for name, tensor in weights(step).items():
        place = header.tensors[name]
        assert body[header.data_start + place.start : header.data_start + place.end] == bytes(tensor.data), name


@contextlib.contextmanager
def next_start(folder: Path) -> Iterator[RunDirectory]:
    """A start after the fault: the term rises, and what was interrupted is swept."""
    run = RunDirectory(folder)
    before = run.owner()
    run.acquire()
    try:
        assert run.term == (before.term if before else 0) + 1
        for swept in (run.path, run.commits, run.spool):
            assert [p.name for p in swept.iterdir() if p.name.startswith((".tmp-", ".del-"))] == []
        yield run
    finally:
        run.release()


def found_by_a_start(folder: Path, at_least: int, at_most: int) -> int:
    """The step that the next start goes on from, everything whole, nothing rejected, retention as it should be."""
    with next_start(folder) as run:
        commits = Commits(run)
        newest = commits.newest()
        assert newest is not None and at_least <= newest.manifest.step <= at_most, (newest, at_least, at_most)
        assert not commits.rejected, commits.rejected
        assert_whole(newest)
        kept = commits.retain(2)
        assert kept[0] == newest and len(kept) == 2
        for commit in kept:
            assert_whole(commit)
        names = sorted(p.name for p in run.commits.iterdir())
        assert names == sorted(c.path.name for c in kept), names
        return newest.manifest.step


def begun(folder: Path, commits: int = 2) -> int:
    """A run with that many commits, on a disk of any size; the step of the last."""
    with acquired(folder) as run:
        made = Commits(run, free_bytes=lambda path: 1 << 50)
        for step in range(1, commits + 1):
            made.write(snapshot(step))
    return commits
