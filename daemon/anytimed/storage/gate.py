"""Whether an export may become the latest: its x compared with the published one on the hold-out. Pure.

Losses are compared at equal hold-out only. Where the published x was not evaluated on the hold-out in force, nothing
can be compared: the export goes through, flagged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from anytimed.contracts import Evaluation

NOT_COMPARED = "not compared with the published x: it was evaluated on another hold-out"


@dataclass(frozen=True, slots=True)
class Standing:
    """The published x: its loss in nats per token on one hold-out."""

    checkpoint: str
    holdout: str
    loss_x: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """`refused`: why the export is kept aside, or None. `flag`: what stands in its manifest, or None."""

    refused: str | None = None
    flag: str | None = None


def judge(new: Evaluation | None, standing: Standing | None, margin: float | None) -> Verdict:
    """The verdict over an export whose latest evaluation is `new`. `margin`: by how many nats per token it may be worse
    than the published one; None lets everything through."""
    if margin is None or new is None or standing is None:
        return Verdict()
    if new.holdout != standing.holdout:
        return Verdict(flag=NOT_COMPARED)
    if math.isfinite(new.loss_x) and new.loss_x <= standing.loss_x + margin:
        return Verdict()
    return Verdict(
        refused=f"x has loss {new.loss_x:.4f} on the hold-out (step {new.step}), the published {standing.checkpoint} "
        f"{standing.loss_x:.4f}: worse by more than {margin:g} nats per token"
    )
