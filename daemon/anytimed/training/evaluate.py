"""Losses on the hold-out, at weights that the module does not hold.

The hold-out's records become windows once per version; each set of weights is then run through `functional_call`, so
that the module's own parameters (y) are never touched."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from anytimed.contracts import Evaluation, Holdout, Model
from anytimed.training.device import Device

IGNORED = -100


def windows(holdout: Holdout, sequence_length: int) -> NDArray[np.int32]:
    """Every held-out record cut into windows, (n, sequence_length + 1), each token but a record's first a target once;
    what a record leaves empty is -100 and does not count."""
    rows: list[NDArray[np.int32]] = []
    for record in holdout.records:
        for start in range(0, max(record.tokens.size - 1, 0), sequence_length):
            row = np.full(sequence_length + 1, IGNORED, np.int32)
            piece = record.tokens[start : start + sequence_length + 1]
            row[: piece.size] = piece
            rows.append(row)
    return np.stack(rows) if rows else np.zeros((0, sequence_length + 1), np.int32)


class Evaluator:
    """Evaluates x, y and z on the hold-out in force; keeps the windows of the last version."""

    def __init__(
        self, model: Model, module: nn.Module, device: Device, *, sequence_length: int, batch_size: int
    ) -> None:
        self._model, self._module, self._device = model, module, device
        self._length, self._batch = sequence_length, batch_size
        self._digest, self._batches, self._targets = "", list[Tensor](), 0

    def evaluate(
        self, step: int, holdout: Holdout, x: Mapping[str, Tensor], y: Mapping[str, Tensor], z: Mapping[str, Tensor]
    ) -> Evaluation | None:
        """Mean losses in nats per token at the three sets of weights (by parameter name); None while nothing is held
        out."""
        if not self._take(holdout):
            return None
        losses = self._device.read([self._loss(x), self._loss(y), self._loss(z)])
        mean = [loss / self._targets for loss in losses]
        return Evaluation(step, self._digest, self._targets, *mean)

    def loss_at(self, weights: Mapping[str, Tensor], holdout: Holdout) -> float | None:
        """Mean loss in nats per token at one set of weights; None while nothing is held out."""
        return self._device.read([self._loss(weights)])[0] / self._targets if self._take(holdout) else None

    def _take(self, holdout: Holdout) -> bool:
        """Keep the windows of this hold-out; whether there is anything to evaluate on."""
        if holdout.digest != self._digest:
            rows = windows(holdout, self._length)
            self._digest, self._targets = holdout.digest, int((rows[:, 1:] != IGNORED).sum())
            self._batches = [self._device.put(rows[i : i + self._batch]) for i in range(0, len(rows), self._batch)]
        return self._targets > 0

    @torch.no_grad()
    def _loss(self, weights: Mapping[str, Tensor]) -> Tensor:
        own = dict(self._module.named_parameters())
        cast = {name: tensor.to(own[name].dtype) for name, tensor in weights.items()}

        def run(tokens: Tensor) -> Tensor:
            logits: Tensor = functional_call(self._module, cast, (tokens,))
            return logits

        total = torch.zeros((), dtype=torch.float64, device=self._device.torch_device)
        with self._device.autocast():
            for tokens in self._batches:
                total += self._model.losses(run, tokens).sum()
        return total
