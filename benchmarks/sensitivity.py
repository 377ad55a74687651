"""How much each number matters: one at a time away from a pilot's numbers, measured at T and at 4T.

Learning rate (the auxiliaries' with it) times 1/4 to 4, beta, momentum, rho, weight decay and warm-up, for SF-NorMuon
and for AMUSE; one seed, and what was better alone at once. The one configuration of `anytime.py` follows from it. How
far the pilot's other seeds are from its first says how much of a difference means nothing.

    .venv/bin/python benchmarks/sensitivity.py                  an hour on two cores; finished runs are kept
    .venv/bin/python benchmarks/sensitivity.py --report         the table from the JSON; trains nothing
"""

from __future__ import annotations

from typing import Any, Final

from horizons import command
from horizons.plans import FULL, Run, Scale, pilot_run
from horizons.trainer import Trainer
from rich.table import Table

from anytimed.contracts import Json

FACTORS: Final = (0.25, 0.5, 2.0, 4.0)
VARIED: Final[dict[str, dict[str, tuple[Any, ...]]]] = {
    "sf_normuon": {
        "beta": (0.6, 0.7, 0.8, 0.95, 0.98),
        "mu": (0.5, 0.6, 0.7, 0.9, 0.95),
        "weight_decay": (0.0, 0.05, 0.2),
        "warmup_steps": (12, 25, 100, 200),
    },
    "amuse": {
        "beta1": (0.4, 0.8),
        "mu": (0.6, 0.7, 0.9, 0.95),
        "rho": (0.0, 0.2, 0.6, 0.8),
        "weight_decay": (0.0, 0.05, 0.2),
        "warmup_steps": (25, 100, 200),
    },
}
TOGETHER: Final[dict[str, tuple[Json, ...]]] = {
    "sf_normuon": (
        {"beta": 0.8, "mu": 0.7},
        {"beta": 0.8, "mu": 0.6},
        {"beta": 0.7, "mu": 0.7},
        {"beta": 0.8, "mu": 0.6, "lr": 0.02, "aux_lr": 0.01},
    ),
    "amuse": ({"rho": 0.2, "mu": 0.7}, {"rho": 0.2, "beta1": 0.4}, {"rho": 0.2, "beta1": 0.4, "mu": 0.7}),
}
"""What was better alone, at once."""
MULTIPLES: Final = (1, 4)


def varied(kind: str, scale: Scale) -> dict[str, dict[str, Run]]:
    """By what is varied and the value, the runs; "base" by seed."""
    base, horizons = pilot_run(kind, scale, 1).optimizer, tuple(scale.unit * m for m in MULTIPLES)

    def run(told: str, changes: Json) -> Run:
        return Run(f"{kind} {told}", {**base, **changes}, horizons[-1], 1, horizons, ("x",))

    found = {"base": {f"seed {seed}": pilot_run(kind, scale, seed) for seed in range(1, scale.seeds + 1)}}
    rates = {f"{f:g}": {"lr": base["lr"] * f, "aux_lr": base["aux_lr"] * f} for f in FACTORS}
    found["lr times"] = {told: run(f"lr times {told}", changes) for told, changes in rates.items()}
    for name, values in VARIED[kind].items():
        found[name] = {f"{value:g}": run(f"{name} {value:g}", {name: value}) for value in values}
    together = {", ".join(f"{name} {value:g}" for name, value in some.items()): some for some in TOGETHER[kind]}
    found["together"] = {told: run(told, changes) for told, changes in together.items()}
    return found


def measured(trainer: Trainer) -> Json:
    """`table`: by optimizer, what is varied and value, the losses of x at the horizons."""
    scale = trainer.scale
    plans = {kind: varied(kind, scale) for kind in VARIED}
    horizons = [scale.unit * m for m in MULTIPLES]
    trainer.all_of([run for some in plans.values() for by in some.values() for run in by.values()])
    return {
        "horizons": horizons,
        "base": {kind: pilot_run(kind, scale, 1).optimizer for kind in VARIED},
        "table": {
            kind: {
                name: {value: _losses(trainer.found[run.name], horizons) for value, run in by.items()}
                for name, by in some.items()
            }
            for kind, some in plans.items()
        },
    }


def _losses(found: Json, horizons: list[int]) -> list[float | None]:
    at = {point["step"]: point["x"] for point in found["seen"]}
    return [at.get(h) for h in horizons]


def tables(result: Json) -> list[Table]:
    """Losses, and how far they are from those of the base's first seed."""
    found = []
    heads = [f"{h} steps" for h in result["horizons"]]
    for kind, some in result["table"].items():
        base = some["base"]["seed 1"]
        told = Table("varied", "value", *heads, title=f"{kind}: x in nats per byte")
        for name, by in some.items():
            for value, losses in by.items():
                told.add_row(name, value, *(_cell(loss, at) for loss, at in zip(losses, base, strict=True)))
        found.append(told)
    return found


def _cell(loss: float | None, base: float) -> str:
    return "diverged" if loss is None else f"{loss:.3f} ({loss - base:+.3f})"


if __name__ == "__main__":
    command.show(tables(command.result_of(command.parser(__doc__, "sensitivity").parse_args(), FULL, measured)))
