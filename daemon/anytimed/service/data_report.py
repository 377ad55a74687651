"""Where each source of a configuration stands: what `anytimed data` tells.

In order: the figures, from the daemon if one runs, from the newest commit if not; what the journal has adopted; what
the source itself answers now: what is new, and what comes next. Nothing is decided, written or acknowledged, and a
source that does not answer costs its own row only.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from anytimed.contracts import (
    AnytimedError,
    Closable,
    ConfigError,
    Describing,
    Json,
    Position,
    Refused,
    SourcePosition,
    SourceRule,
    Stream,
    StreamUnavailable,
    mixture_from_json,
    mixture_to_json,
)
from anytimed.data.fold import gathered
from anytimed.data.fold_file import FoldFile
from anytimed.data.position import SCOPE, Ledger, Voids
from anytimed.data.sources import beyond_budget, require_same_sources, same_mixture
from anytimed.service.assembly import Parts
from anytimed.service.quarantine import noted
from anytimed.service.run_on_disk import RunOnDisk
from anytimed.urls import told


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One source. share: of the draws while no source is left out, in [0, 1], in the mixture in force; None where it
    takes no part. wanted: its share by the configuration, None likewise. place: of the stream, after the last record;
    next: what comes then, for people. lag: of what is adopted, in `lag_unit`; new_lag: of `new_entries`, which are not
    adopted yet. Figures are None where the source does not tell."""

    share: float | None = None
    wanted: float | None = None
    when_dry: str | None = None
    passes: int = 1
    pass_number: int = 1
    left_out: bool = False
    suspended: str | None = None
    unavailable: str | None = None
    refused: str | None = None
    unacknowledged: str | None = None
    records: int = 0
    held_out: int = 0
    rejected: int = 0
    rejected_fraction: float = 0.0
    rejected_budget: Json | None = None
    tokens: int = 0
    lag: int | None = None
    lag_unit: str = "bytes"
    entries: int = 0
    new_entries: int | None = None
    new_lag: int | None = None
    place: Json | None = None
    next: str | None = None
    quarantined: int = 0
    quarantine_reason: str | None = None

    def counted(self, at: SourcePosition, rule: SourceRule | None) -> SourceRow:
        """With the counts of a position, and what a rule makes of them."""
        total = at.records + at.held_out + at.rejected
        return replace(
            self,
            pass_number=at.pass_number,
            left_out=at.dry,
            records=at.records,
            held_out=at.held_out,
            rejected=at.rejected,
            rejected_fraction=at.rejected / total if total else 0.0,
            suspended=beyond_budget(rule, at.rejected, total) if rule is not None else None,
            tokens=at.tokens,
            place=at.place,
        )


@dataclass(frozen=True, slots=True)
class DataReport:
    """commit: the newest, with `batches` trained on and the block and index that it resumes in; None before the first.
    daemon: step and pid of the one that runs, whose figures these are then; None: they are of the commit, at the
    beginning of its block. mixture_waits: the configuration's mixture is not in force yet."""

    directory: str
    commit: Json | None
    daemon: Json | None
    mixture_waits: bool
    rows: Mapping[str, SourceRow]

    def to_json(self) -> Json:
        sources = {name: asdict(row) for name, row in self.rows.items()}
        return {
            "directory": self.directory,
            "commit": self.commit,
            "daemon": self.daemon,
            "mixture_waits": self.mixture_waits,
            "sources": sources,
        }


def report(parts: Parts, run: RunOnDisk, status: Json | None) -> DataReport:
    """status: what the daemon says of itself, None where none runs. Raises ConfigError where a source is configured to
    read something else than before, Refused where the journal is not the commit's."""
    positions = run.sources()
    require_same_sources(parts.rules, positions)
    in_force = _in_force(run)
    wanted = _shares(parts.rules)
    shares = _shares(in_force or parts.rules)
    live = _live(status) if status is not None else None
    adopted = _adopted(run)
    rows: dict[str, SourceRow] = {}
    for name in sorted(positions.keys() | parts.config.sources.keys() | shares.keys()):
        rule = in_force.get(name) or parts.rules.get(name)
        row = SourceRow(share=shares.get(name), wanted=wanted.get(name), entries=len(adopted.get(name, [])))
        if rule is not None:
            budget = {"records": rule.rejected_records, "fraction": rule.rejected_fraction}
            row = replace(row, when_dry=rule.when_dry, passes=rule.passes, rejected_budget=budget)
        row = row.counted(positions.get(name, SourcePosition()), rule)
        if live is not None and name in live:
            row = _as_told(row, live[name])
        if name in parts.config.sources:
            row = _asked(parts, name, row, adopted.get(name, []), live=live is not None and name in live)
        with contextlib.suppress(OSError):
            count, reason = noted(run.directory.quarantine / "records", name)
            row = replace(row, quarantined=count, quarantine_reason=told(reason) if reason else None)
        rows[name] = row
    waits = bool(in_force) and not same_mixture(mixture_to_json(in_force), mixture_to_json(parts.rules))
    return DataReport(str(run.directory.path), run.told(), daemon_of(status), waits, rows)


