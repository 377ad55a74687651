"""The service's parts by themselves: mailbox, timetable, console, systemd, outbox."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from anytimed.config import Schedule
from anytimed.contracts import ConfigError, HostTensor, Refused, Rejected
from anytimed.service.console import _JournalFormatter, ago, size, table
from anytimed.service.keeper import Keeper
from anytimed.service.outbox import Outbox
from anytimed.service.quarantine import Quarantine
from anytimed.service.requests import Commit, Crashed, Export, Mailbox, Published, Reload, Request, Stop
from anytimed.service.signals import posted_to
from anytimed.service.timetable import trigger
from anytimed.storage.exports import ExportContent, Publisher, Spool
from anytimed.storage.run_directory import RunDirectory
from anytimed.storage.store import Store, StoreError


def test_the_mailbox_keeps_order_and_waits_for_the_first_only() -> None:
    box = Mailbox()
    for request in (Commit(), Export(), Stop("x")):
        box.post(request)
    assert list(box.drain()) == [Commit(), Export(), Stop("x")]
    began = time.monotonic()
    assert list(box.drain(wait_s=0.05)) == []
    assert time.monotonic() - began >= 0.04
    threading.Timer(0.05, box.post, [Commit()]).start()
    assert list(box.drain(wait_s=30)) == [Commit()]


def test_signals_are_posted_and_the_handlers_of_before_come_back() -> None:
    box, before = Mailbox(), signal.getsignal(signal.SIGTERM)
    with posted_to(box):
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        got: list[Request] = []
        while len(got) < 3:
            got += box.drain(wait_s=5)
    assert got == [Stop("SIGTERM"), Reload(), Export()]
    assert signal.getsignal(signal.SIGTERM) is before


def test_schedules_become_triggers() -> None:
    assert trigger(Schedule(), "") is None
    now = datetime(2026, 1, 1, 0, 0, 30, tzinfo=UTC)
    interval = trigger(Schedule(every_s=90.0), "")
    assert interval is not None
    first = interval.get_next_fire_time(None, now)
    assert (interval.get_next_fire_time(first, first) - first).total_seconds() == 90
    cron = trigger(Schedule(cron="15 3 * * *"), "")
    assert cron is not None
    assert (cron.get_next_fire_time(None, now).hour, cron.get_next_fire_time(None, now).minute) == (3, 15)
    with pytest.raises(ConfigError, match=r'\[exports\] cron: found "15 25 \* \* \*"'):
        trigger(Schedule(cron="15 25 * * *"), "f.toml: [exports]")


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(None, "never"), (0.4, "0 s"), (59, "59 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"), (356400, "4 d 3 h")],
)
def test_ages(seconds: float | None, told: str) -> None:
    assert ago(seconds) == told


def test_sizes() -> None:
    assert [size(n) for n in (None, 999, 1000, 5_003_520, 2e12)] == ["-", "999 B", "1.0 kB", "5.0 MB", "2.0 TB"]


def test_the_table_shows_what_is_wrong_and_what_is_under_way() -> None:
    status = {
        "state": "training", "since": 0.0, "reason": "", "degraded": ["disk full"], "step": 12,
        "tokens": 3456, "tokens_per_s": None,
        "loss": None, "evaluation": None, "commit": None, "export": None, "skipped": 2, "sources": {},
        "upload": {"checkpoint": "c", "done_bytes": 5e6, "total_bytes": 1e7, "bytes_per_s": 1e6, "left_s": 5.0},
    }  # fmt: skip
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(status, time.time()))
    told = console.export_text()
    for expected in ("disk full", "3,456 tokens", "5.0 MB of 10.0 MB, 1.0 MB/s, 5 s left", "2 (loss or gradient"):
        assert expected in told


def test_every_line_in_the_journal_has_its_priority() -> None:
    record = logging.LogRecord("anytimed", logging.WARNING, "", 0, "one\ntwo", None, None)
    assert _JournalFormatter("%(message)s").format(record) == "<4>one\n<4>two"


# --- the outbox -------------------------------------------------------------------------------------------------------


class Box:
    """An outbox on a real spool and a real store, and what it posted."""

    def __init__(self, folder: Path) -> None:
        self.run = RunDirectory(folder / "run")
        self.run.acquire()
        self.posted: list[Request] = []
        self.store = folder / "published"
        self.outbox = self.fresh()

    def fresh(self) -> Outbox:
        store = Store(str(self.store))
        self.keeper = Keeper(store, self.run.run_id, self.run.term, self.posted.append, ttl_s=1.0, require=False)
        outbox = Outbox(Spool(self.run), Publisher(store), self.keeper, self.posted.append, str(self.store), None)
        self.keeper.on_held = outbox.wake
        return outbox

    def start(self) -> None:
        self.keeper.start()
        self.outbox.start()

    def wait(self, told: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not told():
            assert time.monotonic() < deadline, self.posted
            time.sleep(0.005)

    def published(self) -> list[int]:
        return [p.step for p in self.posted if isinstance(p, Published) and p.error is None and p.step is not None]


@pytest.fixture
def box(tmp_path: Path) -> Any:
    made = Box(tmp_path)
    yield made
    made.outbox.close()
    made.keeper.close()
    made.run.release()


def content(step: int, value: float = 1.0) -> ExportContent:
    data = np.full(4, value, "<f4").data.cast("B")
    return ExportContent(
        step=step,
        tokens=10 * step,
        tensors={"w": HostTensor("F32", (4,), data)},
        config={"model_type": "llama"},
        files={},
        optimizer={},
        evaluation=None,
        config_digest="0" * 64,
        lineage={},
    )


def test_the_outbox_publishes_answers_and_names_the_parent(box: Box) -> None:
    box.start()
    reply: Future[dict[str, Any]] = Future()
    box.outbox.submit(lambda: content(1), reply)
    first = reply.result(20)
    assert first["step"] == 1
    again: Future[dict[str, Any]] = Future()
    box.outbox.submit(lambda: content(2), again)
    second = again.result(20)
    box.wait(lambda: box.outbox.idle)
    manifest = (box.store / "checkpoints" / second["checkpoint"] / "manifest.json").read_text()
    assert f'"parent": "{first["checkpoint"]}"' in manifest
    assert box.published() == [1, 2]
    assert not [p for p in box.run.spool.iterdir() if not p.name.startswith(".")]


def test_what_was_not_begun_gives_way_and_gets_the_answer_of_the_newer(box: Box) -> None:
    begun, go = threading.Event(), threading.Event()

    def slow() -> ExportContent:
        begun.set()
        go.wait(20)
        return content(1)

    box.start()
    box.outbox.submit(slow)
    assert begun.wait(20)
    replies: list[Future[dict[str, Any]]] = [Future(), Future()]
    box.outbox.submit(lambda: content(2), replies[0])
    box.outbox.submit(lambda: content(3), replies[1])
    go.set()
    assert [reply.result(20)["step"] for reply in replies] == [3, 3]
    box.wait(lambda: box.outbox.idle)
    assert box.published() == [1, 3]


def test_a_store_that_fails_is_tried_again_and_an_older_run_s_spool_is_sent(box: Box) -> None:
    box.store.write_text("in the way")
    reply: Future[dict[str, Any]] = Future()
    box.start()
    box.outbox.submit(lambda: content(1), reply)
    with pytest.raises(StoreError):
        reply.result(20)
    assert not box.outbox.idle
    box.wait(lambda: any(isinstance(p, Published) and p.error for p in box.posted))
    box.outbox.close()
    box.keeper.close()
    box.store.unlink()
    box.outbox = box.fresh()
    assert not box.outbox.idle
    box.start()
    box.wait(lambda: box.outbox.idle)
    assert box.published() == [1]


@pytest.mark.parametrize("same_id", [False, True])
def test_what_waited_while_others_published_is_dropped_and_the_next_goes_out(
    box: Box, tmp_path: Path, same_id: bool
) -> None:
    """A run was gone for long, its last export unpublished; another run took the prefix over meanwhile."""
    Spool(box.run).build(content(5))
    box.run.release()
    with RunDirectory(tmp_path / "other") as other:
        other.acquire(at_least=0 if same_id else 7)
        theirs = Spool(other).build(content(5 if same_id else 6, 2.0))
        Publisher(Store(str(box.store))).publish(theirs)
    box.run.acquire(at_least=theirs.manifest.term)
    box.outbox = box.fresh()
    box.start()
    box.wait(lambda: box.outbox.idle)
    assert json.loads((box.store / "latest.json").read_text())["id"] == theirs.id
    reply: Future[dict[str, Any]] = Future()
    box.outbox.submit(lambda: content(7), reply)
    assert reply.result(20)["step"] == 7
    assert json.loads((box.store / "latest.json").read_text())["step"] == 7
    assert not [p for p in box.posted if isinstance(p, Published) and p.error]


def test_an_x_that_is_not_finite_is_refused_and_the_next_one_goes_out(box: Box) -> None:
    box.start()
    box.outbox.submit(lambda: content(1, float("inf")))
    box.wait(lambda: any(isinstance(p, Published) and "not finite" in (p.error or "") for p in box.posted))
    box.outbox.submit(lambda: content(2))
    box.wait(lambda: box.published() == [2])


def test_another_writer_ends_the_run_and_an_unforeseen_error_is_raised_by_the_loop(box: Box, tmp_path: Path) -> None:
    box.start()
    with RunDirectory(tmp_path / "other") as other:
        other.acquire()
        theirs = Spool(other).build(content(1, 2.0))
        taken = box.store / "checkpoints" / theirs.id
        taken.mkdir(parents=True)
        (taken / "manifest.json").write_bytes(theirs.data)
    box.outbox.submit(lambda: content(1))
    box.wait(lambda: any(isinstance(p, Published) and isinstance(p.refused, Refused) for p in box.posted))

    def broken() -> ExportContent:
        return dataclasses.replace(content(2), no_such_field=1)  # type: ignore[call-arg]

    box.outbox.submit(broken)
    box.wait(lambda: any(isinstance(p, Crashed) and isinstance(p.error, TypeError) for p in box.posted))


def test_a_note_that_cannot_be_written_costs_the_note_and_notes_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "records"
    folder.write_text("in the way")
    quarantine = Quarantine(folder)
    quarantine("main", {"at": 1}, Rejected("no UTF-8", "d" * 64))
    assert quarantine.failed is not None and "could not be noted" in quarantine.failed
    folder.unlink()
    quarantine("main", {"at": 1}, Rejected("no UTF-8", "d" * 64))
    quarantine("main", {"at": 1}, Rejected("no UTF-8", "d" * 64))
    assert quarantine.failed is None
    assert len((folder / "main.jsonl").read_text().splitlines()) == 1
    monkeypatch.setattr("anytimed.service.quarantine.MAX_BYTES", 300)
    for at in range(2, 20):
        quarantine("main", {"at": at}, Rejected("no UTF-8", "d" * 64))
    assert quarantine.failed is not None and "no more are noted" in quarantine.failed
    assert (folder / "main.jsonl").stat().st_size < 500
