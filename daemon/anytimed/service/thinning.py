"""Which lines of metrics.jsonl stay as they grow old, and what becomes of the others.

A line is read; where its step was taken before, the earlier lines of that step and of later ones go (`Thinner.add`).
Neighbours of one kind then become one line that says of how many it is, `"of": n`, with the means and the lowest and
highest of what was measured, as long as that line spans

- at most 1/keep of its age, counted in records: resolution halves with every doubling of age, and
- (steps and evaluations) at most 1/EARLY of what was before it: the first decades of a logarithmic axis stay.

What N records leave is at most about 2·keep·log2(N/keep) lines a kind; where they are long, both are halved until they
fit the budget. Events of routine give way first. No clock decides, so a wrong one spoils nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from anytimed.contracts import Json

KEEP = {"step": 512, "evaluation": 256, "lasting": 512, "routine": 128, "other": 128}
LEAST_KEEP = 8
EARLY = 48
ROUTINE = frozenset({"commit", "export", "mirrored", "verified", "state"})
"""Events that are as expected; all others (interventions, failures, what people asked for) live longer."""
FIELDS = {"step": ("loss", "tokens_per_s", "grad_norm"), "evaluation": ("loss_x", "loss_y", "loss_z")}
"""What is measured, in the order of the columns."""
KEPT = {
    "step": ("kind", "time", "step", "tokens", "skipped", "batches_ready"),
    "evaluation": ("kind", "time", "step", "tokens", "holdout", "holdout_tokens"),
}
"""What a line of several has from the newest of them."""
MOST_STEPS = 1 << 53


def nothing() -> None:
    """Between two lines."""


def read(raw: bytes) -> Json | None:
    """The record of a line, None where it is none: torn, garbage, not what this version writes."""
    try:
        record = json.loads(raw)
        kind, of = record["kind"], record.get("of", 1)
        if not (isinstance(kind, str) and whole(of) and of > 0 and math.isfinite(number(record["time"]))):
            return None
        if kind in FIELDS and not (whole(record["step"]) and whole(record.get("tokens", 0))):
            return None
        if kind == "event" and not isinstance(record["what"], str):
            return None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return record  # type: ignore[no-any-return]


def whole(value: object) -> bool:
    return type(value) is int and 0 <= value < MOST_STEPS


def number(value: Any) -> float:
    """NaN for what is no number."""
    try:
        return float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        return math.nan


def bounds(record: Json, field: str) -> tuple[float, float]:
    """The lowest and the highest of what a line stands for."""
    told = record.get("range")
    pair = told.get(field) if isinstance(told, dict) else None
    value = number(record.get(field))
    if not (isinstance(pair, list) and len(pair) == 2):
        return value, value
    low, high = map(number, pair)
    return (value if math.isnan(low) else low), (value if math.isnan(high) else high)


def sources(record: Json) -> dict[str, float]:
    """The prequential losses that a line has, by source."""
    told = record.get("prequential")
    if not isinstance(told, dict):
        return {}
    return {name: value for name, found in told.items() if math.isfinite(value := number(found))}


def short(value: float) -> float | None:
    """Six digits are enough for a picture; JSON has no word for NaN and Inf."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Line:
    """order: of the newest record that it stands for; step: -1 where it has none."""

    order: int
    of: int
    step: int
    raw: bytes


