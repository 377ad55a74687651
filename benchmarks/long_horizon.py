"""A long horizon: weight decay at z, as the paper of SF-NorMuon has it, against decay at y, and none.

A smaller model than that of `anytime.py` (0.14 M parameters) takes 5,000 steps, twenty times T, with the same
configuration, and once with beta 0.9 in it. Told are the loss of x, y and z on unseen text, the norms of weights and of
z, and how far a step moves.

    .venv/bin/python benchmarks/long_horizon.py            a quarter of an hour on two cores; finished runs are kept
    .venv/bin/python benchmarks/long_horizon.py --report   the table from the JSON; trains nothing
"""

from __future__ import annotations

import statistics
from typing import Final

from horizons import command
from horizons.plans import LONG, ONE_CONFIGURATION, Run, Scale
from horizons.trainer import Trainer
from rich.table import Table

from anytimed.contracts import Json

WAYS: Final = {
    "at z": {"type": "sf_normuon", "weight_decay": 0.1},
    "at y": {"type": "horizons.decay:SFNorMuonDecayAtY", "weight_decay": 0.1},
    "none": {"type": "sf_normuon", "weight_decay": 0.0},
    "at z, beta 0.9": {"type": "sf_normuon", "weight_decay": 0.1, "beta": 0.9},
}
"""The last: whether what the sensitivity found for beta up to 4T holds much later."""
FIGURES: Final = ("x", "y", "z", "spectral_weight_norm", "z_norm", "zx_distance", "spectral_update_rms")


def run_of(way: str, scale: Scale, seed: int) -> Run:
    optimizer = {**ONE_CONFIGURATION["sf_normuon"], "warmup_steps": scale.warmup, **WAYS[way]}
    every = scale.horizons[-1] // 20
    marks = tuple(sorted({*range(every, scale.horizons[-1] + 1, every), *scale.horizons}))
    return Run(f"decay {way}@{seed}", optimizer, scale.horizons[-1], seed, marks)


def measured(trainer: Trainer) -> Json:
    """`table`: by way and horizon, the means of the figures."""
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
    return {"seeds": scale.seeds, "table": table}


def _mean(runs: list[Json], step: int, figure: str) -> float | None:
    found = [point[figure] for run in runs for point in run["seen"] if point["step"] == step]
    return None if None in found or not found else round(statistics.fmean(found), 5)


def table_of(result: Json) -> Table:
    told = Table("decay", "steps", *FIGURES, title=f"Means over seeds ({result['seeds']}); losses in nats per byte")
    for way, by_horizon in result["table"].items():
        for h, figures in by_horizon.items():
            told.add_row(way, h, *("-" if figures[name] is None else f"{figures[name]:.4g}" for name in FIGURES))
    return told


if __name__ == "__main__":
    found = command.result_of(command.parser(__doc__, "long_horizon").parse_args(), LONG, measured)
    command.show([table_of(found)], width=140)
