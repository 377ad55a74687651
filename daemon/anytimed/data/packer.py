"""Documents to sequences of equal length, with nothing thrown away.

Tokens of all documents are laid end to end. A window is `sequence_length + 1` tokens, the next one starts
`sequence_length` later: its first token is the last target of the one before, so that every token but the very first is
a target exactly once. What does not fill a window is the remainder, at most `sequence_length` tokens after each `take`.
Every token carries the label of the source that it came from.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from anytimed.contracts import Tokens

Labels = NDArray[np.int16]


class Packer:
    """Holds tokens until they fill windows. `sequence_length` >= 1, in tokens."""

    def __init__(self, sequence_length: int) -> None:
        self._length = sequence_length
        self._parts: list[Tokens] = []
        self._labels: list[int] = []
        self._counts: list[int] = []
        self._size = 0

    @property
    def windows(self) -> int:
        """Full windows that wait to be taken."""
        return max(0, (self._size - 1) // self._length)

    def add(self, tokens: Tokens, label: int) -> None:
        """Append tokens, int32, shape (n,), of one source; copies nothing (parts are joined once, in `take`)."""
        self._parts.append(tokens)
        self._labels.append(label)
        self._counts.append(tokens.size)
        self._size += tokens.size

    def take(self) -> tuple[NDArray[np.int32], Labels]:
        """All full windows, shape (windows, sequence_length + 1), and the labels of their targets, shape (windows,
        sequence_length); they leave the packer."""
        count, length = self.windows, self._length
        flat, labels = self._joined()
        windows = np.lib.stride_tricks.sliding_window_view(flat, length + 1)[::length] if count else flat[:0]
        taken = windows.reshape(count, length + 1).copy()
        told = labels[1 : 1 + count * length].reshape(count, length).copy()
        rest, runs = flat[count * length :].copy(), _runs(labels[count * length :])
        self._parts, self._size = [rest], rest.size
        self._labels, self._counts = [label for label, _ in runs], [n for _, n in runs]
        return taken, told

    def remainder(self) -> tuple[Tokens, list[tuple[int, int]]]:
        """The tokens that wait, shape (n,), as a copy, and whose they are in runs of (label, tokens)."""
        flat, labels = self._joined()
        return flat.copy(), _runs(labels)

    def _joined(self) -> tuple[Tokens, Labels]:
        if len(self._parts) != 1:
            self._parts = [np.concatenate(self._parts) if self._parts else np.zeros(0, np.int32)]
        return self._parts[0], np.repeat(np.array(self._labels, np.int16), np.array(self._counts, np.int64))


def _runs(labels: Labels) -> list[tuple[int, int]]:
    if not labels.size:
        return []
    starts = np.concatenate([[0], np.flatnonzero(np.diff(labels)) + 1])
    counts = np.diff(np.concatenate([starts, [labels.size]]))
    return list(zip(labels[starts].tolist(), counts.tolist(), strict=True))
