"""What rots, shrinks, disappears or appears on the disk between two starts, file by file and byte by byte.

A damaged commit is passed over for the one before it and goes to quarantine with its path, what was expected and what
was found; with none left that verifies the start is refused with 3 and changes nothing. A damaged journal is refused by
the line; a damaged OWNER is recovered.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from anytimed.contracts import Refused
from anytimed.storage.commits import Commit, Commits
from anytimed.storage.journal import Journal
from anytimed.storage.run_directory import RunDirectory
from anytimed.storage.spool import Spool
from tests import tiny
from tests.faultlog import FULL, Injected
from tests.faults.state_injection import assert_whole, some
from tests.storage.material import acquired, content, flip, snapshot, tree

FILES = ("MANIFEST.json", "rank-00000-of-00001.safetensors", "state.json")


class Damage:
    """A run of two commits that is damaged again and again, each time from the same good state."""

    def __init__(self, folder: Path) -> None:
        self.run = acquired(folder)
        commits = Commits(self.run)
        self.good, self.bad = (commits.write(snapshot(step)) for step in (1, 2))
        self._kept = folder.with_name("kept")
        shutil.copytree(self.bad.path, self._kept)

    def restore(self) -> None:
        shutil.rmtree(self.bad.path, ignore_errors=True)
        self.bad.path.unlink(missing_ok=True)
        shutil.copytree(self._kept, self.bad.path)
        for left in (self.run.quarantine / "commits").iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()

    def assert_passed_over(self, file: str) -> None:
        """The next start takes the good one; the bad one is in quarantine, with a note that names the file."""
        commits = Commits(self.run)
        assert commits.newest() == self.good
        assert_whole(self.good)
        (rejected,) = commits.rejected
        assert rejected.path == self.bad.path and not self.bad.path.exists() and rejected.moved_to is not None
        note = json.loads(rejected.moved_to.with_name(f"{rejected.moved_to.name}.json").read_text())
        assert note["path"] == str(self.bad.path) and file in note["expected"] + note["found"], note
        assert note["expected"] and note["found"] and note["expected"] != note["found"]


@pytest.fixture
def damage(tmp_path: Path) -> Damage:
    return Damage(tmp_path / "run")


def offsets(size: int, few: int) -> list[int]:
    return list(range(size)) if FULL else some(range(size), few)


@pytest.mark.fault(8)
@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_in_a_commit(damage: Damage, injected: Injected, file: str) -> None:
    path = damage.bad.path / file
    size = path.stat().st_size
    for at in offsets(size if file != "MANIFEST.json" else size - 1, 8):  # the manifest's last byte ends its line
        flip(path, at)
        damage.assert_passed_over(file)
        damage.restore()
        injected(8, f"{file}: byte {at}")


@pytest.mark.fault(8)
def test_a_flipped_bit_in_the_journal(tmp_path: Path, injected: Injected) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for number in (1, 2, 3):
        journal.append("data", {"number": number, "name": "a b@c"})
    journal.close()
    whole = path.read_bytes()
    for at in offsets(len(whole), 12):
        flip(path, at)
        damaged = path.read_bytes()
        with pytest.raises(Refused, match=r"journal.jsonl line [1-3]:"):
            Journal(path)
        assert path.read_bytes() == damaged
        path.write_bytes(whole)
        injected(8, f"journal.jsonl: byte {at}")
    assert Journal(path).length("data") == 3


@pytest.mark.fault(8)
def test_a_flipped_bit_in_owner(damage: Damage, injected: Injected) -> None:
    path, run_id = damage.run.path / "OWNER", damage.run.run_id
    whole = path.read_bytes()
    damage.run.release()
    for at in offsets(len(whole) - 1, 8):
        path.write_bytes(whole)
        flip(path, at)
        run = RunDirectory(damage.run.path)
        run.acquire()
        assert (run.run_id, run.term) == (run_id, 2)
        newest = Commits(run).newest()
        assert newest == damage.bad
        run.release()
        injected(8, f"OWNER: byte {at}")


@pytest.mark.fault(8)
def test_a_flipped_bit_in_an_export_that_waits(tmp_path: Path, injected: Injected) -> None:
    run = acquired(tmp_path / "run")
    item = Spool(run).build(content(1))
    shutil.copytree(item.path, tmp_path / "kept")
    for file in item.manifest.files:
        for at in offsets(file.size, 2):
            flip(item.path / file.name, at)
            assert Spool(run).pending() == [] and not item.path.exists()
            shutil.copytree(tmp_path / "kept", item.path)
            injected(8, f"spool, {file.name}: byte {at}")
    assert [kept.id for kept in Spool(run).pending()] == [item.id]


def _lengths(size: int) -> list[int]:
    return some(range(size), 5)


@pytest.mark.fault(9)
@pytest.mark.parametrize("file", FILES)
def test_a_truncated_or_grown_file(damage: Damage, injected: Injected, file: str) -> None:
    path = damage.bad.path / file
    whole = path.read_bytes()
    lengths = [n for n in _lengths(len(whole)) if (file, n) != ("MANIFEST.json", len(whole) - 1)]
    for length in lengths:
        path.write_bytes(whole[:length])
        damage.assert_passed_over(file)
        damage.restore()
        injected(9, f"{file}: {length} of {len(whole)} bytes")
    for more in (b"\0", b"x", whole):
        path.write_bytes(whole + more)
        damage.assert_passed_over(file)
        damage.restore()
        injected(9, f"{file}: {len(more)} bytes more")


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _as_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _as_dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _as_empty(path: Path) -> None:
    path.write_bytes(b"")


GONE: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "a folder": _as_folder,
    "a dangling link": _as_dangling,
    "empty": _as_empty,
}


@pytest.mark.fault(9)
def test_a_missing_file_or_something_else_in_its_place(damage: Damage, injected: Injected) -> None:
    for file in FILES:
        for how, happen in GONE.items():
            happen(damage.bad.path / file)
            damage.assert_passed_over(file)
            damage.restore()
            injected(9, f"{file}: {how}")
    for how, whole in (("without a file", ()), ("of another number", ("000009-0000000009",))):
        if whole:
            (damage.good.path.parent / whole[0]).mkdir()
            for file in FILES:
                shutil.copy(damage.bad.path / file, damage.good.path.parent / whole[0])
            assert Commits(damage.run).newest() == damage.bad
        else:
            shutil.rmtree(damage.bad.path)
            damage.bad.path.mkdir()
            damage.assert_passed_over("MANIFEST.json")
        damage.restore()
        injected(9, f"a folder {how}")


@pytest.mark.fault(9)
def test_something_too_many_is_passed_over(damage: Damage, injected: Injected) -> None:
    places = {
        "in a commit": damage.bad.path / ".nfs0001",
        "a folder in a commit": damage.bad.path / "more" / "file",
        "beside the commits": damage.run.commits / "notes.txt",
        "a folder beside the commits": damage.run.commits / "old" / "file",
        "a commit's name with more to it": damage.run.commits / "000003-0000000003.bak" / "MANIFEST.json",
        "in the run": damage.run.path / "core.123",
        "in the spool": damage.run.spool / "lost+found" / "file",
        "in quarantine": damage.run.quarantine / "commits" / "looked-at.txt",
    }
    for where, path in places.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"a person's")
        commits = Commits(damage.run)
        assert commits.newest() == damage.bad and not commits.rejected
        assert Spool(damage.run).pending() == []
        assert [c.manifest.seq for c in commits.retain(2)] == [2, 1]
        assert path.read_bytes() == b"a person's"
        injected(9, f"too many: {where}")


@pytest.mark.fault(9)
def test_a_journal_that_was_truncated_or_lost_is_refused_by_the_commit(tmp_path: Path, injected: Injected) -> None:
    """The daemon itself: what the journal alone cannot know, the commit's position does. Nothing is trained."""
    tiny.write_text(tmp_path / "data", 60)
    config = tiny.config(tmp_path)
    tiny.run("run", config, "--steps", "40")
    path = tmp_path / "run" / "journal.jsonl"
    whole = path.read_bytes()
    _, state = tiny.state_of(tiny.newest_commit(tmp_path))
    known = b"".join(whole.splitlines(keepends=True)[: state["position"]["journal_length"]])
    assert known.count(b"\n") >= 2
    shorter = known[: known.rindex(b"\n", 0, -1) + 1]
    cases = {"missing": None, "empty": b"", "a line that the commit knows is missing": shorter, "torn": known[:-5]}
    before = {name: data for name, data in tree(tmp_path / "run").items() if name.startswith("commits/")}
    for how, left in some(list(cases.items()), 2)[not FULL :]:
        path.unlink(missing_ok=True)
        if left is not None:
            path.write_bytes(left)
        told = tiny.run("run", config, "--steps", "45", expect=3)
        assert "journal" in told and "Traceback" not in told, told
        assert {n: d for n, d in tree(tmp_path / "run").items() if n.startswith("commits/")} == before
        injected(9, f"journal.jsonl: {how}")
    path.write_bytes(whole)
    tiny.run("run", config, "--steps", "45")


