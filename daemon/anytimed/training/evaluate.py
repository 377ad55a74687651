"""Losses on the hold-out, at weights that the module does not hold.

The hold-out's records become windows once per version; each set of weights is then run through `functional_call`, so
that the module's own parameters (y) are never touched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from anytimed.contracts import Evaluation, Holdout, Model, SourceLosses
from anytimed.training.device import Device

IGNORED = -100


def windows(holdout: Holdout, sequence_length: int) -> tuple[NDArray[np.int32], NDArray[np.int16], tuple[str, ...]]:
    """Every held-out record cut into windows, (n, sequence_length + 1), each token but a record's first a target once;
    what a record leaves empty is -100 and does not count. And for each window, (n,), the index of its source among the
    names, which are sorted."""
    names = tuple(sorted({record.source for record in holdout.records}))
    rows: list[NDArray[np.int32]] = []
    sources: list[int] = []
    for record in holdout.records:
        for start in range(0, max(record.tokens.size - 1, 0), sequence_length):
            row = np.full(sequence_length + 1, IGNORED, np.int32)
            piece = record.tokens[start : start + sequence_length + 1]
            row[: piece.size] = piece
            rows.append(row)
            sources.append(names.index(record.source))
    stacked = np.stack(rows) if rows else np.zeros((0, sequence_length + 1), np.int32)
    return stacked, np.array(sources, np.int16), names


class Evaluator:
    """Evaluates x, y and z on the hold-out in force; keeps the windows of the last version."""

    def __init__(
        self, model: Model, module: nn.Module, device: Device, *, sequence_length: int, batch_size: int
    ) -> None:
        self._model, self._module, self._device = model, module, device
        self._length, self._batch = sequence_length, batch_size
        self._digest = ""
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._targets: dict[str, int] = {}
        self._shares: list[float] = []

    def evaluate(
        self, step: int, holdout: Holdout, x: Mapping[str, Tensor], y: Mapping[str, Tensor], z: Mapping[str, Tensor]
    ) -> Evaluation | None:
        """Losses in nats per token at the three sets of weights (by parameter name); None while nothing is held out."""
        if not self._take(holdout):
            return None
        at = self._means(x, y, z)
        by_source = {
            name: SourceLosses(count, *(means[i] for means in at))
            for i, (name, count) in enumerate(self._targets.items())
        }
        x_loss, y_loss, z_loss = map(self._weighed, at)
        return Evaluation(step, self._digest, sum(self._targets.values()), x_loss, y_loss, z_loss, by_source)

    def loss_at(self, weights: Mapping[str, Tensor], holdout: Holdout) -> float | None:
        """Loss in nats per token at one set of weights; None while nothing is held out."""
        return self._weighed(self._means(weights)[0]) if self._take(holdout) else None

    def _take(self, holdout: Holdout) -> bool:
        """Keep the windows of this hold-out; whether there is anything to evaluate on."""
        if holdout.digest != self._digest:
            rows, sources, names = windows(holdout, self._length)
            counted = (rows[:, 1:] != IGNORED).sum(axis=1)
            self._digest = holdout.digest
            self._targets = {name: int(counted[sources == i].sum()) for i, name in enumerate(names)}
            weights = [holdout.weights.get(name, 0.0) for name in names]
            total = math.fsum(weights)
            self._shares = [weight / total for weight in weights] if total else [1 / len(names) for _ in names]
            self._batches = [
                (self._device.put(rows[i : i + self._batch]), self._device.put(sources[i : i + self._batch]))
                for i in range(0, len(rows), self._batch)
            ]
        return bool(self._targets)

    def _weighed(self, means: Sequence[float]) -> float:
        return math.fsum(share * mean for share, mean in zip(self._shares, means, strict=True))

    def _means(self, *weights: Mapping[str, Tensor]) -> list[list[float]]:
        """For each set of weights the mean loss of every source. Waits for the device once."""
        sums = iter(self._device.read([self._sums(named) for named in weights]))
        return [[next(sums) / count for count in self._targets.values()] for _ in weights]

    @torch.no_grad()
    def _sums(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The summed loss of every source, float64."""
        own = dict(self._module.named_parameters())
        cast = {name: tensor.to(own[name].dtype) for name, tensor in weights.items()}

        def run(tokens: Tensor, documents: Tensor | None = None) -> Tensor:
            logits: Tensor = functional_call(
                self._module, cast, (tokens,) if documents is None else (tokens, documents)
            )
            return logits

        total = torch.zeros(len(self._targets), dtype=torch.float64, device=self._device.torch_device)
        with self._device.autocast():
            for tokens, sources in self._batches:
                total += sums_by(self._model.losses(run, tokens).sum(dim=1), sources, len(self._targets))
        return total


def sums_by(values: Tensor, labels: Tensor, count: int) -> Tensor:
    """The sum of the values of every label, (count,), float64. values, labels: any one shape. A product, not a scatter:
    on CUDA a scatter adds up in any order."""
    with torch.autocast(values.device.type, enabled=False):
        of = labels.flatten()[None, :] == torch.arange(count, device=labels.device)[:, None]
        return of.double() @ values.detach().flatten().double()
