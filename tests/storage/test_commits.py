"""Commits: round trips, every kind of damage, every failing system call, retention."""

from __future__ import annotations

import errno
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from anytimed.contracts import AnytimedError, CorruptError, Refused, Snapshot
from anytimed.storage import tensors
from anytimed.storage.commits import Commit, CommitFailed, Commits
from anytimed.storage.durable import digest_of
from anytimed.storage.manifest import CommitManifest, NewerFormat
from anytimed.storage.run_directory import RunDirectory
from tests.storage import faults
from tests.storage.material import acquired, flip, snapshot, tensor, tree

FILES = ["MANIFEST.json", "rank-00000-of-00001.safetensors", "state.json", "extra.bin"]


def write(commits: Commits, step: int) -> Commit:
    return commits.write(snapshot(step), extra_files={"extra.bin": b"extra %d" % step})


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return acquired(tmp_path / "run")


def again(run: RunDirectory) -> Commits:
    """As the next process finds it."""
    run.release()
    run.acquire()
    return Commits(run)


def test_what_was_written_comes_back(run: RunDirectory) -> None:
    waited = []
    kept = snapshot(7)
    made = Commits(run).write(
        Snapshot(7, kept.tensors, kept.state, lambda: waited.append(1)), extra_files={"b": b"more"}
    )
    found = again(run).newest()
    assert waited and found == made and found is not None
    assert found.path.name == "000001-0000000007"
    assert found.state == {"step": 7, "window": [7, 0.5]} and (found.path / "b").read_bytes() == b"more"
    (file,) = found.tensor_files
    assert file.name == "rank-00000-of-00001.safetensors"
    with safe_open(file, framework="numpy") as opened:
        placed = json.loads(opened.metadata()["global"])
    assert placed["x.layer.weight"] == {"shape": [8, 16], "offset": [0, 0]} and placed["counter"]["offset"] == []
    header = tensors.read_header(file)
    assert {n: (p.dtype, p.shape) for n, p in header.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in kept.tensors.items()
    }
    body = file.read_bytes()[header.data_start :]
    for name, place in header.tensors.items():
        assert body[place.start : place.end] == bytes(kept.tensors[name].data)


def test_seq_and_parent_go_on_over_restarts(run: RunDirectory) -> None:
    commits = Commits(run)
    assert commits.newest() is None
    assert [write(commits, s).manifest.parent for s in (10, 20)] == [None, 1]
    commits = again(run)
    newest = commits.newest()
    assert newest is not None and (newest.manifest.order, newest.manifest.step) == ((1, 2), 20)
    third = write(commits, 15).manifest  # a rollback lowers the step
    assert (third.order, third.parent, third.run_id) == ((2, 3), 2, run.run_id)
    newest = again(run).newest()
    assert newest is not None and newest.manifest.step == 15


def damage(commit: Path, kind: str, file: str) -> None:
    path = commit / file
    match kind:
        case "first byte":
            flip(path, 0)
        case "last byte":
            flip(path, -2)
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        case "empty":
            path.write_bytes(b"")
        case "longer":
            path.write_bytes(path.read_bytes() + b" x")
        case "missing":
            path.unlink()
        case "a folder":
            path.unlink()
            path.mkdir()


KINDS = ["first byte", "last byte", "truncated", "empty", "longer", "missing", "a folder"]
# A manifest without its last byte, the line's end, says all that it said.
DAMAGES = [d for d in itertools.product(KINDS, FILES) if d != ("truncated", "MANIFEST.json")]


@pytest.mark.parametrize(("kind", "file"), DAMAGES)
def test_a_damaged_commit_is_set_aside_for_the_one_before(run: RunDirectory, kind: str, file: str) -> None:
    commits = Commits(run)
    good, bad = write(commits, 1), write(commits, 2)
    damage(bad.path, kind, file)
    commits = again(run)
    assert commits.newest() == good
    (rejected,) = commits.rejected
    assert rejected.path == bad.path and rejected.moved_to is not None and rejected.moved_to.is_dir()
    assert rejected.moved_to.parent == run.quarantine / "commits" and not bad.path.exists()
    note = json.loads(rejected.moved_to.with_name(f"{rejected.moved_to.name}.json").read_text())
    assert note == {"path": str(bad.path), "expected": rejected.expected, "found": rejected.found}
    assert file in rejected.expected + rejected.found
    assert write(commits, 3).manifest.seq == 3 and again(run).newest() is not None  # a number is never used twice


