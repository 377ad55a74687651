"""The daemon with a mirror, and commits that rot: machines that vanish, that wake up, disks that forget."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console

from anytimed.config import load
from anytimed.contracts import AnytimedError, Batch
from anytimed.service import saving
from anytimed.service.console import View
from anytimed.service.loop import Daemon
from anytimed.service.recovery import recover
from anytimed.service.requests import Mailbox
from anytimed.storage.run_directory import RunDirectory
from tests import tiny
from tests.service.test_daemon import running, status, until
from tests.storage.material import flip

STEPS = "90"


def mirrored(folder: Path, **more: object) -> Path:
    return tiny.config(folder, commits={"mirror_url": f"file://{folder / 'mirror'}", **more})


def newest_in(mirror: Path) -> str:
    return max((path.parent.name for path in mirror.glob("commits/*/mirror.json")), default="")


def test_a_machine_that_vanishes_goes_on_bit_for_bit_on_an_empty_one(tmp_path: Path) -> None:
    undisturbed, lost = tmp_path / "undisturbed", tmp_path / "lost"
    for folder in (undisturbed, lost):
        tiny.write_text(folder / "data", 48)
    tiny.run("run", tiny.config(undisturbed), "--steps", STEPS)

    config = mirrored(lost)
    with running(config, "--steps", STEPS) as process:
        until(process, lambda: newest_in(lost / "mirror") >= "00001-000003")
        process.kill()
        process.wait()
    told = json.loads((lost / "run" / "OWNER").read_text())["run_id"]
    shutil.rmtree(lost / "run")
    output = tiny.run("run", config, "--steps", STEPS)
    assert "taking commit 00001-" in output and "taken from the mirror" in output and "took the journal" in output
    assert json.loads((lost / "run" / "OWNER").read_text())["run_id"] == told
    tiny.assert_same_state(tiny.newest_commit(undisturbed), tiny.newest_commit(lost))
    # A clean stop has waited for the mirror; it holds the last commit, and all of it is what was written.
    assert newest_in(lost / "mirror").endswith(f"{int(STEPS):010d}")
    found = json.loads(tiny.run("verify", config, "--json"))
    assert found["good"] and {one["what"] for one in found["checked"]} == {"commit", "journal", "mirrored commit"}
    state = json.loads(tiny.run("status", config, "--json"))
    assert state["mirror"]["commit"]["step"] == int(STEPS) and state["resumed"]["from"] == "mirror"


def test_a_mirror_that_does_not_answer_costs_nothing_but_a_warning(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 60)
    tiny.run("run", tiny.config(tmp_path), "--steps", "8")
    (tmp_path / "mirror").write_text("in the way")
    config = mirrored(tmp_path)
    tiny.config(tmp_path, commits={"mirror_url": f"file://{tmp_path / 'mirror'}"}, exports={"drain_s": 0.5})
    output = tiny.run("run", config, "--steps", "40")
    assert "the last commit is not mirrored; the next start sends it" in output and "Traceback" not in output
    assert any("mirror" in problem for problem in json.loads(tiny.run("status", config, "--json"))["degraded"])


def test_an_empty_machine_whose_mirror_does_not_answer_begins_nothing(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 60)
    (tmp_path / "mirror").write_text("in the way")
    config = mirrored(tmp_path)
    output = tiny.run("run", config, "--steps", "8", expect=1)
    assert "the mirror cannot be asked" in output and "--fresh" in output and "Traceback" not in output
    assert not list((tmp_path / "run" / "commits").iterdir())
    tiny.config(tmp_path, commits={"mirror_url": f"file://{tmp_path / 'mirror'}"}, exports={"drain_s": 0.5})
    output = tiny.run("run", config, "--steps", "8", "--fresh")
    assert "new run" in output and "the last commit is not mirrored" in output


def test_an_old_machine_that_was_thought_dead_stops_with_3(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    tiny.write_text(old / "data", 400)
    new.mkdir()
    url = f"file://{tmp_path / 'mirror'}"
    config = tiny.config(old, commits={"mirror_url": url})
    data = {"type": "text", "url": str(old / "data" / "*.txt")}
    other = tiny.config(new, commits={"mirror_url": url}, **{"sources.main": data})
    with running(config) as process:
        until(process, lambda: newest_in(tmp_path / "mirror") >= "00001-000001")
        process.send_signal(signal.SIGSTOP)
        tiny.run("run", other, "--steps", "30")
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 3, output
    assert "the mirror belongs to term 2, ours is 1" in output and "Traceback" not in output
    assert newest_in(tmp_path / "mirror").startswith("00002-")
    assert json.loads(tiny.run("verify", url, "--json"))["good"]


def test_a_commit_that_rots_is_seen_replaced_and_set_aside(tmp_path: Path) -> None:
    """Waiting for data, no step is taken and no commit is due: the new one is made for its own sake."""
    tiny.write_text(tmp_path / "data", 30)
    config = tiny.config(tmp_path, commits={"every_steps": 5, "verify_every_s": 0.3})
    commits = tmp_path / "run" / "commits"
    with running(config) as process:
        until(process, lambda: status(tmp_path)["state"] == "waiting for data" and len(list(commits.iterdir())) == 3)
        until(process, lambda: bool(status(tmp_path)["verification"]))
        newest = tiny.newest_commit(tmp_path)
        step = status(tmp_path)["step"]
        flip(next(newest.glob("rank-*")), 5000)
        until(process, lambda: tiny.newest_commit(tmp_path) != newest)
        until(process, lambda: not newest.exists() and not status(tmp_path)["degraded"])
        assert tiny.newest_commit(tmp_path).name.endswith(f"-{step:010d}")
        assert status(tmp_path)["step"] == step
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert f"no longer what was written: {newest}: expected rank-" in output
    assert [p.name[:17] for p in (tmp_path / "run/quarantine/commits").iterdir() if p.is_dir()] == [newest.name]
    found = json.loads(tiny.run("verify", tmp_path / "run", "--json"))
    assert found["good"] and sum(one["what"] == "commit" for one in found["checked"]) == 3


def test_verify_reads_beside_a_daemon_and_names_what_is_bad(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 400)
    config = mirrored(tmp_path, every_steps=2)
    with running(config) as process:
        until(process, lambda: newest_in(tmp_path / "mirror") >= "00001-000003")
        for _ in range(3):
            assert json.loads(tiny.run("verify", config, "--json"))["good"]
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    bad = [next(tiny.newest_commit(tmp_path).glob("rank-*")), tmp_path / "run" / "journal.jsonl"]
    bad.append(tmp_path / "mirror" / "commits" / newest_in(tmp_path / "mirror") / "state.json")
    for path in bad:
        flip(path, 40)
    output = tiny.run("verify", config, expect=1, COLUMNS="80")
    for path in bad:
        assert f"{path}: expected " in output, output
    assert "3 of what was read is not what was written" in output and "Traceback" not in output
    assert "nothing to verify" in tiny.run("verify", tmp_path / "data", expect=2)
    assert json.loads(tiny.run("verify", tmp_path / "published", "--json"))["good"]


def test_a_failed_commit_is_made_up_for_and_only_unsaved_steps_grow_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With commits an hour apart one failure must not cost an hour; and a day without data is no day of failures."""
    tiny.write_text(tmp_path / "data", 60)
    config = load(tiny.config(tmp_path, commits={"every_steps": None, "every_s": 3600.0, "give_up_after_s": 0.5}))
    monkeypatch.setattr(saving, "RETRY_S", 0.0)
    commits, kept = tmp_path / "run" / "commits", tmp_path / "run" / "kept"
    with RunDirectory(tmp_path / "run") as run:
        run.acquire()
        session = recover(config, run)
        daemon = Daemon(session, Mailbox(), View(Console(quiet=True), ""))

        def step() -> None:
            batch = session.reader.get(20)
            assert isinstance(batch, Batch)
            daemon._step(batch)

        def commit(*, fails: bool) -> None:
            if fails:  # a file where the folder was: it fails, whatever the user's rights are
                commits.rename(kept)
                commits.touch()
            daemon._saving.begin()
            daemon._saving._committer.wait()
            try:
                for request in list(daemon._mailbox.drain()):
                    daemon._do(request)
            finally:
                if fails:
                    commits.unlink()
                    kept.rename(commits)

        session.reader.start()
        try:
            step()
            commit(fails=True)
            assert daemon._board.problems["commit"] and daemon._board.commit is None
            daemon._drain()  # what is owed begins
            daemon._saving._committer.wait()
            daemon._drain()
            assert daemon._board.commit is not None and "commit" not in daemon._board.problems
            time.sleep(0.6)
            step()
            commit(fails=True)  # old is the commit, not what it lacks
            time.sleep(0.6)
            with pytest.raises(AnytimedError, match="give_up_after_s"):
                commit(fails=True)
        finally:
            daemon._reader.close()
            daemon._saving.close()
