"""The README's picture: a source added late, and a switch after a long history."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from drawing import Line, Panel, Points, page

from anytimed.contracts import Json

NEEDED: Final = {
    *("sf_normuon/trunk@1", "added/short/plain@1", "added/short/steered@1"),
    *("switch/long/plain@1", "switch/long/steered@1", "switch/window-4T@1"),
}
"""Runs that are drawn."""


def drawn(result: Json) -> str:
    """The SVG of a benchmark's result."""
    panels = [_extended(result), _switched(result)]
    told = "Held-out losses of x: a source added late, and a switch of the data after a long history"
    return page(panels, told)


def _extended(result: Json) -> Panel:
    """A second source added late, steered and not; over tokens."""
    runs = result["runs"]
    trunk = runs["sf_normuon/trunk@1"]["probed"]
    steered, plain = (runs[f"added/short/{way}@1"]["probed"] for way in ("steered", "plain"))
    before = runs["added/short/steered@1"]["changed"] - 1
    lines = [
        Line(("C++ headers",), "two", _millions(_since(before, steered), "headers")),
        Line((), "two", _millions(_since(before, plain), "headers"), thin=True),
        Line(("Python",), "one", _millions([*trunk, *steered], "python")),
        Line((), "one", _millions(_since(before, plain), "python"), thin=True),
    ]
    key = "x on unseen text, nats a byte; dashed: plain averaging"
    panel = Panel(56, 390, "A second source, added late", key, "million tokens", lines)
    panel.marks = {_tokens_before(runs["added/short/steered@1"]) / 1e6: "headers added"}
    return panel


def _switched(result: Json) -> Panel:
    """Everything after the switch, by how x remembers, and the rival that was restarted for it."""
    runs = result["runs"]
    shown = [
        ("switch/long/plain@1", "three", False, ("plain averaging",)),
        ("switch/long/steered@1", "one", False, ("steered memory",)),
        ("switch/window-4T@1", "two", True, ("a window of the", "right length")),
    ]
    if rivals := result["restarted"]["switch"]:
        best = min(rivals.values(), key=lambda of: of["loss"])
        shown.append((best["run"], "five", True, ("NorMuon, tuned", "and restarted")))
    lines = []
    for run_name, colour, thin, name in shown:
        run = runs[run_name]
        before = run["changed"] - 1
        points = [(p["step"] - before, p["losses"]["headers"]) for p in _since(before, run["probed"])]
        halved = {entry["step"] - before for entry in run["forgets"]}
        dots = [(at, _between(points, at)) for at in sorted(halved) if 0 <= at <= points[-1][0]]
        lines.append(Line(name, colour, points, thin, dots))
    key = "x on unseen text, nats a byte; a dot: x forgets half"
    return Panel(548, 826, "A switch, as if after 100,000 steps", key, "steps after the switch", lines)


def _since(before: int, probed: list[Json]) -> list[Json]:
    return [point for point in probed if point["step"] >= before]


def _millions(probed: list[Json], text: str) -> Points:
    return [(p["tokens"] / 1e6, p["losses"][text]) for p in probed]


def _tokens_before(run: Json) -> float:
    """How many tokens were trained on when the data changed."""
    return float(next(p["tokens"] for p in run["probed"] if p["step"] == run["changed"] - 1))


def _between(points: Points, at: float) -> float:
    for (x, y), (after, next_y) in pairwise(points):
        if x <= at <= after and after > x:
            return y + (next_y - y) * (at - x) / (after - x)
    return points[-1][1]
