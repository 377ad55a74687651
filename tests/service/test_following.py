"""`pull --follow` as a unit runs it: a process that follows a prefix, runs a command, and ends when it is told to."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anytimed.cli import app
from anytimed.contracts import ConfigError, Json
from anytimed.service.after_pull import Command
from anytimed.storage.pull import latest
from tests import tiny
from tests.service.test_daemon import running
from tests.storage.material import Site, content, flip
from tests.storage.web_server import WebServer

# Writes a line for each call, then fails as often as a file says, sleeps as long as another says.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path

folder = Path(sys.argv[1])
def line(**more):
    with (folder / "calls").open("a") as out:
        out.write(json.dumps({"words": sys.argv[2:], **more}) + "\\n")
def ended(number, frame):
    line(ended=number)
    sys.exit(9)
signal.signal(signal.SIGTERM, ended)
named = {name.removeprefix("ANYTIMED_"): value for name, value in os.environ.items() if name.startswith("ANYTIMED_")}
whole = (Path(named["PATH"]) / "model.safetensors").is_file() and (folder / "model/current/config.json").is_file()
line(whole=whole, systemd="NOTIFY_SOCKET" in os.environ, **named)
fail = folder / "fail"
left = int(fail.read_text()) if fail.exists() else 0
if left:
    fail.write_text(str(left - 1))
    sys.exit(7)
if (folder / "down").exists():
    sys.exit(7)
if (folder / "sleep").exists():
    time.sleep(60)
"""


