"""The committer and the mirror's thread by themselves: re-reading kept commits, and a store that comes and goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from anytimed.config import CommitsTable
from anytimed.contracts import AnytimedError, Refused, Snapshot
from anytimed.service import mirroring
from anytimed.service.committer import Committer
from anytimed.service.mirroring import Mirroring
from anytimed.service.requests import Committed, Mirrored, Request, Verified
from anytimed.service.saving import Saving
from anytimed.storage.commits import Commits
from anytimed.storage.durable import forget_cached
from anytimed.storage.journal import Journal
from anytimed.storage.mirror import Mirror
from anytimed.storage.mirror_manifest import Claim, term_key
from anytimed.storage.mirror_reader import look
from anytimed.storage.store import Store
from tests.storage.material import acquired, flip, snapshot


class Desk:
    """Commits of a run, the threads that care for them, and what they posted."""

    def __init__(self, folder: Path) -> None:
        self.run = acquired(folder / "run")
        self.commits = Commits(self.run)
        self.journal = Journal(self.run.journal)
        self.store = Store(str(folder / "mirror"))
        self.posted: list[Request] = []
        self.committer = Committer(self.commits, self.posted.append)
        self.mirroring = Mirroring(Mirror(self.store, self.run), self.commits, self.journal, self.posted.append)

    def wait(self, told: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not told():
            assert time.monotonic() < deadline, self.posted
            time.sleep(0.002)

    def commit(self, step: int, keep: int = 3) -> Path:
        self.committer.submit(snapshot(step), keep)
        self.committer.wait()
        last = self.posted[-1]
        assert isinstance(last, Committed) and last.commit is not None
        return last.commit.path

    def verified(self) -> Verified:
        count = self.count(Verified)
        self.committer.verify()
        self.wait(lambda: self.count(Verified) > count)
        return next(p for p in reversed(self.posted) if isinstance(p, Verified))

    def count(self, kind: type[Request]) -> int:
        return sum(isinstance(p, kind) for p in self.posted)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr(mirroring, "FIRST_PAUSE_S", 0.05)
    made = Desk(tmp_path)
    yield made
    made.committer.close()
    made.mirroring.close()
    made.run.release()


# --- commits that somebody asked for ----------------------------------------------------------------------------------


class Saved:
    """The loop's hand on a real committer; what the learner and the board are to it."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.learner = SimpleNamespace(step_count=0)
        self.board = SimpleNamespace(
            commit=None, problems={}, problem=lambda key, text: None, committed=self._committed
        )
        session = SimpleNamespace(
            learner=self.learner, commits=desk.commits, mirror=None, journal=desk.journal, resumed=None, commit=None
        )
        self.saving = Saving(
            session,
            CommitsTable(every_steps=1),
            self.board,
            desk.posted.append,
            lambda: snapshot(self.learner.step_count),
        )

    def _committed(self, step: int, path: Path) -> dict[str, Any]:
        self.board.commit = {"step": step, "path": str(path), "time": time.time()}
        found: dict[str, Any] = self.board.commit
        return found

    def ask(self) -> Future[dict[str, Any]]:
        reply: Future[dict[str, Any]] = Future()
        self.saving.ask(reply)
        return reply

    def settle(self) -> None:
        """What the loop does with the commit in flight."""
        self.saving.settle()
        done = self.desk.posted[-1]
        assert isinstance(done, Committed)
        self.saving.committed(done, waiting=False)


@pytest.fixture
def saved(desk: Desk) -> Iterator[Saved]:
    made = Saved(desk)
    yield made
    made.saving.close()


def test_a_commit_asked_for_while_an_older_one_is_in_flight_follows_it(saved: Saved) -> None:
    saved.learner.step_count = 3
    first = saved.ask()
    again = saved.ask()
    saved.learner.step_count = 4
    later = saved.ask()
    saved.settle()
    assert first.result(0)["step"] == again.result(0)["step"] == 3 and not later.done()
    saved.learner.step_count = 5
    saved.saving.catch_up()
    saved.settle()
    assert later.result(0)["step"] == 5
    saved.saving.catch_up()  # nothing is owed any more
    assert saved.desk.count(Committed) == 2
    assert saved.ask().result(0)["step"] == 5 and saved.desk.count(Committed) == 2


