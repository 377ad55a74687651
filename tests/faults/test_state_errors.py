"""The kernel says no: no space, a bad disk, a read-only one, no descriptors, no memory, at every system call.

A process that goes on after the error commits the next time, on the same run, without a restart; what it could not
make durable it does not promise, and what it cannot read for now it does not judge.
"""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from anytimed.contracts import AnytimedError
from anytimed.storage.commits import Commits
from anytimed.storage.journal import Journal
from anytimed.storage.spool import Spool
from tests.faultlog import FULL, Injected
from tests.faults.state_injection import Outcome, Point, Victim, calls_of, found_by_a_start, next_start, some
from tests.storage.material import acquired, snapshot, tree

ENTERING = "openat,mkdir,write,fsync,rename"
"""Where a disk says that it is full, broken or read-only: making names, giving bytes, making them durable."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    with acquired(folder) as begun:
        commits = Commits(begun)
        for step in (1, 2):
            commits.write(snapshot(step))
    return folder


def of_the_run(outcome: Outcome, names: str, few: int) -> list[Point]:
    """The calls of these names, but for those by which the process tells what it promised."""
    lines = [line for line in outcome.calls if line.split("(")[0] in names.split(",")]
    return some([p for p, line in zip(calls_of(outcome, names), lines, strict=True) if "told-" not in line], few)


@pytest.mark.parametrize(
    ("fault", "number", "names", "few"),
    [
        pytest.param(3, errno.ENOSPC, ENTERING, 12, marks=pytest.mark.fault(3)),
        pytest.param(5, errno.EIO, "fsync,fdatasync", 12, marks=pytest.mark.fault(5)),
        pytest.param(6, errno.EROFS, ENTERING, 12, marks=pytest.mark.fault(6)),
        pytest.param(7, errno.EMFILE, "openat", 8, marks=pytest.mark.fault(7)),
        pytest.param(7, errno.ENFILE, "openat", 4, marks=pytest.mark.fault(7)),
        pytest.param(7, errno.ENOMEM, "openat,read,getdents64,newfstatat,mkdir,write,rename", 10,
                     marks=pytest.mark.fault(7)),
    ],
    ids=["ENOSPC", "EIO", "EROFS", "EMFILE", "ENFILE", "ENOMEM"],
)  # fmt: skip
def test_an_error_at_a_call_of_a_commit_costs_that_commit_alone(
    run: Path, victim: Victim, injected: Injected, fault: int, number: int, names: str, few: int
) -> None:
    undisturbed = victim.run("commit_twice", run, trace=names)
    step = found_by_a_start(run, 4, 4)
    for call, n in of_the_run(undisturbed, names, few):
        failed = victim.run("commit_twice", run, f"{call}:error={errno.errorcode[number]}:when={n}", trace=names)
        point = f"commit: {call} {n}, {failed.hit}"
        assert any("(INJECTED)" in line for line in failed.calls), point
        if failed.code == 2:
            # The start itself was impossible: said so, in one line that is no verdict on any commit.
            assert len(failed.told) <= 2 and failed.told[-1].startswith(("ended OSError", "ended AnytimedError")), point
        else:
            said = [line.split()[0] for line in failed.told if not line.startswith("untidied")]
            assert said in (["committed", "committed"], ["failed", "committed"], ["committed", "failed"]), failed.told
            assert all("CommitFailed" in line for line in failed.told if line.startswith("failed")), failed.told
        assert not list((run / "quarantine" / "commits").iterdir()), point
        done = failed.last("committed") or step
        step = found_by_a_start(run, done, done)
        injected(fault, f"{errno.errorcode[number]}, {point}")


@pytest.mark.fault(5)
def test_a_file_whose_fsync_failed_is_never_written_again(run: Path, victim: Victim, injected: Injected) -> None:
    names = "openat,write,fsync,fdatasync,ftruncate,rename"
    for action, folder in (("commit_twice", run), ("append", run), ("spool", run)):
        victim.run(action, folder)
        undisturbed = victim.run(action, folder, trace=names)
        for call, n in of_the_run(undisturbed, "fsync", 4):
            failed = victim.run(action, folder, f"{call}:error=EIO:when={n}", trace=names)
            at = next(i for i, line in enumerate(failed.calls) if "(INJECTED)" in line)
            path = failed.calls[at].partition("<")[2].partition(">")[0]
            # Until another file takes its name, nothing is written to it, nor is it given one.
            for line in failed.calls[at + 1 :]:
                if line.startswith("rename") and f'"{path}") = 0' in line:
                    break
                assert not line.startswith(("write", "fsync")) or f"<{path}>" not in line or Path(path).is_dir(), line
                assert not line.startswith("rename") or f'rename("{path}"' not in line, line
            injected(5, f"{action}: {call} {n}, {failed.hit}")
        found_by_a_start(run, 1, 1 << 30)


@pytest.mark.parametrize(
    ("fault", "number", "names"),
    [
        pytest.param(3, errno.ENOSPC, "write,fsync", marks=pytest.mark.fault(3)),
        pytest.param(5, errno.EIO, "write,fsync,fdatasync", marks=pytest.mark.fault(5)),
        pytest.param(6, errno.EROFS, "write,fsync,openat", marks=pytest.mark.fault(6)),
        pytest.param(7, errno.ENOMEM, "write,fsync,openat,read", marks=pytest.mark.fault(7)),
    ],
    ids=["ENOSPC", "EIO", "EROFS", "ENOMEM"],
)
def test_an_error_at_a_call_of_an_append_costs_that_entry_alone(
    tmp_path: Path, victim: Victim, injected: Injected, fault: int, number: int, names: str
) -> None:
    victim.run("append", tmp_path)
    undisturbed = victim.run("append", tmp_path, trace=names)
    length = 6
    for call, n in of_the_run(undisturbed, names, 4):
        failed = victim.run("append", tmp_path, f"{call}:error={errno.errorcode[number]}:when={n}", trace=names)
        point = f"journal: {call} {n}, {failed.hit}"
        # Refused, it is decided once more, under the same number; the entries after it are made all the same.
        refused = [line for line in failed.told if line.startswith("failed")]
        assert len(refused) == (0 if failed.code == 2 else 1), failed.told
        journal = Journal(tmp_path / "journal.jsonl")
        numbers = [entry["number"] for entry in journal.entries("data")]
        journal.close()
        expected = length if failed.code == 2 else length + 2
        assert numbers == list(range(1, expected + 1)), (point, failed.told)
        length = expected
        injected(fault, f"{errno.errorcode[number]}, {point}")


@pytest.mark.parametrize(
    ("fault", "number"),
    [
        pytest.param(3, errno.ENOSPC, marks=pytest.mark.fault(3)),
        pytest.param(5, errno.EIO, marks=pytest.mark.fault(5)),
        pytest.param(6, errno.EROFS, marks=pytest.mark.fault(6)),
    ],
    ids=["ENOSPC", "EIO", "EROFS"],
)
def test_an_error_at_a_call_of_an_export_leaves_nothing_of_it(
    run: Path, victim: Victim, injected: Injected, fault: int, number: int
) -> None:
    names = "fsync" if number == errno.EIO else ENTERING
    undisturbed = victim.run("spool", run, trace=names)
    for call, n in of_the_run(undisturbed, names, 4):
        failed = victim.run("spool", run, f"{call}:error={errno.errorcode[number]}:when={n}", trace=names)
        assert failed.code == 2 and failed.told[-1].startswith("ended"), failed.told
        with next_start(run) as begun:
            pending = Spool(begun).pending()
            assert [item.manifest.term for item in pending] == [2]
        injected(fault, f"{errno.errorcode[number]}, spool: {call} {n}, {failed.hit}")


@pytest.mark.fault(7)
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EINTR], ids=errno.errorcode.get)
def test_what_cannot_be_read_for_now_is_not_judged(run: Path, victim: Victim, injected: Injected, number: int) -> None:
    """At every call by which a start reads: the run is as it was, or the start went past it without a verdict."""
    names = "openat,read,newfstatat,getdents64,lseek,ioctl,fcntl,mmap"
    undisturbed = victim.run("start", run, trace=names)
    stored = {name: data for name, data in tree(run).items() if name.startswith("commits/")}
    for call, n in of_the_run(undisturbed, names, 6 if not FULL else 1000):
        failed = victim.run("start", run, f"{call}:error={errno.errorcode[number]}:when={n}", trace=names)
        point = f"{errno.errorcode[number]}, start: {call} {n}, {failed.hit}"
        assert failed.told == ["found 2"] or failed.code == 2, (point, failed.told)
        assert {name: data for name, data in tree(run).items() if name.startswith("commits/")} == stored, point
        assert not list((run / "quarantine" / "commits").iterdir()), point
        injected(7, point)
    assert found_by_a_start(run, 2, 2)


def test_the_next_start_is_told_of_an_unreadable_commit_by_name(run: Path) -> None:
    with acquired(run) as begun, pytest.MonkeyPatch.context() as patch:
        patch.setattr("anytimed.storage.commit.digest_of", _no_descriptors)
        with pytest.raises(AnytimedError, match=r"000002-0000000002.*nothing was judged or moved"):
            Commits(begun).newest()


def _no_descriptors(path: Path, **options: bool) -> tuple[int, str]:
    raise OSError(errno.EMFILE, "Too many open files")
