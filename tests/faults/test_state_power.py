"""The power goes, after each step: what reached the disk by then is mounted elsewhere, and the next start looks at it.

A child works on an ext4 image and is stopped after every system call. Whatever it had promised by then has to be on
the copy, whole. The disk is mounted as usual; so that nothing reaches it by time (`commit=300`); with names that may
overtake their bytes (`data=writeback,noauto_da_alloc`); and so that everything reaches it at once (`flushed`). That
the harness sees a loss is shown last, with fsyncs that do nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from anytimed.contracts import AnytimedError
from anytimed.storage.commits import Commits
from anytimed.storage.journal import Journal
from anytimed.storage.run_directory import RunDirectory
from anytimed.storage.spool import Spool
from anytimed.storage.target import Target
from tests.faultlog import Injected
from tests.faults.state_disks import PowerCut
from tests.faults.state_injection import CHANGING, Victim, found_by_a_start, last, named, next_start, some
from tests.storage.material import Site, acquired, snapshot

MOUNTS = {
    "as usual": "",
    "nothing by time": "commit=300",
    "names first": "commit=300,data=writeback,noauto_da_alloc",
    "flushed": "commit=300",
}

Look = Callable[[Path, list[str]], None]
"""Asserts what must hold on a disk after the cut, given what had been promised."""


def commit_found(disk: Path, told: list[str]) -> None:
    acknowledged = last(told, "committed") or 2
    folder = disk / "run"
    owner = RunDirectory(folder).owner()
    assert owner is not None and owner.term >= (last(told, "acquired") or 1)
    assert found_by_a_start(folder, acknowledged, 3) in (2, 3)


def entries_found(disk: Path, told: list[str]) -> None:
    journal = Journal(disk / "journal.jsonl")
    numbers = [entry["number"] for entry in journal.entries("data")]
    journal.close()
    assert numbers == list(range(1, len(numbers) + 1))
    assert (last(told, "appended") or 3) <= len(numbers) <= 7


def export_found(disk: Path, told: list[str]) -> None:
    with next_start(disk / "run") as run:
        pending = [item.manifest.term for item in Spool(run).pending()]
    assert pending in ([], [2]) and (pending == [2] or last(told, "spooled") is None)


def target_found(disk: Path, told: list[str]) -> None:
    target = Target(disk / "to")
    manifest = target.current()
    assert manifest is not None or last(told, "pulled") is None
    if manifest is None:
        assert not (disk / "to" / "current").is_symlink()
    else:
        assert target.whole(manifest)


WORK: dict[str, tuple[str, Look]] = {
    "commit": ("run", commit_found),
    "append": (".", entries_found),
    "spool": ("run", export_found),
    "fetch": (".", target_found),
}


def begun(disk: Path) -> None:
    """A run with two commits, a journal of three entries, the address of a published checkpoint; all of it durable."""
    with acquired(disk / "run") as run:
        commits = Commits(run, free_bytes=lambda path: 1 << 50)
        for step in (1, 2):
            commits.write(snapshot(step))
    journal = Journal(disk / "journal.jsonl")
    for number in (1, 2, 3):
        journal.append("data", {"number": number, "files": ["a.txt"] * 3})
    journal.close()
    url = str(disk.parent / "published")
    if not Path(url).exists():
        Site(disk.parent / "writer", url).publish(1)
    (disk / "url").write_text(url)
    flush(disk)


def flush(disk: Path) -> None:
    """Everything written to this filesystem reaches it."""
    subprocess.run(["sync", "-f", disk], check=True)


def cut_when(
    due: Callable[[int, str], bool],
    victim: Victim,
    power: PowerCut,
    action: str,
    look: Callable[[str, Path, list[str]], None],
    *,
    flushed: bool = False,
    lost_fsync: int | None = None,
) -> None:
    """Let the action go on from call to call of a new disk, cut the power after each that is `due` by its number and
    name, and once more when it has ended. `lost_fsync`: the one that answers at once and does nothing."""
    faults = [f"{CHANGING}:signal=SIGSTOP"]
    if lost_fsync is not None:
        faults = [f"{CHANGING.replace('fsync,', '', 1)}:signal=SIGSTOP", f"fsync:retval=0:when={lost_fsync}"]

    def cut(point: str, told: Path) -> None:
        if flushed:
            flush(disk)
        with power.cut() as copy:
            look(point, copy, told.read_text().splitlines() if told.exists() else [])

    def step_by_step(pid: int, lines: Iterator[str], told: Path) -> None:
        number, call = 0, ""
        for line in lines:
            if "--- stopped by SIGSTOP ---" not in line:
                call = line if line[0].isalpha() else call
                continue
            number += 1
            if due(number, named(call)):
                cut(f"{number}, {named(call)}", told)
            os.kill(pid, signal.SIGCONT)
        cut("when it had ended", told)

    with power.on() as disk:
        begun(disk)
        # The process before was killed when it had written a fourth entry, before the fsync: a start reads it.
        assert victim.run("append", disk, "fsync:signal=SIGKILL:when=2").killed
        victim.run(action, disk / WORK[action][0], *faults, during=step_by_step)


def calls_to_cut(victim: Victim, folder: Path, action: str, few: int) -> list[int]:
    begun(folder)
    undisturbed = victim.run(action, folder / WORK[action][0])
    return some(range(1, len(undisturbed.calls) + 1), few)


@pytest.mark.fault(2)
@pytest.mark.parametrize("mount", MOUNTS)
@pytest.mark.parametrize("action", WORK)
def test_what_was_promised_is_on_the_disk(
    tmp_path: Path, victim: Victim, injected: Injected, action: str, mount: str
) -> None:
    calls = calls_to_cut(victim, made(tmp_path / "plain"), action, 8 if action == "commit" else 3)

    def look(point: str, disk: Path, told: list[str]) -> None:
        WORK[action][1](disk, told)
        injected(2, f"{action}, {mount}: {point}")

    power = PowerCut(tmp_path / "power", MOUNTS[mount])
    cut_when(lambda number, call: number in calls, victim, power, action, look, flushed=mount == "flushed")


@pytest.mark.parametrize("action", WORK)
def test_the_harness_sees_what_a_lost_fsync_loses(tmp_path: Path, victim: Victim, action: str) -> None:
    """Each fsync of a file, and the last one before something is promised, is needed: without it this test would find
    a loss right after the promise. (A folder's fsync may be covered by a later one: ext4 has one journal for all.)"""
    begun(made(tmp_path / "plain"))
    undisturbed = victim.run(action, tmp_path / "plain" / WORK[action][0], trace="fsync,write")
    calls = [named(line) for line in undisturbed.calls]
    fsyncs = [at for at, call in enumerate(calls) if call.startswith("fsync")]
    last_before = [max(at for at in fsyncs if at < told) for told, call in enumerate(calls) if "told-" in call]
    folders = ("run", "commits", "plain", "to", "versions", "spool", ".partial-")
    needed = [at for at in fsyncs if at in last_before or not calls[at].split()[1].startswith((".tmp-0", *folders))]
    assert len(needed) >= 2
    for at in some(needed, 3):
        lost: list[str] = []

        def look(point: str, disk: Path, told: list[str], lost: list[str] = lost) -> None:
            try:
                WORK[action][1](disk, told)
            except (AssertionError, AnytimedError) as error:
                lost.append(f"{point}: {error}")

        power = PowerCut(tmp_path / f"power-{at}", MOUNTS["names first"])
        number = fsyncs.index(at) + 1
        cut_when(lambda _, call: "told-" in call, victim, power, action, look, lost_fsync=number)
        assert lost, f"{action}: nothing was lost without {calls[at]}"


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder
