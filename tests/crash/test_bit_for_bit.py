"""Whatever kills the daemon, the steps that follow are the steps that would have followed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from anytimed.contracts import Json
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


def status_of(folder: Path) -> Json:
    try:
        status: Json = json.loads((folder / "run" / "status.json").read_text())
    except FileNotFoundError:
        return {}
    return status


def step_of(folder: Path) -> int:
    return int(status_of(folder).get("step", 0))


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


def test_a_run_whose_data_came_while_it_was_killed_is_the_run_that_its_journal_tells(tmp_path: Path) -> None:
    """What arrived when stands in the journal: given the journal alone, another run takes the same steps."""
    lived, told = tmp_path / "lived", tmp_path / "told"
    tiny.write_text(lived / "data", 8, prefix="first")
    config = tiny.config(lived)
    draw = random.Random(1)
    for arrival in range(6):
        process = tiny.start("run", config)
        at = draw.uniform(0.0, 1.0)
        tiny.write_text(lived / "data", 3, prefix=f"arrival{9 - arrival}", seed=arrival)
        began: list[float] = []

        def due(process=process, at=at, began=began) -> bool:  # type: ignore[no-untyped-def]
            """`at` seconds after this process began to train."""
            if not began and status_of(lived).get("pid") == process.pid:
                began.append(time.monotonic())
            return bool(began) and time.monotonic() > began[0] + at

        kill_when(process, due)
        tiny.write_text(lived / "data", 2, prefix=f"between{9 - arrival}", seed=20 + arrival)
    process = tiny.start("run", config)
    assert process.stdout is not None
    for line in process.stdout:
        if "waiting for data" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0
    journal = [json.loads(line)["entry"] for line in (lived / "run" / "journal.jsonl").read_text().splitlines()]
    assert sum(entry["kind"] == "discovered" for entry in journal) >= 3
    assert any(entry["kind"] == "block_cut" for entry in journal)

    shutil.copytree(lived / "data", told / "data")
    (told / "run").mkdir(mode=0o700, parents=True)
    shutil.copy(lived / "run" / "journal.jsonl", told / "run")
    steps = int(tiny.newest_commit(lived).name.rpartition("-")[2])
    tiny.run("run", tiny.config(told), "--steps", str(steps))
    tiny.assert_same_state(tiny.newest_commit(lived), tiny.newest_commit(told))
