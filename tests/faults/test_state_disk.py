"""Real disks that are full, cut writes short or turn read-only, and a process that is given too little of anything.

The disk is a tmpfs with a few pages left, or ext4 whose journal the kernel has aborted; the limits are the kernel's
own (RLIMIT_FSIZE, RLIMIT_NOFILE, RLIMIT_AS). What was acknowledged is there afterwards, whole; when there is space
again, the next commit stands, and so it does in the same process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from anytimed.contracts import Rejected
from anytimed.service.metrics import Metrics
from anytimed.service.quarantine import Quarantine
from anytimed.storage.journal import Journal
from tests.faultlog import FULL, Injected
from tests.faults.state_disks import PowerCut, mounted, remount, tmpfs
from tests.faults.state_injection import CHANGING, Outcome, Victim, begun, found_by_a_start, named, some

PAGE = os.sysconf("SC_PAGE_SIZE")
_WRITTEN = re.compile(r"^write\(.*, (\d+)\) = (\d+)$")


def cut_short(line: str) -> bool:
    written = _WRITTEN.match(line.strip())
    return written is not None and int(written[2]) < int(written[1])


def promised(outcome: Outcome) -> list[str]:
    return [line.split()[0] for line in outcome.told if not line.startswith(("untidied", "acquired"))]


@pytest.mark.fault(3, 4)
def test_a_full_disk_costs_commits_until_there_is_space(tmp_path: Path, victim: Victim, injected: Injected) -> None:
    """A tmpfs with so many free pages: none, one, and so on, until a commit fits."""
    with tmpfs(tmp_path / "disk", 64 * PAGE) as disk:
        folder, ballast = disk / "run", disk / "ballast"
        step = begun(folder)
        seen = set()
        for free in some(range(10), 6):
            ballast.write_bytes(bytes((os.statvfs(disk).f_bavail - free) * PAGE))
            full = victim.run("commit_twice", folder, trace="write")
            seen.update(promised(full))
            if full.code == 2:
                assert "No space left" in full.told[-1], full.told
            else:
                assert all("No space left" in line for line in full.told if line.startswith("failed")), full.told
            assert not [p for p in (folder / "commits").iterdir() if p.name.startswith(".tmp-")]
            ballast.unlink()
            step = full.last("committed") or step
            step = found_by_a_start(folder, step, step)
            assert promised(victim.run("commit", folder)) == ["committed"]
            step = found_by_a_start(folder, step + 1, step + 1)
            injected(3, f"commit with {free} pages free: {', '.join(promised(full))}")
            if any(map(cut_short, full.calls)):
                injected(4, f"commit with {free} pages free")
        assert seen == {"ended", "failed", "committed"}


@pytest.mark.fault(3, 4)
def test_a_full_disk_costs_entries_until_there_is_space(tmp_path: Path, victim: Victim, injected: Injected) -> None:
    """The journal's last page fills up: the write that crosses its end is cut short, and taken back."""
    with tmpfs(tmp_path / "disk", 64 * PAGE) as disk:
        path, ballast = disk / "journal.jsonl", disk / "ballast"
        Journal(path).close()
        length, short = 0, 0
        while short < (12 if FULL else 2):
            ballast.write_bytes(bytes(os.statvfs(disk).f_bavail * PAGE))
            full = victim.run("append", disk, trace="write")
            ballast.unlink()
            journal = Journal(path)
            numbers = [entry["number"] for entry in journal.entries("data")]
            journal.close()
            assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) == (full.last("appended") or length)
            length = len(numbers)
            if "failed" in promised(full):
                injected(3, f"journal of {length} entries on a full disk")
            if any(map(cut_short, full.calls)):
                short += 1
                injected(4, f"journal of {length} entries, write cut short")
            again = victim.run("append", disk)
            assert promised(again) == ["appended"] * 4
            length += 3


