"""Whatever kills the daemon, the steps that follow are the steps that would have followed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny

STEPS = 200


def leftovers(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(folder) if entry.name.startswith(".tmp-")]
    except FileNotFoundError:
        return []


def kill_when(process: subprocess.Popen[str], due: Callable[[], bool]) -> None:
    """SIGKILL as soon as `due`; polling without a pause, for a tiny commit takes a millisecond or two."""
    deadline = time.monotonic() + 60
    while not due():
        assert process.poll() is None, f"ended before the moment to kill it came:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, "the moment to kill it never came"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def step_of(folder: Path) -> int:
    try:
        step: int = json.loads((folder / "run" / "status.json").read_text())["step"]
    except (FileNotFoundError, json.JSONDecodeError):
        return 0
    return step


@pytest.mark.parametrize("optimizer", ["sf_normuon", "amuse"])
def test_three_kills_leave_the_run_bit_for_bit_the_same(tmp_path: Path, optimizer: str) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        tiny.write_text(folder / "data", 48)
    tiny.run("run", tiny.config(undisturbed, optimizer), "--steps", STEPS_TEXT)

    config = tiny.config(killed, optimizer)
    # At a random step, whatever is going on then.
    at = random.Random(optimizer).randrange(10, 60)
    kill_when(tiny.start("run", config, "--steps", STEPS_TEXT), lambda: step_of(killed) >= at)
    # During a commit, and during an export: what the killed process left half written proves it; else once more.
    for folder in (killed / "run" / "commits", killed / "run" / "spool"):
        for _ in range(5):
            process = tiny.start("run", config, "--steps", STEPS_TEXT)
            while leftovers(folder):  # those of the process before: swept at the start
                assert process.poll() is None
            kill_when(process, lambda folder=folder: bool(leftovers(folder)))  # type: ignore[misc]
            if leftovers(folder):
                break
        assert leftovers(folder), f"five kills, and none caught {folder.name} half written"
    assert step_of(killed) < STEPS, "everything was over before the kills"
    tiny.run("run", config, "--steps", STEPS_TEXT)

    tiny.assert_same_state(tiny.newest_commit(undisturbed), tiny.newest_commit(killed))
    assert tiny.newest_commit(killed).name.endswith(f"-{STEPS:010d}")


STEPS_TEXT = str(STEPS)


def test_a_resume_after_a_stop_is_bit_for_bit_too(tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    for folder in (once, twice):
        tiny.write_text(folder / "data", 60)
    tiny.run("run", tiny.config(once), "--steps", "60")
    for steps in ("23", "60"):
        tiny.run("run", tiny.config(twice), "--steps", steps)
    tiny.assert_same_state(tiny.newest_commit(once), tiny.newest_commit(twice))
