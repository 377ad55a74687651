"""Steps or evaluations in memory: a column of plain numbers for each figure, and few rows made of many for a picture.

A row stands for `of` records and has the lowest and the highest of them beside each figure. `Series.rows` copies what
it is asked for; `few` makes at most about so many rows of it: half of the cuts are even in tokens and half in their
logarithm, so both axes get a fine line, and the newest row stands alone."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anytimed.contracts import Json
from anytimed.service.thinning import FIELDS, bounds, number, short, sources

Column = NDArray[np.float64]
MOST_SOURCES = 64
"""In a picture; those with the most figures."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Columns of equal length: `of`, `step`, `tokens`, `time`, and each figure with `_low` and `_high`. by_source: the
    rows in which a source has a prequential loss, and the losses. Unknown figures are NaN."""

    columns: dict[str, Column]
    by_source: dict[str, tuple[NDArray[np.int64], Column]]

    def __len__(self) -> int:
        return len(self.columns["step"])


class Series:
    """kind: "step" or "evaluation"."""

    def __init__(self, kind: str) -> None:
        self._fields = FIELDS[kind]
        names = ["of", "step", "tokens", "time"]
        names += [f"{field}{end}" for field in self._fields for end in ("", "_low", "_high")]
        self._columns = {name: array("d") for name in names}
        self._figures = [
            (field, tuple(self._columns[f"{field}{end}"] for end in ("", "_low", "_high"))) for field in self._fields
        ]
        self._by_source: dict[str, tuple[array[int], array[float]]] = {}

    def __len__(self) -> int:
        return len(self._columns["step"])

    def add(self, record: Json) -> None:
        """A record as `thinning.read` lets it through."""
        columns, row = self._columns, len(self)
        columns["of"].append(record.get("of", 1))
        columns["step"].append(record["step"])
        columns["tokens"].append(record.get("tokens", 0))
        columns["time"].append(record["time"])
        ranged = "range" in record
        for field, (value, lowest, highest) in self._figures:
            found = number(record.get(field))
            low, high = bounds(record, field) if ranged else (found, found)
            value.append(found)
            lowest.append(low)
            highest.append(high)
        for name, loss in sources(record).items():
            rows, losses = self._by_source.setdefault(name, (array("q"), array("d")))
            rows.append(row)
            losses.append(loss)

    def cut(self, step: int) -> None:
        """Drop the rows of that step and of later ones: they were taken again."""
        steps = self._columns["step"]
        length = len(steps)
        while length and steps[length - 1] >= step:
            length -= 1
        if length == len(steps):
            return
        for column in self._columns.values():
            del column[length:]
        for name, (rows, losses) in list(self._by_source.items()):
            left = len(rows)
            while left and rows[left - 1] >= length:
                left -= 1
            del rows[left:], losses[left:]
            if not left:
                del self._by_source[name]

    def rows(self) -> Rows:
        """A copy."""
        return Rows(
            {name: np.array(column) for name, column in self._columns.items()},
            {name: (np.array(rows), np.array(losses)) for name, (rows, losses) in self._by_source.items()},
        )


def since(rows: Rows, time: float) -> Rows:
    """The rows from the first one that is not older."""
    late = rows.columns["time"] >= time
    first = int(np.argmax(late)) if late.any() else len(rows)
    by_source = {
        name: (found[0][found[0] >= first] - first, found[1][found[0] >= first])
        for name, found in rows.by_source.items()
    }
    return Rows(
        {name: column[first:] for name, column in rows.columns.items()},
        {name: found for name, found in by_source.items() if len(found[0])},
    )


def few(rows: Rows, kind: str, points: int) -> Json:
    """At most about `points` rows as lists by name. A step's figures are the means of what its row stands for, an
    evaluation's are those of the newest; with the lowest and the highest."""
    n = len(rows)
    names = [name for name in rows.columns if name != "of"]
    named = sorted(rows.by_source, key=lambda name: (-len(rows.by_source[name][0]), name))[:MOST_SOURCES]
    if not n:
        return {**{name: [] for name in names}, **({"prequential": {}} if kind == "step" else {})}
    starts = _starts(rows.columns["tokens"], points)
    ends = np.append(starts[1:], n) - 1
    weight = rows.columns["of"]
    made: Json = {}
    for name in names:
        column = rows.columns[name]
        if name in ("step", "tokens"):
            made[name] = column[ends].astype(np.int64).tolist()
        elif name == "time":
            made[name] = np.round(column[ends], 3).tolist()
        elif name.endswith("_low"):
            made[name] = _shorts(np.fmin.reduceat(column, starts))
        elif name.endswith("_high"):
            made[name] = _shorts(np.fmax.reduceat(column, starts))
        elif kind == "step":
            made[name] = _shorts(_weighed(column, weight, starts))
        else:
            made[name] = _shorts(column[ends])
    if kind == "step":
        made["prequential"] = {}
        for name in sorted(named):
            at, losses = rows.by_source[name]
            column = np.full(n, math.nan)
            column[at] = losses
            made["prequential"][name] = _shorts(_weighed(column, weight, starts))
    return made


def _starts(tokens: Column, points: int) -> NDArray[np.int64]:
    """The first row of each."""
    n = len(tokens)
    if n <= points:
        return np.arange(n)
    at = np.maximum.accumulate(tokens)
    half = max(points // 2, 2)
    even = np.linspace(at[0], at[-1], half)
    decades = np.geomspace(max(at[0], 1.0), max(at[-1], 1.0), half)
    cuts = np.searchsorted(at, np.concatenate([even, decades]))
    return np.unique(np.concatenate([[0], cuts[cuts < n], [n - 1]])).astype(np.int64)


def _weighed(column: Column, weight: Column, starts: NDArray[np.int64]) -> Column:
    known = np.isfinite(column)
    sums = np.add.reduceat(np.where(known, column, 0.0) * weight, starts)
    weights = np.add.reduceat(np.where(known, weight, 0.0), starts)
    made: Column = np.divide(sums, weights, out=np.full(len(starts), math.nan), where=weights > 0)
    return made


def _shorts(column: Column) -> list[float | None]:
    return [short(value) for value in column.tolist()]
