"""What a long stream costs: the start, a batch and a step of a run that has read 10, 10,000 and 1,000,000 shards.

The shards are local text files of 64 to 200 bytes in nested folders of at most 1,000; the daemon's own pipeline has
read each of them once, with its journal and its fold file, and a position was kept as a commit keeps it. Behind them
lie new shards, the same for every length.

1. Start: a process of its own opens the journal, restores the pipeline at the position, polls, and makes the first
   batch of new data; before and after it, the same process lists the same files barely: `os.scandir`, and `stat` of
   each. Repeated, in turns between the lengths; medians. What counts is the start less the mean of the two listings.
2. Batches and steps: a process for every length, all alive, in turns: batches out of the reader's queue, then steps of
   a tiny model on such batches. Medians of the ratios within a round, to the shortest history. The bar is on the step;
   the batch alone, some 25 µs, is told beside it: between two processes that do the same it differs by 5 to 10 %.
3. Beside a poll: steps while all files are listed again. They share an interpreter with it, so this is not free; it
   happens once every `[data] discover` (10 s, if nothing else is said).

    .venv/bin/python benchmarks/stream_growth.py            about ten minutes, 5 GB and a million files in /dev/shm
    .venv/bin/python benchmarks/stream_growth.py --quick    10 and 3,000 shards: whether it works
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from growth import history
from rich.console import Console
from rich.table import Table

from anytimed.contracts import Json

STEP_BAR, START_BAR_S = 1.02, 2.0
BATCHES, STEPS = 1024, 50
"""Of a turn; so many batches are four blocks."""
LONGEST_HISTORY_BYTES = 8 << 30
"""What a million shards, of a page each, and what is known of them come to at most."""


def command(role: str, config: Path) -> list[str]:
    return [sys.executable, "-m", "growth.measuring", role, str(config)]


def environment() -> dict[str, str]:
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}


def measured(role: str, config: Path) -> Json:
    done = subprocess.run(command(role, config), env=environment(), stdout=subprocess.PIPE, text=True, check=True)
    told: Json = json.loads(done.stdout)
    return told


class Standing:
    """A process that has started behind a history and waits for its turns."""

    def __init__(self, config: Path) -> None:
        self._process = subprocess.Popen(
            command("turns", config), env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.memory = self._answer()

    def turn(self, what: str, count: int | None = None) -> Json:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {count}\n" if count else f"{what}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Json:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with {self._process.wait()}")
        told: Json = json.loads(line)
        return told


def made(scratch: Path, count: int) -> tuple[Path, Json]:
    """Configuration and facts of a run that has read `count` shards, with new data behind them."""
    print(f"{count} shards: writing and reading them", file=sys.stderr, flush=True)
    config = history.configured(scratch / str(count))
    size = history.write_shards(config.parent, count)
    told = {"shards": count, "bytes": size, **measured("history", config)}
    history.write_new(config.parent)
    return config, told


def starts(configs: Sequence[Path], repeats: int) -> list[Json]:
    """Per configuration the medians of its starts. Each finds the run as the history left it."""
    found: list[list[Json]] = [[] for _ in configs]
    for config in configs:
        shutil.copytree(config.parent / "run", config.parent / "kept")
    for number in range(repeats):
        print(f"start {number + 1} of {repeats}", file=sys.stderr, flush=True)
        for config, results in zip(configs, found, strict=True):
            results.append(measured("start", config))
            shutil.rmtree(config.parent / "run")
            shutil.copytree(config.parent / "kept", config.parent / "run")
    return [start_figures(results) for results in found]


def start_figures(results: Sequence[Json]) -> Json:
    told: Json = {}
    for kind in ("wall", "cpu"):
        times = [result[kind] for result in results]
        medians = {f"{key}_s": round(statistics.median(each[key] for each in times), 4) for key in times[0]}
        over = [each["start"] - (each["listing_before"] + each["listing_after"]) / 2 for each in times]
        told[kind] = {**medians, "over_listing_s": round(statistics.median(over), 4)}
        told[kind]["over_listing_each_s"] = [round(each, 3) for each in over]
    told["rss_bytes"] = int(statistics.median(result["rss"] - result["rss_before"] for result in results))
    told["rss_peak_bytes"] = int(statistics.median(result["rss_peak"] - result["rss_before"] for result in results))
    return told


def turns(configs: Sequence[Path], rounds: int, polls: int) -> list[Json]:
    """Per configuration what a batch and a step take, and steps beside a poll."""
    standing = [Standing(config) for config in configs]
    took: dict[str, list[list[Json]]] = {what: [[] for _ in configs] for what in ("batches", "steps")}
    try:
        for number in range(rounds + 1):  # the first warms up
            print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
            for what, count in (("batches", BATCHES), ("steps", STEPS)):
                order = list(enumerate(standing))
                order = order[number % len(order) :] + order[: number % len(order)]
                for i, process in order if number % 2 else reversed(order):
                    seconds = {key: value / count for key, value in process.turn(what, count).items()}
                    if number:
                        took[what][i].append(seconds)
        beside = [[process.turn("poll") for _ in range(polls)] for process in standing]
        memory = [process.memory for process in standing]
    finally:
        for process in standing:
            process.close()
    found = []
    for i in range(len(configs)):
        told: Json = {"rss_bytes": memory[i]["VmRSS"], "rss_peak_bytes": memory[i]["VmHWM"]}
        for what, name in (("batches", "batch"), ("steps", "step")):
            told[name] = {}
            for key, prefix in (("s", ""), ("cpu_s", "cpu_")):
                ratios = [mine[key] / first[key] for mine, first in zip(took[what][i], took[what][0], strict=True)]
                median = statistics.median(each[key] for each in took[what][i])
                told[name][f"{prefix}median_ms"] = round(1e3 * median, 4)
                told[name][f"{prefix}ratio"] = round(statistics.median(ratios), 4)
                told[name][f"{prefix}quartiles"] = [round(q, 4) for q in statistics.quantiles(ratios, n=4)]
        step_s = statistics.median(each["s"] for each in took["steps"][i])
        lost = [poll["s"] - poll["steps"] * step_s for poll in beside[i]]
        told["poll_s"] = round(statistics.median(poll["s"] for poll in beside[i]), 4)
        told["steps_beside_a_poll"] = statistics.median(poll["steps"] for poll in beside[i])
        told["lost_to_a_poll_s"] = round(statistics.median(lost), 4)
        found.append(told)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="two short histories, few rounds: whether it works")
    parser.add_argument("--rounds", type=int, default=30, help="turns of every process")
    parser.add_argument("--starts", type=int, default=5, help="starts after each history")
    parser.add_argument("--scratch", type=Path, help="a folder with 8 GB and 1.1 million inodes free; else /dev/shm")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/stream_growth.json"))
    arguments = parser.parse_args()
    counts = [10, 3_000] if arguments.quick else [10, 10_000, 1_000_000]
    rounds, repeats, polls = (2, 2, 1) if arguments.quick else (arguments.rounds, arguments.starts, 3)
    result: Json = {
        "machine": {
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "load_before": round(os.getloadavg()[0], 2),
        },
        "bars": {"step_ratio": STEP_BAR, "start_over_listing_s": START_BAR_S},
        "starts": repeats,
        "rounds": rounds,
        "histories": [],
    }
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stream-growth-", dir=arguments.scratch or roomy(max(counts))) as scratch:
        histories = [made(Path(scratch), count) for count in counts]
        configs = [config for config, _ in histories]
        started = starts(configs, repeats)
        for count, start in zip(counts, started, strict=True):
            over, listing = start["wall"]["over_listing_s"], start["wall"]["listing_before_s"]
            print(f"{count} shards: a start takes {over} s over a listing of {listing} s", file=sys.stderr, flush=True)
        stood = turns(configs, rounds, polls)
        for (_, told), start, standing in zip(histories, started, stood, strict=True):
            result["histories"].append({**told, "start": start, **standing})
        print("deleting the shards", file=sys.stderr, flush=True)
    result["machine"]["load_after"] = round(os.getloadavg()[0], 2)
    result["took_s"] = round(time.monotonic() - began)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    report(result)
    if not arguments.quick:
        judge(result["histories"][-1])


def roomy(count: int) -> str | None:
    """Memory, where a million files fit there: the disk is not what is measured."""
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free > LONGEST_HISTORY_BYTES * count // 1_000_000 + (1 << 28):
        return str(shared)
    return None


def judge(longest: Json) -> None:
    worst = longest["step"]["ratio"]
    if worst > STEP_BAR:
        sys.exit(f"a step takes {worst} times as long after {longest['shards']} shards; allowed {STEP_BAR}")
    over = longest["start"]["wall"]["over_listing_s"]
    if over > START_BAR_S:
        sys.exit(f"a start takes {over} s longer than listing {longest['shards']} files; allowed {START_BAR_S}")


def report(result: Json) -> None:
    """The figures as tables."""
    table = Table(
        "shards", "listing", "start", "over it", "CPU", "journal", "restore", "poll", "batch", "memory", "peak"
    )
    for found in result["histories"]:
        start, wall = found["start"], found["start"]["wall"]
        table.add_row(
            f"{found['shards']:,}",
            f"{(wall['listing_before_s'] + wall['listing_after_s']) / 2:.3f} s",
            *(f"{wall[key]:.3f} s" for key in ("start_s", "over_listing_s")),
            f"{start['cpu']['over_listing_s']:.3f} s",
            *(f"{wall[f'{key}_s']:.3f} s" for key in ("journal", "restore", "poll", "first_batch")),
            *(f"{start[key] / 1e6:.0f} MB" for key in ("rss_bytes", "rss_peak_bytes")),
        )
    console = Console(width=max(120, Console().width))
    console.print(table)
    timed = ("a batch, ms", "ratio", "CPU", "a step, ms", "ratio", "CPU", "a poll", "lost to it")
    table = Table("shards", *timed, "position", "journal", "fold")
    for found in result["histories"]:
        table.add_row(
            f"{found['shards']:,}",
            *(f"{found[key][what]:.3f}" for key in ("batch", "step") for what in ("median_ms", "ratio", "cpu_ratio")),
            *(f"{found[key]:.3f} s" for key in ("poll_s", "lost_to_a_poll_s")),
            f"{found['position_bytes']} B",
            *(f"{found[key] / 1e6:.1f} MB" for key in ("journal_bytes", "fold_bytes")),
        )
    console.print(table)


if __name__ == "__main__":
    main()
