"""What steered memory costs on a stream that does not change: the one runs of `anytime.py` with it, and without.

Both schedule-free optimizers on matrices, every seed, to 8T. `anytime.py`'s own runs are taken from where it left them.

    .venv/bin/python benchmarks/steering.py            ten minutes on two cores beside the runs of anytime.py
    .venv/bin/python benchmarks/steering.py --report   the table from the JSON; trains nothing
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Final

from horizons import command
from horizons.plans import FULL, Run, Scale, one_run
from horizons.report import NAMES
from horizons.trainer import Trainer
from rich.table import Table

from anytimed.contracts import Json

KINDS: Final = ("sf_normuon", "amuse")


def plain_run(kind: str, scale: Scale, seed: int) -> Run:
    """The one run without steered memory."""
    run = one_run(kind, scale, seed)
    return replace(run, name=f"{kind}, plain@{seed}", steered=False, marks=scale.horizons, at=("x",))


def measured(trainer: Trainer) -> Json:
    """By kind: `forgets`, the steps at which each seed forgot, and by horizon x with steered memory minus without,
    `by_seed` and `mean`, nats per byte."""
    scale = trainer.scale
    seeds = range(1, scale.seeds + 1)
    made = (one_run, plain_run)
    trainer.all_of([make(kind, scale, seed) for kind in KINDS for seed in seeds for make in made])
    return {"cost": {kind: _cost(trainer, kind, seeds) for kind in KINDS}}


def _cost(trainer: Trainer, kind: str, seeds: range) -> Json:
    def losses(name: str) -> dict[int, float]:
        return {point["step"]: point["x"] for point in trainer.found[name]["seen"]}

    pairs = [(losses(f"{kind}@{seed}"), losses(f"{kind}, plain@{seed}")) for seed in seeds]
    found: Json = {"forgets": [trainer.found[f"{kind}@{seed}"]["forgets"] for seed in seeds]}
    for h in trainer.scale.horizons:
        by_seed = [round(steered[h] - plain[h], 5) for steered, plain in pairs]
        found[str(h)] = {"by_seed": by_seed, "mean": round(statistics.fmean(by_seed), 5)}
    return found


def table_of(result: Json) -> Table:
    horizons = [str(h) for h in result["horizons"]]
    told = Table(
        "", "forgot at", *horizons, title="x with steered memory minus without, nats per byte: mean, and by seed"
    )
    for kind, cost in result["cost"].items():
        forgot = "; ".join(", ".join(map(str, steps)) or "never" for steps in cost["forgets"])
        cells = [f"{cost[h]['mean']:+.4f}\n{', '.join(f'{d:+.4f}' for d in cost[h]['by_seed'])}" for h in horizons]
        told.add_row(NAMES[kind], forgot, *cells)
    return told


if __name__ == "__main__":
    found = command.result_of(command.parser(__doc__, "steering").parse_args(), FULL, measured)
    command.show([table_of(found)], width=160)