@dataclass
class Follower:
    """A follower's process, and the file that it writes to."""

    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        return self.log.read_text()

    def until(self, told: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not told():
            assert self.process.poll() is None, f"ended early:\n{self.said()}"
            assert time.monotonic() < deadline, f"never happened:\n{self.said()}"
            time.sleep(0.02)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> str:
        """End it as an operator does; what it said."""
        self.process.send_signal(number)
        assert self.process.wait(60) == 0, self.said()
        assert "Traceback" not in self.said(), self.said()
        return self.said()


class Place:
    """A folder with the command's script and what it wrote."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url, self.to = folder, url, folder / "model"
        (folder / "after.py").write_text(SCRIPT)

    @contextlib.contextmanager
    def follower(self, *more: str, **environment: str) -> Iterator[Follower]:
        line = f"{sys.executable} {self.folder}/after.py {self.folder} {{id}} {{step}} {{path}} '{{\"k\": 1}}'"
        words = ["pull", self.url, "--to", str(self.to), "--follow", "--every", "0.2", "--exec", line, *more]
        log = self.folder / f"log{len(list(self.folder.glob('log*')))}"
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "anytimed.cli", *words],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "COLUMNS": "300", **environment},
            )
        try:
            yield Follower(process, log)
        finally:
            process.kill()
            process.wait()

    def calls(self) -> list[Json]:
        file = self.folder / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def succeeded(self) -> str:
        file = self.to / ".follow.json"
        return str(json.loads(file.read_text())["succeeded"]["id"]) if file.exists() else ""


def test_it_follows_a_real_run_through_failures_a_kill_and_a_restart(tmp_path: Path) -> None:
    place = Place(tmp_path, str(tmp_path / "published"))
    (tmp_path / "fail").write_text("2")
    tiny.write_text(tmp_path / "data", 30)
    with place.follower() as follower, running(tiny.config(tmp_path), "--steps", "20") as run:
        run.wait(120)
        first = latest(place.url)
        follower.until(lambda: place.succeeded() == first.id)
        follower.process.kill()
        output = follower.said()
    assert "nothing is published yet; waiting" in output
    assert output.count("exit code 7; it is run again after the next look") == 2
    calls = place.calls()
    assert len(calls) >= 3 and calls[-1]["CHECKPOINT"] == first.id
    with place.follower() as follower:
        follower.until(lambda: "in place" in follower.said())
        tiny.write_text(tmp_path / "data", 20, prefix="more", seed=5)
        with running(tiny.config(tmp_path), "--steps", "30") as run:
            run.wait(120)
        newest = latest(place.url)
        assert newest.step > first.step
        follower.until(lambda: place.succeeded() == newest.id)
        follower.stop()
    new = place.calls()[len(calls) :]
    # After the restart it did not run again for what had succeeded; each call saw a whole folder, and who was before.
    assert new[0]["CHECKPOINT"] != first.id and new[0]["PREVIOUS"] == first.id and calls[0]["PREVIOUS"] == ""
    assert new[-1] == {
        "words": [newest.id, str(newest.step), str(place.to / "versions" / newest.id), '{"k": 1}'],
        "whole": True,
        "systemd": False,
        "CHECKPOINT": newest.id,
        "PATH": str(place.to / "versions" / newest.id),
        "STEP": str(newest.step),
        "TOKENS": str(newest.tokens),
        "RUN_ID": newest.run_id,
        "PREVIOUS": new[-1]["PREVIOUS"],
    }
    assert all(call["whole"] for call in place.calls())
    assert (place.to / "current").readlink().name == newest.id
    assert len([p for p in (place.to / "versions").iterdir() if p.name[0] != "."]) <= 4


def test_sigterm_ends_the_command_too_and_the_next_start_runs_it_again(tmp_path: Path) -> None:
    site = Site(tmp_path / "writer", str(tmp_path / "published"))
    item = site.publish(1)
    place = Place(tmp_path, site.url)
    (tmp_path / "sleep").touch()
    with place.follower() as follower:
        follower.until(lambda: len(place.calls()) == 1)
        output = follower.stop()
    assert [call.get("ended") for call in place.calls()] == [None, signal.SIGTERM]
    assert "stopped with the follower, exit code 9" in output and place.succeeded() == ""
    (tmp_path / "sleep").unlink()
    with place.follower() as follower:
        follower.until(lambda: place.succeeded() == item.id)
        follower.stop(signal.SIGINT)
    # Another command line has not succeeded for it yet.
    with place.follower("--exec", f"{sys.executable} {tmp_path}/after.py {tmp_path} other") as follower:
        follower.until(lambda: len(place.calls()) == 4)
        follower.stop()
    assert place.calls()[-1]["words"] == ["other"] and place.calls()[-1]["PREVIOUS"] == item.id


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_pull_that_is_cut_is_gone_on_with(tmp_path: Path, number: signal.Signals) -> None:
    item = Site(tmp_path / "writer", str(tmp_path / "published")).publish(1)
    reached, go_on = threading.Event(), threading.Event()
    with WebServer(tmp_path / "published") as web:

        def hold(path: str) -> None:
            if path.endswith("tokenizer.json"):  # the second file
                reached.set()
                go_on.wait()

        web.before = hold
        place = Place(tmp_path, web.url)
        with place.follower() as follower:
            assert reached.wait(60)
            if number is signal.SIGTERM:
                assert "nothing was pulled" in follower.stop()
        go_on.set()
        assert place.calls() == []
        web.asked.clear()
        with place.follower() as follower:
            follower.until(lambda: place.succeeded() == item.id)
            follower.stop()
    assert item.manifest.files[0].name == "model.safetensors"
    assert "model.safetensors" not in {name for name, _, _ in web.asked}
    assert "tokenizer.json" in {name for name, _, _ in web.asked}


def test_a_newer_checkpoint_ends_the_tries_for_an_older_one(tmp_path: Path) -> None:
    site = Site(tmp_path / "writer", str(tmp_path / "published"))
    first = site.publish(1)
    place = Place(tmp_path, site.url)
    (tmp_path / "down").touch()
    with place.follower("--keep", "1") as follower:
        follower.until(lambda: len(place.calls()) >= 2)
        second = site.publish(2)
        follower.until(lambda: place.calls()[-1]["CHECKPOINT"] == second.id)
        (tmp_path / "down").unlink()
        follower.until(lambda: place.succeeded() == second.id)
        # A damaged one changes nothing, and the one after it is taken.
        bad = site.spool.build(content(3))
        flip(bad.path / "model.safetensors", -1)
        site.publisher._verify = False
        site.publisher.publish(bad)
        follower.until(lambda: "bad; took the older" in follower.said())
        assert (place.to / "current").readlink().name == second.id
        fourth = site.publish(4)
        follower.until(lambda: place.succeeded() == fourth.id)
        follower.until(lambda: len(list((place.to / "versions").iterdir())) == 1)
        follower.stop()
    named = [call["CHECKPOINT"] for call in place.calls()]
    assert set(named) == {first.id, second.id, fourth.id} and named == sorted(named)


def test_systemd_hears_of_readiness_and_is_fed(tmp_path: Path) -> None:
    site = Site(tmp_path / "writer", str(tmp_path / "published"))
    place = Place(tmp_path, site.url)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        heard: list[str] = []

        def hear(wanted: str) -> None:
            while not any(wanted in line for line in heard):
                heard.extend(manager.recv(65536).decode().split("\n"))

        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
        with place.follower(**environment) as follower:
            hear("nothing is published")
            assert "READY=1" not in heard and any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in heard)
            item = site.publish(12)
            hear("READY=1")
            heard.clear()
            hear(f"STATUS={item.id}, step 12, published ")
            follower.until(lambda: place.succeeded() == item.id)
            heard.clear()
            hear("WATCHDOG=1")
            follower.process.send_signal(signal.SIGTERM)
            hear("STOPPING=1")
            assert follower.process.wait(30) == 0
    assert [call["systemd"] for call in place.calls()] == [False]


def test_two_followers_and_bad_usage_are_refused(tmp_path: Path) -> None:
    site = Site(tmp_path / "writer", str(tmp_path / "published"))
    site.publish(1)
    place = Place(tmp_path, site.url)
    with place.follower() as follower:
        follower.until(lambda: place.succeeded() != "")
        with place.follower() as second:
            assert second.process.wait(60) == 3
            assert "another `pull --follow` keeps this folder" in second.said()
        follower.stop()
    for more, told in (
        (["--exec", "true"], "--exec: without --follow there is one pull"),
        (["--follow", "--json"], "--json: with --follow there is no end"),
        (["--follow", "--checkpoint", "best"], "leave one of the two out"),
        (["--follow", "--exec", "nosuch-program x"], "is not found"),
        (["--follow", "--exec-timeout", "3"], "there is no --exec"),
    ):
        wrong = CliRunner().invoke(app, ["pull", site.url, "--to", str(place.to), *more]).exception
        assert isinstance(wrong, ConfigError) and told in str(wrong)
    for line in ("", "'open"):
        with pytest.raises(ConfigError, match="--exec"):
            Command(line, 1.0)


def test_a_command_that_takes_too_long_goes_with_its_children(tmp_path: Path) -> None:
    site = Site(tmp_path / "writer", str(tmp_path / "published"))
    manifest = site.publish(1).manifest
    child = tmp_path / "child"
    command = Command(f"sh -c 'sleep 300 & echo $! > {child}; wait'", 1.0)
    ticks: list[float] = []
    problem = command.run(manifest, tmp_path, "", threading.Event(), lambda: ticks.append(time.monotonic()))
    assert problem == "not done after 1 s, ended by SIGTERM" and ticks
    with pytest.raises(ProcessLookupError):
        for _ in range(200):  # until its new parent has taken notice
            os.kill(int(child.read_text()), 0)
            if Path(f"/proc/{child.read_text().strip()}/stat").read_text().split()[2] == "Z":
                raise ProcessLookupError
            time.sleep(0.02)
    gone = Command("/bin/sh -c 'exit 3'", 5.0)
    assert gone.run(manifest, tmp_path, "", threading.Event(), lambda: None) == "exit code 3"
