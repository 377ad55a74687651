"""Losses to a table, its bars, and what a person reads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, Final

from rich.table import Table

from anytimed.contracts import Json
from horizons.plans import FAMILIES, Scale

NAMES: Final = {
    "sf_normuon": "SF-NorMuon, one run",
    "amuse": "AMUSE, one run",
    "sf_adamw": "Schedule-Free AdamW, one run",
    "adamw": "AdamW + cosine, tuned",
    "normuon": "NorMuon + cosine, tuned",
    "normuon, mu 0.8": "NorMuon (mu 0.8) + cosine, tuned",
    "normuon, mu 0.6": "NorMuon (mu 0.6) + cosine, tuned",
    "muon_wsd": "Muon + warmup-stable-decay, tuned",
}


def spread(losses: Sequence[float | None]) -> Json:
    """Mean, and half the range, over seeds; None where one diverged."""
    finite = [loss for loss in losses if loss is not None]
    if not finite or len(finite) < len(losses):
        return {"mean": None, "spread": None, "seeds": len(losses)}
    return {
        "mean": round(statistics.fmean(finite), 4),
        "spread": round((max(finite) - min(finite)) / 2, 4),
        "seeds": len(losses),
    }


def table_of(found: Json, scale: Scale) -> Json:
    """By kind and horizon: the loss of x on unseen text, nats per byte, mean and spread over seeds."""
    told: Json = {}
    for kind, runs in found["one"].items():
        told[kind] = {str(h): spread([_at(run, h) for run in runs]) for h in scale.horizons}
    for kind, by_horizon in found["rivals"].items():
        told[kind] = {h: {**spread(of["losses"]), "lr": of["lr"]} for h, of in by_horizon.items()}
    return told


CLOSE_NATS: Final = 0.03
AHEAD_NATS: Final = 0.1


def bars(table: Json, scale: Scale) -> list[Json]:
    """What the issue asks of the one run, for SF-NorMuon and for AMUSE, at the horizon where it does worst; `ok` is
    False where a rival diverged. Where one of the two was not trained there is none."""
    found = []
    for kind in ("sf_normuon", "amuse"):
        for against, most in (("adamw", -AHEAD_NATS), ("normuon", CLOSE_NATS)):
            both = [str(h) for h in scale.horizons if kind in table and judged(table, against, str(h))]
            if not both:
                continue
            behind = [_behind(table, kind, against, h) for h in both]
            figure = None if None in behind else max(b for b in behind if b is not None)
            found.append(
                {
                    "name": f"{NAMES[kind]}, behind {NAMES[against]}, at the worst horizon",
                    "figure": figure,
                    "by_horizon": behind,
                    "expected": f"at most {most:+} nats per byte",
                    "ok": figure is not None and figure <= most,
                }
            )
    return found


def judged(table: Json, family: str, horizon: str) -> str | None:
    """The kind of a family beside which the one run is judged there: of those with the most seeds the lowest mean. None
    where none was trained to there."""

    def rank(kind: str) -> tuple[int, float]:
        found = table[kind][horizon]
        return -found["seeds"], math.inf if found["mean"] is None else found["mean"]

    return min((kind for kind in FAMILIES[family] if horizon in table.get(kind, {})), key=rank, default=None)


def _behind(table: Json, one: str, family: str, horizon: str) -> float | None:
    """Mean minus that of the rival it is judged beside; None where one of them diverged."""
    means = [table[kind][horizon]["mean"] for kind in (one, judged(table, family, horizon))]
    return None if None in means else round(means[0] - means[1], 4)


def _at(run: Json, step: int) -> float | None:
    return next((point["x"] for point in run["seen"] if point["step"] == step), None)


def tables(result: Json) -> list[Table]:
    horizons = [str(h) for h in result["horizons"]]
    tokens = [f"{int(h) * result['tokens_per_step'] / 1e6:.2f} M" for h in horizons]
    heads = [f"{h} steps\n{t} tokens" for h, t in zip(horizons, tokens, strict=True)]
    losses = Table("", *heads, title="Held-out nats per byte: mean over seeds, +- half their range; (learning rate)")
    for kind, by_horizon in result["table"].items():
        losses.add_row(NAMES.get(kind, kind), *(_cell(by_horizon.get(h)) for h in horizons))
    held = Table("bar", "found", "by horizon", "expected", "")
    for bar in result["bars"]:
        by = ", ".join("-" if b is None else f"{b:+.3f}" for b in bar["by_horizon"])
        figure = "-" if bar["figure"] is None else f"{bar['figure']:+.3f}"
        held.add_row(bar["name"], figure, by, bar["expected"], "holds" if bar["ok"] else "MISSED")
    return [losses, held]


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not trained"
    if found["mean"] is None:
        return "diverged"
    told = f"{found['mean']:.3f}"
    if found["seeds"] > 1:
        told += f" +-{found['spread']:.3f}"
    return told + (f" ({found['lr']:g})" if "lr" in found else "")