def daemon_of(status: Json | None) -> Json | None:
    """Which daemon said this. Raises AnytimedError on a status of another version."""
    if status is None:
        return None
    try:
        return {"step": int(status["step"]), "pid": int(status["pid"])}
    except (LookupError, TypeError, ValueError) as error:
        raise AnytimedError(f"the daemon's status is none of this version: {error!r}") from error


# --- what stands on the disk ------------------------------------------------------------------------------------------


def _in_force(run: RunOnDisk) -> Mapping[str, SourceRule]:
    """The mixture that was decided last; empty before the first."""
    if run.commit is None:
        position = Position()
    else:
        with run.described():
            at = run.state["position"]
            position = Position(
                journal_length=at["journal_length"],
                journal_digest=at["journal_digest"],
                mixture=mixture_from_json(at["mixture"]),
            )
    decided = Ledger(run.journal, position).waiting("mixture")
    return mixture_from_json(decided[-1]["sources"]) if decided else position.mixture


def _adopted(run: RunOnDisk) -> Mapping[str, list[Any]]:
    """By source all entries that the journal has."""
    folds = FoldFile(None, run.journal, Voids(run.journal))
    return gathered(folds.restore(run.journal.length(SCOPE))).adopted


def _shares(rules: Mapping[str, SourceRule]) -> dict[str, float]:
    total = sum(rule.weight for rule in rules.values())
    return {name: rule.weight / total for name, rule in rules.items()}


# --- what the daemon says ---------------------------------------------------------------------------------------------


def _live(status: Json) -> Mapping[str, Json]:
    sources = status.get("sources")
    if not isinstance(sources, dict):
        raise AnytimedError("the daemon's status names no sources: it is of another version")
    return sources


def _as_told(row: SourceRow, source: Json) -> SourceRow:
    """With the daemon's own figures, which are of the record that it read last."""
    try:
        names = ("pass_number", "records", "held_out", "rejected", "tokens", "entries", "when_dry", "share")
        total = source["records"] + source["held_out"] + source["rejected"]
        return replace(
            row,
            **{name: source[name] for name in names},
            place=source["place"],
            rejected_fraction=source["rejected"] / total if total else 0.0,
            lag=source["lag_bytes"],
            left_out=source["dry"],
            suspended=_safe(source["suspended"]),
            unavailable=_safe(source["unavailable"]),
            unacknowledged=_safe(source["unacknowledged"]),
        )
    except (LookupError, TypeError, ZeroDivisionError) as error:
        raise AnytimedError(f"the daemon's status is none of this version: {error!r}") from error


# --- what the source says ---------------------------------------------------------------------------------------------


def _asked(parts: Parts, name: str, row: SourceRow, adopted: Sequence[Any], *, live: bool) -> SourceRow:
    """With what the source itself answers now."""
    try:
        stream = parts.open_stream(name)
    except (StreamUnavailable, Refused) as error:
        return _failed(row, error)
    try:
        return _looked_at(stream, row, adopted, live=live)
    finally:
        if isinstance(stream, Closable):
            with contextlib.suppress(StreamUnavailable):
                stream.close()


def _looked_at(stream: Stream, row: SourceRow, adopted: Sequence[Any], *, live: bool) -> SourceRow:
    row = replace(row, lag_unit=getattr(stream, "lag_unit", "bytes"))
    try:
        if adopted:
            stream.adopt(adopted)
        lag = stream.lag(row.place)
        row = replace(row, lag=row.lag if live else lag, next=_next(stream, row.place))
        new = stream.discover()
        if new:
            stream.adopt(new)
        row = replace(row, new_entries=len(new), new_lag=stream.lag(row.place) - lag, next=_next(stream, row.place))
    except (StreamUnavailable, Refused) as error:
        return _failed(row, error)
    return row


def _next(stream: Stream, place: Json | None) -> str:
    if isinstance(stream, Describing):
        return told(stream.describe(place))
    return "the beginning" if place is None else f"after {told(json.dumps(place))}"


def _failed(row: SourceRow, error: AnytimedError) -> SourceRow:
    if isinstance(error, ConfigError):
        raise error
    if isinstance(error, Refused):
        return replace(row, refused=told(str(error)))
    return replace(row, unavailable=told(str(error)))


def _safe(text: object) -> str | None:
    return told(str(text)) if text is not None else None
