"""What trackers draw: the numbers of a record, by a name with a group in front of the slash."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from anytimed.contracts import Json

GROUPS = {"step": "training", "evaluation": "holdout"}
_AXES = frozenset({"kind", "time", "step", "tokens"})


def figures(record: Json) -> dict[str, float]:
    """`training/loss`, `prequential/SOURCE`, `holdout/loss_x`, `holdout/SOURCE/loss_x`, …; what is not known (null) is
    left out. Nothing for events."""
    group = GROUPS.get(record["kind"])
    return {} if group is None else dict(_numbers(record, group))


def event(record: Json) -> str | None:
    """A line for people where the record is an event."""
    if record["kind"] != "event":
        return None
    told = record.get("told")
    if told is None:
        told = ", ".join(f"{key} {value}" for key, value in record.items() if key not in (*_AXES, "what", "id"))
    return f"step {record.get('step')}: {record['what']}: {told}"


def _numbers(record: Mapping[str, Any], group: str) -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, int | float) and key not in _AXES:
            yield f"{group}/{key}", float(value)
        elif key == "prequential":
            yield from ((f"{key}/{source}", float(loss)) for source, loss in value.items() if loss is not None)
        elif key == "by_source":
            for source, losses in value.items():
                yield from _numbers(losses, f"{group}/{source}")
