"""The README's pictures: the one run with every tuned run's end on it; and what x, y and z are worth."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

from drawing import Line, Marker, Panel, page

from anytimed.contracts import Json
from horizons.report import judged

ENDS: Final = {
    "adamw": ("AdamW + cosine, tuned for each", "two", "square"),
    "normuon": ("NorMuon + cosine, tuned for each", "five", "diamond"),
    "muon_wsd": ("Muon + WSD, tuned for each", "three", "circle"),
}
ONE: Final = {
    "sf_normuon": (("SF-NorMuon",), "one", False),
    "amuse": (("AMUSE",), "four", False),
    "sf_adamw": (("SF-AdamW",), "two", True),
}


def drawn(result: Json) -> str:
    """The SVG of a benchmark's result."""
    panels = [_horizons(result), *([_three(result)] if "sf_normuon" in result["one"] else [])]
    told = "Held-out loss over tokens: one run of each schedule-free optimizer, with the ends of tuned runs; x, y and z"
    left = panels[0]
    return page(panels, told, *left.key(left.left + 14, 290))


def _horizons(result: Json) -> Panel:
    per_step = result["tokens_per_step"] / 1e6
    lines = [
        Line(name, colour, _mean(result["one"][kind], "x", per_step, result["horizons"]), thin)
        for kind, (name, colour, thin) in ONE.items()
        if kind in result["one"]
    ]
    markers = []
    for kind, (name, colour, shape) in ENDS.items():
        ends = {int(h): [loss for loss in of["losses"] if loss is not None] for h, of in best(result, kind).items()}
        points = [(h * per_step, min(found), statistics.fmean(found), max(found)) for h, found in ends.items() if found]
        if points:
            markers.append(Marker(name, colour, shape, points))
    return Panel(
        56,
        470,
        "One run, and runs tuned for each horizon",
        "x on unseen text, nats a byte; means over seeds",
        "million tokens",
        lines,
        markers,
        ticks={h * per_step: f"{h * per_step:.3g}" for h in result["horizons"]},
        log=True,
        floor=_floor([y for line in lines for _, y in line.points]),
        ceiling=_ceiling(lines, markers, result["horizons"][0] * per_step),
    )


def best(result: Json, family: str) -> Json:
    """By horizon, the rival of a family beside which the one run is judged, where one was trained to there."""
    kinds = {str(h): judged(result["table"], family, str(h)) for h in result["horizons"]}
    return {h: result["rivals"][kind][h] for h, kind in kinds.items() if kind}


def _three(result: Json) -> Panel:
    per_step = result["tokens_per_step"] / 1e6
    runs = result["one"]["sf_normuon"]
    names = {"x": (("x", "exported"), "one"), "y": (("y", "trained at"), "four"), "z": (("z", "fast"), "two")}
    lines = [
        Line(name, colour, _mean(runs, which, per_step, result["horizons"])) for which, (name, colour) in names.items()
    ]
    every_other = result["horizons"][-1::-2]  # the panel is narrow
    return Panel(
        620,
        866,
        "x, y and z of SF-NorMuon",
        "nats a byte on unseen text",
        "million tokens",
        lines,
        ticks={h * per_step: f"{h * per_step:.3g}" for h in every_other},
        log=True,
        floor=_floor([y for line in lines for _, y in line.points]),
    )


def _beside(step: int, horizons: Sequence[int]) -> bool:
    """Whether a horizon, which is measured too, is a few steps away: two points there would only make a notch."""
    return any(0 < abs(step - h) < 0.05 * h for h in horizons)


def _mean(runs: Sequence[Json], which: str, per_step: float, horizons: Sequence[int]) -> list[tuple[float, float]]:
    """Means over seeds, where all of them have one."""
    found = []
    for points in zip(*(run["seen"] for run in runs), strict=True):
        losses = [point[which] for point in points]
        if None not in losses and not _beside(points[0]["step"], horizons):
            found.append((points[0]["step"] * per_step, statistics.fmean(losses)))
    return found


def _floor(losses: Sequence[float]) -> float:
    return int(min(losses) * 5) / 5


def _ceiling(lines: Sequence[Line], markers: Sequence[Marker], since: float) -> float:
    """What is before the first horizon may leave the picture."""
    found = [y for line in lines for x, y in line.points if x >= since] + [p[3] for m in markers for p in m.points]
    return int(max(found) * 5 + 1.5) / 5
