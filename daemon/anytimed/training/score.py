"""How well a module predicts documents: sums of losses over windows, one document after the other.

Documents are cut as those of the hold-out are (`windows`): every token but a document's first is a target once, its end
token too. `loss`, over these, is what the daemon's evaluation and Hugging Face's `labels=input_ids` count.

Bits per byte have to be the same question for every tokenizer: how many bits for all bytes of the text? So there the
first token counts too, predicted from the end token alone (as after another document), and the end token, which is not
text, does not. It is what lm-evaluation-harness calls bits per byte, but for windows that do not overlap.

Sums are float64, on the device; nothing is waited for before `sums`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anytimed.contracts import HeldRecord, Holdout, Model, Tokens
from anytimed.training.device import Device
from anytimed.training.evaluate import IGNORED, windows


@dataclass(frozen=True, slots=True)
class Sums:
    """Over all documents. nats: of the targets; first_nats: of the documents' first tokens, which are no targets;
    end_nats: of their end tokens, which are."""

    documents: int
    targets: int
    nats: float
    first_nats: float
    end_nats: float

    @property
    def text_nats(self) -> float:
        """Of all tokens of the texts: the first ones with them, the end tokens without."""
        return self.nats + self.first_nats - self.end_nats


class Scorer:
    """Scores documents at the weights that `module` holds, which is on `device`."""

    def __init__(
        self, model: Model, module: nn.Module, device: Device, *, end_token: int, sequence_length: int, batch_size: int
    ) -> None:
        """sequence_length: targets of a window; batch_size: windows at a time."""
        self._model, self._module, self._device = model, module, device
        self._end, self._length, self._batch = end_token, sequence_length, batch_size
        self._rows: list[tuple[NDArray[np.int32], bool]] = []  # windows, and whether each is its document's last
        self._firsts: Counter[int] = Counter()
        self._targets = 0
        self._total = torch.zeros(2, dtype=torch.float64, device=device.torch_device)

    def add(self, tokens: Tokens) -> None:
        """A document, (n,), n > 0, without its end token."""
        self._firsts[int(tokens[0])] += 1
        ended = np.append(tokens, np.int32(self._end)).astype(np.int32)
        self._targets += tokens.size
        rows, _, _ = windows(Holdout((HeldRecord("", "", ended),)), self._length)
        for number, row in enumerate(rows, 1):
            self._rows.append((row, number == len(rows)))
            if len(self._rows) == self._batch:
                self._run()

    def sums(self) -> Sums:
        """Of all that was added. Waits for the device."""
        self._run()
        first = self._first_nats()
        nats, end_nats, first_nats = self._device.read([self._total, first])
        return Sums(self._firsts.total(), self._targets, nats, first_nats, end_nats)

    def _run(self) -> None:
        if not self._rows:
            return
        rows = np.stack([row for row, _ in self._rows])
        closing = np.array([last for _, last in self._rows], np.int64)
        self._rows = []
        filled = (rows != IGNORED).sum(axis=1)
        losses = self._losses(rows[:, : int(filled.max())])
        # The end token by its place, the last target of a last window: a text may hold the same number.
        ends = losses.gather(1, self._device.put(filled - 2)[:, None])[:, 0] * self._device.put(closing)
        self._total += torch.stack([losses.sum(), ends.sum()])

    @torch.no_grad()
    def _losses(self, rows: NDArray[np.int32]) -> Tensor:
        """Of the targets of each row, float64, (rows, length - 1)."""
        with self._device.autocast():
            return self._model.losses(self._module, self._device.put(rows)).double()

    def _first_nats(self) -> Tensor:
        """Each first token after the end token alone, as often as it came."""
        total = torch.zeros(1, dtype=torch.float64, device=self._device.torch_device)
        tokens = np.array(sorted(self._firsts), np.int32)
        for at in range(0, tokens.size, 256):
            some = tokens[at : at + 256]
            counts = self._device.put(np.array([self._firsts[int(token)] for token in some], np.int64))
            total += (self._losses(np.stack([np.full_like(some, self._end), some], axis=1))[:, 0] * counts).sum()
        return total