@pytest.mark.fault(10)
def test_with_every_commit_corrupt_the_daemon_refuses_and_changes_nothing(tmp_path: Path, injected: Injected) -> None:
    tiny.write_text(tmp_path / "data", 60)
    config = tiny.config(tmp_path)
    tiny.run("run", config, "--steps", "30")
    commits = sorted((tmp_path / "run" / "commits").iterdir())
    assert len(commits) == 3
    for commit, file in zip(commits, FILES, strict=True):
        flip(commit / file, 100 if file != "state.json" else 3)
    before = untouched(tmp_path / "run")
    told = tiny.run("run", config, "--steps", "40", expect=3)
    assert "none verifies" in told and "--fresh" in told and "Traceback" not in told, told
    for commit, file in zip(commits, FILES, strict=True):
        assert str(commit) in told and file in told
    assert untouched(tmp_path / "run") == before
    injected(10, "the daemon")


def untouched(run: Path) -> dict[str, bytes]:
    """Everything but the term that every start raises, and what tells how it went."""
    told = ("OWNER", "LOCK", "status.json", "metrics.jsonl", "control.sock")
    return {name: data for name, data in tree(run).items() if name not in told}


@pytest.mark.fault(10)
def test_with_every_commit_corrupt_nothing_is_touched(tmp_path: Path, injected: Injected) -> None:
    for file, at in some([(file, at) for file in FILES for at in (0, 10, -2)], 3):
        folder = tmp_path / f"{file}-{at}"
        run = acquired(folder)
        commits = Commits(run)
        made: Iterator[Commit] = (commits.write(snapshot(step)) for step in (1, 2, 3))
        for commit in made:
            flip(commit.path / file, at)
        before = tree(folder)
        with pytest.raises(Refused, match="3 commits and none verifies") as caught:
            Commits(run).newest()
        assert caught.value.exit_code == 3 and tree(folder) == before
        injected(10, f"{file}: byte {at} in each")
