"""Extending the stream without retuning: what steered memory is worth, and what a source added late costs.

The daemon itself trains, on one thread, a byte model of half a million parameters (a toy, but a real run): see
`extension/runs.py`. All of it with one set of hyperparameters.

    stationary   2,000 steps of Python sources: how often does steering fire, with SF-NorMuon and with AMUSE, and what
                 does that cost?
    switch       C++ headers alone from step 1,000 on, as if 100,000 steps had gone before: plain averaging, steered
                 memory, a window that fits; and with the short history that it is
    extend       C++ headers added to the Python sources at step 1,000, next to a run that had both from the start

    .venv/bin/python benchmarks/extend.py                  about half an hour on two cores; finished runs are kept
    .venv/bin/python benchmarks/extend.py --quick          a smaller model, 200 steps: does it work at all?
    .venv/bin/python benchmarks/extend.py --seeds 3        the decisive comparison again with other seeds
    .venv/bin/python benchmarks/extend.py --report         tables and picture from the JSON; trains nothing

Every run is a process of its own (with --quick they share one). Its curve is kept under .anytimed/extend/ and taken
from there where plan, texts, torch and Python are the same. Needs no network; texts are what Python and torch bring
(`extension/corpora.py`).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from extension import picture, report
from extension.corpora import SOURCES, Corpus, gather
from extension.plans import FULL, QUICK, Plan, Scale, plans, tables
from extension.runs import run_directory, train
from rich.console import Console

from anytimed.contracts import Json


@functools.cache
def corpora_of(scale: Scale, scratch: Path) -> dict[str, Corpus]:
    """The texts, written where they are not yet."""
    return {
        name: gather(name, scratch / "corpora", stream_bytes=scale.stream_bytes, probe_bytes=scale.probe_bytes)
        for name in SOURCES
    }


def key_of(plan: Plan, scale: Scale, corpora: dict[str, Corpus]) -> str:
    """What a kept curve has to have come from."""
    texts = {name: corpus.digest for name, corpus in corpora.items()}
    made = [plan.told(), tables(plan, scale, texts, "", ""), repr(scale), torch.__version__, platform.python_version()]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def kept(plan: Plan, scale: Scale, corpora: dict[str, Corpus], scratch: Path) -> Json | None:
    """The curve of an earlier run of the same plan, if what others go on from is there as well."""
    try:
        found: Json = json.loads(_curve(plan, scratch).read_text())
    except (OSError, ValueError):
        return None
    if found["key"] != key_of(plan, scale, corpora) or not run_directory(scratch, plan.name).exists():
        return None
    return found


def _curve(plan: Plan, scratch: Path) -> Path:
    return scratch / "curves" / f"{plan.name.replace('/', '-')}.json"


def one(plan: Plan, scale: Scale, scratch: Path) -> None:
    """Train one plan in this process and keep its curve."""
    corpora = corpora_of(scale, scratch)
    found = {"key": key_of(plan, scale, corpora), **train(plan, scale, corpora, scratch)}
    path = _curve(plan, scratch)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))


def all_of(arguments: argparse.Namespace, scale: Scale, scratch: Path) -> dict[str, Json]:
    """Every run's curve by its name; `jobs` at a time, those that others go on from first."""
    corpora = corpora_of(scale, scratch)
    wanted = [plan for seed in range(1, arguments.seeds + 1) for plan in plans(scale, seed)]
    if arguments.kept:
        found = {plan.name: kept(plan, scale, corpora, scratch) for plan in wanted}
        return {name: curve for name, curve in found.items() if curve is not None}
    again: set[str] = set()

    def run(plan: Plan) -> None:
        if plan.start not in again and kept(plan, scale, corpora, scratch) is not None:
            return
        again.add(plan.name)
        if arguments.quick:  # a process takes longer to start than these take to train
            one(plan, scale, scratch)
            return
        command = [sys.executable, __file__, "--one", plan.name, "--scratch", str(arguments.scratch)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        found = kept(plan, scale, corpora, scratch)
        if done.returncode or found is None:
            raise SystemExit(f"{plan.name}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        print(f"{plan.name}: to step {found['end']} in {found['seconds']:.0f} s", file=sys.stderr, flush=True)

    if arguments.quick:
        for plan in wanted:
            run(plan)
    else:
        trunks = [plan for plan in wanted if plan.start is None]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for some in (trunks, [plan for plan in wanted if plan.start is not None]):
                list(pool.map(run, some))
    curves = {plan.name: kept(plan, scale, corpora, scratch) for plan in wanted}
    return {name: curve for name, curve in curves.items() if curve is not None}


def result_of(curves: dict[str, Json], scale: Scale, scratch: Path) -> Json:
    """Everything that is shown, without what only this machine's files are."""
    texts = {
        name: {"sha256": corpus.digest, "stream_bytes": corpus.size, "probe_documents": len(corpus.probe)}
        for name, corpus in corpora_of(scale, scratch).items()
    }
    plain = {name: {k: v for k, v in curve.items() if k not in ("key", "plan")} for name, curve in curves.items()}
    return {
        "scale": scale.name,
        "trunk_steps": scale.trunk,
        "machine": {"cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()},
        "texts": texts,
        **report.figures(plain, scale),
        "runs": plain,
    }


def as_text(result: Json) -> str:
    """JSON with every point of a curve on one line."""
    text = json.dumps(result, indent=1)
    return re.sub(r"\{[^{}]*?(\{[^{}]*\}[^{}]*?)?\}", lambda m: _line(m.group()), text) + "\n"


def _line(text: str) -> str:
    joined = re.sub(r"\s*\n\s*", " ", text)
    return joined.replace("{ ", "{").replace(" }", "}").replace("[ ", "[").replace(" ]", "]")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model and 200 steps: whether it works")
    parser.add_argument("--seeds", type=int, default=1, help="of the switch after a long history")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a thread each")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/extend.json"))
    parser.add_argument("--svg", type=Path, help="default: beside the JSON")
    parser.add_argument(
        "--scratch", type=Path, default=Path(".anytimed/extend"), help="run directories and kept curves"
    )
    parser.add_argument("--kept", action="store_true", help="of the runs those that were made; trains nothing")
    parser.add_argument("--report", action="store_true", help="tables and picture from the JSON; trains nothing")
    parser.add_argument("--assert", dest="insist", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not 1 <= arguments.seeds <= 9:
        parser.error("--seeds: 1 to 9")
    return arguments


def main() -> int:
    arguments = parsed()
    scale = QUICK if arguments.quick else FULL
    scratch: Path = (arguments.scratch / scale.name).absolute()
    if arguments.one:
        seed = int(arguments.one.rpartition("@")[2])
        one(next(plan for plan in plans(scale, seed) if plan.name == arguments.one), scale, scratch)
        return 0
    if arguments.report:
        result: dict[str, Any] = json.loads(arguments.json.read_text())
    else:
        result = result_of(all_of(arguments, scale, scratch), scale, scratch)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(as_text(result), encoding="utf-8")
    svg = arguments.svg or arguments.json.with_suffix(".svg")
    if result["runs"].keys() >= picture.NEEDED:
        svg.write_text(picture.drawn(result), encoding="utf-8")
    else:
        print(f"no picture without {', '.join(sorted(picture.NEEDED - result['runs'].keys()))}", file=sys.stderr)
    out = Console() if sys.stdout.isatty() else Console(width=120)
    for table in report.tables(result):
        out.print(table)
    missed = [bar for bar in result["bars"] if not bar["ok"]]
    if arguments.insist and missed:
        for bar in missed:
            print(f"missed: {bar['name']}: {bar['figure']}, expected {bar['expected']}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
