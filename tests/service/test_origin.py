"""Where a start takes the state from: local or mirror, whatever is missing, damaged, older or of another run."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from anytimed.config import CommitsTable
from anytimed.contracts import AnytimedError, Refused
from anytimed.data.fold_file import FoldFile
from anytimed.service import origin
from anytimed.service.origin import Origin, Sources
from anytimed.storage.commits import Commit, Commits
from anytimed.storage.journal import Journal
from anytimed.storage.mirror import Mirror, TermTaken
from anytimed.storage.mirror_reader import look
from anytimed.storage.run_directory import RunDirectory
from anytimed.storage.store import Store, StoreError
from anytimed.storage.verify import verify_run
from tests.storage import object_store
from tests.storage.material import flip, snapshot, tree

ROOT = Path(__file__).parents[2]
assert object_store  # imported for the protocol that it registers


def needs(commit: Commit) -> tuple[int, str]:
    return commit.state["length"], commit.state["digest"]


class Machine:
    """A directory that starts, decides, commits and mirrors as the daemon does, and then is gone."""

    def __init__(self, folder: Path, url: str) -> None:
        self.run = RunDirectory(folder)
        self.table = CommitsTable(mirror_url=url)

    def start(self, *, fresh: bool = False) -> Origin:
        self.run.release()
        if fresh:
            self.run.start_fresh()
        self.run.acquire()
        sources = Sources(self.run, self.table)
        sources.identify(fresh=fresh)
        self.origin = sources.newest(needs, fresh=fresh)
        return self.origin

    def commit(self, step: int, *, mirrored: bool = True) -> Commit:
        journal = self.origin.journal
        journal.append("data", {"draw": step})
        told = {"length": journal.length("data"), "digest": journal.digest("data"), "step": step}
        made = self.origin.commits.write(replace(snapshot(step), state=told))
        if mirrored and self.origin.mirror is not None:
            self.origin.mirror.push(made, journal)
        return made


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "START_S", 0.2)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "mirror")


@pytest.fixture
def machine(tmp_path: Path, url: str) -> Machine:
    """One that has mirrored steps 1 and 2."""
    made = Machine(tmp_path / "run", url)
    made.start()
    made.commit(1)
    made.commit(2)
    return made


def step_of(origin: Origin) -> int | None:
    return origin.commit.manifest.step if origin.commit is not None else None


def test_an_empty_machine_goes_on_with_the_mirrors_run(
    machine: Machine, tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_id, journal = machine.run.run_id, machine.run.journal.read_bytes()
    new = Machine(tmp_path / "new", url)
    with caplog.at_level(logging.INFO):
        found = new.start()
    assert (found.taken, step_of(found), new.run.run_id) == ("mirror", 2, run_id)
    assert new.run.term > 1 and new.run.journal.read_bytes() == journal
    assert "taking commit 00001-000002-0000000002 from the mirror" in caplog.text
    assert "no good one here" in caplog.text
    assert new.commit(3).manifest.order == (new.run.term, 3)
    with pytest.raises(TermTaken):
        machine.commit(3)  # the old machine was not dead


def test_a_new_run_begins_where_the_mirror_holds_nothing(tmp_path: Path, url: str) -> None:
    found = Machine(tmp_path / "run", url).start()
    assert (found.taken, found.commit, found.problem) == ("", None, None)
    assert look(Store(url)).term == 1


def test_the_newer_one_is_taken_and_said(machine: Machine, tmp_path: Path, url: str) -> None:
    machine.commit(3, mirrored=False)
    found = machine.start()
    assert (found.taken, step_of(found)) == ("local", 3)
    other = Machine(tmp_path / "other", url)
    assert step_of(other.start()) == 2  # step 3 never left the first machine
    other.commit(9)
    found = machine.start()  # its own newest is of an older term
    assert (found.taken, step_of(found)) == ("mirror", 9)
    assert [e["draw"] for e in found.journal.entries("data")] == [1, 2, 9]
    assert [p.name.startswith("journal-") for p in machine.run.quarantine.iterdir() if p.is_file()] == [True]


def test_all_local_ones_corrupt_the_mirrors_is_taken_and_they_go_to_quarantine(machine: Machine) -> None:
    for path in machine.run.commits.iterdir():
        flip(path / "state.json", 3)
    found = machine.start()
    assert (found.taken, step_of(found)) == ("mirror", 2)
    bad = {p.name for p in (machine.run.quarantine / "commits").iterdir() if p.is_dir()}
    assert {name[:17] for name in bad} == {"000002-0000000002"}
    machine.commit(3)
    machine.origin.commits.retain(2)
    newest = Commits(machine.run).newest()
    assert newest is not None and newest.manifest.step == 3


def test_a_bad_one_in_the_mirror_is_passed_over_for_the_one_before(
    machine: Machine, tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    flip(tmp_path / "mirror/commits/00001-000002-0000000002/state.json", 3)
    new = Machine(tmp_path / "new", url)
    found = new.start()
    assert (found.taken, step_of(found)) == ("mirror", 1)
    assert "rejected a commit in the mirror" in caplog.text and "state.json: expected" in caplog.text
    assert not list(new.run.path.rglob(".tmp-*"))


@pytest.mark.parametrize("file", ["state.json", "mirror.json", "MANIFEST.json"])
def test_if_none_in_the_mirror_verifies_nothing_is_begun(machine: Machine, tmp_path: Path, url: str, file: str) -> None:
    for commit in (tmp_path / "mirror" / "commits").iterdir():
        flip(commit / file, 30)
    new = Machine(tmp_path / "new", url)
    for _ in range(2):
        with pytest.raises(Refused, match=rf"none in the mirror verifies: .*{file}.*--fresh") as caught:
            new.start()
        assert caught.value.exit_code == 3
    assert list(new.run.commits.iterdir()) == [] and new.start(fresh=True).commit is None


def test_a_store_that_breaks_down_in_the_middle_is_worth_another_start(
    machine: Machine, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Machine(tmp_path / "other", url)
    other.start()
    other.commit(9)

    def broken(self: Store, key: str, size: int) -> object:
        raise StoreError(f"{key}: connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "download", broken)
        with pytest.raises(StoreError, match="connection reset"):
            machine.start()  # its own commit 2 would be a step back, and would count as newer
    assert step_of(machine.start()) == 9


@pytest.mark.parametrize("how", ["missing", "shorter", "broken"])
def test_a_journal_that_is_missing_shorter_or_broken_comes_from_the_mirror(
    machine: Machine, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = machine.run.journal
    whole = path.read_bytes()
    match how:
        case "missing":
            path.unlink()
        case "shorter":
            path.write_bytes(whole.splitlines(keepends=True)[0])
        case "broken":
            flip(path, 10)
    with caplog.at_level(logging.INFO):
        found = machine.start()
    assert (found.taken, step_of(found)) == ("local", 2)
    assert path.read_bytes() == whole and "took the journal" in caplog.text
    assert found.journal.length("data") == 2


def test_without_a_mirror_that_answers_a_good_local_one_is_taken(machine: Machine) -> None:
    machine.table = CommitsTable(mirror_url="objects://dead/mirror", mirror_storage_options={"denied": True})
    found = machine.start()
    assert (found.taken, step_of(found)) == ("local", 2)
    assert found.problem is not None and "403" in found.problem


@pytest.mark.parametrize("state", ["empty", "corrupt"])
def test_with_nothing_good_here_a_mirror_that_does_not_answer_is_worth_a_restart(
    machine: Machine, tmp_path: Path, url: str, state: str
) -> None:
    table = CommitsTable(mirror_url="objects://dead/mirror", mirror_storage_options={"denied": True})
    used = machine if state == "corrupt" else Machine(tmp_path / "new", url)
    good, used.table = used.table, table
    if state == "corrupt":
        for path in machine.run.commits.iterdir():
            flip(path / "state.json", 3)
    for _ in range(2):
        with pytest.raises(AnytimedError, match="the mirror cannot be asked") as caught:
            used.start()
        assert caught.value.exit_code == 1
    used.table = good
    assert step_of(used.start()) == 2


def test_fresh_starts_over_on_purpose_and_counts_as_newer(machine: Machine, tmp_path: Path, url: str) -> None:
    old = machine.run.run_id
    found = machine.start(fresh=True)
    assert (found.taken, found.commit) == ("", None)
    assert machine.run.run_id != old and machine.run.term > 1
    machine.commit(1)
    new = Machine(tmp_path / "new", url)
    found = new.start()
    assert (new.run.run_id, step_of(found)) == (machine.run.run_id, 1)
    assert [m.run_id for m in look(Store(url)).commits] == [machine.run.run_id]


def test_a_mirror_of_another_run_is_refused_by_name(machine: Machine, tmp_path: Path) -> None:
    other = Machine(tmp_path / "other", str(tmp_path / "another"))
    other.start()
    other.commit(5)
    other.table = machine.table
    before = tree(tmp_path / "mirror")
    with pytest.raises(Refused, match=rf"{machine.run.run_id}.*{other.run.path}.*{other.run.run_id}"):
        other.start()
    assert tree(tmp_path / "mirror") == before


def test_two_starts_at_once_the_later_one_goes_on(machine: Machine, tmp_path: Path, url: str) -> None:
    machines = [Machine(tmp_path / name, url) for name in ("a", "b")]
    sources = []
    for one in machines:
        one.run.acquire()
        sources.append(Sources(one.run, one.table))
        sources[-1].identify()
    assert {one.run.term for one in machines} == {2}
    machines[0].origin, machines[1].origin = (s.newest(needs) for s in sources)
    assert sorted(one.run.term for one in machines) == [2, 3]
    with pytest.raises(TermTaken):
        machines[0].commit(3)
    machines[1].commit(3)


def test_killed_at_every_call_of_a_restore_the_next_start_restores(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.service.restored", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) > 40


def test_a_full_disk_while_restoring_leaves_nothing_and_is_no_older_state(
    machine: Machine, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = Machine(tmp_path / "new", url)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
        with pytest.raises(AnytimedError, match="5 bytes free"):
            new.start()
    assert list(new.run.commits.iterdir()) == []
    assert step_of(new.start()) == 2


def test_no_secret_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url, options = "objects://user:hunter2hunter2@host/mirror", {"denied": True, "secret": "s3cr3ts3cr3t"}
    machine = Machine(tmp_path / "run", url)
    machine.table = CommitsTable(mirror_url=url, mirror_storage_options=options)
    with caplog.at_level(logging.DEBUG), pytest.raises(AnytimedError, match="403") as caught:
        machine.start()
    machine.run.release()
    machine.run.acquire()
    told = str(caught.value) + caplog.text + Mirror(Store(url, options), machine.run).url
    assert "hunter2" not in told and "s3cr3t" not in told


def test_the_caches_of_a_journal_stay_here_and_count_for_theirs_only(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not mirrored, not verified, moved aside with their run; those that another journal left here are not believed."""
    monkeypatch.setattr("anytimed.storage.journal._MUCH_LINES", 2)
    monkeypatch.setattr("anytimed.data.fold_file._ENTRIES", 2)

    def go_on(machine: Machine, steps: range) -> None:
        journal = machine.start().journal
        folds = FoldFile(machine.run.fold, journal)
        list(folds.restore(journal.length("data")))
        for step in steps:
            machine.commit(step)
            folds.keep(journal.length("data"))

    def caches(run: Path) -> list[str]:
        return sorted(p.name for p in run.iterdir() if p.name.startswith("journal"))

    both = ["journal.checked", "journal.fold", "journal.jsonl"]
    one = Machine(tmp_path / "run", url)
    go_on(one, range(1, 9))
    assert caches(one.run.path) == both
    assert not [problem for found in verify_run(one.run.path) for problem in found.problems]
    assert not [key for key in Store(url).list() if "checked" in key or "fold" in key]

    strange = Machine(tmp_path / "strange", str(tmp_path / "another"))
    go_on(strange, range(100, 120))
    new = Machine(tmp_path / "new", url)
    new.run.path.mkdir(mode=0o700)
    for name in both[:2]:
        shutil.copy(strange.run.path / name, new.run.path / name)
    found = new.start().journal
    drawn = [{"draw": step} for step in range(1, 9)]
    assert found.entries("data") == drawn
    folds = FoldFile(new.run.fold, found)
    assert folds._parts == [], "none is of this journal"
    assert [fold.length for fold in folds.restore(8)][-1] == 8
    assert Journal(new.run.journal).digest("data") == one.origin.journal.digest("data")

    assert one.start(fresh=True).journal.length("data") == 0
    assert caches(tmp_path / "run.old-1") == both and caches(one.run.path) == ["journal.jsonl"]