@pytest.mark.fault(3, 4)
def test_figures_and_notes_on_a_full_disk_stay_whole_lines(tmp_path: Path, injected: Injected) -> None:
    with tmpfs(tmp_path / "disk", 96 * PAGE) as disk:
        metrics = Metrics(disk / "metrics.jsonl", disk / "status.json")
        metrics.start()
        notes = Quarantine(disk)
        ballast, records, told = disk / "ballast", 0, 0
        for turn in range(12 if FULL else 3):
            for full in (False, True):
                if full:
                    ballast.write_bytes(bytes(os.statvfs(disk).f_bavail * PAGE))
                failed = set()
                for _ in range(60 + turn):
                    records += 1
                    metrics.write("step", step=records)
                    notes("main", {"at": records}, Rejected("no text", "d" * 64))
                    metrics.show({"state": "x" * PAGE if full else "training"})
                    assert metrics.flush()
                    failed |= {bool(metrics.failed), bool(notes.failed)}
                # A file's last page has room for some lines; by now both are beyond it.
                assert (metrics.failed and notes.failed) if full else failed == {False}, failed
            for file in ("metrics.jsonl", "main.jsonl"):
                lines = (disk / file).read_bytes().splitlines(keepends=True)
                assert all(line.endswith(b"\n") and json.loads(line) for line in lines)
                assert len(lines) > told
            told = len(lines)
            assert json.loads((disk / "status.json").read_bytes()) == {"state": "training"}
            ballast.unlink()
            injected(3, f"metrics, notes and status, turn {turn}")
            injected(4, f"metrics, notes and status, turn {turn}")
        metrics.close()
        (disk / "main.jsonl").write_bytes((disk / "main.jsonl").read_bytes() + b'{"place": {"at"')
        Quarantine(disk)("main", {"at": 0}, Rejected("no text", "d" * 64))  # a torn note is passed over


@pytest.mark.fault(4)
def test_a_write_cut_short_is_gone_on_with_or_given_up(tmp_path: Path, victim: Victim, injected: Injected) -> None:
    """RLIMIT_FSIZE lets the first bytes of a write through. At first nothing more is allowed, then the limit is lifted
    between two writes, and the commit stands, whole."""
    folder = tmp_path / "run"
    step = begun(folder)
    for limit in some(range(300, 1280, 40), 5):
        before = lambda pid, limit=limit: resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, -1))  # noqa: E731
        given_up = victim.run("commit_twice", folder, trace="write", before=before)
        assert promised(given_up) == ["failed", "failed"] and any(map(cut_short, given_up.calls)), given_up
        assert "File too large" in given_up.told[0]
        assert found_by_a_start(folder, step, step) == step
        injected(4, f"given up at {limit} bytes")

        seen: list[str] = []

        def lift(pid: int, lines: Iterator[str], told: Path, seen: list[str] = seen) -> None:
            for line in lines:
                if cut_short(line):
                    seen.append(line)
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (-1, -1))
                if "--- stopped by SIGSTOP ---" in line:
                    os.kill(pid, signal.SIGCONT)

        gone_on = victim.run("commit", folder, "write:signal=SIGSTOP", trace="write", before=before, during=lift)
        assert len(seen) == 1 and promised(gone_on) == ["committed"], (seen, gone_on)
        step = found_by_a_start(folder, step + 1, step + 1)
        injected(4, f"gone on with at {limit} bytes, {named(seen[0])}")


