"""SIGKILL at every system call: of a start with its commit and retention, of the journal, of an export being built,
of a start that sweeps, of retention. The next start finds what was there or what was to be, whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from anytimed.storage.commits import Commits
from anytimed.storage.journal import Journal
from anytimed.storage.spool import Spool
from tests.faultlog import FULL, Injected
from tests.faults.state_injection import (
    CHANGING,
    FILES,
    Victim,
    assert_whole,
    begun,
    calls_of,
    found_by_a_start,
    next_start,
    points,
)
from tests.storage.material import acquired, snapshot

TRACED = FILES if FULL else CHANGING


@pytest.mark.fault(1)
def test_killed_at_a_call_of_start_commit_and_retention(tmp_path: Path, victim: Victim, injected: Injected) -> None:
    folder = tmp_path / "run"
    step = begun(folder)
    undisturbed = victim.run("commit", folder, trace=TRACED)
    step = found_by_a_start(folder, step + 1, step + 1)
    for call, n in points(undisturbed, 40, TRACED):
        killed = victim.run("commit", folder, f"{call}:signal=SIGKILL:when={n}", trace=call)
        assert killed.killed, (call, n)
        step = found_by_a_start(folder, killed.last("committed") or step, step + 1)
        injected(1, f"commit: {call} {n}, {killed.hit}")


@pytest.mark.fault(1)
def test_killed_at_a_call_of_an_append(tmp_path: Path, victim: Victim, injected: Injected) -> None:
    path = tmp_path / "journal.jsonl"
    victim.run("append", tmp_path)
    undisturbed = victim.run("append", tmp_path, trace=TRACED)
    length = 6
    for call, n in points(undisturbed, 8, TRACED):
        killed = victim.run("append", tmp_path, f"{call}:signal=SIGKILL:when={n}", trace=call)
        assert killed.killed, (call, n)
        journal = Journal(path)
        assert (killed.last("appended") or length) <= journal.length("data") <= length + 3
        length = journal.length("data")
        assert [entry["number"] for entry in journal.entries("data")] == list(range(1, length + 1))
        journal.close()
        injected(1, f"journal: {call} {n}, {killed.hit}")


@pytest.mark.fault(1)
def test_killed_at_a_call_of_an_export_being_built(tmp_path: Path, victim: Victim, injected: Injected) -> None:
    folder = tmp_path / "run"
    victim.run("spool", folder)
    undisturbed = victim.run("spool", folder, trace=TRACED)
    built = 2
    for call, n in points(undisturbed, 8, TRACED):
        killed = victim.run("spool", folder, f"{call}:signal=SIGKILL:when={n}", trace=call)
        assert killed.killed, (call, n)
        with next_start(folder) as run:
            pending = Spool(run).pending()
        assert len(pending) in (built, built + 1)
        assert len(pending) == built + 1 or killed.last("spooled") is None
        built = len(pending)
        injected(1, f"spool: {call} {n}, {killed.hit}")


@pytest.mark.fault(12)
def test_killed_at_a_call_of_retention(tmp_path: Path, victim: Victim, injected: Injected) -> None:
    folder = tmp_path / "run"
    step = begun(folder, 5)
    undisturbed = victim.run("retain", folder, trace=TRACED)
    for call, n in points(undisturbed, 20, TRACED):
        with acquired(folder) as run:
            commits = Commits(run)
            commits.newest()
            for _ in range(3):
                step += 1
                commits.write(snapshot(step))
            assert len(list(run.commits.iterdir())) == 5
        killed = victim.run("retain", folder, f"{call}:signal=SIGKILL:when={n}", trace=call)
        assert killed.killed, (call, n)
        with next_start(folder) as run:
            commits = Commits(run)
            newest = commits.newest()
            assert newest is not None and newest.manifest.step == step and not commits.rejected
            # Whatever was being deleted: each that is still there is whole, and the good ones are all there.
            left = sorted(int(p.name[:6]) for p in run.commits.iterdir())
            assert left[-2:] == [newest.manifest.seq - 1, newest.manifest.seq]
            kept = commits.retain(5)
            assert len(kept) == len(left) >= 2
            for commit in kept:
                assert_whole(commit)
            assert len(commits.retain(2)) == 2
        injected(12, f"{call} {n}, {killed.hit}")


@pytest.mark.fault(1)
def test_killed_at_a_call_of_the_sweep_after_it(tmp_path: Path, victim: Victim, injected: Injected) -> None:
    """Leftovers of a killed commit and a killed deletion; the start that sweeps them is killed as well."""
    folder = tmp_path / "run"
    step = begun(folder)

    def leftovers() -> None:
        victim.here("hold", folder)
        assert victim.run("save", folder).code == 0
        assert victim.run("save", folder, "rename:signal=SIGKILL:when=1").killed
        assert victim.run("tidy", folder, "rmdir:signal=SIGKILL:when=1").killed
        victim.here("release", folder)
        kinds = {p.name[:5] for p in (folder / "commits").iterdir() if p.name.startswith(".")}
        assert kinds == {".tmp-", ".del-"}

    leftovers()
    undisturbed = victim.run("start", folder, trace=TRACED)
    step = found_by_a_start(folder, step + 1, step + 1)
    for call, n in points(undisturbed, 8, TRACED):
        leftovers()
        killed = victim.run("start", folder, f"{call}:signal=SIGKILL:when={n}", trace=call)
        assert killed.killed, (call, n)
        step = found_by_a_start(folder, step + 1, step + 1)
        injected(1, f"start: {call} {n}, {killed.hit}")


@pytest.mark.fault(11)
def test_ten_crashed_saves_then_retention(tmp_path: Path, victim: Victim, injected: Injected) -> None:
    """Ten savers of one owner are killed half way, at different calls; then retention tidies up, and the next save
    stands."""
    folder = tmp_path / "run"
    step = begun(folder, 3)
    victim.here("hold", folder)
    undisturbed = victim.run("save", folder)
    # A kill before the folder is made leaves nothing behind, one after the rename a commit.
    calls = calls_of(undisturbed, CHANGING)
    inside = calls[calls.index(("mkdir", 1)) + 1 : calls.index(("rename", 1)) + 1]
    assert len(inside) > 10
    crashed = []
    for call, n in inside[-10:]:
        killed = victim.run("save", folder, f"{call}:signal=SIGKILL:when={n}", trace=call)
        assert killed.killed and killed.told == []
        crashed.append(f"{call} {n}, {killed.hit}")
    assert sum(p.name.startswith(".tmp-") for p in (folder / "commits").iterdir()) == 10
    assert victim.run("tidy", folder).told == [f"kept [{step + 1}, {step}]"]
    assert sorted(int(p.name[7:]) for p in (folder / "commits").iterdir()) == [step, step + 1]
    assert victim.run("save", folder).told == [f"committed {step + 2}"]
    victim.here("release", folder)
    assert found_by_a_start(folder, step + 2, step + 2)
    for point in crashed:
        injected(11, point)