def test_any_flipped_byte_is_found(run: RunDirectory) -> None:
    commits = Commits(run)
    made = write(commits, 1)
    made.verify()
    for file in FILES[1:]:
        for at in range(0, (made.path / file).stat().st_size, 97):
            flip(made.path / file, at)
            with pytest.raises(CorruptError, match=file):
                made.verify()
            flip(made.path / file, at)
    made.verify()


def test_a_file_too_many_is_passed_over(run: RunDirectory) -> None:
    made = write(Commits(run), 1)
    (made.path / ".nfs0001").write_bytes(b"left by the file server")
    commits = again(run)
    assert commits.newest() == made and not commits.rejected


def test_if_none_verifies_the_start_is_refused_and_nothing_touched(run: RunDirectory) -> None:
    commits = Commits(run)
    for step, file in enumerate(FILES, 1):
        flip(write(commits, step).path / file, 3)
    commits = again(run)
    before = tree(run.path)
    with pytest.raises(Refused, match=r"4 commits and none verifies.*--fresh") as caught:
        commits.newest()
    assert all(f"{n:06d}-{n:010d}" in str(caught.value) for n in (1, 2, 3, 4))
    assert tree(run.path) == before


def test_a_commit_of_a_newer_format_is_not_passed_over(run: RunDirectory) -> None:
    commits = Commits(run)
    write(commits, 1)
    newer = write(commits, 2)
    told = newer.manifest.model_copy(update={"format_version": 2})
    (newer.path / "MANIFEST.json").write_bytes(told.to_bytes())
    before = tree(run.path)
    with pytest.raises(NewerFormat, match="pip install -U anytimed") as caught:
        Commits(run).newest()
    assert caught.value.exit_code == 3 and tree(run.path) == before


def test_a_renamed_commit_does_not_count_as_another(run: RunDirectory) -> None:
    commits = Commits(run)
    first = write(commits, 1)
    shutil.copytree(first.path, run.commits / "000009-0000000009")
    assert Commits(run).newest() == first


def test_a_shortage_of_this_process_judges_no_commit(run: RunDirectory) -> None:
    write(Commits(run), 1)
    commits = again(run)
    before = tree(run.path)
    real = Path.stat

    def too_many(self: Path, **options: bool) -> object:
        if self.name == "state.json":
            raise OSError(errno.EMFILE, "Too many open files")
        return real(self, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(AnytimedError, match="nothing was judged") as caught:
        patch.setattr(Path, "stat", too_many)
        commits.newest()
    assert not isinstance(caught.value, Refused | CorruptError) and tree(run.path) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE], ids=errno.errorcode.get)
def test_a_failure_at_any_call_leaves_the_commits_as_they_were(run: RunDirectory, number: int) -> None:
    commits = Commits(run)
    with faults.at_call(0, faults.error(number)) as counted:
        newest = write(commits, 1)
    assert counted.calls > 15
    for n in range(1, counted.calls + 1):
        with faults.at_call(n, faults.error(number)):
            try:
                made = write(commits, n + 1)
            except CommitFailed as error:
                assert error.exit_code == 1 and str(run.commits) in str(error)
                made = newest
        newest = made
        assert again(run).newest() == newest
        assert [p.name for p in run.commits.iterdir() if p.name.startswith(".")] == []
    assert newest.manifest.step == 1  # no call of a commit may fail unnoticed


def test_without_space_nothing_is_begun(tmp_path: Path) -> None:
    run = acquired(tmp_path / "run")
    need = int(1.05 * 10_000) + (16 << 20)
    for free, fits in ((need - 1, False), (need + 200, True)):
        commits = Commits(run, free_bytes=lambda path, free=free: free)  # type: ignore[misc]
        wanted = Snapshot(1, {"w": tensor(np.zeros(10_000), "U8")}, {})
        if fits:
            commits.write(wanted)
            continue
        with pytest.raises(CommitFailed, match=f"{free} bytes free"):
            commits.write(wanted)
        assert list(run.commits.iterdir()) == []


