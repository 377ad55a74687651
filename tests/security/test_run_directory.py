"""The run directory is ours alone: made private, refused where others could have planted something in it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from anytimed.contracts import ConfigError
from anytimed.storage.run_directory import RunDirectory
from tests import tiny
from tests.faults.tools import needs_root

SOMEBODY = 54321


def test_everything_in_it_is_closed_to_others_whatever_the_umask(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 20)
    path = tiny.config(tmp_path)
    before = os.umask(0)
    try:
        tiny.run("run", path, "--steps", "8")
    finally:
        os.umask(before)
    run = tmp_path / "run"
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    for commit in (run / "commits").iterdir():
        assert stat.S_IMODE(commit.stat().st_mode) == 0o700, commit
    for name in ("LOCK", "journal.jsonl", "metrics.jsonl", "status.json"):
        assert stat.S_IMODE((run / name).stat().st_mode) == 0o600, name


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720])
def test_a_folder_that_others_could_fill_is_not_taken(tmp_path: Path, mode: int) -> None:
    """A LOCK in it makes it look like a run; what else is in it nobody knows."""
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.write_text("mine")
    (run / "LOCK").touch()
    (run / "journal.jsonl").symlink_to(victim)
    run.chmod(mode)
    with pytest.raises(ConfigError, match=f"others can write here \\(mode {mode:o}\\)"):
        RunDirectory(run).acquire()
    assert victim.read_text() == "mine" and stat.S_IMODE(run.stat().st_mode) == mode


def test_an_empty_folder_that_others_can_write_becomes_ours(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    RunDirectory(tmp_path / "run").acquire()
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    needs_root("giving a folder away")
    (tmp_path / "run").mkdir(mode=0o700)
    os.chown(tmp_path / "run", SOMEBODY, SOMEBODY)
    with pytest.raises(ConfigError, match=f"belongs to uid {SOMEBODY}"):
        RunDirectory(tmp_path / "run").acquire()


@pytest.mark.parametrize(
    "name", ["LOCK", "OWNER", "journal.jsonl", "status.json", "metrics.jsonl", "spool", "quarantine"]
)
def test_a_symlink_that_somebody_else_planted_is_refused(tmp_path: Path, name: str) -> None:
    needs_root("giving a link away")
    run = tmp_path / "run"
    with RunDirectory(run) as directory:
        directory.acquire()
    victim = tmp_path / "victim"
    victim.mkdir() if name in ("spool", "quarantine") else victim.write_text("mine")
    if (run / name).is_dir():
        (run / name).rename(tmp_path / "aside")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(victim)
    os.chown(run / name, SOMEBODY, SOMEBODY, follow_symlinks=False)
    with pytest.raises(ConfigError, match=f"{name}: a symlink that uid {SOMEBODY} made"):
        RunDirectory(run).acquire()
    assert not victim.is_file() or victim.read_text() == "mine"


def test_what_is_written_all_the_time_is_never_written_through_a_link(tmp_path: Path) -> None:
    """Even one of our own: a daemon as root must not follow it."""
    tiny.write_text(tmp_path / "data", 20)
    path = tiny.config(tmp_path)
    with RunDirectory(tmp_path / "run") as directory:
        directory.acquire()
    victims = {name: tmp_path / f"victim-{name}" for name in ("status.json", "metrics.jsonl", ".tmp-status.json")}
    for name, victim in victims.items():
        victim.write_text("mine")
        (tmp_path / "run" / name).symlink_to(victim)
    told = tiny.run("run", path, "--steps", "6")
    assert [victim.read_text() for victim in victims.values()] == ["mine"] * 3
    assert "Traceback" not in told
