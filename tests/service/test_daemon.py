"""The daemon from outside, as an operator meets it: a process, signals, its socket, its exit codes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from anytimed.config import load
from anytimed.contracts import Json
from anytimed.service.control import ask
from anytimed.service.reload import changes_that_need_a_restart
from tests import tiny


def until(process: subprocess.Popen[str], told: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not told():
        assert process.poll() is None, f"ended early:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.02)


def status(folder: Path) -> Json:
    with contextlib.suppress(OSError):
        return ask(folder / "run" / "control.sock", "GET", "/status", timeout_s=5)
    return {"state": "", "step": 0, "commit": None, "export": None}


@contextlib.contextmanager
def running(config: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = tiny.start("run", config, *arguments, **environment)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_status_says_since_when_it_is_in_its_state(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 12)
    with running(tiny.config(tmp_path)) as process:
        until(process, lambda: status(tmp_path)["state"] == "waiting for data")
        first = status(tmp_path)
        until(process, lambda: status(tmp_path)["time"] > first["time"] + 1)
        later = status(tmp_path)
        assert first["since"] == later["since"] <= first["time"]


def test_data_added_while_it_runs_is_read_once_in_order_of_arrival(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 12, prefix="m")
    config = tiny.config(tmp_path)
    with running(config) as process:
        until(process, lambda: status(tmp_path)["state"] == "waiting for data")
        before = status(tmp_path)["step"]
        # A name that sorts before the others: order is that of arrival all the same.
        tiny.write_text(tmp_path / "data", 10, prefix="a", seed=1)
        until(process, lambda: status(tmp_path)["sources"]["main"]["entries"] == 22)
        until(process, lambda: status(tmp_path)["state"] == "waiting for data" and status(tmp_path)["step"] > before)
        with (tmp_path / "data" / "a0003.txt").open("a") as grown:
            grown.write("and more, " * 60)
        until(process, lambda: status(tmp_path)["sources"]["main"]["entries"] == 23)
        until(process, lambda: status(tmp_path)["sources"]["main"]["lag_bytes"] == 0)
        read = status(tmp_path)["sources"]["main"]
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
    journal = [json.loads(line)["entry"] for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    arrived = [entry[0] for e in journal if e["kind"] == "discovered" for entry in e["entries"]]
    assert arrived == [*(f"m{i:04d}.txt" for i in range(12)), *(f"a{i:04d}.txt" for i in range(10)), "a0003.txt"]
    # Every byte once: a record is trained on, with an end token, or held out, as the hash of its content says.
    grown_by = len("and more, " * 60)
    contents = [path.read_bytes() for path in sorted((tmp_path / "data").iterdir())]
    contents[3:4] = [contents[3][:-grown_by], contents[3][-grown_by:]]
    held = [c for c in contents if int.from_bytes(hashlib.sha256(c).digest()[:8], "big") < 0.25 * 2**64]
    assert read["held_out"] == len(held) > 0
    assert read["records"] == 23 - len(held)
    assert read["tokens"] == sum(len(c) + 1 for c in contents if c not in held)
    # The Position says how far training has come in it: the second and third arrival are in its past.
    _, state = tiny.state_of(tiny.newest_commit(tmp_path))
    assert state["position"]["sources"]["main"]["place"]["entry"] >= 12


def test_sigterm_commits_and_ends_with_0_and_the_socket_is_gone(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 200)
    with running(tiny.config(tmp_path, commits={"every_steps": None, "every_s": 1000.0})) as process:
        until(process, lambda: status(tmp_path)["step"] >= 20)
        mode = (tmp_path / "run" / "control.sock").stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o660
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "Committed step" in output
    assert " pull " in output
    assert not (tmp_path / "run" / "control.sock").exists()
    step = int(tiny.newest_commit(tmp_path).name.rpartition("-")[2])
    assert step >= 20
    # Without the daemon, status still answers, and says so.
    assert f'"step": {step}' in tiny.run("status", tmp_path / "run", "--json")
    assert "No daemon runs" in tiny.run("status", tmp_path / "config.toml")


def test_export_on_request_and_on_sigusr1(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 400)
    with running(tiny.config(tmp_path, exports={"every_steps": None})) as process:
        until(process, lambda: status(tmp_path)["step"] >= 5)
        assert not list((tmp_path / "published").glob("checkpoints/*/manifest.json"))
        told = tiny.run("export", tmp_path / "config.toml")
        assert "Published 00001-000001-" in told
        process.send_signal(signal.SIGUSR1)
        until(process, lambda: len(list((tmp_path / "published").glob("checkpoints/*/manifest.json"))) == 2)
        until(process, lambda: (status(tmp_path)["export"] or {}).get("checkpoint", "").startswith("00001-000002-"))
        told = tiny.run("status", tmp_path / "run")
        assert "last export" in told
        assert "hold-out" in told
    listed = json.loads(tiny.run("list", tmp_path / "published", "--json"))
    assert [m["id"][:12] for m in listed] == ["00001-000002", "00001-000001"]
    assert listed[0]["parent"] == listed[1]["id"]
    assert listed[0]["lineage"]["main"]["records"] > 0


def test_a_second_daemon_is_refused(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 400)
    config = tiny.config(tmp_path)
    with running(config) as process:
        until(process, lambda: status(tmp_path)["step"] >= 5)
        told = tiny.run("run", config, expect=3)
        assert f"pid {process.pid}" in told
        assert "another writer holds this run" in told
        assert "Traceback" not in told
        told = tiny.run("run", config, "--fresh", expect=3)
        assert f"pid {process.pid}" in told
        assert process.poll() is None


def test_reload_applies_what_may_change_and_refuses_the_rest_whole(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 800)
    config = tiny.config(tmp_path, exports={"every_steps": None})
    with running(config) as process:
        until(process, lambda: status(tmp_path)["step"] >= 5)
        tiny.config(tmp_path, exports={"every_steps": 3}, data={"batch_size": 8})
        process.send_signal(signal.SIGHUP)
        until(process, lambda: bool(status(tmp_path).get("degraded")))
        assert "[data] batch_size" in status(tmp_path)["degraded"][0]
        config.write_text("[run\n")
        process.send_signal(signal.SIGHUP)
        until(process, lambda: "not valid TOML" in (status(tmp_path).get("degraded") or [""])[0])
        assert not list((tmp_path / "published").glob("checkpoints/*/manifest.json")), "nothing of it was applied"
        tiny.config(tmp_path, exports={"every_steps": 3})
        process.send_signal(signal.SIGHUP)
        until(process, lambda: len(list((tmp_path / "published").glob("checkpoints/*/manifest.json"))) >= 2)
        assert status(tmp_path)["degraded"] == []


def test_documents_are_masked_from_the_next_start_on(tmp_path: Path) -> None:
    """[data] mask_documents decides over numbers, neither over tensors nor over the tokens that come next."""
    tiny.write_text(tmp_path / "data", 60)
    tiny.run("run", tiny.config(tmp_path), "--steps", "14")
    shutil.copytree(tmp_path / "run", tmp_path / "at14")
    unmasked = load(tiny.config(tmp_path))
    masked = load(tiny.config(tmp_path, data={"mask_documents": True}))
    assert changes_that_need_a_restart(unmasked, masked) == ["[data] mask_documents"]
    tiny.run("run", masked.path, "--steps", "21")
    ours, our_state = tiny.state_of(tiny.newest_commit(tmp_path))
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "at14").rename(tmp_path / "run")
    tiny.run("run", tiny.config(tmp_path), "--steps", "21")
    theirs, their_state = tiny.state_of(tiny.newest_commit(tmp_path))
    assert our_state["learner"]["step"] == their_state["learner"]["step"] == 21
    assert our_state["position"] == their_state["position"]
    assert not torch.equal(ours["x.model.embed_tokens.weight"], theirs["x.model.embed_tokens.weight"])


def test_rewritten_data_is_refused_with_3(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 60)
    config = tiny.config(tmp_path)
    tiny.run("run", config, "--steps", "40")
    (tmp_path / "data" / "doc0001.txt").write_text("another history " * 50)
    told = tiny.run("run", config, expect=3)
    assert "doc0001.txt" in told
    assert "--fresh" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": {"hidden_size": 64}}, "model.hidden_size: 32 in the commit, 64 in the config"),
        ({"optimizer": {"type": "amuse"}}, 'optimizer.type: "sf_normuon" in the commit, "amuse" in the config'),
        ({"data": {"sequence_length": 16}}, "data.sequence_length: 32 in the commit, 16 in the config"),
    ],
)
def test_a_config_that_does_not_fit_the_commit_is_refused_with_2(
    tmp_path: Path, changes: dict[str, dict[str, object]], expected: str
) -> None:
    tiny.write_text(tmp_path / "data", 30)
    tiny.run("run", tiny.config(tmp_path), "--steps", "8")
    told = tiny.run("run", tiny.config(tmp_path, **changes), expect=2)
    assert expected in told
    assert "--fresh" in told
    assert "Traceback" not in told


def test_fresh_moves_the_old_run_aside_and_publishes_above_it(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 60)
    tiny.run("run", tiny.config(tmp_path), "--steps", "20")
    old = tiny.newest_commit(tmp_path).name
    tiny.run("run", tiny.config(tmp_path, model={"hidden_size": 16}), "--fresh", "--steps", "9")
    assert (tmp_path / "run.old-1" / "commits" / old).is_dir()
    latest = json.loads((tmp_path / "published" / "latest.json").read_text())
    assert latest["step"] == 9
    assert latest["id"] > "00002"


def test_a_changed_learning_rate_resumes(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 60)
    tiny.run("run", tiny.config(tmp_path), "--steps", "12")
    before = tiny.state_of(tiny.newest_commit(tmp_path))[1]["learner"]["clocks"][0]["weight_sum"]
    tiny.run("run", tiny.config(tmp_path, optimizer={"lr": 0.003}), "--steps", "13")
    after = tiny.state_of(tiny.newest_commit(tmp_path))[1]["learner"]["clocks"][0]["weight_sum"]
    assert before < after < 1.01 * before, "the sum goes on; the new weight is a hundredth of the old ones"


def test_corrupt_commits_are_passed_over_and_all_corrupt_is_refused(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 60)
    config = tiny.config(tmp_path)
    tiny.run("run", config, "--steps", "30")
    commits = sorted(path for path in (tmp_path / "run" / "commits").iterdir())
    assert len(commits) == 3

    def damage(commit: Path) -> None:
        file = next(commit.glob("rank-*"))
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    damage(commits[2])
    told = tiny.run("run", config, "--steps", "31")
    assert "rejected a commit" in told
    assert f"resumed step {int(commits[1].name[-10:])}" in told
    for commit in (tmp_path / "run" / "commits").iterdir():
        damage(commit)
    told = tiny.run("run", config, expect=3)
    assert "--fresh" in told


def test_systemd_is_told_ready_status_watchdog_and_stopping(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 400)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        told: list[str] = []
        with running(tiny.config(tmp_path), NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="400000") as process:
            while sum(t.startswith("WATCHDOG=1") for t in told) < 5:
                told.append(manager.recv(4096).decode())
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.3)
            manager.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    manager.recv(4096)
            time.sleep(0.6)
            with pytest.raises(BlockingIOError):  # a stopped daemon feeds no watchdog
                manager.recv(4096)
            process.send_signal(signal.SIGCONT)
            manager.settimeout(30)
            process.send_signal(signal.SIGTERM)
            while not ("STOPPING=1" in told and "EXTEND_TIMEOUT_USEC" in told[-1]):
                told.append(manager.recv(4096).decode())
            assert process.wait(timeout=60) == 0
    assert "READY=1" in told
    assert "STOPPING=1" in told
    assert any(t.startswith("STATUS=training | step") for t in told)
    phases = [t.splitlines()[0] for t in told[: told.index("READY=1")]]
    assert phases == [
        "STATUS=starting: reading the configuration",
        "STATUS=starting: reading and verifying the commits",
        "STATUS=starting: going on from the beginning",
    ]
    assert all("\nEXTEND_TIMEOUT_USEC=600000000\n" in t for t in told[: told.index("READY=1")])


def test_a_store_that_fails_costs_no_step_and_the_spool_is_sent_later(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 100)
    # A file where the prefix should be: every call to the store fails, as with a dead endpoint.
    (tmp_path / "published").write_text("in the way")
    config = tiny.config(tmp_path, exports={"drain_s": 0.5})
    told = tiny.run("run", config, "--steps", "30")
    assert "the spool keeps it" in told
    assert "Traceback" not in told
    assert [p for p in (tmp_path / "run" / "spool").iterdir() if not p.name.startswith(".")]
    (tmp_path / "published").unlink()
    tiny.run("run", config, "--steps", "31")
    assert json.loads((tmp_path / "published" / "latest.json").read_text())["step"] == 27


def test_a_deep_run_directory_has_a_socket_all_the_same(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    tiny.write_text(deep / "data", 200)
    with running(tiny.config(deep)) as process:
        until(process, lambda: status(deep)["step"] >= 5)
        assert len(os.fsencode(deep / "run" / "control.sock")) > 107
        assert '"step"' in tiny.run("status", deep / "run", "--json")


def test_journal_lines_carry_a_priority_and_no_time(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 30)
    told = tiny.run("run", tiny.config(tmp_path), "--steps", "5", JOURNAL_STREAM="8:1")
    lines = [line for line in told.splitlines() if "step" in line and "INFO" not in line]
    assert any(line.startswith("<6>new run") for line in told.splitlines())
    assert lines


def test_data_rewritten_while_it_runs_ends_with_3_and_loses_no_step(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 400)
    config = tiny.config(tmp_path, commits={"every_steps": None, "every_s": 1000.0})
    with running(config) as process:
        until(process, lambda: status(tmp_path)["step"] >= 40)
        (tmp_path / "data" / "doc0000.txt").write_text("another history " * 90)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 3, output
    assert "doc0000.txt" in output
    assert "Traceback" not in output
    assert int(tiny.newest_commit(tmp_path).name.rpartition("-")[2]) >= 40


def test_commits_that_cannot_be_written_end_the_run_after_a_while_with_1(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 400)
    with running(tiny.config(tmp_path, commits={"every_steps": 5, "give_up_after_s": 1.0})) as process:
        until(process, lambda: bool(status(tmp_path)["commit"]))
        good = tiny.newest_commit(tmp_path)
        # A file where the folder was: every later commit fails, whatever the user's rights are.
        (tmp_path / "run" / "commits").rename(tmp_path / "run" / "kept")
        (tmp_path / "run" / "commits").write_text("in the way")
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "give_up_after_s" in output
    assert "Traceback" not in output
    assert (tmp_path / "run" / "kept" / good.name).is_dir()


def test_a_run_that_was_taken_away_is_left_at_once_with_3(tmp_path: Path) -> None:
    """The lock file was replaced under the daemon: someone else may own the run, so nothing more is written to it."""
    tiny.write_text(tmp_path / "data", 400)
    with running(tiny.config(tmp_path, commits={"every_steps": 5})) as process:
        until(process, lambda: bool(status(tmp_path)["commit"]))
        (tmp_path / "run" / "LOCK").unlink()
        (tmp_path / "run" / "LOCK").touch()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 3, output
    assert "no longer ours" in output
    assert "Traceback" not in output


def test_on_a_terminal_there_is_a_live_table_and_closing_it_commits_and_stops(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 800)
    config = tiny.config(tmp_path, commits={"every_steps": None, "every_s": 1000.0})
    pid, terminal = pty.fork()
    if pid == 0:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "120"}
        os.execve(sys.executable, [sys.executable, "-m", "anytimed.cli", "run", str(config)], environment)
    shown = b""
    try:
        deadline = time.monotonic() + 60
        while b"hold-out, step" not in shown or status(tmp_path)["step"] < 40:
            assert time.monotonic() < deadline, shown.decode(errors="replace")
            shown += os.read(terminal, 65536)
    finally:
        os.close(terminal)
        deadline = time.monotonic() + 60
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    for told in ("loss at y (training)", "last commit", "last export", "to go", "tokens/s"):
        assert told in shown.decode(errors="replace")
    assert int(tiny.newest_commit(tmp_path).name.rpartition("-")[2]) >= 40


def test_a_worse_x_is_kept_aside_and_latest_stays(tmp_path: Path) -> None:
    """A learning rate that ruins the model: the gate compares with the published x, evaluated again on the hold-out in
    force, also after a restart."""
    tiny.write_text(tmp_path / "data", 300)
    aligned = {"exports": {"every_steps": 20}, "evaluation": {"every_steps": 20}, "guard": {"skipped_steps": 0}}
    tiny.run("run", tiny.config(tmp_path, **aligned), "--steps", "60")
    good = json.loads((tmp_path / "published" / "latest.json").read_text())
    assert good["step"] == 60
    ruin = {"optimizer": {"lr": 50.0, "aux_lr": 50.0}}
    told = tiny.run("run", tiny.config(tmp_path, **aligned, **ruin), "--steps", "100")
    assert "worse by more than 0.5 nats" in told, told
    for pointer in ("latest.json", "best.json"):
        assert json.loads((tmp_path / "published" / pointer).read_text()) == good
    aside = [p.name[-3:] for p in (tmp_path / "run" / "quarantine" / "exports").iterdir()]
    assert sorted(aside) == ["080", "100"]
    # Without a gate it goes out.
    open_ = {"exports": {"every_steps": 20, "gate_margin_nats": 1e9}}
    tiny.run("run", tiny.config(tmp_path, **{**aligned, **ruin, **open_}), "--steps", "120")
    assert json.loads((tmp_path / "published" / "latest.json").read_text())["step"] == 120


def test_an_x_ruined_between_evaluations_does_not_lower_the_bar(tmp_path: Path) -> None:
    """Exports come more often than evaluations: the first ruined ones slip out, then the gate closes and stays so."""
    tiny.write_text(tmp_path / "data", 300)
    often = {"exports": {"every_steps": 9}, "evaluation": {"every_steps": 20}, "guard": {"skipped_steps": 0}}
    tiny.run("run", tiny.config(tmp_path, **often), "--steps", "60")
    told = tiny.run("run", tiny.config(tmp_path, **often, optimizer={"lr": 50.0, "aux_lr": 50.0}), "--steps", "130")
    assert "worse by more than 0.5 nats" in told, told
    assert json.loads((tmp_path / "published" / "latest.json").read_text())["step"] < 80


def test_a_machine_that_is_taken_away_commits_first_and_ends_in_time(tmp_path: Path) -> None:
    """The store does not answer, and a stop would wait for it for a minute; there are three seconds to live."""
    tiny.write_text(tmp_path / "data", 400)
    (tmp_path / "blocked").write_text("a file where the store's folder should be")
    config = tiny.config(
        tmp_path, run={"stop_within_s": 3.0}, commits={"every_steps": None, "every_s": 1000.0},
        exports={"url": str(tmp_path / "blocked" / "published"), "drain_s": 60.0},
    )  # fmt: skip
    with running(config) as process:
        until(process, lambda: status(tmp_path)["step"] >= 20 and status(tmp_path)["spooled"] > 0)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        took = time.monotonic() - began
    assert process.returncode == 0, output
    assert took < 30, took  # three seconds, and what a busy machine adds
    assert "not everything is published; the spool keeps it" in output
    stopped = json.loads((tmp_path / "run" / "status.json").read_text())
    assert stopped["commit"]["step"] == stopped["step"] > 0 and stopped["state"] == "stopped"


def test_a_hang_is_told_where_it_stands_and_is_no_failure_of_its_batch(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 30)
    with running(tiny.config(tmp_path)) as process:
        until(process, lambda: status(tmp_path)["state"] == "waiting for data")
        process.send_signal(signal.SIGQUIT)  # as the unit's watchdog does
        output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGQUIT
    assert "most recent call first" in output and "_wait" in output
    with running(tiny.config(tmp_path)) as process:
        until(process, lambda: status(tmp_path)["state"] == "waiting for data")
        assert not (tmp_path / "run" / "failures.jsonl").exists()


def test_a_run_directory_that_cannot_be_written_is_a_mistake_in_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tiny.write_text(tmp_path / "data", 3)
    config = tiny.config(tmp_path, run={"directory": str(tmp_path / "file" / "run")})
    assert "no run can be kept here" in tiny.run("run", config, expect=2)


def test_a_run_that_ends_by_itself_has_all_the_time_for_its_uploads(tmp_path: Path) -> None:
    """Nobody takes the machine away: `stop_within_s` counts from a signal, and there was none."""
    tiny.write_text(tmp_path / "data", 40)
    config = tiny.config(tmp_path, run={"stop_within_s": 1.5}, exports={"every_steps": 20})
    output = tiny.run("run", config, "--steps", "20")
    assert "not everything is published" not in output, output
    assert (tmp_path / "published" / "latest.json").exists()
