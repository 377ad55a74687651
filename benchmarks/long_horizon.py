"""A long horizon: weight decay at z, as the paper of SF-NorMuon has it, against decay at y, and none.

A smaller model than that of `anytime.py` (0.14 M parameters) takes 5,000 steps, twenty times T, with the same
configuration. Told are the loss of x, y and z on unseen text, the norms of weights and of z, and how far a step moves.

    .venv/bin/python benchmarks/long_horizon.py            half an hour on two cores; finished runs are kept
    .venv/bin/python benchmarks/long_horizon.py --report   the table from the JSON; trains nothing
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Final

from horizons.plans import LONG, ONE_CONFIGURATION, Run, Scale
from horizons.trainer import Trainer, as_text, earlier, machine, text_of
from rich.console import Console
from rich.table import Table

from anytimed.contracts import Json

WAYS: Final = {
    "at z": {"type": "sf_normuon", "weight_decay": 0.1},
    "at y": {"type": "horizons.decay:SFNorMuonDecayAtY", "weight_decay": 0.1},
    "none": {"type": "sf_normuon", "weight_decay": 0.0},
}
FIGURES: Final = ("x", "y", "z", "spectral_weight_norm", "z_norm", "zx_distance", "spectral_update_rms")


def run_of(way: str, scale: Scale, seed: int) -> Run:
    optimizer = {**ONE_CONFIGURATION["sf_normuon"], "warmup_steps": scale.warmup, **WAYS[way]}
    every = scale.horizons[-1] // 20
    marks = tuple(sorted({*range(every, scale.horizons[-1] + 1, every), *scale.horizons}))
    return Run(f"decay {way}@{seed}", optimizer, scale.horizons[-1], seed, marks)


def result_of(trainer: Trainer) -> Json:
    scale = trainer.scale
    seeds = range(1, scale.seeds + 1)
    runs = {way: [run_of(way, scale, seed) for seed in seeds] for way in WAYS}
    trainer.all_of([run for seed in range(scale.seeds) for run in (runs[way][seed] for way in WAYS)])
    table = {
        way: {
            str(h): {figure: _mean([trainer.found[run.name] for run in some], h, figure) for figure in FIGURES}
            for h in scale.horizons
        }
        for way, some in runs.items()
    }
    return {
        "scale": scale.name,
        "machine": machine(),
        "text": text_of(trainer.corpus),
        "parameters": next(iter(trainer.found.values()))["parameters"],
        "tokens_per_step": scale.tokens,
        "seeds": scale.seeds,
        "table": table,
        "runs": {name: {k: v for k, v in run.items() if k != "run"} for name, run in sorted(trainer.found.items())},
    }


def _mean(runs: list[Json], step: int, figure: str) -> float | None:
    found = [point[figure] for run in runs for point in run["seen"] if point["step"] == step]
    return None if None in found or not found else round(statistics.fmean(found), 5)


def table_of(result: Json) -> Table:
    told = Table("decay", "steps", *FIGURES, title=f"Means over {result['seeds']} seeds; losses in nats per byte")
    for way, by_horizon in result["table"].items():
        for h, figures in by_horizon.items():
            told.add_row(way, h, *("-" if figures[name] is None else f"{figures[name]:.4g}" for name in FIGURES))
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a thread each")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/long_horizon.json"))
    parser.add_argument("--scratch", type=Path, default=Path(".anytimed/anytime"), help="where finished runs are kept")
    parser.add_argument("--from", dest="earlier", type=Path, help="take runs from this result where they are the same")
    parser.add_argument("--report", action="store_true", help="the table from the JSON; trains nothing")
    arguments = parser.parse_args()
    if arguments.report:
        result: Json = json.loads(arguments.json.read_text())
    else:
        scratch = (arguments.scratch / LONG.name).absolute()
        result = result_of(Trainer(LONG, scratch, arguments.jobs, here=False, earlier=earlier(arguments.earlier)))
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(as_text(result), encoding="utf-8")
    (Console() if sys.stdout.isatty() else Console(width=140)).print(table_of(result))


if __name__ == "__main__":
    main()
