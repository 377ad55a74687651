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
from segments import Segments, compared

from anytimed.config import load
from anytimed.service.console import View
from anytimed.service.recovery import recover
from anytimed.service.requests import Mailbox
from anytimed.storage.run_directory import RunDirectory

WARMUP_SEGMENTS = 4
EXPORTING, PLAIN = True, False


class Timed(Segments):
    """The daemon, with a clock around every step and an export at the start of every other segment."""

    published: Path

    def begin(self, segments: int, published: Path) -> None:
        self.take_turns((PLAIN, EXPORTING), segments, warmup=WARMUP_SEGMENTS)
        self.published = published
        self.stalls: list[float] = []
        self.plain_steps: list[float] = []
        self.compared = 0

    def stepped(self, before: float, after: float) -> None:
        if self.taken == 0 and self.kind is EXPORTING:
            self._begin_export()
            self.stalls.append(time.perf_counter() - after)
            self._expected = {name: x.clone() for name, x in self._learner._at("x").items()}
            # The copy to compare with is not the product's.
            self.since += time.perf_counter() - self.stalls[-1] - after
        elif self.kind is PLAIN:
            self.plain_steps.append(after - before)

    def waits(self) -> None:
        while self.kind is EXPORTING and not self._outbox.idle:
            time.sleep(0.001)

    def ended(self) -> None:
        if self.kind is EXPORTING:
            self._compare()

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
    result = {
        "config": str(arguments.config),
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "device": str(session.learner.device),
        "parameters": sum(p.numel() for p in session.learner.module.parameters()),
        **compared(daemon.times, (PLAIN, "no export"), (EXPORTING, "export every 10 steps")),
        "stall_of_the_exporting_step_ms": round(1e3 * statistics.median(daemon.stalls), 2),
        "median_step_ms": round(1e3 * statistics.median(daemon.plain_steps), 1),
        "exports_compared_bit_for_bit": daemon.compared,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
