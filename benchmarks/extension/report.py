"""Curves to bars and tables: x on the new text and on the old one, so many steps after the change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rich.table import Table

from anytimed.contracts import Json
from extension.figures import FIRED, NEW, OLD, Curves, found
from extension.plans import HISTORIES
from extension.scales import Scale

CLOSE_NATS: Final = 0.05
BEHIND_NATS: Final = 1.0
WAYS: Final = {
    "plain": "plain averaging",
    "steered": "steered memory",
    "power-1": "averaging power 1",
    "power-4": "averaging power 4",
    "window-T": "window of T",
    "window-4T": "window of 4T",
    "amuse-plain": "AMUSE, plain",
    "amuse-steered": "AMUSE, steered",
    "amuse-window-4T": "AMUSE, window of 4T",
}
RIVALS: Final = {"normuon": "NorMuon restarted", "normuon, mu 0.8": "NorMuon (mu 0.8) restarted"}
CHANGES: Final = {"switch": "The new text alone", "added": "The new text beside the old one"}


def figures(runs: Mapping[str, Json], restarted: Mapping[str, Mapping[str, Json]], scale: Scale) -> Json:
    """`figures` by name, with what was predicted; `by_seed`, at the end behind the fitting window on the new text;
    `after`: by change, history and way, x on both texts so many steps after the change; `bars`."""
    curves = Curves(runs, restarted)
    told = found(curves)
    decisive = ["switch/long/plain", "switch/long/steered", "switch/long/power-1", "switch/window-T"]
    decisive += [of["run"].partition("@")[0] for of in restarted["switch"].values()]
    by_seed = {name: curves.by_seed(name) for name in decisive}
    near, far = by_seed["switch/long/steered"].values(), by_seed["switch/long/plain"].values()
    return {
        "figures": told,
        "by_seed": by_seed,
        "after": {
            change: {history: _rows(change, history, runs, restarted, scale) for history in HISTORIES}
            for change in CHANGES
        },
        "bars": bars(told[FIRED]["found"], max(near, default=None), min(far, default=None)),
    }


def _rows(
    change: str, history: str, runs: Mapping[str, Json], restarted: Mapping[str, Mapping[str, Json]], scale: Scale
) -> Json:
    """By way, of the runs of seed 1 that were made. A window and a restart stand with either history: they do not know
    it."""
    rows: Json = {}
    for way in WAYS:
        for name in (f"{change}/{history}/{way}@1", f"{change}/{way}@1"):
            if name in runs:
                rows[way] = _row(runs[name], scale)
    for kind in RIVALS:
        if (of := restarted[change].get(kind)) is not None:
            rows[kind] = {"lr": of["lr"], **_row(runs[of["run"]], scale)}
    return rows


def _row(run: Json, scale: Scale) -> Json:
    since = {point["step"] - run["changed"] + 1: point["losses"] for point in run["probed"]}
    return {str(row): since[row] for row in scale.rows}


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


def tables(result: Json) -> list[Table]:
    """What a person reads."""
    told = Table("figure, nats a byte", "predicted", "found", title="Predicted before the run, and found")
    for name, both in result["figures"].items():
        told.add_row(name, _number(both["predicted"]), _number(both["found"]))
    after = [
        _after(f"{CHANGES[change]}, {history} history: x on the new text (on the old), nats a byte", rows)
        for change, histories in result["after"].items()
        for history, rows in histories.items()
        if rows
    ]
    seeds = Table("the switch, long history", "by seed", title="At the end, behind a window of 4T on the new text")
    for name, found_by in result["by_seed"].items():
        seeds.add_row(name, "  ".join(f"{value:+.3f}" for value in found_by.values()))
    held = Table("bar", "found", "expected", "")
    for bar in result["bars"]:
        held.add_row(bar["name"], _number(bar["figure"]), bar["expected"], "holds" if bar["ok"] else "MISSED")
    return [*after, seeds, told, held]


def _after(title: str, rows: Json) -> Table:
    steps = [since for since in next(iter(rows.values())) if since != "lr"]
    table = Table("", *(f"{since} steps" for since in steps), title=title)
    for way, row in rows.items():
        name = WAYS.get(way) or f"{RIVALS[way]}, {row['lr']:g}"
        table.add_row(name, *(f"{row[since][NEW]:.3f} ({row[since][OLD]:.3f})" for since in steps))
    return table


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:g}"
