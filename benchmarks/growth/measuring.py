"""What is timed, each in a process of its own: `python -m growth.measuring ROLE CONFIG`, in benchmarks/.

history    reads all shards once and says what that left behind.
start      the bare listing, the start of the data side to its first batch, the bare listing again; once. Seconds
           that passed, and those that the process had a core.
turns      stands ready, reads lines `batches N`, `steps N` and `poll` and answers each with a line: seconds.
"""

from __future__ import annotations

import cProfile
import io
import json
import os
import pstats
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from anytimed.contracts import Batch, Json
from anytimed.data.reader import Reader
from anytimed.service.assembly import learner_of, pipeline_of
from anytimed.storage.journal import Journal
from anytimed.training.device import Device
from growth.history import opened, position_of, quarantine, read_all

LONG_S = 600.0


def bare_listing(folder: str) -> int:
    """Names, sizes and times of all files below; how many."""
    count = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                count += bare_listing(entry.path)
            else:
                entry.stat()
                count += 1
    return count


def memory() -> dict[str, int]:
    """Of this process now, and at most so far, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(lines[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM")}


def start(path: Path) -> Json:
    """Seconds of every part of the start, and of the listing before and after."""
    data = str(path.parent / "data")
    marks: list[tuple[float, float]] = []

    def mark() -> None:
        marks.append((time.perf_counter(), time.process_time()))

    _, parts, run = opened(path)
    position = position_of(path)
    before = memory()["VmRSS"]
    mark()
    files = bare_listing(data)
    mark()
    profile = cProfile.Profile() if os.environ.get("GROWTH_PROFILE") else None
    if profile is not None:
        profile.enable()
    journal = Journal(run.journal)
    mark()
    pipeline = pipeline_of(parts, journal, quarantine, run.fold)
    pipeline.restore(position)
    mark()
    outcome = pipeline.next_batch()  # what the journal holds beyond the position, if anything
    pipeline.poll()
    mark()
    while not isinstance(outcome, Batch):
        outcome = pipeline.next_batch()
    mark()
    if profile is not None:
        profile.disable()
        shown = io.StringIO()
        pstats.Stats(profile, stream=shown).sort_stats("tottime").print_stats(25)
        print(shown.getvalue(), file=sys.stderr)
    held = memory()
    bare_listing(data)
    mark()
    names = ("listing_before", "journal", "restore", "poll", "first_batch", "listing_after")
    told: Json = {"files": files, "rss_before": before, "rss": held["VmRSS"], "rss_peak": held["VmHWM"]}
    for which, kind in enumerate(("wall", "cpu")):
        spans = [after[which] - before_it[which] for before_it, after in pairwise(marks)]
        told[kind] = {**dict(zip(names, spans, strict=True)), "start": sum(spans[1:5])}
    return told


class Turns:
    """A data side that stands behind its history, and a learner; both as in the daemon."""

    def __init__(self, path: Path) -> None:
        config, parts, run = opened(path)
        self.pipeline = pipeline_of(parts, Journal(run.journal), quarantine, run.fold)
        self.pipeline.restore(position_of(path))
        run_settings = config.run
        device = Device(
            run_settings.device,
            threads=run_settings.threads,
            precision=run_settings.precision,
            deterministic=run_settings.deterministic,
        )
        self.learner = learner_of(parts, device)
        self.reader = Reader(self.pipeline, config.data.prefetch_batches)
        self.reader.start()
        self.reader.poll()

    def batch(self) -> Batch:
        while not isinstance(outcome := self.reader.get(LONG_S), Batch):
            raise RuntimeError(f"no batch: {outcome}")
        return outcome

    def batches(self, count: int) -> Json:
        began, busy = time.perf_counter(), time.process_time()
        for _ in range(count):
            self.batch()
        return {"s": time.perf_counter() - began, "cpu_s": time.process_time() - busy}

    def steps(self, count: int) -> Json:
        began, busy = time.perf_counter(), time.process_time()
        for _ in range(count):
            self._step()
        return {"s": time.perf_counter() - began, "cpu_s": time.process_time() - busy}

    def _step(self) -> None:
        self.learner.step(self.batch())
        self.learner.reports()  # waits for the device

    def poll(self) -> Json:
        """Steps beside a poll: how many while it lasted, how long it lasted."""
        done, poll = threading.Event(), self.pipeline.poll

        def polled(*, prepared: bool = False) -> int:
            try:
                return poll(prepared=prepared)
            finally:
                done.set()

        self.pipeline.poll = polled  # type: ignore[method-assign]
        self.reader._polls_from = 0.0  # the one before may just have been; a daemon would let this one wait
        began, count = time.perf_counter(), 0
        self.reader.poll()
        while not done.is_set():
            self._step()
            count += 1
        took = time.perf_counter() - began
        self.pipeline.poll = poll  # type: ignore[method-assign]
        return {"s": took, "steps": count}

    def serve(self) -> None:
        print(json.dumps({"ready": True, **memory()}), flush=True)
        for line in sys.stdin:
            what, *arguments = line.split()
            print(json.dumps(getattr(self, what)(*map(int, arguments))), flush=True)
        self.reader.close()


def main() -> None:
    role, path = sys.argv[1], Path(sys.argv[2])
    roles: dict[str, Any] = {"history": read_all, "start": start}
    if role == "turns":
        Turns(path).serve()
    else:
        print(json.dumps(roles[role](path)))


if __name__ == "__main__":
    main()
