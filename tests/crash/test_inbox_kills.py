"""A daemon that is killed while an application feeds it: what was acknowledged is trained on, once."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from anytimed.service.feeding import Feeder, Line
from tests import tiny
from tests.crash import audited
from tests.crash.test_random_kills import BATCH, LENGTH, held_out, windows
from tests.faultlog import FULL, Injected
from tests.service.test_daemon import running, status, until

INBOX = "anytimed.data.inbox:Inbox"
KILLS = 20 if FULL else 4
PAUSE_S = 0.03


class Sender:
    """Feeds records in requests of a few until `stop`; `acknowledged` are those that were answered."""

    def __init__(self, folder: Path) -> None:
        self.feeder = Feeder(folder / "run" / "control.sock", "main", lambda why: None)
        self.acknowledged: list[bytes] = []
        self.failed: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(90)
        assert not self._thread.is_alive()
        if self.failed is not None:
            raise self.failed

    def _run(self) -> None:
        draw, number = random.Random(18), 0
        try:
            while not self._stop.is_set():
                contents = []
                for _ in range(draw.randrange(1, 5)):
                    contents.append(f"{number:06d} {draw.randbytes(draw.randrange(100, 500)).hex()}".encode())
                    number += 1
                self.feeder.send([Line(json.dumps({"text": c.decode()}).encode(), "here", len(c)) for c in contents])
                self.acknowledged += contents
                self._stop.wait(PAUSE_S)
        except Exception as error:  # noqa: BLE001 - raised in `stop`
            self.failed = error
        finally:
            self.feeder.close()


def timeline(lives: list[NDArray[np.int16]], known: dict[bytes, int]) -> list[tuple[int, ...]]:
    """The batches of the run that is left, each as its windows: every life goes on from a step of those before, and
    takes the steps that it takes again on the same batches."""
    line: list[tuple[int, ...]] = []
    for life in lives:
        batches = [tuple(known[row.tobytes()] for row in batch) for batch in life]
        if batches:
            at = line.index(batches[0]) if batches[0] in line else len(line)
            again = line[at : at + len(batches)]
            assert batches[: len(again)] == again, "steps were taken again on other batches"
            line[at : at + len(batches)] = batches
    return line


def goes_on(folder: Path, sender: Sender, records: int, step: int) -> bool:
    """More is acknowledged, and more steps are taken."""
    return len(sender.acknowledged) > records and status(folder)["step"] > step


@pytest.mark.fault(18)
@pytest.mark.timeout(1800)
def test_killed_while_it_is_fed_it_trains_once_on_all_that_was_acknowledged(tmp_path: Path, injected: Injected) -> None:
    environment = {**audited.installed(tmp_path / "plugin"), "ANYTIMED_ALLOW_ADAPTERS": INBOX}
    # Files of the inbox come and go: none is kept for senders that ask again.
    inbox = {"type": INBOX, "url": None, "segment_bytes": 20_000, "keep_bytes": 0}
    config = tiny.config(tmp_path, model={"type": "audited"}, commits={"every_steps": 4}, **{"sources.main": inbox})
    draw, sender = random.Random(5), None
    try:
        for kill in range(KILLS):
            with running(config, **environment) as process:
                until(process, lambda: bool(status(tmp_path)["state"]))
                sender = sender or Sender(tmp_path)
                before, step = len(sender.acknowledged), status(tmp_path)["step"]
                until(process, partial(goes_on, tmp_path, sender, before, step))
                time.sleep(draw.uniform(0.0, 0.6))
                process.send_signal(signal.SIGKILL)
                process.wait()
                injected(18, f"kill {kill} of a daemon that is fed, {len(sender.acknowledged)} records acknowledged")
        with running(config, **environment) as process:
            until(process, lambda: bool(status(tmp_path)["state"]))
            assert sender is not None
            sender.stop()
            count, known = len(sender.acknowledged), windows(sender.acknowledged)

            def all_used() -> bool:
                """All is read, and trained on but for what does not fill a batch: that is later, on a busy machine."""
                now = status(tmp_path)
                at = now["sources"]["main"]
                read = now["state"] == "waiting for data" and at["records"] + at["held_out"] == count
                return read and now["step"] * BATCH > len(known) - BATCH

            until(process, all_used)
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0, output
    finally:
        if sender is not None:
            sender._stop.set()

    contents = sender.acknowledged
    assert sender.feeder.fed.records == count
    line = timeline(audited.trained_on(tmp_path / "plugin", BATCH, LENGTH), known)
    used = [k for batch in line for k in batch]
    assert len(used) == len(set(used)), "a record was trained on twice"
    assert len(known) - len(used) < BATCH, "acknowledged, and not trained on"
    read = tiny.state_of(tiny.newest_commit(tmp_path))[1]["position"]["sources"]["main"]
    assert read["held_out"] <= sum(map(held_out, contents))
    assert read["rejected"] == 0
    segments = sorted((tmp_path / "run" / "streams" / "main").iterdir())
    assert segments[0].name > "0" * 20 + "-" + "0" * 20 + ".jsonl", "nothing was deleted"
    numbers = [int(path.name[21:41]) for path in segments]
    assert all(a < b for a, b in pairwise(numbers)) and numbers[-1] <= count
