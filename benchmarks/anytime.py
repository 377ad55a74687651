"""One configuration, every horizon: is one run, at every moment, as good as a run that was tuned for that moment?

The daemon itself trains a byte model of half a million parameters on the Python standard library's sources. One run
each of SF-NorMuon, AMUSE and Schedule-Free AdamW, with one configuration, is measured at T, 2T, 4T and 8T. Against it
stand, for each of these horizons, AdamW and NorMuon under a cosine and Muon under warmup-stable-decay
(`horizons/rivals.py`), which know when they end, each with the learning rate that is best for just that horizon
(`horizons/tuning.py`).

    .venv/bin/python benchmarks/anytime.py            under two hours on two cores; finished runs are kept
    .venv/bin/python benchmarks/anytime.py --quick    a smaller model, two horizons of some steps: does it work at all?
    .venv/bin/python benchmarks/anytime.py --report   table and pictures from the JSON; trains nothing

Every run is a process of its own, one thread each (with --quick they share one). What was seen in it is kept under
.anytimed/anytime/ and taken from there where run, texts, torch and Python are the same. Needs no network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from extension.corpora import Corpus, gather
from horizons import picture, report
from horizons.plans import FULL, ONE_CONFIGURATION, QUICK, RIVALS, Run, Scale, one_run, rival_run, tables
from horizons.runs import train
from horizons.tuning import best_of, tuned
from rich.console import Console

from anytimed.contracts import Json


class Trainer:
    """Trains runs, some at once, and keeps what was seen."""

    def __init__(self, scale: Scale, scratch: Path, jobs: int, *, here: bool) -> None:
        """here: in this process, one after the other; otherwise a process each."""
        self.scale, self._scratch, self._here = scale, scratch, here
        self.corpus = corpus_of(scale, scratch)
        self._pool = ThreadPoolExecutor(1 if here else jobs)
        self._lock = threading.Lock()
        self.found: dict[str, Json] = {}

    def all_of(self, runs: Sequence[Run]) -> list[Json]:
        return list(self._pool.map(self._one, runs))

    def _one(self, run: Run) -> Json:
        found = self._kept(run)
        if found is None:
            if self._here:
                keep(run, self.scale, self.corpus, self._scratch)
            else:
                self._elsewhere(run)
            found = self._kept(run)
            assert found is not None, run.name
            with self._lock:
                told = found["seen"][-1]["x"] if found["seen"] else None
                print(f"{run.name}: {told} in {found['seconds']:.0f} s", file=sys.stderr, flush=True)
        with self._lock:
            self.found[run.name] = found
        return found

    def _elsewhere(self, run: Run) -> None:
        command = [sys.executable, __file__, "--one", json.dumps(run.told()), "--scratch", str(self._scratch.parent)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        if self.scale is QUICK:
            command.append("--quick")
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(f"{run.name}: exit {done.returncode}\n{done.stdout}{done.stderr}")

    def _kept(self, run: Run) -> Json | None:
        try:
            found: Json = json.loads(_file(run, self._scratch).read_text())
        except (OSError, ValueError):
            return None
        return found if found["key"] == key_of(run, self.scale, self.corpus) else None


def corpus_of(scale: Scale, scratch: Path) -> Corpus:
    """The text, written where it is not yet."""
    return gather("python", scratch / "corpora", stream_bytes=scale.stream_bytes, probe_bytes=scale.probe_bytes)


def key_of(run: Run, scale: Scale, corpus: Corpus) -> str:
    """What a kept run has to have come from."""
    made = [run.told(), tables(run, scale, corpus.digest, ""), torch.__version__, platform.python_version()]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def _file(run: Run, scratch: Path) -> Path:
    return scratch / "curves" / f"{re.sub(r'[^A-Za-z0-9._@-]+', '-', run.name)}.json"


def keep(run: Run, scale: Scale, corpus: Corpus, scratch: Path) -> None:
    """Train a run in this process and keep what was seen."""
    path = _file(run, scratch)
    found = {
        "key": key_of(run, scale, corpus),
        **train(run, scale, corpus, scratch / "runs" / f"{path.stem}-{os.getpid()}"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(found))
    beside.replace(path)


def measured(trainer: Trainer) -> Json:
    """Train everything. `one`: what each one run saw, by seed; `rivals`: by kind and horizon the learning rates that
    were tried (first seed), and the best one's losses by seed."""
    scale = trainer.scale
    seeds = range(1, scale.seeds + 1)

    def last(found: Json) -> float | None:
        return found["seen"][-1]["x"] if found["seen"] else None

    def rival(kind: str, horizon: int) -> Json:
        def losses(rates: Sequence[float]) -> list[float | None]:
            return [last(f) for f in trainer.all_of([rival_run(kind, horizon, lr, scale, 1) for lr in rates])]

        tried = tuned(RIVALS[kind].centre, losses)
        best = best_of(tried)
        ends = [last(f) for f in trainer.all_of([rival_run(kind, horizon, best, scale, seed) for seed in seeds])]
        return {"tried": {f"{lr:g}": loss for lr, loss in tried.items()}, "lr": best, "losses": ends}

    def one(kind: str) -> list[Json]:
        found = trainer.all_of([one_run(kind, scale, seed) for seed in seeds])
        return [{name: f[name] for name in ("seen", "forgets", "parameters", "seconds")} for f in found]

    horizons = sorted(scale.horizons, reverse=True)  # the longest first: nothing waits for one at the end
    with ThreadPoolExecutor(64) as asking:
        ones = {kind: asking.submit(one, kind) for kind in ONE_CONFIGURATION}
        rivals = {(kind, h): asking.submit(rival, kind, h) for h in horizons for kind in RIVALS}
        return {
            "one": {kind: asked.result() for kind, asked in ones.items()},
            "rivals": {kind: {str(h): rivals[kind, h].result() for h in scale.horizons} for kind in RIVALS},
        }