def test_who_lost_the_run_commits_nothing(run: RunDirectory) -> None:
    commits = Commits(run)
    write(commits, 1)
    (run.path / "LOCK").unlink()
    acquired(run.path)  # another writer got in by the new file
    before = tree(run.path)
    with pytest.raises(Refused, match="no longer ours"):
        write(commits, 2)
    assert tree(run.path) == before


def test_wrong_tensors_and_names_leave_nothing(run: RunDirectory) -> None:
    commits = Commits(run)
    bad = Snapshot(1, {"w": tensor([1.0]).__class__("F32", (3,), memoryview(b"1234"))}, {})
    with pytest.raises(ValueError, match="w: 4 bytes"):
        commits.write(bad)
    for name in ("../x", "MANIFEST.json", "state.json/"):
        with pytest.raises(ValueError):
            commits.write(snapshot(1), extra_files={name: b""})
    assert list(run.commits.iterdir()) == [] and not (run.path / "x").exists()


def names(run: RunDirectory) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in run.commits.iterdir())


def test_retention_keeps_the_newest_and_says_which(run: RunDirectory) -> None:
    commits = Commits(run)
    for step in range(1, 6):
        write(commits, step)
    assert [c.manifest.step for c in commits.retain(2)] == [5, 4]
    assert names(run) == [4, 5]
    with pytest.raises(ValueError, match="2 or more"):
        commits.retain(1)
    assert names(run) == [4, 5]


def test_retention_does_not_count_what_does_not_verify(run: RunDirectory) -> None:
    commits = Commits(run)
    made = [write(commits, step) for step in range(1, 6)]
    flip(made[3].path / "state.json", 2)
    commits = again(run)
    assert [c.manifest.step for c in commits.retain(2)] == [5, 3]
    assert names(run) == [3, 5]
    assert [r.path for r in commits.rejected] == [made[3].path]


def test_retention_without_enough_good_ones_deletes_nothing(run: RunDirectory) -> None:
    commits = Commits(run)
    made = [write(commits, step) for step in range(1, 4)]
    for commit in made[1:]:
        flip(commit.path / "state.json", 2)
    assert [c.manifest.step for c in again(run).retain(2)] == [1]
    assert names(run) == [1]
    flip(made[0].path / "state.json", 2)
    assert again(run).retain(2) == []
    assert names(run) == [1]  # damaged, but the last: for a person


def test_retention_reads_a_commit_once_only(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [write(Commits(run), step) for step in range(1, 4)]
    read: list[Path] = []

    def counted(path: Path, *, from_disk: bool) -> tuple[int, str]:
        read.append(path)
        return digest_of(path, from_disk=from_disk)

    monkeypatch.setattr("anytimed.storage.commit.digest_of", counted)
    commits = again(run)
    commits.retain(2)
    assert {path.parent for path in read} == {commit.path for commit in made[1:]}
    read.clear()
    write(commits, 4)  # known from writing it
    commits.retain(3)
    assert read == []


def test_ten_crashed_commits_then_retention(run: RunDirectory) -> None:
    commits = Commits(run)
    for step in range(1, 4):
        write(commits, step)
    for n in range(10):
        left = run.commits / f".tmp-{n + 4:06d}-abcd"
        left.mkdir()
        (left / "rank-00000-of-00001.safetensors").write_bytes(b"half")
    commits.retain(2)
    assert names(run) == [2, 3]


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS], ids=errno.errorcode.get)
def test_a_failure_at_any_call_of_retention_keeps_the_good_ones(run: RunDirectory, number: int) -> None:
    commits = Commits(run)
    for step in range(1, 6):
        write(commits, step)
    with faults.at_call(0, faults.error(number)) as counted:
        commits.retain(2)
    for n in range(1, counted.calls + 1):
        for step in range(1, 4):
            write(commits, step)
        with faults.at_call(n, faults.error(number)):
            kept = commits.retain(2)
        assert len(kept) == 2
        for commit in kept:
            commit.verify()
        assert again(run).newest() == kept[0]


