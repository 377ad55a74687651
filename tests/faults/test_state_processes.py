"""Who may write: one daemon a directory, by whatever path it is called; and no process that outlives the owner keeps
the directory from the next one."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from anytimed.contracts import Refused
from anytimed.storage.commits import Commits
from anytimed.storage.run_directory import RunDirectory
from tests import tiny
from tests.faultlog import Injected
from tests.faults.state_disks import mounted
from tests.faults.state_injection import some
from tests.service.test_daemon import running, status, until
from tests.storage.material import acquired, snapshot, tree

ROOT = Path(__file__).parents[2]

PARENT = """
import json, multiprocessing, os, subprocess, sys, time
from pathlib import Path
from anytimed.storage.commits import Commits
from anytimed.storage.run_directory import RunDirectory
from tests.storage.material import snapshot

def work():
    time.sleep(600)

if __name__ == "__main__":
    run = RunDirectory(Path(sys.argv[1]))
    run.acquire()
    Commits(run).write(snapshot(1))
    how = sys.argv[2]
    if how == "subprocess":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    elif how == "all descriptors":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False)
    elif how == "shell":
        child = subprocess.Popen("sleep 600 & wait", shell=True, start_new_session=True)
    else:
        child = multiprocessing.get_context(how).Process(target=work)
        child.start()
    print(json.dumps([run.term, child.pid]), flush=True)
    time.sleep(600)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "parent.py"
    path.write_text(PARENT)
    return path


def left_behind(script: Path, folder: Path, how: str) -> int:
    """A worker whose parent, the owner of the run, was killed."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    parent = subprocess.Popen(
        [sys.executable, script, folder, how],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert parent.stdout is not None
    term, worker = json.loads(parent.stdout.readline())
    with pytest.raises(Refused, match=f"pid {parent.pid} on "):
        RunDirectory(folder).acquire()
    assert RunDirectory(folder).owner() is not None and term >= 1
    parent.kill()
    parent.wait()
    parent.stdout.close()
    return int(worker)


@pytest.mark.fault(15)
@pytest.mark.parametrize("how", ["spawn", "forkserver", "subprocess", "all descriptors", "shell"])
def test_a_worker_that_outlives_its_killed_parent_does_not_keep_the_run(
    tmp_path: Path, script: Path, injected: Injected, how: str
) -> None:
    worker = left_behind(script, tmp_path / "run", how)
    try:
        os.kill(worker, 0)  # it lives
        began = time.monotonic()
        with acquired(tmp_path / "run") as run:
            assert time.monotonic() - began < 1.0
            assert run.term == 2
            newest = Commits(run).newest()
            assert newest is not None and newest.manifest.step == 1
            Commits(run).write(snapshot(2))
        os.kill(worker, 0)
        injected(15, how)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_forked_worker_would_keep_it(tmp_path: Path, script: Path) -> None:
    """Why workers are spawned: the test above can fail."""
    worker = left_behind(script, tmp_path / "run", "fork")
    try:
        with pytest.raises(Refused):
            RunDirectory(tmp_path / "run").acquire()
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.fixture
def paths(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Ways to name the same directory."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "beside").mkdir()
    with mounted(folder, tmp_path / "bound", "none", "bind") as bound:
        yield {
            "as it is": folder,
            "a symlink": tmp_path / "link",
            "with dots": tmp_path / "beside" / ".." / "run",
            "bind-mounted": bound,
        }


@pytest.mark.fault(14)
def test_a_second_daemon_is_refused_within_a_second(tmp_path: Path, paths: dict[str, Path], injected: Injected) -> None:
    """By any path: exit 3, naming pid and host, before torch is imported; `--fresh` too. The first trains on."""
    tiny.write_text(tmp_path / "data", 2000)
    config = tiny.config(tmp_path)
    with running(config) as process:
        until(process, lambda: status(tmp_path)["step"] >= 5, 150)
        for name, path in some(list(paths.items()), 2):
            second = tmp_path / f"second {name}"
            second.mkdir()
            other = tiny.config(second, run={"directory": str(path)})
            before = RunDirectory(path).owner()
            told = tiny.run("run", other, expect=3)
            assert f"pid {process.pid} on {os.uname().nodename}" in told, told
            assert "another writer holds this run" in told and "Traceback" not in told
            assert RunDirectory(path).owner() == before
            began = time.monotonic()
            with pytest.raises(Refused, match=f"pid {process.pid} on "):
                RunDirectory(path).acquire()
            assert time.monotonic() - began < 1.0
            injected(14, f"the daemon, {name}")
        assert "another writer holds this run" in tiny.run("run", config, "--fresh", expect=3)
        injected(14, "the daemon, --fresh")
        step = status(tmp_path)["step"]
        until(process, lambda: status(tmp_path)["step"] > step, 150)


@pytest.mark.fault(14)
def test_a_second_owner_is_refused_by_any_path(paths: dict[str, Path], injected: Injected) -> None:
    for name, other_name in some(list(itertools.permutations(paths, 2)), 4):
        path, other = paths[name], paths[other_name]
        with acquired(path) as first:
            before = tree(path)
            with pytest.raises(Refused, match=f"pid {os.getpid()} on "):
                RunDirectory(other).acquire()
            with pytest.raises(Refused):
                RunDirectory(other).start_fresh()
            assert first.owned() and tree(path) == before
        injected(14, f"{name}, then {other_name}")


@pytest.mark.fault(14)
def test_after_a_fork_neither_side_lets_a_third_in(tmp_path: Path, injected: Injected) -> None:
    with acquired(tmp_path / "run") as run:
        child = os.fork()
        if child == 0:
            time.sleep(600)
            os._exit(0)
        try:
            run.release()
            with pytest.raises(Refused):
                RunDirectory(tmp_path / "run").acquire()
            injected(14, "a forked child holds it")
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    acquired(tmp_path / "run").release()