def result_of(trainer: Trainer) -> Json:
    scale, corpus = trainer.scale, trainer.corpus
    found = measured(trainer)
    return {
        "scale": scale.name,
        "machine": {"cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()},
        "text": {
            "sha256": corpus.digest,
            "stream_bytes": corpus.size,
            "probe_documents": len(corpus.probe),
            "probe_bytes": sum(len(text.encode()) for text in corpus.probe),
        },
        "tokens_per_step": scale.tokens,
        "horizons": list(scale.horizons),
        "one_configuration": {kind: one_run(kind, scale, 1).optimizer for kind in ONE_CONFIGURATION},
        "table": report.table_of(found, scale),
        **found,
    }


def as_text(result: Json) -> str:
    """JSON with everything that fits on a line on one."""
    text = json.dumps(result, indent=1)
    return re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda m: re.sub(r"\s+", " ", m.group()), text) + "\n"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, two short horizons: whether it works")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a thread each")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/anytime.json"))
    parser.add_argument("--scratch", type=Path, default=Path(".anytimed/anytime"), help="where finished runs are kept")
    parser.add_argument("--report", action="store_true", help="table and pictures from the JSON; trains nothing")
    parser.add_argument("--assert", dest="insist", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parsed()
    scale = QUICK if arguments.quick else FULL
    scratch: Path = (arguments.scratch / scale.name).absolute()
    if arguments.one:
        told: dict[str, Any] = json.loads(arguments.one)
        keep(
            Run(**{**told, "marks": tuple(told["marks"]), "at": tuple(told["at"])}),
            scale,
            corpus_of(scale, scratch),
            scratch,
        )
        return 0
    if arguments.report:
        result: Json = json.loads(arguments.json.read_text())
    else:
        result = result_of(Trainer(scale, scratch, arguments.jobs, here=arguments.quick))
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(as_text(result), encoding="utf-8")
    arguments.json.with_suffix(".svg").write_text(picture.drawn(result), encoding="utf-8")
    out = Console() if sys.stdout.isatty() else Console(width=120)
    for table in report.tables(result):
        out.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
