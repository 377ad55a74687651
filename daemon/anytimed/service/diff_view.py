"""What `anytimed diff` shows: two checkpoints side by side, then how far the weights moved, layer by layer.

In order: the figures of both with what lies between; what was read of each source; the evaluation, where both were made
on the same hold-out; what else changed; and the weights, a line a layer, below it the tensors that moved the most.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from anytimed.contracts import Json
from anytimed.service.console import ago
from anytimed.storage.movement import Differs, Moved, grouped, together
from anytimed.urls import told

_SHOWN = 160
"""Characters of a value that people are shown."""


def manifest_lines(found: Json, ancestry: Json) -> Iterator[Any]:
    """What the manifests tell."""
    a, b = found["a"], found["b"]
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for title in ("A", "B"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("from A to B", overflow="fold")
    _add(table, "checkpoint", a["id"], b["id"], _descent(found, ancestry))
    if not found["same_run"]:
        _add(table, "run", _short(a["run_id"]), _short(b["run_id"]), "another run")
    if a["term"] != b["term"]:
        _add(table, "term", str(a["term"]), str(b["term"]), f"{abs(b['term'] - a['term'])} starts between")
    for name in ("step", "tokens"):
        _add(table, name, f"{a[name]:,}", f"{b[name]:,}", f"{found[name]:+,}")
    _add(table, "made", *(side["created"][:19].replace("T", " ") for side in (a, b)), _span(found["seconds"]))
    changed = "changed" if found["config_changed"] else "the same"
    _add(table, "config", _short(a["config_digest"]), _short(b["config_digest"]), changed)
    yield table
    yield from _optimizer(found["optimizer"])
    yield from _evaluation(found["evaluation"])
    yield from _sources(found["lineage"])
    yield from _others(found)


def weight_lines(tensors: Sequence[Moved | Differs], top: int, everything: bool) -> Iterator[Any]:
    """The weights: `top` of the tensors are marked as those that moved the most; all tensors with `everything`."""
    compared = [t for t in tensors if isinstance(t, Moved)]
    movers = {t.name for t in _movers(compared, top)}
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("weights", overflow="fold")
    for title in ("|A|", "|B|", "|B - A| / |A|", "cosine", "numbers"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, members in grouped(compared).items():
        alone = len(members) == 1 and members[0].name.removesuffix(".weight") == name
        _row(table, name, together(name, members), mark=alone and members[0].name in movers, style="bold")
        for tensor in () if alone else members:
            if everything or tensor.name in movers:
                _row(table, "  " + tensor.name[len(name) + 1 :], tensor, mark=tensor.name in movers)
    if compared:
        _row(table, "all", together("all", compared), mark=False, style="bold")
        yield table
        marked = f"◀ the {len(movers)} tensors that moved the most, of {len(compared)}"
        yield Text(marked if any(t.norm_change for t in compared) else "nothing moved")
    for other in tensors:
        if isinstance(other, Differs):
            yield Text(told(f"not compared: {other.name}: {other.a or 'not in A'} → {other.b or 'not in B'}"))


def _movers(tensors: Sequence[Moved], top: int) -> list[Moved]:
    changed = [t for t in tensors if t.norm_change]
    return sorted(changed, key=lambda t: -(math.inf if t.change is None else t.change))[:top]


def _row(table: Table, name: str, moved: Moved, *, mark: bool, style: str | None = None) -> None:
    change = "from zero" if moved.change is None else f"{moved.change:.2e}"
    cosine = "-" if moved.cosine is None else f"{moved.cosine:.6f}"
    table.add_row(
        Text(told(f"{name} ◀" if mark else name)),
        f"{moved.norm_a:.4g}",
        f"{moved.norm_b:.4g}",
        change,
        cosine,
        f"{moved.numbers:,}",
        style="yellow" if mark and style is None else style,
    )


# --- the manifests ----------------------------------------------------------------------------------------------------


def _descent(found: Json, ancestry: Json) -> str:
    if found["a"]["id"] == found["b"]["id"] and found["same_run"]:
        return "the same checkpoint"
    if ancestry["whole"]:
        exports = len(ancestry["chain"]) - 1
        return f"B descends from A, {exports} export{'s' if exports > 1 else ''} on"
    return f"no line of parents from B to A; known back to {ancestry['chain'][-1]}"


def _optimizer(found: Json) -> Iterator[Any]:
    if not found:
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("optimizer", overflow="fold")
    for title in ("A", "B", "change"):
        table.add_column(title, justify="right", overflow="fold")
    for name, (before, after) in found.items():
        _add(table, name, _value(before), _value(after), _delta(before, after))
    yield Text("")
    yield table


def _evaluation(found: Json | None) -> Iterator[Any]:
    if found is None:
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("evaluation", "A", "B", "change"):
        table.add_column(title, justify="left" if title == "evaluation" else "right")
    _add(table, "at step", *(_value(step) for step in found["at_step"]), "")
    _add(table, "hold-out", *(_short(digest or "-") for digest in found["holdout"]), "")
    comparable = found["comparable"]
    rows = [(which.replace("_", " of "), found[which]) for which in ("loss_x", "loss_y", "loss_z")]
    rows += [(f"  {name}, loss of x", losses) for name, losses in found.get("by_source", {}).items()]
    for name, (before, after) in rows:
        _add(table, name, _value(before), _value(after), _delta(before, after) if comparable else "")
    yield Text("")
    yield table
    if None in found["holdout"]:
        yield Text(f"{'A' if found['holdout'][0] is None else 'B'} was exported before it was evaluated.")
    elif not comparable:
        yield Text("Another hold-out, so the losses cannot be compared; `anytimed eval A B --data GLOB` can.")


def _sources(lineage: Json) -> Iterator[Any]:
    if not lineage:
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("read between", "records", "held out", "rejected", "tokens"):
        table.add_column(title, justify="left" if title == "read between" else "right")
    table.add_column("", overflow="fold")
    for name, source in lineage.items():
        notes = {"both": [], "a": ["not in B any more"], "b": ["new in B"]}[source["in"]]
        notes += [f"{key} {_value(x)} → {_value(y)}" for key, (x, y) in source["changed"].items()]
        counts = (f"{source[count]:+,}" for count in ("records", "held_out", "rejected", "tokens"))
        _add(table, name, *counts, "; ".join(notes))
    yield Text("")
    yield table


def _others(found: Json) -> Iterator[Any]:
    lines = [f"intervention: {_value(entry)}" for entry in found["interventions"]]
    lines += [f"flag, new in B: {flag}" for flag in found["flags"]["new"]]
    lines += [f"flag, gone in B: {flag}" for flag in found["flags"]["gone"]]
    for name, (before, after) in found["files"].items():
        where = "only in A" if after is None else "only in B" if before is None else "differs"
        lines.append(f"file {name}: {where}")
    if lines:
        yield Text("")
        yield from (Text(told(line)) for line in lines)
    yield Text("")


def _add(table: Table, *cells: str) -> None:
    """A row of plain texts: what a manifest says is neither markup nor a way to steer the terminal."""
    table.add_row(*(Text(told(cell)) for cell in cells))


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = value if isinstance(value, str) else json.dumps(value)
    return told(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")


def _delta(before: Any, after: Any) -> str:
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (before, after))
    return f"{after - before:+.4g}" if numbers else ""


def _span(seconds: float) -> str:
    return f"{ago(abs(seconds))} {'later' if seconds >= 0 else 'earlier'}"


def _short(text: str) -> str:
    return text[:12]
