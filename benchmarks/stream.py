"""How fast the stream feeds a trainer: ours, mosaicml-streaming, LitData and Hugging Face `datasets` streaming.

The same documents, the same tokenizer, the same batches (16 windows of 1,024 tokens and the target after each), on two
cores: as zstd-compressed JSON Lines, as Parquet text, and tokenized already. Ours delivers the position with every
batch, shuffles in blocks and keeps a hold-out back; the peers do nothing of that. Each contender is a process tree of
its own, frozen but for its turns; the turns of a round follow one another, and the order changes from round to round.

1. Setting: every peer tries its numbers of workers, for a turn each after a warm-up; the fastest is measured.
2. Speed: rounds; the bars are medians of the ratios within a round.
3. Memory: every contender once more, alone: the peak of the proportional set sizes of its processes, summed.

    .venv/bin/pip install --no-deps -r benchmarks/peers.txt     the peers; those that are missing are left out
    .venv/bin/python benchmarks/stream.py                       about ten minutes on two quiet cores, 1.2 GB on disk
    .venv/bin/python benchmarks/stream.py --quick               a small corpus and three short rounds
    .venv/bin/python benchmarks/stream.py --table               the tables again, from the file

The corpus is kept in the cache folder for the next time (`--cache`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from chosen import names
from rich.console import Console
from throughput import report
from throughput.corpus import BATCH_SIZE, FULL, QUICK, SEQUENCE_LENGTH, Corpus
from throughput.field import CONTENDERS, KINDS
from throughput.ours import BLOCK_SEQUENCES
from throughput.peers import Setting
from throughput.tree import Runner

CORES: Final = 2
BLOCK_BATCHES: Final = BLOCK_SEQUENCES // BATCH_SIZE
BLOCKS_A_TURN: Final = {"zst": 2, "parquet": 2, "bin": 16, "jsonl": 2}
PACKAGES: Final = ("torch", "numpy", "tokenizers", "pyarrow", "zstandard", "mosaicml-streaming", "litdata", "datasets")


class Benchmark:
    """One run; writes the file whenever a kind of data is through."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path, told: Callable[[str], None]) -> None:
        self.arguments, self.scratch, self.told = arguments, scratch, told
        self.corpus = Corpus(arguments.cache, QUICK if arguments.quick else FULL, told)
        self.result: dict[str, Any] = {"machine": machine(), "rounds": arguments.rounds, "kinds": {}}
        self.absent = dict(absent())
        self._count = 0

    def run(self) -> dict[str, Any]:
        keys = [key for key in CONTENDERS if key not in self.absent and key in (self.arguments.only or CONTENDERS)]
        self.corpus.make({CONTENDERS[key].sets[kind] for key in keys for kind in self.arguments.kinds})
        self.result["corpus"] = self.corpus.facts()
        for kind in self.arguments.kinds:
            self.result["kinds"][kind] = self._kind(kind, keys)
            if not self.arguments.quick:
                self.arguments.json.parent.mkdir(parents=True, exist_ok=True)
                self.arguments.json.write_text(json.dumps(self.result, indent=2) + "\n")
        return self.result

    def _kind(self, kind: str, keys: Iterable[str]) -> dict[str, Any]:
        """Setting, speed and memory of every contender on one kind of data."""
        batches = BLOCK_BATCHES * (1 if self.arguments.quick else BLOCKS_A_TURN[kind])
        found: dict[str, Any] = {key: {"status": "unavailable", "reason": why} for key, why in self.absent.items()}
        chosen: dict[str, Setting] = {}
        for key in keys:
            try:
                chosen[key], tried = self._tried(key, kind, batches)
            except RuntimeError as error:
                found[key] = {"status": "failed", "reason": str(error)}
                continue
            found[key] = {"status": "measured", "title": CONTENDERS[key].title, "tried": tried}
            found[key]["setting"] = chosen[key].told
        turns = self._rounds(kind, chosen, batches)
        for key in chosen:
            found[key] |= figures(turns, key)
            self.told(f"{KINDS.get(kind, kind)}: memory of {CONTENDERS[key].title}")
            with self._runner(key, kind, chosen[key]) as runner:
                found[key]["peak_bytes"] = runner.peak_bytes(2, batches)
        return {"batches_a_turn": batches, "contenders": found}

    def _tried(self, key: str, kind: str, batches: int) -> tuple[Setting, dict[str, float]]:
        """The fastest of a contender's settings, and the tokens a second of each."""
        rates: dict[Setting, float] = {}
        for setting in CONTENDERS[key].settings(kind):
            self.told(f"{KINDS.get(kind, kind)}: {CONTENDERS[key].title} with {setting.told}")
            with self._runner(key, kind, setting) as runner:
                runner.turn(max(1, batches // 8))
                rates[setting] = rate(runner.turn(batches))
        return max(rates, key=rates.__getitem__), {setting.told: round(r) for setting, r in rates.items()}

    def _rounds(self, kind: str, chosen: dict[str, Setting], batches: int) -> list[dict[str, dict[str, Any]]]:
        """What each turn took, by round and contender; everybody's first turn is a warm-up."""
        runners = {key: self._runner(key, kind, setting) for key, setting in chosen.items()}
        rounds: list[dict[str, dict[str, Any]]] = []
        try:
            for number in range(self.arguments.rounds + 1):
                self.told(f"{KINDS.get(kind, kind)}: round {number} of {self.arguments.rounds}")
                order = list(runners)
                turn = number % len(order)
                order = order[turn:] + order[:turn]
                rounds.append({key: runners[key].turn(batches) for key in (order[::-1] if number % 2 else order)})
        finally:
            for runner in runners.values():
                runner.close()
        return rounds[1:]

    def _runner(self, key: str, kind: str, setting: Setting) -> Runner:
        self._count += 1
        return Runner(key, kind, setting, self.corpus.folder, self.scratch / f"{self._count}-{key}")


def rate(turn: dict[str, Any]) -> float:
    """Tokens a second."""
    return float(turn["tokens"] / turn["seconds"])


def figures(rounds: list[dict[str, dict[str, Any]]], key: str) -> dict[str, Any]:
    """Tokens a second, tokens a CPU second (of rounds without a new pass), and the ratio to every other."""
    mine = [turns[key] for turns in rounds]
    found: dict[str, Any] = {
        "tokens_per_s": spread([rate(turn) for turn in mine], 0),
        "tokens_per_cpu_s": round(statistics.median(t["tokens"] / max(t["cpu_s"], 0.01) for t in mine)),
        "times_as_fast_as": {
            other: spread([rate(turns[key]) / rate(turns[other]) for turns in rounds], 3)
            for other in rounds[0]
            if other != key
        },
    }
    return found


def spread(values: list[float], digits: int) -> dict[str, Any]:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": round(median, digits), "quartiles": [round(low, digits), round(high, digits)]}


def absent() -> Iterable[tuple[str, str]]:
    """Contenders that cannot take part, and why."""
    for key, contender in CONTENDERS.items():
        if contender.package is not None and _version(contender.package) is None:
            yield key, f"{contender.package} is not installed: pip install --no-deps -r benchmarks/peers.txt"


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "batch": [BATCH_SIZE, SEQUENCE_LENGTH + 1],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def parsed() -> argparse.Namespace:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "anytimed-benchmarks"
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="a small corpus, three short rounds, no file")
    parser.add_argument("--rounds", type=int, help="measured rounds of each kind; 9")
    parser.add_argument("--kinds", type=names((*KINDS, "jsonl")), default=list(KINDS), help=", ".join(KINDS))
    parser.add_argument("--only", type=names(CONTENDERS), help="contenders: " + ", ".join(CONTENDERS))
    parser.add_argument("--cache", type=Path, default=cache, help="where the corpus is kept")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/stream.json"))
    parser.add_argument("--table", action="store_true", help="print the tables from the JSON; measure nothing")
    parser.add_argument("--assert", dest="insist", action="store_true", help="exit with 1 where a bar is missed")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 9)
    return arguments


def main() -> int:
    arguments = parsed()
    out = Console() if sys.stdout.isatty() else Console(width=120)
    if arguments.table:
        result = json.loads(arguments.json.read_text())
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or frozen processes would stay behind
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
        errors = Console(stderr=True, highlight=False)
        with tempfile.TemporaryDirectory(prefix="stream-bench-") as scratch:
            result = Benchmark(arguments, Path(scratch), errors.print).run()
    for table in report.tables(result):
        out.print(table)
    bars = report.bars(result)
    for bar in bars:
        out.print(bar.told, highlight=False)
    return int(arguments.insist and any(bar.ok is False for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
