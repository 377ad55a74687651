"""Fault 22: the wall clock two hours back and ten days ahead, between starts and while it runs (libfaketime, preloaded;
the monotonic clock and the files' times stay what they are)."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from anytimed.service.timetable import Every
from tests import tiny
from tests.crash.audited import ROOT
from tests.faultlog import FULL, Injected
from tests.faults import moments, tools

BACK, REAL, AHEAD = "-2h", "+0", "+10d"
OFFSET_S = {BACK: -7200.0, REAL: 0.0, AHEAD: 864_000.0}
KEEP = 3


class Clock:
    """What the processes started with `environment` take for the time; `set` also reaches those that run."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"
        self.environment = {
            "LD_PRELOAD": tools.needs_faketime(),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            # Once a second: read at every look at the clock, threads get into each other's way, and the process ends.
            "FAKETIME_CACHE_DURATION": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def set(self, offset: str) -> None:
        beside = self._file.with_suffix(".new")
        beside.write_text(offset + "\n")
        beside.replace(self._file)


def published(folder: Path) -> list[str]:
    """Ids of the published checkpoints, oldest first: they sort as they are ordered."""
    return sorted(path.parent.name for path in (folder / "published" / "checkpoints").glob("*/manifest.json"))


def named(folder: Path, pointer: str) -> str:
    """The checkpoint that latest.json or best.json names; "" where it is not there yet."""
    with contextlib.suppress(FileNotFoundError):
        return str(json.loads((folder / "published" / pointer).read_text())["id"])
    return ""


def shows(folder: Path, offset: str) -> bool:
    """Whether the daemon's own clock has that offset by now."""
    with contextlib.suppress(FileNotFoundError):
        told = json.loads((folder / "run" / "status.json").read_text())["time"]
        return abs(told - time.time() - OFFSET_S[offset]) < 600
    return False


def discovered(folder: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return (folder / "run" / "journal.jsonl").read_text()
    return ""


@pytest.mark.fault(22)
@pytest.mark.timeout(3600)
def test_a_clock_that_is_set_orders_nothing_and_stalls_nothing(tmp_path: Path, injected: Injected) -> None:
    """Each life starts at one offset and is set to another while it runs. After both it has to find new data and to
    publish, which it does by the clock alone, within seconds and not when the old time comes round again."""
    lives = [(BACK, AHEAD), (AHEAD, BACK)]
    if FULL:
        lives = [pair for pair in itertools.product((BACK, REAL, AHEAD), repeat=2) if pair != (REAL, REAL)] + lives
    folder, clock = tmp_path / "set", Clock(tmp_path)
    config = tiny.config(
        folder_made(folder),
        commits={"every_steps": 7, "every_s": 0.5, "keep": KEEP},
        exports={"every_steps": None, "every_s": 0.5, "keep": KEEP},
    )
    reader = subprocess.Popen(
        [sys.executable, "-m", "tests.crash.reader", folder / "published", tmp_path / "pulled"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    arrivals = 0
    try:
        for number, life in enumerate(lives):
            newest = tiny.newest_commit(folder) if number else None
            clock.set(life[0])
            process = tiny.start("run", config, **clock.environment)
            try:
                for offset in life:
                    clock.set(offset)
                    moments.reached(process, folder, lambda f, offset=offset: shows(f, offset))  # type: ignore[misc]
                    for _ in range(2):  # the second time nothing is under way any more that was begun before
                        before = named(folder, "latest.json")
                        (new, *_) = tiny.write_text(folder / "data", 8, prefix=f"{99 - arrivals:02d}-", seed=arrivals)
                        arrivals += 1
                        moments.reached(process, folder, lambda f, new=new: new.name in discovered(f))  # type: ignore[misc]
                        moments.reached(process, folder, lambda f, old=before: named(f, "latest.json") > old)  # type: ignore[misc]
                        moments.reached(process, folder, moments.waits)
            finally:
                process.send_signal(signal.SIGTERM if number % 2 else signal.SIGKILL)
                told, _ = process.communicate(timeout=moments.DEADLINE_S)
            assert process.returncode == (0 if number % 2 else -signal.SIGKILL), told
            if newest is not None:
                assert f"resumed step {int(newest.name[-10:])} from {newest}" in told, told
            injected(22, f"life {number}: {life[0]} at the start, then {life[1]}")
    finally:
        pulls, _ = reader.communicate()
    assert reader.returncode == 0, pulls

    process = tiny.start("run", config)
    before = moments.owner(folder)
    moments.reached(process, folder, moments.owned_by_another_than(before))
    moments.reached(process, folder, moments.waits)
    moments.reached(process, folder, lambda f: bool(named(f, "best.json")))
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=moments.DEADLINE_S)
    assert process.returncode == 0, told
    assert published(folder)[-1] == named(folder, "latest.json")
    assert named(folder, "best.json") in published(folder)
    assert len(published(folder)) >= KEEP <= len(list((folder / "run" / "commits").iterdir()))
    as_journalled(folder, tmp_path / "told")


def test_an_interval_that_was_missed_is_not_made_up_for() -> None:
    """APScheduler's own would list each of the 8,640,000 times of ten days at a tenth of a second."""
    every, now = Every(0.1), datetime(2026, 1, 1, tzinfo=UTC)
    following = every.get_next_fire_time(None, now)
    assert following == now + timedelta(seconds=0.1)
    assert every.get_next_fire_time(following, following) == now + timedelta(seconds=0.2)
    later = now + timedelta(days=10)
    assert every.get_next_fire_time(following, later) == later + timedelta(seconds=0.1)


def folder_made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def as_journalled(lived: Path, told: Path) -> None:
    """An undisturbed run that is given the data and the journal ends with the same bits."""
    shutil.copytree(lived / "data", told / "data")
    (told / "run").mkdir(mode=0o700)
    shutil.copy(lived / "run" / "journal.jsonl", told / "run")
    newest = tiny.newest_commit(lived)
    tiny.run("run", tiny.config(told), "--steps", str(int(newest.name[-10:])))
    tiny.assert_same_state(newest, tiny.newest_commit(told))
