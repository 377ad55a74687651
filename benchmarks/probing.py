"""Losses on documents that are no part of any stream, at weights that the parameters need not hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor

from anytimed.contracts import HeldRecord, Holdout
from anytimed.service.session import Session
from anytimed.training.evaluate import Evaluator

ROWS: int = 64
"""Windows that are measured at once."""


class Probe:
    """Documents of one text, for one session: mean loss in nats per token (with the byte tokenizer: per byte)."""

    def __init__(self, session: Session, name: str, documents: Iterable[str]) -> None:
        parts, self._learner = session.parts, session.learner
        records = tuple(HeldRecord(name, str(i), parts.tokenizer.encode(text)) for i, text in enumerate(documents))
        self._holdout = Holdout(records, {name: 1.0})
        self._evaluator = Evaluator(
            parts.model,
            self._learner.module,
            self._learner.device,
            sequence_length=parts.config.data.sequence_length,
            batch_size=ROWS,
        )

    def losses(self, at: Iterable[str]) -> list[float | None]:
        """At each of "x", "y", "z"; None where the loss is not finite."""
        return [rounded(self._evaluator.loss_at(self._weights(which), self._holdout)) for which in at]

    def _weights(self, which: str) -> Mapping[str, Tensor]:
        named = dict(self._learner.module.named_parameters())
        if which == "y":
            return {name: p.detach() for name, p in named.items()}
        values = self._learner.optimizer.averaged() if which == "x" else self._learner.optimizer.iterate()
        return {name: values[p] for name, p in named.items()}


def rounded(value: float | None) -> float | None:
    """To five places; None where it is not finite, for JSON has no word for that."""
    return None if value is None or not math.isfinite(value) else round(value, 5)
