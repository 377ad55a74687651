"""How fast the optimizers step: ours, the same algorithms a matrix at a time, and what PyPI has.

One process, one set of gradients, interleaved rounds. On a CPU at 27.5 M and 0.86 M parameters, with one thread and
with two: wall and CPU time of whole steps, bytes of state, peak memory; our orthogonalisation against torch.bmm, and
the rest of the step against a plain copy of its bytes. On a GPU at 124 M: the share of a real training step as well.

    .venv/bin/pip install --no-deps -r benchmarks/peers.txt        the peers; without them ours and the plain loops run
    .venv/bin/python benchmarks/optimizer.py                       everything that this machine can run
    .venv/bin/python benchmarks/optimizer.py --device cuda         the GPU part alone, into the same file
    .venv/bin/python benchmarks/optimizer.py --table               the README's table, from the file

About ten minutes on two cores, half of them heavyball's compiler. The machine has to be quiet: where something else
has one of two cores, every parallel region waits for a time slice, and a step on two threads takes up to 50 times as
long.

The result is JSON with an entry `cpu` and an entry `cuda`; a run replaces those that it measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from chosen import names
from contest import memory, parts, report
from contest.contenders import CONTENDERS
from contest.field import drop, enter, entries
from contest.machine import machine
from contest.rounds import cpu_timer, cuda_timer, measure
from contest.shapes import SHAPES, Gradients
from contest.training_step import training_part
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

CPU: Final = torch.device("cpu")
QUICK_COPY_BYTES: Final = 2**22


class Benchmark:
    """One run: measures what the arguments ask for, and writes the file whenever a figure has come in."""

    def __init__(self, arguments: argparse.Namespace, told: Callable[[str], None]) -> None:
        self.arguments, self.told = arguments, told
        self.keys = chosen(arguments)
        self.file: Path = arguments.json
        self.result: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def run(self) -> dict[str, Any]:
        device = self.arguments.device
        if device != "cuda":
            self._cpu(self.arguments.shapes or ["27m", "1m"])
        if device == "cpu":
            self.result.setdefault("cuda", {"status": "not run", "reason": "asked for the CPU alone"})
        elif torch.cuda.is_available():
            self._cuda((self.arguments.shapes or ["124m"])[0])
        elif self.result.get("cuda", {}).get("status") != "measured":  # a result from another machine stays
            reason = f"torch {torch.__version__} finds no CUDA device here"
            self.result["cuda"] = {"status": "not run", "reason": reason}
        self._write()
        return self.result

    def _write(self) -> None:
        self.result["bars"] = [dataclasses.asdict(bar) | {"ok": bar.ok} for bar in report.bars(self.result)]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(as_text(self.result))

    def _head(self) -> dict[str, Any]:
        return {"machine": machine(), "rounds": self.arguments.rounds, "warmup_rounds": self.arguments.warmup}

    def _cpu(self, names: list[str]) -> None:
        shapes: dict[str, Any] = {}
        self.result["cpu"] = {**self._head(), "shapes": shapes}
        for name in names:
            shapes[name] = {"title": SHAPES[name].title, "threads": {}}
            self._shape(name, shapes[name])
        largest = max(shapes, key=lambda name: shapes[name]["parameters"])
        measured = shapes[largest]["threads"][str(self.arguments.threads[0])]["contenders"]
        self._peaks(shapes[largest], largest, measured, CPU)

    def _shape(self, name: str, entry: dict[str, Any]) -> None:
        """All thread counts of one shape."""
        shape, arguments = SHAPES[name], self.arguments
        torch.set_num_threads(arguments.threads[0])
        weights = shape.weights(CPU)
        entry.update(parameters=weights.elements, matrices=len(weights.matrices))
        copy_bytes = QUICK_COPY_BYTES if arguments.quick else parts.COPY_BYTES
        field = enter(self.keys, weights, Gradients.drawn(weights), lambda what: self.told(f"{shape.title}: {what}"))
        parted = next((field.running[key][1].step for key in parts.PARTED if key in field.running), None)
        with parts.PolarClock() as clock:
            stacks = {} if parted is None else clock.stacks_of(parted)
            lanes = field.lanes(shape.repeats) + (parts.lanes(stacks, shape.repeats, copy_bytes) if stacks else [])
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                where = f"{shape.title}, {report.threads_in_words(threads)}"
                samples = measure(
                    lanes,
                    rounds=arguments.rounds,
                    warmup=arguments.warmup,
                    timer=cpu_timer,
                    told=lambda what, where=where: self.told(f"{where}: {what}"),  # type: ignore[misc]
                    inner=clock.take,
                )
                found = entry["threads"][str(threads)] = {"contenders": entries(field, samples)}
                if stacks:
                    found["parts"] = parts.figures(samples, stacks, weights, copy_bytes)
                self._write()
        drop(field)

    def _cuda(self, name: str) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        found = training_part(
            device,
            SHAPES[name],
            self.keys,
            rounds=self.arguments.rounds,
            warmup=self.arguments.warmup,
            timer=cuda_timer,
            told=lambda what: self.told(f"{SHAPES[name].title} on {device}: {what}"),
        )
        torch.cuda.empty_cache()  # the child processes of `_peaks` need the room
        self.result["cuda"] = {**self._head(), **found}
        self._write()
        self._peaks(self.result["cuda"], name, found["contenders"], device)

    def _peaks(self, entry: dict[str, Any], shape: str, contenders: Mapping[str, Any], device: torch.device) -> None:
        """Peak memory of every contender that was measured, of the first alone where it has to be quick."""
        keys = [key for key, found in contenders.items() if found["status"] == "measured"]
        entry["peak_bytes"] = {}
        for key in keys[:1] if self.arguments.quick else keys:
            self.told(f"{SHAPES[shape].title}: peak memory of {CONTENDERS[key].title}")
            threads = self.arguments.threads[-1]
            entry["peak_bytes"][key] = memory.peak_in_child(Path(__file__), key, shape, device, threads)


def as_text(result: dict[str, Any]) -> str:
    """JSON with every figure on one line."""
    text = re.sub(r"\[\s+([-\d.]+),\s+([-\d.]+)\s+\]", r"[\1, \2]", json.dumps(result, indent=2))
    return re.sub(r"\{\s+(\"median\": [-\d.]+),\s+(\"quartiles\": \[.*?\])\s+\}", r"{\1, \2}", text) + "\n"


def chosen(arguments: argparse.Namespace) -> list[str]:
    """The contenders to measure. `quick` leaves out those that compile: they take minutes."""
    if arguments.only:
        return [key for key in CONTENDERS if key in arguments.only]
    return [
        key
        for key, contender in CONTENDERS.items()
        if not contender.on_request and not (arguments.quick and contender.compiles)
    ]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--shapes", type=names(SHAPES), help="of 27m, 1m, 124m, tiny; default 27m,1m; on a GPU 124m")
    parser.add_argument("--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2, help="rounds that are not measured")
    parser.add_argument(
        "--device", choices=("all", "cpu", "cuda"), default="all", help="all: the CPU, and CUDA where there is one"
    )
    parser.add_argument("--only", type=names(CONTENDERS), help="contenders: " + ", ".join(CONTENDERS))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/optimizer.json"))
    parser.add_argument("--quick", action="store_true", help="a tiny model, three rounds: does it run at all?")
    parser.add_argument("--table", action="store_true", help="print the README's table from the JSON; measure nothing")
    parser.add_argument("--assert", dest="insist", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # what `memory.peak_in_child` starts
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shapes, arguments.rounds, arguments.warmup = ["tiny"], 3, 1
    return arguments


def main() -> int:
    arguments = parsed()
    if arguments.peak_of:
        torch.set_num_threads(arguments.threads[0])
        print(json.dumps(memory.peak(arguments.peak_of, arguments.shapes[0], torch.device(arguments.device))))
        return 0
    if arguments.table:
        print(report.markdown(json.loads(arguments.json.read_text())))
        return 0
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # of the peers' compiled code
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # No refresh thread: it would take its share of what is measured.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("starting", total=None)

        def told(what: str) -> None:
            progress.update(task, description=what, refresh=True)
            if not console.is_terminal:
                console.print(what)

        result = Benchmark(arguments, told).run()
    out = Console() if sys.stdout.isatty() else Console(width=120)
    for table in report.tables(result):
        out.print(table)
    bars = report.bars(result)
    out.print(report.bar_table(bars))
    return int(arguments.insist and any(bar.ok is False for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
