"""A hundred thousand tiny steps of a real daemon, with everything that an operator does to it: memory and file
descriptors have to stay flat.

A process of its own runs a model of a few thousand parameters; commits and exports by step, evaluations, new files in
its source, reloads that change something, scrapes, event listeners that come and go, pauses, an inbox that is fed. Its
resident memory, open file descriptors and threads are read from /proc once a second. What is told is the slope of a
line through the samples of the second half (Theil-Sen: the median of the slopes between pairs), so a single spike
decides nothing; and the growth in every quarter. The run has a past from the start, or memory would grow towards limits
that are not what is asked about: every source begins with more than is read ahead of it, and metrics.jsonl with half a
year of events, so that its thinning works on as much as it ever does. Still the allocators' arenas grow in the first
half, until every size of piece has its place.

    .venv/bin/python benchmarks/soak.py [--steps 100000] [--assert]
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from anytimed.contracts import Json
from anytimed.service.control import UnixConnection, ask

RESULT = Path(__file__).parent / "results" / "soak.json"
MEMORY_BAR = 0.03
"""Growth over the measured part, as a share of the memory at its beginning."""
DESCRIPTOR_BAR = 1.0
STEADY_FROM = 0.5
QUARTERS = 4
PAST_EVENTS, PAST_S = 40_000, 180 * 86_400
BACKLOG_FILES, BACKLOG_FEEDS = 100, 250
"""Of 14 kB and of 6 kB each: a source is read ahead by about 256 Ki characters."""

CONFIG = """
[run]
directory = "{folder}/run"
threads = 1
device = "cpu"
[model]
type = "llama"
hidden_size = 16
layers = 1
heads = 1
intermediate_size = 32
[tokenizer]
type = "bytes"
[data]
sequence_length = 16
batch_size = 2
shuffle_block_sequences = 256
discover = {{ every_s = 1.0 }}
holdout = {{ fraction = 0.05, max_tokens = 512, record_tokens = 64 }}
[sources.main]
type = "text"
url = "{folder}/data/*.txt"
when_dry = "others"
[sources.again]
type = "text"
url = "{folder}/base/*.txt"
when_dry = "replay"
passes = 1000000
[sources.mine]
type = "inbox"
when_dry = "others"
weight = {weight}
[optimizer]
type = "sf_normuon"
lr = 0.01
warmup_steps = 100
[evaluation]
every_steps = 200
[commits]
every_steps = 100
[exports]
url = "{folder}/published"
every_steps = 100
keep = 5
delete_after_s = 5.0
[logging]
every_steps = {logging}
"""


def write_config(folder: Path, turn: int) -> None:
    beside = folder / ".tmp-config"
    beside.write_text(CONFIG.format(folder=folder, weight=1.0 + turn % 2, logging=1 + turn % 3))
    beside.replace(folder / "config.toml")


def write_text(path: Path, draw: random.Random, words: int) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(" ".join(f"{draw.getrandbits(24):x}" for _ in range(words)))
    beside.replace(path)


def sample(pid: int) -> dict[str, float]:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "rss_mib": int(fields["VmRSS"].split()[0]) / 1024,
        "anonymous_mib": int(fields["RssAnon"].split()[0]) / 1024,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208
        "threads": int(fields["Threads"]),
    }


def growth(steps: list[int], values: list[float]) -> float:
    """By how much the values grow from the first step to the last, by the median slope between pairs."""
    pairs = list(itertools.combinations(range(0, len(steps), max(1, len(steps) // 200)), 2))
    slopes = [(values[b] - values[a]) / (steps[b] - steps[a]) for a, b in pairs if steps[b] > steps[a]]
    return statistics.median(slopes) * (steps[-1] - steps[0]) if slopes else 0.0


def quarters(steps: list[int], values: list[float]) -> list[float]:
    """The growth within each quarter of the steps."""
    found = []
    for i in range(QUARTERS):
        lowest, highest = (steps[-1] * (i + d) / QUARTERS for d in (0, 1))
        chosen = [at for at, step in enumerate(steps) if lowest <= step <= highest]
        found.append(round(growth([steps[at] for at in chosen], [values[at] for at in chosen]), 2) if chosen else 0.0)
    return found


def disturb(
    socket: Path, folder: Path, turn: int, draw: random.Random, done: dict[str, int], without: frozenset[str]
) -> Json:
    """What an operator and their machines do within a second; `without` some of it."""

    def due(what: str, every: int) -> bool:
        return turn % every == 0 and what not in without

    def counted(what: str, route: str, method: str = "POST") -> Json:
        done[what] = done.get(what, 0) + 1
        return ask(socket, method, route, timeout_s=120)

    status = counted("statuses", "/status", "GET")
    connection = UnixConnection(socket, 30)
    connection.request("GET", "/metrics")
    assert b"anytimed_steps_total" in connection.getresponse().read()
    connection.close()
    done["scrapes"] = done.get("scrapes", 0) + 1
    if due("listeners", 2):
        connection = UnixConnection(socket, 30)
        connection.request("GET", "/events")
        connection.getresponse().read(200)
        connection.close()
        done["listeners"] = done.get("listeners", 0) + 1
    if due("files", 3):
        write_text(folder / "data" / f"{turn:07d}.txt", draw, 500)
        done["files"] = done.get("files", 0) + 1
    if due("reloads", 5):
        write_config(folder, turn)
        counted("reloads", "/reload")
    if due("commits", 7):
        counted("commits asked for", "/commit")
    if due("exports", 11):
        counted("exports asked for", "/export")
    if due("pauses", 13):
        counted("pauses", "/pause")
        counted("resumptions", "/resume")
    if due("feeds", 4):
        feed(socket, draw, 5)
        done["feeds"] = done.get("feeds", 0) + 1
    return status


def feed(socket: Path, draw: random.Random, records: int) -> None:
    connection = UnixConnection(socket, 30)
    body = "\n".join(json.dumps({"text": f"{draw.getrandbits(64):x} " * 20}) for _ in range(records))
    connection.request("POST", "/records?source=mine", body, {"Content-Type": "application/jsonl"})
    assert connection.getresponse().read()
    connection.close()


def write_past(run: Path) -> None:
    """Eight megabytes of metrics.jsonl: commits and exports of half a year."""
    run.mkdir(mode=0o700)
    now = time.time()
    with (run / "metrics.jsonl").open("x") as file:
        for number in range(PAST_EVENTS):
            what = ("commit", "export")[number % 2]
            told = f"{what} {number} of an earlier half year, told in as many words as a real one is, with its path"
            event = {"kind": "event", "time": now - PAST_S * (1 - number / PAST_EVENTS), "what": what}
            file.write(json.dumps({**event, "id": f"0-{number + 1}", "told": told, "step": 0, "tokens": 0}) + "\n")


def soak(steps: int, folder: Path, without: frozenset[str] = frozenset()) -> Json:
    draw, done = random.Random(0), {}
    (folder / "data").mkdir()
    (folder / "base").mkdir()
    for number in range(BACKLOG_FILES):
        write_text(folder / "base" / f"{number:04d}.txt", draw, 2000)
        write_text(folder / "data" / f"backlog-{number:04d}.txt", draw, 2000)
    write_config(folder, 0)
    write_past(folder / "run")
    command = [sys.executable, "-m", "anytimed.cli", "run", str(folder / "config.toml"), "--steps", str(steps)]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    began, at, seen = time.monotonic(), [], []
    fed = 0
    try:
        for turn in itertools.count():
            if process.poll() is not None:
                break
            try:
                while fed < BACKLOG_FEEDS:
                    feed(folder / "run" / "control.sock", draw, 18)
                    fed += 1
                status = disturb(folder / "run" / "control.sock", folder, turn, draw, done, without)
                found = sample(process.pid)
            except (OSError, http.client.HTTPException):
                time.sleep(0.5)  # it starts, or it has just ended
                continue
            at.append(status["step"])
            seen.append(found)
            if turn % 30 == 0:
                told = "  ".join(f"{name} {value:,.0f}" for name, value in found.items())
                print(f"step {status['step']:>8,}  {told}", flush=True)
            time.sleep(1.0)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=120)
    if process.returncode != 0:
        raise SystemExit((folder / "log.txt").read_text()[-4000:])
    first = next(i for i, step in enumerate(at) if step >= STEADY_FROM * steps)
    steady, rows = at[first:], seen[first:]
    last = json.loads((folder / "run" / "status.json").read_text())
    return {
        "steps": last["step"],
        "seconds": round(time.monotonic() - began, 1),
        "samples": len(rows),
        "measured_from_step": steady[0],
        "done": dict(sorted(done.items())),
        "degraded": last["degraded"],
        "figures": {
            name: {
                "first": round(rows[0][name], 2),
                "last": round(rows[-1][name], 2),
                "most": round(max(row[name] for row in rows), 2),
                "growth": round(growth(steady, [row[name] for row in rows]), 3),
                "growth_by_quarter": quarters(at, [row[name] for row in seen]),
            }
            for name in rows[0]
        },
        "run_directory_mib": round(
            sum(path.stat().st_size for path in (folder / "run").rglob("*") if path.is_file()) / 2**20, 1
        ),
    }


def problems(found: Json) -> list[str]:
    figures = found["figures"]
    memory, told = figures["rss_mib"], []
    if memory["growth"] > MEMORY_BAR * memory["first"]:
        told.append(f"memory grew by {memory['growth']:.1f} MiB of {memory['first']:.0f}, allowed {MEMORY_BAR:.0%}")
    told += [
        f"{name} grew by {figures[name]['growth']:.1f}, allowed {DESCRIPTOR_BAR}"
        for name in ("descriptors", "threads")
        if figures[name]["growth"] > DESCRIPTOR_BAR
    ]
    if found["degraded"]:
        told.append(f"degraded at the end: {found['degraded']}")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--without", default="", help="what not to do, to find out what costs: reloads,files,feeds,…")
    parser.add_argument("--assert", dest="bars", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="anytimed-soak-") as folder:
        found = soak(asked.steps, Path(folder), frozenset(asked.without.split(",")))
    told = problems(found)
    asked.out.write_text(json.dumps(found, indent=1) + "\n")
    for name, row in found["figures"].items():
        print(
            f"{name:12} first {row['first']:,}  last {row['last']:,}  most {row['most']:,}  growth {row['growth']:+,}"
        )
    print(f"{found['steps']:,} steps in {found['seconds']:,} s; {found['done']}")
    for problem in told:
        print(problem)
    sys.exit(bool(told) and asked.bars)


if __name__ == "__main__":
    main()
