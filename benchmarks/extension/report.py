"""Curves to figures, bars and tables.

Predictions are the pilot's (the table in the design's optimizers page: another text, another program), written down
before this benchmark ran; None where there was none. A figure whose runs were not made is None too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from rich.table import Table

from anytimed.contracts import Json
from extension.plans import Scale

CLOSE_NATS: Final = 0.05
BEHIND_NATS: Final = 1.0
ROWS: Final = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Shares of the steps after the change that the table shows."""
COLUMNS: Final = {
    "switch/long/plain": "plain, long",
    "switch/long/window": "window, long",
    "switch/long/steered": "steered, long",
    "switch/long/amuse": "AMUSE steered, long",
    "switch/short/plain": "plain, short",
    "switch/short/steered": "steered, short",
}
FIRED: Final = "stationary, SF-NorMuon: times fired"
NEAR: Final = "switch: steered behind window, nats"
FAR: Final = "switch: plain behind window, nats"


class Curves:
    """The runs by name, and what is asked of them. Raises KeyError where a run was not made."""

    def __init__(self, runs: dict[str, Json]) -> None:
        self.runs = runs
        self.seeds = [s for s in range(1, 10) if {f"{name}@{s}" for name in [*COLUMNS][:3]} <= runs.keys()]

    def last(self, name: str, text: str, seed: int = 1) -> float:
        """x at the end."""
        return float(self.runs[f"{name}@{seed}"]["probed"][-1]["losses"][text][0])

    def apart(self, name: str, other: str, text: str) -> float:
        return self.last(name, text) - self.last(other, text)

    def behind(self, name: str) -> list[float]:
        """Behind the fitting window on the new text, for every seed."""
        window = "switch/long/window"
        return [round(self.last(name, "headers", s) - self.last(window, "headers", s), 4) for s in self.seeds]

    def fired(self, *names: str) -> int:
        return sum(len(self.runs[f"{name}@1"]["forgets"]) for name in names)


FIGURES: Final[dict[str, tuple[float | None, Callable[[Curves], float]]]] = {
    FIRED: (0, lambda c: c.fired("sf_normuon/trunk", "sf_normuon/stationary")),
    "stationary, AMUSE: times fired": (1, lambda c: c.fired("amuse/trunk", "amuse/stationary")),
    "stationary, AMUSE: steered minus unsteered, nats": (
        0.0,
        lambda c: c.apart("amuse/stationary", "amuse/unsteered", "python"),
    ),
    NEAR: (0.012, lambda c: max(c.behind("switch/long/steered"), default=float("nan"))),
    FAR: (1.37, lambda c: min(c.behind("switch/long/plain"), default=float("nan"))),
    "switch: AMUSE steered behind SF-NorMuon's window, nats": (
        0.03,
        lambda c: c.apart("switch/long/amuse", "switch/long/window", "headers"),
    ),
    "switch: times fired, SF-NorMuon": (9, lambda c: c.fired("switch/long/steered")),
    "switch: times fired, AMUSE": (7, lambda c: c.fired("switch/long/amuse")),
    "switch: times fired, SF-NorMuon, short history": (2, lambda c: c.fired("switch/short/steered")),
    "switch: steered minus plain, short history, nats": (
        0.003,
        lambda c: c.apart("switch/short/steered", "switch/short/plain", "headers"),
    ),
    "extend: old text, added late minus both from the start, nats": (
        -0.02,
        lambda c: c.apart("extend/added", "extend/both", "python"),
    ),
    "extend: new text, added late minus both from the start, nats": (
        0.05,
        lambda c: c.apart("extend/added", "extend/both", "headers"),
    ),
    "extend: times fired": (2, lambda c: c.fired("extend/added")),
    "extend: old text, steered minus unsteered, nats": (
        None,
        lambda c: c.apart("extend/added", "extend/unsteered", "python"),
    ),
    "extend: new text, steered minus unsteered, nats": (
        None,
        lambda c: c.apart("extend/added", "extend/unsteered", "headers"),
    ),
}


def figures(runs: dict[str, Json], scale: Scale) -> Json:
    """`figures` by name, with what was predicted; `by_seed`; `after_the_switch`: x and y on the new text; `bars`."""
    curves = Curves(runs)
    told = {name: {"predicted": guess, "found": _found(curves, find)} for name, (guess, find) in FIGURES.items()}
    return {
        "figures": told,
        "by_seed": {name: curves.behind(f"switch/long/{name}") for name in ("steered", "plain")},
        "after_the_switch": _after(runs, scale),
        "bars": bars(*(told[name]["found"] for name in (FIRED, NEAR, FAR))),
    }


def _found(curves: Curves, find: Callable[[Curves], float]) -> float | None:
    try:
        value = find(curves)
    except KeyError:
        return None
    return round(value, 4) if value == value else None


def bars(fired: float | None, near: float | None, far: float | None) -> list[Json]:
    """What the issue asks for; `ok` is False where nothing was measured."""
    return [
        {
            "name": "a stationary run with SF-NorMuon never fires",
            "figure": fired,
            "expected": "0",
            "ok": fired == 0,
        },
        {
            "name": "after the switch, steered memory behind a fitting window (worst seed)",
            "figure": near,
            "expected": f"at most {CLOSE_NATS} nats",
            "ok": near is not None and near <= CLOSE_NATS,
        },
        {
            "name": "after the switch, plain averaging behind a fitting window (best seed)",
            "figure": far,
            "expected": f"more than {BEHIND_NATS} nats",
            "ok": far is not None and far > BEHIND_NATS,
        },
    ]


def _after(runs: dict[str, Json], scale: Scale) -> list[Json]:
    """Rows about so many steps after the switch, of the runs that were made."""
    rows = []
    for share in ROWS:
        since = round(share * scale.after)
        row: Json = {"steps": since}
        for name in COLUMNS:
            if (run := runs.get(f"{name}@1")) is not None:
                at = run["changed"] - 1 + since
                row[name] = min(run["probed"], key=lambda p, at=at: abs(p["step"] - at))["losses"]["headers"]
        rows.append(row)
    return rows


def tables(result: Json) -> list[Table]:
    """What a person reads."""
    told = Table("figure", "predicted", "found", title="Predictions, from the pilot, and what was found")
    for name, both in result["figures"].items():
        told.add_row(name, _number(both["predicted"]), _number(both["found"]))
    names = [name for name in COLUMNS if name in result["after_the_switch"][0]]
    after = Table("steps after", *(COLUMNS[name] for name in names), title="Switch: x (y) on the new text, nats a byte")
    for row in result["after_the_switch"]:
        after.add_row(str(row["steps"]), *(f"{row[name][0]:.3f} ({row[name][1]:.3f})" for name in names))
    held = Table("bar", "found", "expected", "")
    for bar in result["bars"]:
        held.add_row(bar["name"], _number(bar["figure"]), bar["expected"], "holds" if bar["ok"] else "MISSED")
    return [told, after, held]


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:g}"
