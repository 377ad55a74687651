"""What `anytimed top` shows: the status, and how the figures came to be what they are, as lines of small bars.

`Overview` keeps the newest points of each figure, seeded from `/history` and gone on with from `/events`; `shown` makes
one picture of it for a terminal of any width.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from anytimed.contracts import Json
from anytimed.service.console import ago, number, size, table

POINTS = 600
BARS = "▁▂▃▄▅▆▇█"
EVENTS = 8


class Overview:
    """The newest figures of a run. All of it belongs to one thread."""

    def __init__(self) -> None:
        self.status: Json | None = None
        self._lines: dict[str, deque[float | None]] = {}
        self._events: deque[Json] = deque(maxlen=EVENTS)

    def seed(self, history: Json) -> None:
        """Begin with what `/history` says."""
        self._lines.clear()
        steps, evaluations = history["steps"], history["evaluations"]
        for name in ("loss", "tokens_per_s"):
            self._line(name).extend(steps[name])
        for source, values in steps["prequential"].items():
            self._line(f"prequential {source}").extend(values)
        for name in ("loss_x", "loss_y", "loss_z"):
            self._line(name).extend(evaluations[name])
        self._events.clear()
        self._events.extend(history["events"][-EVENTS:])

    def hear(self, kind: str, data: Json) -> None:
        """A message of `/events`."""
        match kind:
            case "status":
                self.status = data
                self._line("lag").append(sum(source["lag_bytes"] for source in data["sources"].values()))
            case "step":
                for name in ("loss", "tokens_per_s"):
                    self._line(name).append(data[name])
                for source, value in data["prequential"].items():
                    self._line(f"prequential {source}").append(value)
            case "evaluation":
                for name in ("loss_x", "loss_y", "loss_z"):
                    self._line(name).append(data[name])
            case "event":
                self._events.append(data)

    def shown(self, width: int, now: float) -> RenderableType:
        """The picture. width: of the terminal, in characters; now: seconds since 1970."""
        if self.status is None:
            return Text("waiting for a daemon", style="dim")
        figures = Table.grid(padding=(0, 2))
        figures.add_column(style="dim", no_wrap=True)
        figures.add_column(justify="right", no_wrap=True)
        figures.add_column(no_wrap=True)
        room = max(10, width - 48)
        for name, title, form in self._figures():
            values = [value for value in self._lines.get(name, ()) if value is not None]
            if values:
                told = size(values[-1]) if name == "lag" else number(values[-1], form)
                figures.add_row(title, told, Text(sparkline(values, room), style=_style(name)))
        events = Table.grid(padding=(0, 2))
        events.add_column(style="dim", no_wrap=True, justify="right")
        events.add_column(no_wrap=True)
        events.add_column()
        for event in reversed(self._events):
            events.add_row(f"{ago(max(0.0, now - event['time']))} ago", str(event["what"]), Text(str(event["told"])))
        title = f"anytimed {self.status['config']}"
        return Group(
            Panel(table(self.status, now), title=Text(title), title_align="left"),
            Panel(figures, title="figures, oldest to newest", title_align="left"),
            Panel(events, title="events", title_align="left"),
        )

    def _figures(self) -> list[tuple[str, str, str]]:
        sources = sorted(name for name in self._lines if name.startswith("prequential "))
        return [
            ("loss_x", "hold-out x", ".4f"), ("loss_y", "hold-out y", ".4f"), ("loss_z", "hold-out z", ".4f"),
            ("loss", "training loss at y", ".4f"), *((name, name, ".4f") for name in sources),
            ("tokens_per_s", "tokens/s", ",.0f"), ("lag", "not read yet", ""),
        ]  # fmt: skip

    def _line(self, name: str) -> deque[float | None]:
        return self._lines.setdefault(name, deque(maxlen=POINTS))


def sparkline(values: Sequence[float], width: int) -> str:
    """At most `width` bars, each the mean of its share of the values, between the smallest and the largest mean."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    count = min(width, len(finite))
    edges = [i * len(finite) // count for i in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    span = high - low
    if span <= 0:
        return BARS[len(BARS) // 2] * count
    return "".join(BARS[min(len(BARS) - 1, int((mean - low) / span * len(BARS)))] for mean in means)


def _style(name: str) -> str:
    return {"loss_x": "green", "loss_y": "yellow", "loss_z": "magenta", "tokens_per_s": "cyan"}.get(name, "blue")
