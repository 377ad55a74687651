"""Documents to sequences of equal length, with nothing thrown away.

Tokens of all documents are laid end to end. A window is `sequence_length + 1` tokens, the next one starts
`sequence_length` later: its first token is the last target of the one before, so that every token but the very first is
a target exactly once. What does not fill a window is the remainder, at most `sequence_length` tokens after each `take`.
Every token carries the label of the source that it came from; labels are kept in runs.

Tokens are copied once, into a buffer that leaves with its windows and comes back when they are used up: memory that was
touched before costs a fraction of fresh pages. Where the vocabulary allows it the buffer has two bytes a token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anytimed.contracts import AnytimedError, Tokens

Labels = NDArray[np.int16]
Run = tuple[int, int]
"""A label and how many tokens have it."""

Buffer = NDArray[Any]
"""uint16 or int32, shape (n,)."""
_SPARE = 2
"""Buffers kept for later."""


class Windows:
    """Windows of one buffer, by number; `labels` of the targets, by number too."""

    def __init__(self, buffer: Buffer, count: int, length: int, runs: Sequence[Run]) -> None:
        self.buffer = buffer
        self._count, self._length = count, length
        self._runs = runs
        self._labels: Labels | None = None

    def __len__(self) -> int:
        return self._count

    def tokens(self, numbers: NDArray[np.intp]) -> NDArray[np.int32]:
        """A copy of some windows, (n, length + 1)."""
        length = self._length
        taken = np.empty((len(numbers), length + 1), np.int32)
        # Without the last token of each, which the next window shares: an index over overlapping windows costs numpy
        # several times as much.
        taken[:, :length] = self.buffer[: self._count * length].reshape(self._count, length)[numbers]
        taken[:, length] = self.buffer[length::length][numbers]
        return taken

    def labels(self, numbers: NDArray[np.intp]) -> Labels:
        """Those of the targets of some windows, (n, length); read-only."""
        if len(self._runs) <= 1:
            return _all_of(self._runs[0][0] if self._runs else 0, len(numbers), self._length)
        if self._labels is None:
            told = np.repeat([label for label, _ in self._runs], [n for _, n in self._runs]).astype(np.int16)
            self._labels = told[1 : 1 + self._count * self._length].reshape(self._count, self._length)
        return self._labels[numbers]


@functools.lru_cache(maxsize=64)
def _all_of(label: int, count: int, length: int) -> Labels:
    """One label throughout, for every batch of one source the same array."""
    labels = np.full((count, length), label, np.int16)
    labels.flags.writeable = False
    return labels


class Packer:
    """Holds tokens until they fill windows. `sequence_length` >= 1, in tokens; `expected_tokens` until a `take`; every
    token is below `vocab_size`."""

    def __init__(self, sequence_length: int, expected_tokens: int = 0, *, vocab_size: int = 1 << 31) -> None:
        self._length = sequence_length
        self._expected = expected_tokens
        self._vocab_size = vocab_size
        self._dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32
        self._spare: list[Buffer] = []
        self._buffer = self._take_buffer()
        self._runs: list[Run] = []
        self._size = 0

    @property
    def windows(self) -> int:
        """Full windows that wait to be taken."""
        return max(0, (self._size - 1) // self._length)

    def add(self, tokens: NDArray[np.integer[Any]], label: int, end: int | None = None) -> None:
        """Append tokens, shape (n,), of one source, as a copy; and the token `end`. Raises AnytimedError on one beyond
        the vocabulary."""
        count = tokens.size
        found = int(np.maximum.reduce(tokens)) if count and tokens.dtype.kind == "i" else 0
        if (found := max(found, end or 0)) >= self._vocab_size:
            raise AnytimedError(
                f"the tokenizer gave token {found}; expected one below its vocab_size = "
                f"{self._vocab_size}: the adapter has to be corrected"
            )
        start, stop = self._size, self._size + count
        self._size = stop if end is None else stop + 1
        if self._size > self._buffer.size:
            grown = np.empty(max(self._size, 2 * self._buffer.size), self._dtype)
            grown[:start] = self._buffer[:start]
            self._buffer = grown
        np.copyto(self._buffer[start:stop], tokens, casting="unsafe")  # below the vocabulary, they fit
        if end is not None:
            self._buffer[stop] = end
        if self._runs and self._runs[-1][0] == label:
            self._runs[-1] = (label, self._runs[-1][1] + self._size - start)
        elif self._size > start:
            self._runs.append((label, self._size - start))

    def take(self) -> Windows:
        """All full windows; they leave the packer, with its buffer."""
        windows = Windows(self._buffer, self.windows, self._length, self._runs)
        used = len(windows) * self._length
        rest, runs = self._buffer[used : self._size].copy(), _behind(self._runs, used)
        self._buffer, self._size, self._runs = self._take_buffer(), 0, []
        at = 0
        for label, count in runs:
            self.add(rest[at : at + count], label)
            at += count
        return windows

    def give_back(self, windows: Windows) -> None:
        """Windows are used up: their buffer may be filled again."""
        if len(self._spare) < _SPARE:
            self._spare.append(windows.buffer)

    def clear(self) -> None:
        """Drop what waits, and the buffers."""
        self._spare, self._runs, self._size = [], [], 0
        self._buffer = np.empty(0, self._dtype)

    def remainder(self) -> tuple[Tokens, list[Run]]:
        """The tokens that wait, shape (n,), as a copy, and whose they are."""
        return self._buffer[: self._size].astype(np.int32), list(self._runs)

    def _take_buffer(self) -> Buffer:
        return self._spare.pop() if self._spare else np.empty(self._expected, self._dtype)


def _behind(runs: Sequence[Run], used: int) -> list[Run]:
    """What is left of the runs behind the first `used` tokens."""
    found: list[Run] = []
    for label, count in runs:
        left = count - min(count, used)
        used -= count - left
        if left:
            found.append((label, left))
    return found
