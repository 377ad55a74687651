"""SIGKILL: at every system call of a protocol, and at random moments of a process that commits without pause."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anytimed.storage.commits import Commits
from tests.storage.material import acquired

ROOT = Path(__file__).parents[2]


def victim(role: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.storage.victim", role, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(("role", "calls"), [("sweep-commit", 30), ("sweep-pull", 30)])
def test_killed_at_every_call_the_old_or_the_new_stands(tmp_path: Path, role: str, calls: int) -> None:
    process = victim(role, tmp_path)
    told = process.communicate()[0]
    assert process.returncode == 0, told
    assert (
        int(told.split()[-1]) > calls
    )  # the sweep went through the whole protocol: its calls, counted by hand, are more


def test_a_disk_that_cuts_writes_short_loses_no_commit(tmp_path: Path) -> None:
    process = victim("full", tmp_path)
    told = process.communicate()[0]
    assert process.returncode == 0, told
    assert told.splitlines()[-1] == "recovered" and told.startswith("fits into ") and told.split()[2] != "0"


def test_killed_at_random_no_acknowledged_commit_is_lost(tmp_path: Path) -> None:
    random_s = random.Random(7)
    acknowledged = 0
    for _ in range(5):
        process = victim("commits", tmp_path)
        assert process.stdout is not None
        first = process.stdout.readline()  # it has started, and committed once
        time.sleep(random_s.uniform(0.0, 0.15))
        process.kill()
        told = [first, *process.communicate()[0].splitlines(keepends=True)]
        acknowledged = max(acknowledged, *(int(line) for line in told if line.endswith("\n")))
        with acquired(tmp_path) as run:
            commits = Commits(run)
            newest = commits.newest()
            assert newest is not None and not commits.rejected
            # One more may have become durable before it could be said.
            assert newest.manifest.step in (acknowledged, acknowledged + 1)
            assert newest.state["step"] == newest.manifest.step
    assert acknowledged > 5