def test_a_commit_asked_for_while_the_last_one_is_being_told_is_made(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved.learner.step_count = 3
    saved.ask()
    saved.settle()
    saved.learner.step_count = 4
    with monkeypatch.context() as patched:  # the thread has posted what came of it, and is not done
        patched.setattr(Committer, "busy", property(lambda self: True))
        later = saved.ask()
    saved.saving.catch_up()
    saved.settle()
    assert later.result(0)["step"] == 4


def test_who_asked_for_a_commit_is_told_when_there_will_be_none(saved: Saved) -> None:
    with pytest.raises(AnytimedError, match="no step was taken yet"):
        saved.ask().result(0)
    saved.learner.step_count = 3
    reply = saved.ask()
    saved.saving.settle()
    saved.saving.committed(Committed(3, error="the disk is full"), waiting=False)
    with pytest.raises(AnytimedError, match="the disk is full; it is tried again"):
        reply.result(0)
    reply = saved.ask()
    saved.saving.close()
    with pytest.raises(AnytimedError, match="stopping"):
        reply.result(0)


# --- reading again ----------------------------------------------------------------------------------------------------


def test_good_commits_are_all_read_and_nothing_is_touched(desk: Desk) -> None:
    for step in (1, 2, 3):
        desk.commit(step)
    assert desk.verified() == Verified(3)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("file", ["rank-00000-of-00001.safetensors", "state.json", "MANIFEST.json"])
def test_a_rotten_commit_stays_until_a_new_one_is_made_and_then_goes(desk: Desk, which: int, file: str) -> None:
    paths = [desk.commit(step) for step in (1, 2, 3)]
    flip(paths[which] / file, 5)
    found = desk.verified()
    assert (found.commits, [r.path for r in found.rotten]) == (3, [paths[which]])
    assert file in found.rotten[0].expected + found.rotten[0].found
    assert all(path.is_dir() for path in paths)  # the newest may be the rotten one: first a good one, then it goes
    new = desk.commit(3)
    left = {*paths, new} - {paths[which]}
    assert set(desk.commits.kept()) == left and len(left) == 3
    assert len([p for p in (desk.run.quarantine / "commits").iterdir() if p.is_dir()]) == 1
    assert desk.verified() == Verified(3)


def test_a_rotten_commit_does_not_count_for_retention(desk: Desk) -> None:
    paths = [desk.commit(step) for step in (1, 2, 3)]
    for path in paths[1:]:
        flip(path / "state.json", 2)
    assert len(desk.verified().rotten) == 2
    new = desk.commit(4, keep=2)
    assert set(desk.commits.kept()) == {paths[0], new}


def test_a_commit_that_is_due_waits_for_one_reading_at_most(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        desk.commit(step)
    reading, go = threading.Event(), threading.Event()
    read: list[Path] = []
    real = Commits.recheck

    def slow(self: Commits, path: Path) -> object:
        reading.set()
        go.wait(20)
        read.append(path)
        return real(self, path)

    monkeypatch.setattr(Commits, "recheck", slow)
    desk.committer.verify()
    assert reading.wait(20)
    desk.committer.verify()  # it is going on
    assert not desk.committer.busy
    desk.committer.submit(snapshot(4), 3)
    go.set()
    desk.wait(lambda: desk.count(Verified) == 1)
    assert [type(p) for p in desk.posted[-2:]] == [Committed, Verified]
    assert len(read) == 2  # the oldest of the three was retired by the commit between


def test_it_is_the_disk_that_is_read(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    path = desk.commit(1)
    forgotten: list[str] = []

    def forget(file: int) -> None:
        forgotten.append(Path(f"/proc/self/fd/{file}").readlink().name)
        forget_cached(file)

    for module in ("durable", "commit"):
        monkeypatch.setattr(f"anytimed.storage.{module}.forget_cached", forget)
    desk.verified()
    assert set(forgotten) == {p.name for p in path.iterdir()}


# --- the mirror's thread ----------------------------------------------------------------------------------------------


def mirrored(desk: Desk) -> list[int]:
    return [p.manifest.step for p in desk.posted if isinstance(p, Mirrored) and p.manifest is not None]


def test_a_commit_is_mirrored_and_older_ones_go(desk: Desk) -> None:
    desk.mirroring.start()
    for step in (1, 2, 3, 4):
        commit = desk.commits.write(snapshot(step))
        desk.mirroring.submit(commit, 2)
        desk.wait(lambda: desk.mirroring.idle)
    assert mirrored(desk) == [1, 2, 3, 4]
    assert [m.step for m in look(desk.store).commits] == [4, 3]


def test_a_store_that_is_down_gets_the_newest_when_it_is_back(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "mirror").write_text("in the way")
    desk.mirroring.start()
    desk.mirroring.submit(desk.commits.write(snapshot(1)), 2)
    desk.wait(lambda: desk.count(Mirrored) >= 2)
    assert all(isinstance(p, Mirrored) and p.error and p.refused is None for p in desk.posted)
    for step in (2, 3):
        desk.mirroring.submit(desk.commits.write(snapshot(step)), 2)
    assert not desk.mirroring.idle
    (tmp_path / "mirror").unlink()
    desk.wait(lambda: desk.mirroring.idle)
    assert mirrored(desk) == [3]


def test_a_commit_is_not_retired_while_it_is_sent(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    sending, go = threading.Event(), threading.Event()
    real = Store.put_copy

    def slow(self: Store, local: Path, key: str) -> None:
        sending.set()
        go.wait(20)
        real(self, local, key)

    monkeypatch.setattr(Store, "put_copy", slow)
    desk.mirroring.start()
    first = desk.commits.write(snapshot(1))
    desk.mirroring.submit(first, 2)
    assert sending.wait(20)
    for step in (2, 3, 4):  # neither waits for the store
        desk.commit(step, keep=2)
    assert first.path.is_dir()
    go.set()
    desk.wait(lambda: desk.mirroring.idle)
    assert mirrored(desk) == [1]
    desk.commit(5, keep=2)
    assert not first.path.exists()


def test_a_mirror_that_was_taken_over_ends_the_run(desk: Desk) -> None:
    claim = Claim(run_id=desk.run.run_id, term=7, host="other", pid=1, started="now", nonce="n")
    desk.store.replace(term_key(7), claim.to_bytes())
    desk.mirroring.start()
    desk.mirroring.submit(desk.commits.write(snapshot(1)), 2)
    desk.wait(lambda: desk.count(Mirrored) == 1)
    (told,) = desk.posted
    assert isinstance(told, Mirrored) and isinstance(told.refused, Refused)
    assert "term 7" in str(told.refused) and "on other" in str(told.refused)
    assert look(desk.store).commits == ()


def test_an_unforeseen_error_is_raised_by_the_loop(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Commits, "write", lambda self, made: made.nonsense)
    desk.committer.submit(Snapshot(1, {}, {}), 2)
    desk.committer.wait()
    assert type(desk.posted[0]).__name__ == "Crashed"
