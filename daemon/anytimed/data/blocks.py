"""Blocks of sequences as they are filled and used up.

`Filling` is the block that is being read: the packer's windows so far and what was finished on the way. `Block` is one
that was read, its sequences permuted; batches are taken from the oldest blocks and may span several.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anytimed.contracts import Batch, Holdout, Position, SourcePosition, SourceRule
from anytimed.data.packer import Labels, Windows


@dataclass(slots=True)
class Block:
    """A block that was read. order: of use, of its windows, shape (k,); `used` of them are taken. start, following: the
    positions before and after it, without their `batches`."""

    start: Position
    windows: Windows
    order: NDArray[np.intp]
    used: int
    following: Position
    mixture: Mapping[str, SourceRule]
    read: Mapping[str, SourcePosition]
    holdout: Holdout

    @property
    def left(self) -> int:
        return len(self.order) - self.used


class Blocks:
    """Blocks that were read, oldest first. batches: how many were taken before the first of them. used_up: gets the
    windows of a block that all are taken."""

    def __init__(self, batch_size: int, batches: int, used_up: Callable[[Windows], None]) -> None:
        self._used_up = used_up
        self._size = batch_size
        self._batches = batches
        self._ready: deque[Block] = deque()
        self._left = 0

    def add(self, block: Block) -> None:
        self._ready.append(block)
        self._left += block.left

    def clear(self) -> None:
        """Drop what waits."""
        self._ready.clear()
        self._left = 0

    @property
    def left(self) -> int:
        """Sequences that wait."""
        return self._left

    @property
    def full(self) -> bool:
        """There is a batch to take."""
        return self._left >= self._size

    def completes(self, sequences: int) -> bool:
        """Whether so many more would make a batch."""
        return self.left + sequences >= self._size

    def take(self, names: tuple[str, ...]) -> Batch:
        """The next batch. names: of the labels. Only where `full`."""
        rows: list[NDArray[np.int32]] = []
        labels: list[Labels] = []
        missing = self._size
        self._left -= missing
        while missing:
            block = self._ready[0]
            count = min(missing, block.left)
            numbers = block.order[block.used : block.used + count]
            rows.append(block.windows.tokens(numbers))
            labels.append(block.windows.labels(numbers))
            block.used += count
            missing -= count
            if not block.left:
                self._ready.popleft()
                self._used_up(block.windows)
        self._batches += 1
        within = block.start.within(block.used, self._batches)
        return Batch(
            tokens=rows[0] if len(rows) == 1 else np.concatenate(rows),
            labels=labels[0] if len(labels) == 1 else np.concatenate(labels),
            sources=names,
            position=within if block.left else block.following.within(0, self._batches),
            holdout=block.holdout,
            mixture=block.mixture,
            read=block.read,
        )