class Thinner:
    """Takes lines, oldest first, and keeps no more than the budget and what came since. `breathe` is called between
    lines: whoever runs this beside a training lets it have the interpreter there."""

    def __init__(self, budget_bytes: int, breathe: Callable[[], None] = nothing) -> None:
        self._budget, self._breathe = budget_bytes, breathe
        self._lines: dict[str, list[Line]] = {group: [] for group in KEEP}
        self.bytes = self._count = 0

    def add(self, raw: bytes) -> None:
        """A line, without its end."""
        record = read(raw)
        if record is None:
            return
        kind = record["kind"]
        group = kind if kind in FIELDS else group_of(record) if kind == "event" else "other"
        step = record["step"] if kind in FIELDS else -1
        if kind in FIELDS:
            self._cut("evaluation", step)
            self._cut("step", step if kind == "step" else step + 1)
        self._count += 1
        self._lines[group].append(Line(self._count, record.get("of", 1), step, raw))
        self.bytes += len(raw) + 1
        if self.bytes > 4 * self._budget:
            self._thin()
        self._breathe()

    def lines(self) -> list[bytes]:
        """What stays, in the order of time."""
        self._thin()
        return [line.raw for line in sorted(self._all(), key=lambda line: line.order)]

    def _cut(self, group: str, step: int) -> None:
        """Drop what was taken again: lines of that step and later ones."""
        lines = self._lines[group]
        while lines and lines[-1].step >= step:
            self.bytes -= len(lines.pop().raw) + 1

    def _thin(self) -> None:
        keep = dict(KEEP)
        for group in KEEP:
            self._apply(group, keep[group])
        while sum(map(self._size, KEEP)) > self._budget:
            large = max((group for group in KEEP if keep[group] > LEAST_KEEP), key=self._size, default=None)
            if large is None:
                break
            keep[large] //= 2
            self._apply(large, keep[large])
        self.bytes = sum(map(self._size, KEEP))

    def _apply(self, group: str, keep: int) -> None:
        lines = self._lines[group]
        early = max(3, EARLY * keep // KEEP[group]) if group in FIELDS else 0
        parts = partition([line.of for line in lines], keep, early)
        self._lines[group] = made = []
        for first, end in parts:
            made.append(lines[first] if end - first == 1 else _one(lines[first:end]))
            self._breathe()

    def _size(self, group: str) -> int:
        return sum(len(line.raw) + 1 for line in self._lines[group])

    def _all(self) -> Iterable[Line]:
        return (line for lines in self._lines.values() for line in lines)


def group_of(event: Json) -> str:
    return "routine" if event["what"] in ROUTINE else "lasting"


def partition(of: Sequence[int], keep: int, early: int) -> list[tuple[int, int]]:
    """Which neighbours become one, as (first, end), for lines that stand for so many records each, oldest first."""
    parts: list[tuple[int, int]] = []
    older, newer, first, span = 0, sum(of), 0, 0
    for i, count in enumerate(of):
        newer -= count
        allowed = newer // keep
        if early:
            allowed = min(allowed, older // early)
        if span and span + count > allowed:
            parts.append((first, i))
            first, span = i, 0
        span += count
        older += count
    if span:
        parts.append((first, len(of)))
    return parts


def _one(lines: Sequence[Line]) -> Line:
    """One line for several; of events the newest."""
    records = [json.loads(line.raw) for line in lines]
    newest, of = records[-1], sum(line.of for line in lines)
    fields = FIELDS.get(newest["kind"])
    if fields is None:
        made = {**newest, "of": of}
    else:
        made = {key: newest[key] for key in KEPT[newest["kind"]] if key in newest}
        made |= {field: newest.get(field) for field in fields}
        if newest["kind"] == "step":
            weights = [line.of for line in lines]
            made |= {field: short(_mean([number(r.get(field)) for r in records], weights)) for field in fields}
            made["prequential"] = _means([sources(record) for record in records], weights)
        made["of"] = of
        made["range"] = {field: _range(records, field) for field in fields}
    raw = json.dumps(made, separators=(",", ":"), allow_nan=True).encode()
    return Line(lines[-1].order, of, lines[-1].step, raw)


def _range(records: Sequence[Json], field: str) -> list[float | None]:
    low, high = zip(*(bounds(record, field) for record in records), strict=True)
    return [
        short(min((v for v in low if math.isfinite(v)), default=math.nan)),
        short(max((v for v in high if math.isfinite(v)), default=math.nan)),
    ]


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    """Of those that are known."""
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if math.isfinite(value)]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else math.nan


def _means(by_source: Sequence[dict[str, float]], weights: Sequence[int]) -> dict[str, float | None]:
    names = sorted({name for found in by_source for name in found})
    return {name: short(_mean([found.get(name, math.nan) for found in by_source], weights)) for name in names}
