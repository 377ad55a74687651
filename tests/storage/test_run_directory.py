"""One writer: the lock, the term, what a start sweeps, and moving a run aside."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anytimed.contracts import AnytimedError, ConfigError, Refused
from anytimed.storage.commits import Commits
from anytimed.storage.run_directory import RunDirectory
from tests.storage.material import acquired, flip, snapshot

HOLDER = """
import sys, pathlib
from anytimed.storage.run_directory import RunDirectory
run = RunDirectory(pathlib.Path(sys.argv[1]))
run.acquire()
print(run.term, flush=True)
sys.stdin.read()
"""


def test_made_private_with_all_folders(tmp_path: Path) -> None:
    run = acquired(tmp_path / "deep" / "run")
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    assert sorted(p.name for p in run.path.iterdir()) == ["LOCK", "OWNER", "commits", "quarantine", "served", "spool"]
    assert (run.journal.name, run.status.name, run.metrics.name) == ("journal.jsonl", "status.json", "metrics.jsonl")


def test_a_second_process_is_refused_within_a_second_by_name(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "1\n"
        began = time.monotonic()
        run = RunDirectory(tmp_path / "run")
        with pytest.raises(Refused, match=f"pid {process.pid} on {os.uname().nodename}") as caught:
            run.acquire()
        assert time.monotonic() - began < 1.0 and caught.value.exit_code == 3
        with pytest.raises(Refused):
            run.start_fresh()
        assert run.owner() is not None and run.owner().term == 1  # type: ignore[union-attr]
        process.kill()  # the kernel frees the lock with the process
        process.wait()
        run.acquire()
        assert run.term == 2
    finally:
        process.kill()
        process.communicate()


def test_a_child_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    run = acquired(tmp_path / "run")
    child = subprocess.Popen(["sleep", "60"], close_fds=False)  # so only close-on-exec protects
    try:
        run.release()
        acquired(tmp_path / "run")
    finally:
        child.kill()
        child.wait()


def test_the_term_goes_up_at_every_start_and_the_id_stays(tmp_path: Path) -> None:
    seen = []
    for at_least in (0, 0, 7, 3):
        run = RunDirectory(tmp_path / "run")
        run.acquire(at_least)
        seen.append((run.term, run.run_id))
        run.release()
    assert [term for term, _ in seen] == [1, 2, 8, 9] and len({ident for _, ident in seen}) == 1


def test_owned_until_the_lock_or_the_owner_changes(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert not run.owned()
    run.acquire()
    assert run.owned()
    owner = run.path / "OWNER"
    told = json.loads(owner.read_text())
    owner.write_text(json.dumps({**told, "term": told["term"] + 1}))
    assert not run.owned()
    owner.write_text(json.dumps(told))
    assert run.owned()
    (run.path / "LOCK").unlink()
    assert not run.owned()
    (run.path / "LOCK").touch()  # another file: another process could hold it
    assert not run.owned()


def test_acquiring_twice_in_one_process_is_an_error(tmp_path: Path) -> None:
    run = acquired(tmp_path / "run")
    with pytest.raises(AnytimedError, match="holds the run already"):
        run.acquire()
    assert run.owned()
    with pytest.raises(Refused):
        acquired(tmp_path / "run")


def test_a_start_sweeps_what_was_interrupted_and_nothing_else(tmp_path: Path) -> None:
    run = acquired(tmp_path / "run")
    run.release()
    for folder in (run.commits, run.spool):
        for name in (".tmp-000001-ab", ".del-000001-ab", "keep"):
            (folder / name).mkdir()
            (folder / name / "file").write_bytes(b"x")
    (run.path / ".tmp-OWNER-ab").write_bytes(b"half")
    (run.path / "notes.txt").write_bytes(b"a person's")
    run.acquire()
    assert [p.name for p in run.commits.iterdir()] == [p.name for p in run.spool.iterdir()] == ["keep"]
    assert not (run.path / ".tmp-OWNER-ab").exists() and (run.path / "notes.txt").exists()


def test_a_damaged_owner_is_recovered_from_the_commits(tmp_path: Path) -> None:
    with acquired(tmp_path / "run") as run:
        ident = run.run_id
        Commits(run).write(snapshot(1))
    (run.path / "OWNER").write_bytes(b'{"run_id')
    run.acquire()
    assert (run.term, run.run_id) == (2, ident)


def test_a_flipped_bit_anywhere_in_owner_does_not_lower_the_term(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.acquire(40)
    ident = run.run_id
    Commits(run).write(snapshot(1))
    whole = (run.path / "OWNER").read_bytes()
    for at in range(len(whole) - 1):  # the last byte is the line's end
        run.release()
        (run.path / "OWNER").write_bytes(whole)
        flip(run.path / "OWNER", at)
        run.acquire()
        assert (run.term, run.run_id) == (42, ident), at


def test_a_folder_with_other_things_is_not_taken_over(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    (home / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match="holds other things"):
        RunDirectory(home).acquire()
    assert [p.name for p in home.iterdir()] == ["thesis.txt"] and stat.S_IMODE(home.stat().st_mode) == 0o755
    with pytest.raises(ConfigError, match="a file"):
        RunDirectory(home / "thesis.txt").acquire()


def test_start_fresh_moves_aside_and_the_term_goes_on(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert run.start_fresh() is None
    ids = []
    for n in (1, 2):
        run.acquire(10 * n)
        ids.append(run.run_id)
        Commits(run).write(snapshot(5))
        run.release()
        assert run.start_fresh() == tmp_path / f"run.old-{n}"
    run.acquire()
    assert run.term == 22 and run.run_id not in ids
    assert Commits(run).newest() is None
    for n in (1, 2):
        old = Commits(acquired(tmp_path / f"run.old-{n}")).newest()
        assert old is not None and old.manifest.step == 5


def test_the_term_goes_on_even_where_the_old_owner_is_damaged(tmp_path: Path) -> None:
    with acquired(tmp_path / "run") as run:
        Commits(run).write(snapshot(1))
    (run.path / "OWNER").unlink()
    run.start_fresh()
    run.acquire()
    assert run.term == 2


def test_the_holder_itself_cannot_start_fresh(tmp_path: Path) -> None:
    run = acquired(tmp_path / "run")
    with pytest.raises(Refused):
        run.start_fresh()
    assert run.owned()


def test_a_failing_acquire_gives_the_lock_back(tmp_path: Path) -> None:
    run = acquired(tmp_path / "run")
    run.release()
    shutil.rmtree(run.spool)
    run.spool.write_bytes(b"in the way")
    with pytest.raises(OSError):
        run.acquire()
    run.spool.unlink()
    run.acquire()
    assert run.owned()
