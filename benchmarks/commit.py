"""What a commit costs, and how soon a run goes on after a start.

Three measurements, for the quickstart model and a larger one of 27 M parameters, with the daemon's own parts:

1. Bytes: commits are written by themselves, and what the kernel says this process has written (/proc/self/io: handed
   to write calls, and sent to the disk where that is counted) and the sizes of the files are set against the bytes of
   the state's tensors.
2. Stall: the daemon's own loop; every few steps one begins a commit. How long the loop stands still for it, next to a
   plain step and to the copy of the state alone, which is timed at other steps of the same run.
3. Resume: `anytimed run` from the start of the process to the end of its first step, every digest checked, next to a
   bare script that imports torch and loads the same tensors; the two take turns.

    .venv/bin/python benchmarks/commit.py [--quick] [--rounds 20] [--resumes 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from quiet import NEVER
from rich.console import Console
from rich.table import Table

from anytimed.config import Config, load
from anytimed.contracts import Batch, Json
from anytimed.service.console import View
from anytimed.service.loop import Daemon
from anytimed.service.recovery import recover
from anytimed.service.requests import Mailbox
from anytimed.storage.run_directory import RunDirectory

BYTES_BAR = 1.02
ROUND = 6
"""Steps of a round: the first begins a commit, the fourth copies the state for comparison, the others are plain."""

BARE = """
import sys, time
import torch
from safetensors.torch import load_file
tensors = [tensor.clone() for file in sys.argv[1:] for tensor in load_file(file).values()]  # read, not only mapped
print(time.time())
"""

LARGE: dict[str, Any] = {
    "model": {"hidden_size": 512, "layers": 8, "heads": 8, "intermediate_size": 1536},
    "data": {"sequence_length": 128, "batch_size": 4},
}
SMALL: dict[str, Any] = {
    "model": {"hidden_size": 64, "layers": 2, "heads": 2, "intermediate_size": 128},
    "data": {"sequence_length": 64, "batch_size": 4},
}


class Timed(Daemon):
    """The daemon, with a clock around every step and a commit at the start of every round."""

    def begin(self, rounds: int) -> None:
        self.rounds, self.in_round = rounds + 1, 0  # the first warms up
        self.plain: list[float] = []
        self.beside: list[float] = []
        self.stalls: list[float] = []
        self.copies: list[float] = []

    def _step(self, batch: Batch) -> None:
        began = time.perf_counter()
        super()._step(batch)
        self._report()  # waits for the device, as a commit does
        stepped = time.perf_counter()
        committing = self._saving._committer.busy
        if self.in_round == 0:
            self._saving.begin()
            self.stalls.append(time.perf_counter() - stepped)
        else:
            (self.beside if committing else self.plain).append(stepped - began)
        if self.in_round == ROUND // 2:
            before = time.perf_counter()
            state = self._steering.state()
            self._session.snapshot(self._trained.position, self._board.evaluation, self._parent, state).wait()
            self.copies.append(time.perf_counter() - before)
        self.in_round += 1
        if self.in_round == ROUND:
            self._saving._committer.wait()
            self._drain()
            self.in_round, self.rounds = 0, self.rounds - 1
            if not self.rounds:
                self._limit = self._learner.step_count


def configured(path: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """The configuration with `changes`, in a scratch folder, without anything that is not measured here; as TOML."""
    tables = {
        **changes,
        "run": {"directory": str(folder / "run")},
        "exports": {"url": str(folder / "published"), "every_s": 86_400.0},
        "commits": {"every_s": 86_400.0, "keep": 2},
        "evaluation": {"every_steps": NEVER},
        "logging": {"every_steps": NEVER},
        "data.discover": {"every_s": 86_400.0},
    }
    return based_on(path, folder / "config.toml", tables, without=["exports", "commits"])


def based_on(path: Path, written: Path, tables: dict[str, dict[str, Any]], without: Sequence[str] = ()) -> Path:
    """A configuration file that takes from another what it does not say itself."""
    lines = [f"based_on = {json.dumps(str(path.absolute()))}", f"without = {json.dumps(list(without))}"]
    for name, values in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    written.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return written


def written_bytes() -> dict[str, int]:
    """What this process has written so far, as the kernel counts it."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    counts = {name: int(count) for name, _, count in (line.partition(": ") for line in lines)}
    return {"handed to write": counts["wchar"], "sent to the disk": counts["write_bytes"]}


