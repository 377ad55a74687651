"""What trackers draw: the numbers of a record, by a name with a group in front of the slash."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from anytimed.contracts import Json

_AXES = frozenset({"kind", "time", "step", "tokens"})
_HELD_OUT = frozenset({"loss_x", "loss_y", "loss_z", "targets"})
"""Of an evaluation; its other figures are the optimizer's."""


def figures(record: Json) -> dict[str, float]:
    """`training/loss`, `prequential/SOURCE`, `holdout/loss_x`, `holdout/SOURCE/loss_x`, `optimizer/beta`, …; what is
    not known (null) is left out. Nothing for events."""
    match record["kind"]:
        case "step":
            return dict(_numbers(record, "training"))
        case "evaluation":
            return dict(_numbers(record, "optimizer"))
        case _:
            return {}


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
        if key == "prequential":
            yield from ((f"{key}/{source}", float(loss)) for source, loss in value.items() if loss is not None)
        elif key == "by_source":
            for source, losses in value.items():
                yield from _numbers(losses, f"holdout/{source}")
        elif isinstance(value, int | float) and key not in _AXES:
            held_out = group == "optimizer" and key in _HELD_OUT
            yield f"{'holdout' if held_out else group}/{key}", float(value)
