"""Pictures for the README as SVGs of our own: panels side by side, lines with their names at their ends, points with
their spread.

A picture brings its own background and follows the reader's colour scheme, so it can be read on any page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Final

WIDTH, HEIGHT = 960, 400
TOP, BOTTOM = 76, 344
COLOURS: Final = {
    "one": ("#0969da", "#58a6ff"),
    "two": ("#bc4c00", "#f0883e"),
    "three": ("#6e7781", "#8b949e"),
    "four": ("#1a7f37", "#3fb950"),
    "five": ("#8250df", "#bc8cff"),
}
"""In light and in dark."""


def _colours(which: int) -> str:
    return "\n".join(
        f".line.{name} {{ stroke: {both[which]} }} text.{name}, .dot.{name} {{ fill: {both[which]} }} "
        f".dot.{name} {{ stroke: {both[which]} }}"
        for name, both in COLOURS.items()
    )


STYLE: Final = f"""
text {{ font: 13px -apple-system, "Segoe UI", "DejaVu Sans", Helvetica, Arial, sans-serif; fill: #57606a }}
.page {{ fill: #ffffff }}
.grid {{ stroke: #d8dee4; stroke-width: 1 }}
.mark {{ stroke: #6e7781; stroke-width: 1 }}
.title {{ font-size: 15px; font-weight: 600; fill: #1f2328 }}
.line {{ fill: none; stroke-width: 2.2; stroke-linejoin: round }}
.thin {{ stroke-width: 1.6; stroke-dasharray: 6 4 }}
{_colours(0)}
.dot.hollow {{ fill: #ffffff; stroke-width: 1.8 }}
"""
DARK: Final = f"""
text {{ fill: #9198a1 }}
.page {{ fill: #0d1117 }}
.grid {{ stroke: #30363d }}
.mark {{ stroke: #8b949e }}
.title {{ fill: #f0f6fc }}
{_colours(1)}
.dot.hollow {{ fill: #0d1117 }}
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


@dataclass(frozen=True, slots=True)
class Marker:
    """Points that no line joins: where, lowest, middle, highest. shape: "circle", "square" or "diamond", hollow."""

    name: str
    colour: str
    shape: str
    points: Sequence[tuple[float, float, float, float]]


@dataclass(slots=True)
class Panel:
    """Axes. left, right: pixels; names of the lines go to the right of that. ticks: of the axis across, by place;
    none: round numbers. log: the axis across is logarithmic. floor, ceiling: of the other; none: what is drawn after
    the first tenth, by fifths."""

    left: float
    right: float
    title: str
    told: str
    across: str
    lines: Sequence[Line]
    markers: Sequence[Marker] = ()
    ticks: dict[float, str] = field(default_factory=dict)
    log: bool = False
    floor: float | None = None
    ceiling: float | None = None
    low: float = field(init=False)
    high: float = field(init=False)
    start: float = field(init=False)
    stop: float = field(init=False)
    marks: dict[float, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        xs = [x for line in self.lines for x, _ in line.points] + [p[0] for m in self.markers for p in m.points]
        self.start, self.stop = min(xs), max(xs)
        # The fall of the first tenth of the steps would flatten everything else.
        since = self.start + 0.1 * (self.stop - self.start)
        ys = [y for line in self.lines for x, y in line.points if x >= since]
        self.low = math.floor(min(ys) * 5) / 5 if self.floor is None else self.floor
        self.high = math.ceil(max(ys) * 5) / 5 if self.ceiling is None else self.ceiling

    def x(self, value: float) -> float:
        start, stop = (math.log(self.start), math.log(self.stop)) if self.log else (self.start, self.stop)
        return self.left + ((math.log(value) if self.log else value) - start) / (stop - start) * (
            self.right - self.left
        )

    def y(self, value: float) -> float:
        return BOTTOM - (value - self.low) / (self.high - self.low) * (BOTTOM - TOP)

    def drawn(self, name: str) -> Iterable[str]:
        yield f'<clipPath id="{name}"><rect x="{self.left}" y="{TOP}" width="{self.right - self.left + 4}" '
        yield f'height="{BOTTOM - TOP + 4}"/></clipPath>'
        yield text(self.left, 34, self.title, "title")
        yield text(self.left, 56, self.told)
        for tick in _ticks(self.low, self.high):
            y = self.y(tick)
            yield f'<path class="grid" d="M{self.left} {y:.1f}H{self.right}"/>'
            yield text(self.left - 8, y + 4.5, f"{tick:.1f}", anchor="end")
        for at, told in (self.ticks or {t: f"{t:,g}" for t in _ticks(self.start, self.stop)}).items():
            if self.ticks:
                yield f'<path class="grid" d="M{self.x(at):.1f} {TOP}V{BOTTOM}"/>'
            yield text(self.x(at), BOTTOM + 20, told, anchor="middle")
        yield text((self.left + self.right) / 2, BOTTOM + 42, self.across, anchor="middle")
        for at, told in self.marks.items():
            yield f'<path class="mark" d="M{self.x(at):.1f} {TOP}V{BOTTOM}"/>'
            yield text(self.x(at) - 7, TOP + 12, told, anchor="end")
        yield f'<g clip-path="url(#{name})">'
        for line in self.lines:
            path = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in line.points)
            yield f'<path class="line {line.colour}{" thin" if line.thin else ""}" d="M{path}"/>'
            for x, y in line.dots:
                yield f'<circle class="dot {line.colour}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3.4"/>'
        yield "</g>"
        for marker in self.markers:
            for at, lowest, middle, highest in marker.points:
                x, y = self.x(at), self.y(middle)
                yield f'<path class="line {marker.colour}" d="M{x:.1f} {self.y(lowest):.1f}V{self.y(highest):.1f}"/>'
                yield _shape(marker, x, y)
        for line, y in self._placed():
            for i, part in enumerate(line.name):
                yield text(self.right + 8, y + 15 * i, part, line.colour)

    def key(self, x: float, y: float) -> Iterable[str]:
        """The names of the markers, one below the other from there."""
        for i, marker in enumerate(self.markers):
            yield _shape(marker, x, y + 18 * i - 4.5)
            yield text(x + 12, y + 18 * i, marker.name, marker.colour)

    def _placed(self) -> Iterable[tuple[Line, float]]:
        """Every line with the height of its name: at its end, but never over another name or below the axis."""
        named = sorted((line for line in self.lines if line.name), key=lambda line: line.points[-1][1])
        highest = float(BOTTOM + 5)
        for line in named:
            wanted = self.y(line.points[-1][1]) + 4.5 + 7.5 * (len(line.name) - 1)
            last = min(wanted, highest)  # of its lines of text
            yield line, last - 15 * (len(line.name) - 1)
            highest = last - 15 * len(line.name) - 3


def page(panels: Sequence[Panel], told: str, *more: str) -> str:
    """The SVG. told: for those who do not see it; more: elements beside the panels."""
    body = [part for i, panel in enumerate(panels) for part in panel.drawn(f"panel{i}")]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{told}">'
    style = f"<style>{STYLE}@media (prefers-color-scheme: dark) {{{DARK}}}</style>"
    background = f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="8"/>'
    return "\n".join([head, style, background, *body, *more, "</svg>"]) + "\n"


def text(x: float, y: float, told: str, kind: str = "", anchor: str = "start") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{named} text-anchor="{anchor}">{escape(told)}</text>'


def _shape(marker: Marker, x: float, y: float) -> str:
    kind = f'class="dot hollow {marker.colour}"'
    if marker.shape == "circle":
        return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="4.4"/>'
    if marker.shape == "square":
        return f'<rect {kind} x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    return f'<path {kind} d="M{x:.1f} {y - 5.6:.1f}l5.6 5.6l-5.6 5.6l-5.6 -5.6z"/>'


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers."""
    width = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(width * m for m in (1, 2, 2.5, 5, 10) if (high - low) / (width * m) <= 8)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]
