"""A store that is dead, or answers half of all requests with 500 or 503, costs the training nothing that matters.

The quickstart configuration, the daemon's own loop, in one process; the store is an S3 server (moto) behind a proxy,
each in a process of its own. Segments of 10 steps, each begun by an export, go round among a healthy store, one that
swallows every request, and one in a storm. Throughput is steps a second over a segment, medians; the ratio of each to
the healthy one is what counts (at least 0.98).

    .venv/bin/python benchmarks/store_faults.py [--segments 60] [--config configs/quickstart.toml]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from quiet import quiet
from rich.console import Console
from segments import Segments

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the servers and the proxy of the fault suite

from anytimed.config import load  # noqa: E402
from anytimed.service.console import View  # noqa: E402
from anytimed.service.recovery import recover  # noqa: E402
from anytimed.service.requests import Mailbox  # noqa: E402
from anytimed.storage.run_directory import RunDirectory  # noqa: E402
from tests.faults import servers  # noqa: E402

MODES = ("healthy", "dead", "storm")


class Timed(Segments):
    """The daemon, with a clock around segments and another store for each."""

    def begin(self, segments: int, proxy: subprocess.Popen[str]) -> None:
        self.take_turns(MODES, segments, warmup=len(MODES))
        self._proxy = proxy

    def begins(self) -> None:
        assert self._proxy.stdin is not None
        self._proxy.stdin.write(self.kind + "\n")
        self._proxy.stdin.flush()
        self._outbox.wake()  # no pause left over from the segment before

    def starts(self) -> None:
        self._begin_export()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--segments", type=int, default=60, help="measured segments of 10 steps, a third each")
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.toml"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/store_faults.json"))
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="store-faults-") as scratch,
        servers.moto(Path(scratch)) as server,
        subprocess.Popen(
            [sys.executable, "-m", "tests.faults.proxy", str(server.port)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as proxy,
    ):
        assert proxy.stdout is not None
        config = quiet(
            load(arguments.config),
            Path(scratch),
            url=f"s3://{servers.BUCKET}/published",
            storage_options=servers.options(int(proxy.stdout.readline())),
            drain_s=0.0,
            deadline_s=10.0,
        )
        run = RunDirectory(Path(config.run.directory))
        run.acquire()
        session = recover(config, run)
        with View(Console(quiet=True), "store_faults") as view:
            daemon = Timed(session, Mailbox(), view)
            daemon.begin(arguments.segments, proxy)
            daemon.run()
        run.release()
        proxy.kill()
    median = {mode: statistics.median(times) for mode, times in daemon.times.items()}
    healthy = daemon.times["healthy"]
    result = {
        "config": str(arguments.config),
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "device": str(session.learner.device),
        "segments_each": len(healthy),
        "median_10_steps_s": {mode: round(value, 4) for mode, value in median.items()},
        "quartiles_10_steps_s": {
            mode: [round(q, 4) for q in statistics.quantiles(times, n=4)] for mode, times in daemon.times.items()
        },
        "throughput_ratio_to_healthy": {mode: round(median["healthy"] / median[mode], 4) for mode in MODES[1:]},
        # The same comparison among segments that do the same thing: what a ratio is worth.
        "ratio_of_healthy_halves": round(statistics.median(healthy[1::2]) / statistics.median(healthy[::2]), 4),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
