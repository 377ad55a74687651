"""What a listener hears: in this process, and from a daemon that trains, pauses, reloads and stops."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from anytimed.contracts import Json
from anytimed.service import bulletin as module
from anytimed.service.bulletin import KEPT, KINDS, MOST_LISTENERS, Bulletin, later, order
from anytimed.service.overview import BARS, Overview, sparkline
from tests import tiny
from tests.service.listening import asked, messages
from tests.service.test_daemon import running, status, until


def event(number: int, term: int = 1) -> Json:
    return {"kind": "event", "id": f"{term}-{number}", "what": "commit"}


def heard(bulletin: Bulletin, kinds: tuple[str, ...] = KINDS, after: str | None = None) -> list[tuple[str, Any]]:
    """Everything that a listener hears of a bulletin that has been closed."""

    async def listen() -> bytes:
        return b"".join([chunk async for chunk in bulletin.listen(kinds, after)])

    text = asyncio.run(listen()).decode()
    found = re.findall(r"^event: (\w+)\ndata: (.*)$", text, re.MULTILINE)
    return [(kind, json.loads(data)) for kind, data in found]


def test_who_comes_back_hears_what_it_missed_and_nothing_twice() -> None:
    bulletin = Bulletin()
    for number in range(1, 6):
        bulletin.post(event(number))
    bulletin.post({"kind": "step", "step": 1})
    bulletin.show({"step": 7})
    bulletin.close()
    assert heard(bulletin) == [("status", {"step": 7})]
    assert [value["id"] for kind, value in heard(bulletin, after="1-3") if kind == "event"] == ["1-4", "1-5"]
    assert heard(bulletin, ("event",), after="2-1") == []
    assert len(heard(bulletin, ("event",), after="of something else")) == 5


@given(st.lists(st.tuples(st.integers(1, 99_999), st.integers(1, 10**9)), unique=True), st.text(max_size=50))
def test_ids_are_ordered_as_they_were_given(numbers: list[tuple[int, int]], noise: str) -> None:
    events = [event(number, term) for term, number in sorted(numbers)]
    for place, found in enumerate(events):
        assert later(events, found["id"]) == events[place + 1 :]
    assert order(noise) >= (0, 0)


def test_a_listener_that_does_not_keep_up_is_told_and_the_newest_stay() -> None:
    bulletin = Bulletin()

    async def listen() -> list[bytes]:
        listener = bulletin.listen(("step",))
        chunks = [await anext(listener)]
        for number in range(KEPT + 5):
            bulletin.post({"kind": "step", "step": number})
        bulletin.close()
        return chunks + [chunk async for chunk in listener]

    chunks = asyncio.run(listen())
    assert chunks[1] == b'event: lost\ndata: {"records":5}\n\n'
    assert b'"step":5}' in chunks[2] and f'"step":{KEPT + 4}'.encode() in chunks[-1]
    assert len(chunks) == 2 + KEPT


def test_of_statuses_only_the_newest_is_sent_once_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STATUS_EVERY_S", 0.5)
    bulletin = Bulletin()
    bulletin.show({"step": 0})

    def tell() -> None:
        for step in range(1, 101):
            bulletin.show({"step": step})

    async def listen() -> list[int]:
        listener = bulletin.listen(("status",))
        await anext(listener)
        found = [json.loads((await anext(listener)).split(b"data: ")[1])["step"]]
        teller = threading.Thread(target=tell)
        teller.start()
        while found[-1] != 100:
            found.append(json.loads((await anext(listener)).split(b"data: ")[1])["step"])
        teller.join()
        await listener.aclose()  # type: ignore[attr-defined]
        return found

    found = asyncio.run(listen())
    assert found[0] == 0 and found[-1] == 100 and len(found) <= 3
    assert not bulletin._listeners


def test_a_quiet_listener_is_pinged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PING_S", 0.05)
    bulletin = Bulletin()

    async def listen() -> list[bytes]:
        listener = bulletin.listen(("event",))
        return [await anext(listener) for _ in range(3)]

    assert asyncio.run(listen())[1:] == [b": ping\n\n"] * 2


def test_listeners_are_not_without_bound(tmp_path: Path) -> None:
    bulletin = Bulletin()

    async def listen() -> bool:
        listeners = [bulletin.listen(("event",)) for _ in range(MOST_LISTENERS)]
        for listener in listeners:
            assert not bulletin.crowded
            await anext(listener)
        return bulletin.crowded

    assert asyncio.run(listen())


def test_a_daemon_tells_what_happens_and_pauses_when_asked(tmp_path: Path) -> None:
    """One life: it trains, pauses, is exported and committed, resumes, waits for data, reloads, stops."""
    tiny.write_text(tmp_path / "data", 80)
    run = tmp_path / "run"
    never = {"every_steps": None, "every_s": 100_000.0}
    config = tiny.config(tmp_path, commits=never, exports=never)
    with running(config) as process:
        until(process, lambda: status(tmp_path)["step"] > 0)
        kinds: list[tuple[str, str | None, Json]] = []
        listening = threading.Thread(target=lambda: kinds.extend(messages(run)))
        listening.start()
        assert asked(run, "POST", "/pause")[1]["state"] == "paused"
        at = status(tmp_path)
        assert (at["state"], at["reason"]) == (
            "paused", "asked to pause; `anytimed resume` goes on, and so does a restart",
        )  # fmt: skip
        until(process, lambda: (status(tmp_path)["commit"] or {}).get("step") == at["step"])
        assert asked(run, "GET", "/readyz")[0] == 200
        assert asked(run, "POST", "/pause")[1] == {"state": "paused", "step": at["step"]}  # again: as it was
        exported = asked(run, "POST", "/export")[1]
        assert exported["step"] == at["step"]
        until(process, lambda: status(tmp_path)["time"] > at["time"] + 1.0)
        assert status(tmp_path)["step"] == at["step"]
        assert "Training at step" in tiny.run("resume", run)
        until(process, lambda: status(tmp_path)["state"] == "waiting for data")
        why = status(tmp_path)["reason"]
        assert f"Paused at step {status(tmp_path)['step']}." in tiny.run("pause", run)
        assert "Waiting for data" in tiny.run("resume", run)
        assert status(tmp_path)["reason"] == why != ""
        assert asked(run, "POST", "/reload")[1]["changed"] == []
        asked(run, "POST", "/pause")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        listening.join(timeout=30)
    recorded = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = [record for record in recorded if record["kind"] == "event"]
    assert [record["id"] for record in events] == [f"1-{number + 1}" for number in range(len(events))]
    states = [record["state"] for record in events if record["what"] == "state"]
    assert states == [
        "training", "paused", "training", "waiting for data", "paused", "waiting for data", "paused", "stopping",
        "stopped",
    ]  # fmt: skip
    assert {"started", "commit", "export", "reload"} <= {record["what"] for record in events}
    assert all(record["told"] and record["tokens"] >= 0 for record in events)
    for evaluation in (record for record in recorded if record["kind"] == "evaluation"):
        assert evaluation["tokens"] == evaluation["step"] * 4 * 32 and 0 < evaluation["holdout_tokens"] < 1000
    # What was heard is what was written, from the moment of listening on; the status comes first.
    assert kinds[0][0] == "status" and kinds[0][2]["run_id"] == at["run_id"]
    assert all((ident == value["id"]) if kind == "event" else (ident is None) for kind, ident, value in kinds)
    from_first = list(itertools.dropwhile(lambda e: e["id"] != next(i for k, i, _ in kinds if k == "event"), events))
    said = [value["id"] for kind, _, value in kinds if kind == "event"]
    assert said == [record["id"] for record in from_first][: len(said)]
    assert len(from_first) - len(said) <= 3  # those of the end come as the socket closes
    assert {kind for kind, _, _ in kinds} == set(KINDS)
    # The terminal's view of the same, with no daemon there.
    told = [json.loads(line) for line in tiny.run("events", run, "--json", "-n", "3").splitlines()]
    assert told == events[-3:]
    only = tiny.run("events", run, "--only", "export", "--only", "reload", "-n", "2").splitlines()
    assert len(only) == 2 and "reloaded: nothing has changed" in only[-1] and "reload" in only[-1]
    assert "systemd has not started its daemon" in tiny.run("logs", run, expect=1)
    assert "no daemon answers" in tiny.run("top", run, expect=1)


def test_events_are_followed_over_a_restart(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 12)
    config, run = tiny.config(tmp_path), tmp_path / "run"
    with running(config) as process:
        until(process, lambda: status(tmp_path)["state"] == "waiting for data")
        with running_follower(run) as follower:
            lines = iter(follower.stdout.readline, "")  # type: ignore[union-attr]
            seen = [json.loads(line) for line in itertools.islice(lines, 1)]
            tiny.run("commit", run)
            process.kill()
            process.wait()
            with running(config) as again:
                until(again, lambda: status(tmp_path)["state"] == "waiting for data")
                for line in lines:
                    seen.append(json.loads(line))
                    if seen[-1]["id"].startswith("2-") and seen[-1].get("state") == "waiting for data":
                        break
            follower.send_signal(signal.SIGINT)
            assert follower.wait(timeout=30) == 130
    recorded = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = [record["id"] for record in recorded if record["kind"] == "event"]
    said = [event["id"] for event in seen]
    assert said == events[events.index(said[0]) :][: len(said)]


@contextlib.contextmanager
def running_follower(run: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "anytimed.cli", "events", str(run), "--follow", "--json", "-n", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_line_of_bars_shows_where_the_values_went() -> None:
    assert sparkline([], 10) == sparkline([math.nan], 10) == ""
    assert sparkline([1.0], 10) == sparkline([5.0], 10) and len(sparkline([1.0], 10)) == 1
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == BARS
    assert sparkline([0.0, math.inf, 7.0], 8) == BARS[0] + BARS[-1]


@given(st.lists(st.floats(-1e6, 1e6), max_size=300), st.integers(1, 80))
def test_bars_fit_the_width(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(width, len(values)) and set(line) <= set(BARS)


def test_the_overview_goes_on_from_the_history() -> None:
    overview = Overview()
    steps = {
        "loss": [3.0, None, 2.0],
        "tokens_per_s": [10.0, 10.0, 12_345.0],
        "prequential": {"main": [3.0, None, 2.5]},
    }
    happened = [{"time": 900.0 + i, "what": "commit", "told": f"number {i} [bold]"} for i in range(20)]
    overview.seed({
        "steps": steps, "events": happened,
        "evaluations": {"loss_x": [2.0], "loss_y": [2.5], "loss_z": [2.75]},
    })  # fmt: skip
    assert "waiting for a daemon" in drawn(overview)
    overview.hear("status", {**STATUS, "state": "training"})
    overview.hear("step", {"loss": 1.5, "tokens_per_s": 99.0, "prequential": {"new": 4.0}})
    overview.hear("evaluation", {"loss_x": 1.25, "loss_y": 1.5, "loss_z": 1.75})
    overview.hear("event", {"time": 990.0, "what": "export", "told": "published it"})
    text = drawn(overview)
    for found in (
        "1.2500",
        "1.5000",
        "prequential new",
        "4.0000",
        "99",
        "10 s ago",
        "published it",
        "number 19 [bold]",
    ):
        assert found in text, found
    assert "number 3 " not in text
    assert all(len(line) <= 100 for line in text.splitlines())


STATUS: Json = {
    "config": "demo.toml", "state": "training", "since": 0.0, "reason": "", "step": 10, "tokens": 100,
    "tokens_per_s": 5.0, "loss": 1.0, "evaluation": None, "commit": None, "export": None, "sources": {}, "skipped": 0,
    "degraded": [],
}  # fmt: skip


def drawn(overview: Overview) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(overview.shown(100, 1000.0))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