def stops(lines: Iterator[str], pid: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """The call after which the process was stopped, and what lets it go on."""
    call = ""
    for line in lines:
        if "--- stopped by SIGSTOP ---" in line:
            yield named(call), lambda: os.kill(pid, signal.SIGCONT)
        elif line[0].isalpha():
            call = line


@pytest.mark.fault(6)
def test_commits_on_a_disk_that_is_read_only_for_a_while(tmp_path: Path, victim: Victim, injected: Injected) -> None:
    """The folder of the commits is mounted read-only after some call of a commit, and writable again when that has
    failed; the next commit of the same process stands."""
    folder = tmp_path / "run"
    commits = folder / "commits"
    step = begun(folder)
    undisturbed = [named(line) for line in victim.run("commit_twice", folder).calls]
    step = found_by_a_start(folder, step + 2, step + 2)
    first = next(n for n, call in enumerate(undisturbed) if call.startswith("mkdir .tmp-"))
    last_one = next(n for n, call in enumerate(undisturbed) if call.startswith("rename .tmp-0"))
    assert last_one - first > 10
    for at in some(range(first, last_one), 4):  # counted from 0: after call `at` + 1, before the rename
        seen: list[str] = []

        def read_only(pid: int, lines: Iterator[str], told: Path, at: int = at, seen: list[str] = seen) -> None:
            with contextlib.ExitStack() as for_now:
                for number, (call, go_on) in enumerate(stops(lines, pid)):
                    if number == at:
                        for_now.enter_context(mounted(commits, commits, "none", "bind"))
                        remount(commits, "bind,ro")
                        seen.append(call)
                    elif "failed" in told.read_text():
                        for_now.close()
                    go_on()

        outcome = victim.run("commit_twice", folder, f"{CHANGING}:signal=SIGSTOP", during=read_only)
        assert promised(outcome) == ["failed", "committed"], outcome.told
        assert "Read-only file system" in outcome.told[0]
        step = found_by_a_start(folder, step + 2, step + 2)
        injected(6, f"writable again: {at}, {seen[0]}")


@pytest.mark.fault(6)
def test_a_disk_that_the_kernel_has_turned_read_only(tmp_path: Path, victim: Victim, injected: Injected) -> None:
    """ext4 aborts its journal, as it does after an error of the device: every later change is refused, until the next
    boot mounts the disk again. It finds what was acknowledged."""
    begun(tmp_path / "plain")
    calls = victim.run("commit", tmp_path / "plain").calls
    for at in some(range(len(calls)), 5):
        power = PowerCut(tmp_path / f"disk-{at}")
        seen: list[str] = []

        def abort(pid: int, lines: Iterator[str], told: Path, at: int = at, seen: list[str] = seen) -> None:
            for number, (call, go_on) in enumerate(stops(lines, pid)):
                if number == at:
                    remount(power.disk, "abort")  # noqa: B023 - called within this turn of the loop
                    seen.append(call)
                go_on()

        with power.on() as disk:
            begun(disk / "run")
            os.sync()
            outcome = victim.run("commit", disk / "run", f"{CHANGING}:signal=SIGSTOP", during=abort)
        assert seen and outcome.code in (0, 2)
        assert outcome.code == 0 or "Read-only file system" in outcome.told[-1], outcome.told
        with power.again() as disk:
            found_by_a_start(disk / "run", outcome.last("committed") or 2, 3)
        injected(6, f"aborted: {at}, {seen[0]}")


@pytest.mark.fault(7)
@pytest.mark.parametrize("what", ["descriptors", "memory"])
def test_with_too_little_of_it_nothing_is_lost_or_judged(
    tmp_path: Path, victim: Victim, injected: Injected, what: str
) -> None:
    folder = tmp_path / "run"
    step = begun(folder)

    def limited(amount: int) -> Outcome:
        def before(pid: int) -> None:
            if what == "descriptors":
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (amount, amount))
            else:
                used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * PAGE
                resource.prlimit(pid, resource.RLIMIT_AS, (used + (amount << 20), -1))

        return victim.run("commit_twice", folder, before=before)

    ends = set()
    for amount in some(range(3, 10) if what == "descriptors" else range(0, 29, 2), 6):
        outcome = limited(amount)
        ends.update(promised(outcome))
        assert outcome.code in (0, 2), outcome
        assert not list((folder / "quarantine" / "commits").iterdir())
        step = found_by_a_start(folder, outcome.last("committed") or step, outcome.last("committed") or step)
        injected(7, f"{what}, {amount}: {', '.join(promised(outcome))}")
    assert "committed" in ends and len(ends) > 1, ends
