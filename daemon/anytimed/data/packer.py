"""Documents to sequences of equal length, with nothing thrown away.

Tokens of all documents are laid end to end. A window is `sequence_length + 1` tokens, the next one starts
`sequence_length` later: its first token is the last target of the one before, so that every token but the very first is
a target exactly once. What does not fill a window is the remainder, at most `sequence_length` tokens after each `take`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from anytimed.contracts import Tokens


class Packer:
    """Holds tokens until they fill windows. `sequence_length` >= 1, in tokens."""

    def __init__(self, sequence_length: int, remainder: Tokens | None = None) -> None:
        self._length = sequence_length
        self._parts: list[Tokens] = []
        self._size = 0
        if remainder is not None and remainder.size:
            self.add(remainder)

    @property
    def windows(self) -> int:
        """Full windows that wait to be taken."""
        return max(0, (self._size - 1) // self._length)

    def add(self, tokens: Tokens) -> None:
        """Append tokens, shape (n,); copies nothing (parts are joined once, in `take`)."""
        self._parts.append(np.asarray(tokens, np.int32))
        self._size += tokens.size

    def take(self) -> NDArray[np.int32]:
        """All full windows, shape (windows, sequence_length + 1); they leave the packer."""
        count, length = self.windows, self._length
        flat = self._joined()
        windows = np.lib.stride_tricks.sliding_window_view(flat, length + 1)[::length] if count else flat[:0]
        taken = windows.reshape(count, length + 1).copy()
        rest = flat[count * length :].copy()
        self._parts, self._size = [rest], rest.size
        return taken

    def remainder(self) -> Tokens:
        """The tokens that wait, shape (n,), as a copy."""
        return self._joined().copy()

    def _joined(self) -> Tokens:
        if len(self._parts) != 1:
            self._parts = [np.concatenate(self._parts) if self._parts else np.zeros(0, np.int32)]
        return self._parts[0]
