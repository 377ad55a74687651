"""Exports cost nothing that matters: 10-step wall times with an export every 10 steps against none.

The quickstart configuration, the daemon's own loop, in one process: segments of 10 steps alternate between one that
begins with an export and one without. The segment's time includes everything that goes on beside it, building,
hashing, writing and publishing; an export that is not published when its segment ends is waited for at that segment's
cost. Every published x is compared bit for bit with the optimizer's x at that step. Timers, evaluations and commits
are off in both.

    .venv/bin/python benchmarks/export_stall.py [--segments 80] [--config configs/quickstart.toml]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from quiet import quiet
from rich.console import Console
from safetensors.torch import load_file

from anytimed.config import load
from anytimed.contracts import Batch
from anytimed.service.console import View
from anytimed.service.loop import Daemon
from anytimed.service.recovery import recover
from anytimed.service.requests import Mailbox
from anytimed.storage.run_directory import RunDirectory

STEPS = 10
WARMUP_SEGMENTS = 4


class Timed(Daemon):
    """The daemon, with a clock around every step and an export at the start of every other segment."""

    segments: int
    published: Path

    def begin(self, segments: int, published: Path) -> None:
        self.segments, self.published = segments, published
        self.times: dict[bool, list[float]] = {False: [], True: []}
        self.stalls: list[float] = []
        self.plain_steps: list[float] = []
        self.compared = 0
        self._segment = self._in_segment = 0
        self._began = 0.0

    def _step(self, batch: Batch) -> None:
        exporting = self._segment % 2 == 1
        if self._in_segment == 0:
            self._began = time.perf_counter()
        before = time.perf_counter()
        super()._step(batch)
        stepped = time.perf_counter()
        if self._in_segment == 0 and exporting:
            self._begin_export()
            self.stalls.append(time.perf_counter() - stepped)
            self._expected = {name: x.clone() for name, x in self._learner._at("x").items()}
            self._began += (
                time.perf_counter() - self.stalls[-1] - stepped
            )  # the copy to compare with is not the product's
        elif not exporting:
            self.plain_steps.append(stepped - before)
        self._in_segment += 1
        if self._in_segment == STEPS:
            self._end_segment(exporting)

    def _end_segment(self, exporting: bool) -> None:
        while exporting and not self._outbox.idle:
            time.sleep(0.001)
        took = time.perf_counter() - self._began
        if exporting:
            self._compare()
        if self._segment >= WARMUP_SEGMENTS:
            self.times[exporting].append(took)
        self._segment, self._in_segment = self._segment + 1, 0
        if self._segment == self.segments + WARMUP_SEGMENTS:
            self._limit = self._learner.step_count

    def _compare(self) -> None:
        latest = json.loads((self.published / "latest.json").read_text())["id"]
        found = load_file(self.published / "checkpoints" / latest / "model.safetensors")
        assert found.keys() == self._expected.keys()
        assert all(torch.equal(found[name], self._expected[name].cpu()) for name in found), "an exported x differs"
        self.compared += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--segments", type=int, default=80, help="measured segments of 10 steps, half of them exporting"
    )
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.toml"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/export_stall.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="export-stall-") as scratch:
        config = quiet(load(arguments.config), Path(scratch))
        mailbox = Mailbox()
        run = RunDirectory(Path(config.run.directory))
        run.acquire()
        session = recover(config, run)
        with View(Console(quiet=True), "export_stall") as view:
            daemon = Timed(session, mailbox, view)
            daemon.begin(arguments.segments, Path(scratch) / "published")
            daemon.run()
        run.release()
    plain, exporting = (statistics.median(daemon.times[which]) for which in (False, True))
    result = {
        "config": str(arguments.config),
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "device": str(session.learner.device),
        "parameters": sum(p.numel() for p in session.learner.module.parameters()),
        "segments_each": len(daemon.times[True]),
        "median_10_steps_s": {"no export": round(plain, 4), "export every 10 steps": round(exporting, 4)},
        "quartiles_10_steps_s": {
            name: [round(q, 4) for q in statistics.quantiles(daemon.times[which], n=4)]
            for name, which in (("no export", False), ("export every 10 steps", True))
        },
        "ratio": round(exporting / plain, 4),
        # The same comparison among segments that do the same thing: what the ratio is worth.
        "ratio_of_plain_halves": round(
            statistics.median(daemon.times[False][1::2]) / statistics.median(daemon.times[False][::2]), 4
        ),
        "stall_of_the_exporting_step_ms": round(1e3 * statistics.median(daemon.stalls), 2),
        "median_step_ms": round(1e3 * statistics.median(daemon.plain_steps), 1),
        "exports_compared_bit_for_bit": daemon.compared,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
