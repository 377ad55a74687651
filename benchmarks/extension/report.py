"""Curves to figures, bars and tables.

Predictions are the pilot's (the table in the design's optimizers page: another text, another program), written down
before this benchmark ran.
"""

from __future__ import annotations

import statistics
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
PREDICTED: Final[dict[str, float]] = {
    "stationary, SF-NorMuon: times fired": 0,
    "stationary, AMUSE: times fired": 1,
    "stationary, AMUSE: cost of steering, nats": 0.0,
    "switch: steered behind window, nats": 0.012,
    "switch: plain behind window, nats": 1.37,
    "switch: AMUSE steered behind window, nats": 0.03,
    "switch: times fired, SF-NorMuon": 9,
    "switch: times fired, short history": 2,
    "extend: x on the old text, added minus both from the start": -0.02,
    "extend: x on the new text, added minus both from the start": 0.05,
}


def figures(runs: dict[str, Json], scale: Scale) -> Json:
    """`figures` by name, with what was predicted; `table`: x (and y) after the switch; `bars`."""
    found: dict[str, Any] = {}

    def last(name: str, text: str, which: int = 0) -> float:
        return float(runs[name]["probed"][-1]["losses"][text][which])

    def fired(*names: str) -> int:
        return sum(len(runs[f"{name}@1"]["forgets"]) for name in names)

    seeds = sorted(int(name.rpartition("@")[2]) for name in runs if name.startswith("switch/long/steered@"))

    def behind(name: str) -> list[float]:
        return [last(f"{name}@{s}", "headers") - last(f"switch/long/window@{s}", "headers") for s in seeds]

    steered, plain = behind("switch/long/steered"), behind("switch/long/plain")
    found["stationary, SF-NorMuon: times fired"] = fired("sf_normuon/trunk", "sf_normuon/stationary")
    found["stationary, AMUSE: times fired"] = fired("amuse/trunk", "amuse/stationary")
    found["stationary, AMUSE: cost of steering, nats"] = last("amuse/stationary@1", "python") - last(
        "amuse/unsteered@1", "python"
    )
    found["switch: steered behind window, nats"] = max(steered)
    found["switch: plain behind window, nats"] = min(plain)
    found["switch: AMUSE steered behind window, nats"] = last("switch/long/amuse@1", "headers") - last(
        "switch/long/window@1", "headers"
    )
    found["switch: times fired, SF-NorMuon"] = fired("switch/long/steered")
    found["switch: times fired, short history"] = fired("switch/short/steered")
    for text, what in (("python", "old"), ("headers", "new")):
        found[f"extend: x on the {what} text, added minus both from the start"] = last("extend/added@1", text) - last(
            "extend/both@1", text
        )
    rounded = {name: round(value, 4) for name, value in found.items()}
    return {
        "figures": {name: {"predicted": PREDICTED[name], "found": value} for name, value in rounded.items()},
        "by_seed": {
            "steered behind window": [round(v, 4) for v in steered],
            "plain behind window": [round(v, 4) for v in plain],
        },
        "after_the_switch": _table(runs, scale),
        "bars": _bars(rounded),
    }


def _bars(found: dict[str, float]) -> list[Json]:
    fired = found["stationary, SF-NorMuon: times fired"]
    near, far = found["switch: steered behind window, nats"], found["switch: plain behind window, nats"]
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
            "ok": near <= CLOSE_NATS,
        },
        {
            "name": "after the switch, plain averaging behind a fitting window (best seed)",
            "figure": far,
            "expected": f"more than {BEHIND_NATS} nats",
            "ok": far > BEHIND_NATS,
        },
    ]


def _table(runs: dict[str, Json], scale: Scale) -> list[Json]:
    """x and y on the new text, about so many steps after the switch."""
    rows = []
    for share in ROWS:
        since = round(share * scale.after)
        row: Json = {"steps": since}
        for name in COLUMNS:
            run = runs[f"{name}@1"]
            at = run["changed"] - 1 + since
            row[name] = min(run["probed"], key=lambda p, at=at: abs(p["step"] - at))["losses"]["headers"]
        rows.append(row)
    return rows


def tables(result: Json) -> list[Table]:
    """What a person reads."""
    told = Table("figure", "predicted", "found", title="Predictions, from the pilot, and what was found")
    for name, both in result["figures"].items():
        told.add_row(name, f"{both['predicted']:g}", f"{both['found']:g}")
    after = Table("steps after the switch", *COLUMNS.values(), title="x (y) on the new text, nats a byte")
    for row in result["after_the_switch"]:
        after.add_row(str(row["steps"]), *(f"{row[name][0]:.3f} ({row[name][1]:.3f})" for name in COLUMNS))
    bars = Table("bar", "found", "expected", "")
    for bar in result["bars"]:
        bars.add_row(bar["name"], f"{bar['figure']:g}", bar["expected"], "holds" if bar["ok"] else "MISSED")
    seeds = result["by_seed"]
    if len(seeds["steered behind window"]) > 1:
        for name, values in seeds.items():
            bars.add_row(f"{name}, {len(values)} seeds: median", f"{statistics.median(values):.4f}", "", "")
    return [told, after, bars]