def test_manifest_names_what_it_should(tmp_path: Path) -> None:
    run = acquired(tmp_path / "run", clock=lambda: 0.0)
    made = Commits(run, clock=lambda: 1_800_000_000.0).write(snapshot(3))
    told = CommitManifest.from_bytes((made.path / "MANIFEST.json").read_bytes(), "here")
    assert (told.world_size, told.created, told.term) == (1, "2027-01-15T08:00:00+00:00", 1)
    assert {f.name for f in told.files} == {"rank-00000-of-00001.safetensors", "state.json"}


def test_a_commit_from_elsewhere_is_put_in_place_like_one_of_ours(tmp_path: Path) -> None:
    there, here = acquired(tmp_path / "there"), acquired(tmp_path / "here")
    theirs = [write(Commits(there), step) for step in (1, 2)][1]
    data = (theirs.path / "MANIFEST.json").read_bytes()

    def fill(folder: Path) -> None:
        for entry in theirs.manifest.files:
            shutil.copyfile(theirs.path / entry.name, folder / entry.name)

    commits = Commits(here)
    adopted = commits.adopt(theirs.manifest, data, fill)
    assert tree(adopted.path) == tree(theirs.path) and again(here).newest() == adopted
    assert write(Commits(here), 3).manifest.seq == 3
    flip(adopted.path / "state.json", 2)
    assert Commits(here).adopt(theirs.manifest, data, fill) == adopted  # what was in the way is kept for a person
    adopted.verify()
    assert [p.name[:17] for p in (here.quarantine / "commits").iterdir() if p.is_dir()] == [adopted.path.name]

    def broken(folder: Path) -> None:
        fill(folder)
        raise CorruptError("one file was not what the manifest says")

    before = tree(here.commits)
    with pytest.raises(CorruptError):
        Commits(here).adopt(theirs.manifest, data, broken)
    assert tree(here.commits) == before


def test_a_commit_that_is_read_elsewhere_is_retired_later(run: RunDirectory) -> None:
    commits = Commits(run)
    made = [write(commits, step) for step in range(1, 5)]
    with commits.pinned(made[0]) as there:
        assert there
        commits.retain(2)
        assert names(run) == [1, 3, 4]
    commits.retain(2)
    assert names(run) == [3, 4]
    with commits.pinned(made[0]) as there:
        assert not there


def test_rot_does_not_fill_the_disk(run: RunDirectory) -> None:
    commits = Commits(run)
    for step in range(1, 10):
        write(commits, step)
        flip(write(commits, 100 + step).path / "state.json", 2)
        commits = again(run)
        assert commits.newest() is not None
    whole = [p for p in (run.quarantine / "commits").iterdir() if p.is_dir()]
    assert len(whole) == 4 and {p.name.split("-")[1][-3:] for p in whole} == {"106", "107", "108", "109"}
    assert len(list((run.quarantine / "commits").glob("*.json"))) == 9


def test_a_name_that_may_not_be_durable_is_neither_found_nor_counted(run: RunDirectory) -> None:
    """The folder's fsync fails, and so does taking the name back."""
    commits = Commits(run)
    first = write(commits, 1)
    with faults.at_call(0, faults.error(errno.EIO)) as counted:
        write(commits, 2)
    calls, kept = counted.calls, write(commits, 3)

    def fail(n: int) -> None:
        real, left = Path.rename, 1

        def rename(self: Path, goal: Path) -> Path:
            nonlocal left
            if goal.name.startswith(".tmp-"):
                left -= 1
                raise OSError(errno.EIO, "Input/output error")
            return real(self, goal)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "rename", rename)
            with faults.at_call(n, faults.error(errno.EIO)), pytest.raises(CommitFailed):
                write(commits, 4)

    # The last two calls of a commit are the open of the commits' folder and its fsync.
    fail(calls)
    assert names(run) == [1, 2, 3, 4]
    assert [c.manifest.step for c in commits.retain(2)] == [3, 2] and names(run) == [2, 3, 4]
    newest = commits.newest()
    assert newest == kept and not first.path.exists()