def training(config: Config, rounds: int) -> Json:
    """Bytes and stall, in this process."""
    with RunDirectory(Path(config.run.directory)) as run:
        run.acquire()
        session = recover(config, run)
        with View(Console(quiet=True), "commit") as view:
            daemon = Timed(session, Mailbox(), view)
            daemon.begin(rounds)
            daemon.run()
        snapshot = session.snapshot(daemon._trained.position, None, None, daemon._steering.state())
        state = sum(tensor.data.nbytes for tensor in snapshot.tensors.values())
        before = written_bytes()
        commits = [session.commits.write(snapshot) for _ in range(3)]
        after = written_bytes()
        files = sum(path.stat().st_size for commit in commits for path in commit.path.iterdir())
    ratios = {name: round((after[name] - before[name]) / len(commits) / state, 4) for name in before}
    # The first of each warms up: buffers, a page cache that is not there yet.
    plain, stall, copy = (statistics.median(times[1:]) for times in (daemon.plain, daemon.stalls, daemon.copies))
    beside = statistics.median(daemon.beside) if daemon.beside else None
    return {
        "parameters": sum(p.numel() for p in session.learner.module.parameters()),
        "device": str(session.learner.device),
        "state_bytes": state,
        "bytes_written_over_state": {"files": round(files / len(commits) / state, 4), **ratios},
        "rounds": rounds,
        "median_step_ms": round(1e3 * plain, 2),
        "median_step_beside_a_commit_ms": round(1e3 * beside, 2) if beside is not None else None,
        "median_stall_ms": round(1e3 * stall, 2),
        "quartiles_stall_ms": [round(1e3 * q, 2) for q in statistics.quantiles(daemon.stalls[1:], n=4)],
        "median_copy_ms": round(1e3 * copy, 2),
        "stall_over_step_plus_copy": round(stall / (plain + copy), 4),
    }


def resume(config: Path, repeats: int) -> Json:
    """Seconds from the start of a process to its first step, and to all tensors loaded in a bare script."""
    folder = Path(load(config).run.directory)
    ours, bare = [], []
    each_step = based_on(config, config.with_name("resume.toml"), {"logging": {"every_steps": 1}})
    for _ in range(repeats):
        newest = max(path for path in (folder / "commits").iterdir() if not path.name.startswith("."))
        files = sorted(map(str, newest.glob("rank-*")))
        began = time.time()
        told = subprocess.run([sys.executable, "-c", BARE, *files], capture_output=True, text=True, check=True)
        bare.append(float(told.stdout) - began)
        steps = int(newest.name.rpartition("-")[2]) + 1
        began = time.time()
        command = [sys.executable, "-m", "anytimed.cli", "run", str(each_step), "--steps", str(steps)]
        subprocess.run(command, capture_output=True, text=True, check=True)
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        taken = [line["time"] for line in map(json.loads, lines) if line["kind"] == "step" and line["time"] > began]
        ours.append(taken[0] - began)
    return {
        "repeats": repeats,
        "median_to_first_step_s": round(statistics.median(ours), 3),
        "median_bare_load_s": round(statistics.median(bare), 3),
        "ratio": round(statistics.median(ours) / statistics.median(bare), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="one small model, few rounds: whether it works")
    parser.add_argument("--rounds", type=int, default=20, help=f"commits a model, one every {ROUND} steps")
    parser.add_argument("--resumes", type=int, default=5, help="starts a model, in turns with the bare script")
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.toml"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/commit.json"))
    arguments = parser.parse_args()
    rounds, resumes = (3, 1) if arguments.quick else (arguments.rounds, arguments.resumes)
    models = {"small": SMALL} if arguments.quick else {"quickstart": dict[str, Any](), "27 M": LARGE}
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    result: Json = {"machine": machine}
    for name, changes in models.items():
        with tempfile.TemporaryDirectory(prefix="commit-") as scratch:
            path = configured(arguments.config, Path(scratch), changes)
            own = max(3, rounds // 4) if changes is LARGE else rounds  # its steps take seconds on a CPU
            print(f"{name}: {own} commits, {resumes} starts", file=sys.stderr, flush=True)
            result[name] = {**training(load(path), own), "resume": resume(path, resumes)}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    report(result)
    worst = max(max(found["bytes_written_over_state"].values()) for name, found in result.items() if name in models)
    if worst > BYTES_BAR and not arguments.quick:  # names and rounding to pages weigh on a state of a megabyte
        sys.exit(f"{worst} bytes written for a byte of state; expected {BYTES_BAR} at most")


def report(result: Json) -> None:
    """The figures as a table."""
    table = Table("model", "state", "written / state", "step", "stall", "copy", "to first step", "bare load", "ratio")
    for name, found in result.items():
        if name == "machine":
            continue
        written, going = found["bytes_written_over_state"], found["resume"]
        table.add_row(
            name,
            f"{found['state_bytes'] / 1e6:.1f} MB",
            " ".join(f"{ratio:.3f}" for ratio in written.values()),
            f"{found['median_step_ms']:.1f} ms",
            f"{found['median_stall_ms']:.1f} ms",
            f"{found['median_copy_ms']:.1f} ms",
            f"{going['median_to_first_step_s']:.2f} s",
            f"{going['median_bare_load_s']:.2f} s",
            f"{going['ratio']:.2f}",
        )
    Console(width=max(120, Console().width)).print(table)


if __name__ == "__main__":
    main()
