"""What leaves the loop's thread: metrics.jsonl, status.json, and the threads of trackers that fail, hang, come back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from anytimed.contracts import AnytimedError, Json, SinkRun
from anytimed.service import history as history_module
from anytimed.service import metrics as metrics_module
from anytimed.service import sinks as sinks_module
from anytimed.service.metrics import Metrics
from anytimed.service.sinks import Sinks, Table

RUN = SinkRun("run", 3, {}, "digest", 40, 4000, Path("sinks"))


@contextmanager
def writing(folder: Path) -> Iterator[Metrics]:
    metrics = Metrics(folder / "metrics.jsonl", folder / "status.json")
    metrics.start()
    try:
        yield metrics
    finally:
        metrics.close()


def lines(folder: Path) -> list[Json]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def until(true: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.005)


class Tracker:
    """Keeps what it is told; `fails(record)` says what it raises. `gate` lets one write through at a time."""

    def __init__(self) -> None:
        self.runs: list[SinkRun] = []
        self.records: list[Json] = []
        self.closed = self.flushed = 0
        self.fails: Callable[[Json | None], Exception | None] = lambda _: None
        self.gate: threading.Semaphore | None = None

    def table(self, **settings: int) -> Table:
        return Table("tracker", dict(settings), lambda: self)

    def check(self) -> str:
        return ""

    def open(self, run: SinkRun) -> None:
        if (error := self.fails(None)) is not None:
            raise error
        self.runs.append(run)

    def write(self, record: Json) -> None:
        if self.gate is not None:
            self.gate.acquire()
        if (error := self.fails(record)) is not None:
            raise error
        self.records.append(record)

    def flush(self) -> None:
        self.flushed += 1

    def close(self) -> None:
        self.closed += 1

    @property
    def steps(self) -> list[int]:
        return [record["step"] for record in self.records]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(sinks_module, "LONGEST_PAUSE_S", 0.02)


# --- the files --------------------------------------------------------------------------------------------------------


def test_lines_are_json_in_order_and_the_newest_status_is_on_the_disk_when_it_closes(tmp_path: Path) -> None:
    with writing(tmp_path) as metrics:
        for step in range(200):
            metrics.write("step", step=step, loss=float("nan"), prequential={"a": float("inf"), "b": [1.5]})
            metrics.show({"step": step})
    assert [line["step"] for line in lines(tmp_path)] == list(range(200))
    assert lines(tmp_path)[7] | {"time": 0} == {
        "kind": "step", "time": 0, "step": 7, "loss": None, "prequential": {"a": None, "b": [1.5]}
    }  # fmt: skip
    assert json.loads((tmp_path / "status.json").read_text()) == {"step": 199}
    assert metrics.disk is not None and 0 < metrics.disk["free_bytes"] <= metrics.disk["total_bytes"]


def test_what_cannot_be_written_is_told_and_forgotten_when_all_is_well(tmp_path: Path) -> None:
    lost = tmp_path / "no"
    with writing(lost) as metrics:
        metrics.write("step", step=1)
        metrics.show({})
        assert metrics.flush()
        assert metrics.failed is not None
        assert "metrics.jsonl" in metrics.failed and "status.json" in metrics.failed
        lost.mkdir()
        metrics.write("step", step=2)
        metrics.show({})
        assert metrics.flush()
        assert metrics.failed is None
    assert [line["step"] for line in lines(lost)] == [2]


def test_a_disk_that_hangs_holds_nobody_and_costs_the_oldest_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, let_go = threading.Event(), threading.Event()
    real = history_module.append_line

    def hangs(path: Path, line: bytes) -> None:
        entered.set()
        assert let_go.wait(60)
        real(path, line)

    monkeypatch.setattr(history_module, "append_line", hangs)
    monkeypatch.setattr(metrics_module, "MOST_WAITING", 10)
    with writing(tmp_path) as metrics:
        metrics.write("step", step=0)
        assert entered.wait(30)
        for step in range(1, 31):
            metrics.write("step", step=step)
            metrics.show({"step": step})
        assert not metrics.flush(0.01)
        assert metrics.failed is not None and "20 lines are lost" in metrics.failed
        let_go.set()
        assert metrics.flush(30)
    assert [line["step"] for line in lines(tmp_path)] == [0, *range(21, 31)]
    assert json.loads((tmp_path / "status.json").read_text()) == {"step": 30}


def test_closing_waits_for_nobody_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go, tracker = threading.Event(), Tracker()
    monkeypatch.setattr(history_module, "append_line", lambda path, line: let_go.wait(60))
    monkeypatch.setattr(metrics_module, "CLOSE_S", 0.1)
    tracker.gate = threading.Semaphore(0)
    metrics = Metrics(tmp_path / "metrics.jsonl", tmp_path / "status.json")
    metrics.start()
    metrics.follow({"t": tracker.table()}, RUN)
    metrics.write("step", step=1, tokens=1)
    began = time.monotonic()
    metrics.close()
    assert time.monotonic() - began < 20
    let_go.set()
    tracker.gate.release(10)
    Metrics(tmp_path / "metrics.jsonl", tmp_path / "status.json").close()  # never started


# --- trackers ---------------------------------------------------------------------------------------------------------


def test_a_tracker_gets_every_line_and_where_the_run_goes_on(tmp_path: Path) -> None:
    tracker = Tracker()
    with writing(tmp_path) as metrics:
        metrics.follow({"t": tracker.table()}, RUN)
        for step in range(41, 61):
            metrics.write("step", step=step, tokens=step * 100, loss=1.0 / step)
        metrics.write("evaluation", step=60, loss_x=float("nan"))
    assert tracker.records == lines(tmp_path)
    assert tracker.records[-1]["loss_x"] is None
    assert (tracker.closed, len(tracker.runs)) == (1, 1) and tracker.flushed > 0
    assert tracker.runs[0].folder == Path("sinks/t")
    assert (tracker.runs[0].step, tracker.runs[0].tokens) == (40, 4000)
    assert metrics.sinks()["t"] == {"type": "tracker", "written": 21, "waiting": 0, "dropped": 0, "problem": None}


@pytest.mark.usefixtures("soon")
def test_a_tracker_that_fails_is_opened_anew_where_it_failed(tmp_path: Path) -> None:
    tracker, down = Tracker(), threading.Event()
    tracker.fails = lambda record: OSError("no route") if down.is_set() else None
    with writing(tmp_path) as metrics:
        metrics.follow({"t": tracker.table()}, RUN)
        metrics.write("step", step=41, tokens=4100)
        until(lambda: tracker.steps == [41])
        down.set()
        for step in (42, 43):
            metrics.write("step", step=step, tokens=step * 100)
        until(lambda: metrics.failed is not None)
        assert metrics.failed == "sink t: OSError: no route"
        down.clear()
        until(lambda: metrics.failed is None)
        assert tracker.steps == [41, 42, 43]
    assert [(run.step, run.tokens) for run in tracker.runs] == [(40, 4000), (41, 4100)]
    assert metrics.sinks()["t"]["dropped"] == 0


@pytest.mark.usefixtures("soon")
def test_a_record_that_fails_again_and_again_is_passed_over(tmp_path: Path) -> None:
    tracker = Tracker()
    tracker.fails = lambda record: AnytimedError("not this one") if record and record["step"] == 2 else None
    with writing(tmp_path) as metrics:
        metrics.follow({"t": tracker.table()}, RUN)
        for step in (1, 2, 3):
            metrics.write("step", step=step, tokens=step)
        until(lambda: tracker.steps == [1, 3])
        until(lambda: metrics.failed is None)
    assert metrics.sinks()["t"]["dropped"] == 1
    assert len(tracker.runs) == 1 + sinks_module.MOST_TRIES


def test_a_slow_tracker_loses_its_oldest_records_and_holds_up_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks_module, "MOST_WAITING", 10)
    slow, quick = Tracker(), Tracker()
    slow.gate = threading.Semaphore(0)
    with writing(tmp_path) as metrics:
        metrics.follow({"slow": slow.table(), "quick": quick.table()}, RUN)
        metrics.write("step", step=0, tokens=0)
        until(lambda: metrics.sinks()["slow"]["waiting"] == 0)  # its thread has it
        for step in range(1, 31):
            metrics.write("step", step=step, tokens=step)
            until(lambda step=step: quick.steps[-1:] == [step])  # type: ignore[misc]
        assert metrics.flush()
        assert [line["step"] for line in lines(tmp_path)] == quick.steps == list(range(31))
        assert metrics.sinks()["slow"] | {"written": 0} == {
            "type": "tracker", "written": 0, "waiting": 10, "dropped": 20, "problem": None
        }  # fmt: skip
        slow.gate.release(100)
    assert slow.steps == [0, *range(21, 31)]


def test_trackers_come_change_and_go_while_it_runs() -> None:
    sinks, one, two, three = Sinks(), Tracker(), Tracker(), Tracker()

    def put(step: int) -> None:
        sinks.put({"kind": "step", "step": step, "tokens": step})

    sinks.follow({"a": one.table(), "b": two.table(x=1)}, RUN, 10)
    put(1)
    sinks.follow({"a": three.table(), "b": three.table(x=2)}, RUN, 10)  # a is what it was, b is another one
    put(2)
    sinks.follow({}, RUN, 10)
    put(3)
    until(lambda: (one.closed, two.closed, three.closed) == (1, 1, 1))
    assert (one.steps, two.steps, three.steps) == ([1, 2], [1], [2])
    sinks.close(10)
    assert sinks.status() == {}


def test_a_thousand_lines_leave_the_caller_at_once(tmp_path: Path) -> None:
    """Every append of this disk takes 5 ms; the loop must not see it."""
    real = history_module.append_line

    def slow(path: Path, line: bytes) -> None:
        time.sleep(0.005)
        real(path, line)

    with pytest.MonkeyPatch.context() as patched, writing(tmp_path) as metrics:
        patched.setattr(history_module, "append_line", slow)
        began = time.monotonic()
        for step in range(400):
            metrics.write("step", step=step)
            metrics.show({"step": step})
        took = time.monotonic() - began
        assert metrics.flush(60)
        assert took < (time.monotonic() - began) / 4
    assert len(lines(tmp_path)) == 400
