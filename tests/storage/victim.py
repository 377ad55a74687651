"""Processes that are killed: run as `python -m tests.storage.victim ROLE FOLDER`, they say on stdout what they
promised.

`commits`: commit for ever, telling each step once it is durable. `sweep-commit`, `sweep-pull`: fork a child for every
system call of the protocol and kill it there with SIGKILL; after each, look at the disk as the next start would.
`full`: commit on a disk that takes files of a limited size only, as the kernel enforces it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from anytimed.storage.commits import CommitFailed, Commits
from anytimed.storage.pull import pull
from anytimed.storage.run_directory import RunDirectory
from tests.storage import faults
from tests.storage.material import Site, acquired, snapshot


def say(*told: object) -> None:
    print(*told, flush=True)


def commits(folder: Path) -> None:
    run = acquired(folder)
    kept = Commits(run)
    newest = kept.newest()
    step = newest.manifest.step if newest else 0
    while True:
        step += 1
        kept.write(snapshot(step))
        say(step)
        kept.retain(2)


def killed_at(n: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child that is killed at its n-th call; whether it got to the end instead."""
    child = os.fork()
    if child == 0:
        with faults.at_call(n, faults.kill):
            action()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return True


def sweep_commit(folder: Path) -> None:
    """Every call of a start, a commit and the retention after it."""

    def start_and_commit() -> None:
        run = acquired(folder)
        kept = Commits(run)
        newest = kept.newest()
        assert newest is not None
        kept.write(snapshot(newest.manifest.step + 1))
        kept.retain(2)

    with acquired(folder) as run:
        first = Commits(run)
        for step in (1, 2):
            first.write(snapshot(step))
    step, n, finished = 2, 0, False
    while not finished:
        n += 1
        finished = killed_at(n, start_and_commit)
        run = RunDirectory(folder)
        before = run.owner()
        run.acquire()
        assert before is not None and run.term == before.term + 1, (n, before)
        kept = Commits(run)
        newest = kept.newest()
        assert newest is not None and newest.manifest.step in (step, step + 1), (n, newest)
        assert not kept.rejected, (n, kept.rejected)
        assert newest.state["step"] == newest.manifest.step
        step = newest.manifest.step
        assert len(kept.retain(2)) == 2, n
        assert sorted(p.name[0] for p in run.commits.iterdir()) == ["0", "0"], n
        run.release()
    say("killed at", n - 1)


def sweep_pull(folder: Path) -> None:
    """Every call of a pull that replaces an older checkpoint."""
    site = Site(folder / "writer", str(folder / "published"))
    old = site.publish(1)
    pull(site.url, folder / "old")
    new = site.publish(2)
    n, finished = 0, False
    while not finished:
        n += 1
        to = folder / f"to-{n}"
        shutil.copytree(folder / "old", to, symlinks=True)
        finished = killed_at(n, partial(pull, site.url, to))
        leads_to = (to / "current" / "manifest.json").read_bytes()
        assert leads_to in (old.data, new.data), n
        manifest = old.manifest if leads_to == old.data else new.manifest
        for entry in manifest.files:
            assert (to / "current" / entry.name).stat().st_size == entry.size, (n, entry.name)
        assert pull(site.url, to).manifest == new.manifest, n
        assert not [p for p in to.rglob("*") if p.name.startswith(".tmp")], n
        shutil.rmtree(to)
    say("killed at", n - 1)


def full(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    run = acquired(folder)
    kept = Commits(run)
    kept.write(snapshot(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in range(
        0, 1400, 100
    ):  # the tensor file of a snapshot has about 1200 bytes: the kernel cuts a write short
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with contextlib.suppress(CommitFailed):
            kept.write(snapshot(1))
            say("fits into", limit)
            break
        newest = Commits(run).newest()
        assert newest is not None and newest.manifest.seq == 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept.write(snapshot(2))
    assert kept.newest() == Commits(run).newest()
    say("recovered")


if __name__ == "__main__":
    role = {"commits": commits, "sweep-commit": sweep_commit, "sweep-pull": sweep_pull, "full": full}[sys.argv[1]]
    role(Path(sys.argv[2]))
