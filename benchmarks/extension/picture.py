"""The README's picture, as an SVG of our own: two panels, lines with their names at their ends.

It brings its own background and follows the reader's colour scheme, so it can be read on any page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Final

from anytimed.contracts import Json

WIDTH, HEIGHT = 960, 400
TOP, BOTTOM = 76, 344
STYLE: Final = """
text { font: 13px -apple-system, "Segoe UI", "DejaVu Sans", Helvetica, Arial, sans-serif; fill: #57606a }
.page { fill: #ffffff }
.grid { stroke: #d8dee4; stroke-width: 1 }
.mark { stroke: #6e7781; stroke-width: 1 }
.title { font-size: 15px; font-weight: 600; fill: #1f2328 }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round }
.thin { stroke-width: 1.6; stroke-dasharray: 6 4 }
.line.one { stroke: #0969da } text.one, circle.one { fill: #0969da }
.line.two { stroke: #bc4c00 } text.two, circle.two { fill: #bc4c00 }
.line.three { stroke: #6e7781 } text.three { fill: #57606a }
"""
DARK: Final = """
text { fill: #9198a1 }
.page { fill: #0d1117 }
.grid { stroke: #30363d }
.mark { stroke: #8b949e }
.title { fill: #f0f6fc }
.line.one { stroke: #58a6ff } text.one, circle.one { fill: #58a6ff }
.line.two { stroke: #f0883e } text.two, circle.two { fill: #f0883e }
.line.three { stroke: #8b949e } text.three { fill: #9198a1 }
"""
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    """A curve in the panel's own units. name: one string a line of text, none for a line that needs none. dots: of its
    points, those to mark."""

    name: tuple[str, ...]
    colour: str
    points: Points
    thin: bool = False
    dots: Points = ()


@dataclass(slots=True)
class Panel:
    """Axes with a linear scale each. left, right: pixels; names of the lines go to the right of that."""

    left: float
    right: float
    title: str
    told: str
    across: str
    lines: list[Line]
    low: float = field(init=False)
    high: float = field(init=False)
    start: float = field(init=False)
    stop: float = field(init=False)
    marks: dict[float, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        xs = [x for line in self.lines for x, _ in line.points]
        self.start, self.stop = min(xs), max(xs)
        # The fall of the first tenth of the steps would flatten everything else.
        since = self.start + 0.1 * (self.stop - self.start)
        ys = [y for line in self.lines for x, y in line.points if x >= since]
        self.low = math.floor(min(ys) * 5) / 5
        self.high = math.ceil(max(ys) * 5) / 5

    def x(self, value: float) -> float:
        return self.left + (value - self.start) / (self.stop - self.start) * (self.right - self.left)

    def y(self, value: float) -> float:
        return BOTTOM - (value - self.low) / (self.high - self.low) * (BOTTOM - TOP)

    def drawn(self, name: str) -> Iterable[str]:
        yield f'<clipPath id="{name}"><rect x="{self.left}" y="{TOP}" width="{self.right - self.left + 4}" '
        yield f'height="{BOTTOM - TOP + 4}"/></clipPath>'
        yield _text(self.left, 34, self.title, "title")
        yield _text(self.left, 56, self.told)
        for tick in _ticks(self.low, self.high):
            y = self.y(tick)
            yield f'<path class="grid" d="M{self.left} {y:.1f}H{self.right}"/>'
            yield _text(self.left - 8, y + 4.5, f"{tick:.1f}", anchor="end")
        for tick in _ticks(self.start, self.stop):
            yield _text(self.x(tick), BOTTOM + 20, f"{tick:,g}", anchor="middle")
        yield _text((self.left + self.right) / 2, BOTTOM + 42, self.across, anchor="middle")
        for at, told in self.marks.items():
            yield f'<path class="mark" d="M{self.x(at):.1f} {TOP}V{BOTTOM}"/>'
            yield _text(self.x(at) - 7, TOP + 12, told, anchor="end")
        yield f'<g clip-path="url(#{name})">'
        for line in self.lines:
            path = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in line.points)
            yield f'<path class="line {line.colour}{" thin" if line.thin else ""}" d="M{path}"/>'
            for x, y in line.dots:
                yield f'<circle class="{line.colour}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3.4"/>'
        yield "</g>"
        for line, y in self._placed():
            for i, part in enumerate(line.name):
                yield _text(self.right + 8, y + 15 * i, part, line.colour)

    def _placed(self) -> Iterable[tuple[Line, float]]:
        """Every line with the height of its name: at its end, but never over another name or below the axis."""
        named = sorted((line for line in self.lines if line.name), key=lambda line: line.points[-1][1])
        highest = float(BOTTOM + 5)
        for line in named:
            wanted = self.y(line.points[-1][1]) + 4.5 + 7.5 * (len(line.name) - 1)
            last = min(wanted, highest)  # of its lines of text
            yield line, last - 15 * (len(line.name) - 1)
            highest = last - 15 * len(line.name) - 3


NEEDED: Final = {
    *("sf_normuon/trunk@1", "extend/added@1", "extend/both@1"),
    *(f"switch/long/{way}@1" for way in ("plain", "steered", "window")),
}
"""Runs that are drawn."""


def drawn(result: Json) -> str:
    """The SVG of a benchmark's result."""
    panels = [_extended(result), _switched(result)]
    body = [part for i, panel in enumerate(panels) for part in panel.drawn(f"panel{i}")]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="Held-out losses of x: a source added late, and a switch of the data after a long history">'
    )
    style = f"<style>{STYLE}@media (prefers-color-scheme: dark) {{{DARK}}}</style>"
    page = f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="8"/>'
    return "\n".join([head, style, page, *body, "</svg>"]) + "\n"


def _extended(result: Json) -> Panel:
    """A second source added late, next to both from the start; over tokens."""
    runs = result["runs"]
    trunk, added, both = (runs[f"{name}@1"]["probed"] for name in ("sf_normuon/trunk", "extend/added", "extend/both"))
    before = runs["extend/added@1"]["changed"] - 1
    lines = [
        Line(("C++ headers",), "two", _millions([p for p in added if p["step"] >= before], "headers")),
        Line((), "two", _millions(both, "headers"), thin=True),
        Line(("Python",), "one", _millions([*trunk, *added], "python")),
        Line((), "one", _millions(both, "python"), thin=True),
    ]
    key = "x on unseen text, nats a byte; dashed: both from the start"
    panel = Panel(56, 390, "A second source, added late", key, "million tokens", lines)
    panel.marks = {_tokens_before(runs["extend/added@1"]) / 1e6: "headers added"}
    return panel


def _switched(result: Json) -> Panel:
    """Everything after the switch, by how x remembers."""
    runs = result["runs"]
    lines = []
    for key, colour, thin, name in (
        ("plain", "three", False, ("plain averaging",)),
        ("steered", "one", False, ("steered memory",)),
        ("window", "two", True, ("a window of the", "right length")),
    ):
        run = runs[f"switch/long/{key}@1"]
        before = run["changed"] - 1
        points = [(p["step"] - before, p["losses"]["headers"][0]) for p in run["probed"] if p["step"] >= before]
        halved = {entry["step"] - before for entry in run["forgets"]}
        dots = [(at, _between(points, at)) for at in sorted(halved) if 0 <= at <= points[-1][0]]
        lines.append(Line(name, colour, points, thin, dots))
    key = "x on unseen text, nats a byte; a dot: x forgets half"
    return Panel(548, 826, "A switch, as if after 100,000 steps", key, "steps after the switch", lines)


def _millions(probed: list[Json], text: str) -> Points:
    return [(p["tokens"] / 1e6, p["losses"][text][0]) for p in probed if text in p["losses"]]


def _tokens_before(run: Json) -> float:
    """How many tokens were trained on when the data changed."""
    return float(next(p["tokens"] for p in run["probed"] if p["step"] == run["changed"] - 1))


def _between(points: Points, at: float) -> float:
    for (x, y), (after, next_y) in pairwise(points):
        if x <= at <= after and after > x:
            return y + (next_y - y) * (at - x) / (after - x)
    return points[-1][1]


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers."""
    width = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(width * m for m in (1, 2, 2.5, 5, 10) if (high - low) / (width * m) <= 8)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _text(x: float, y: float, told: str, kind: str = "", anchor: str = "start") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{named} text-anchor="{anchor}">{escape(told)}</text>'
