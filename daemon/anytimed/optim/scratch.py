"""Working memory of the optimizers: named buffers that grow once and are used again at every step.

A step asks for a buffer by name, shape and dtype and gets the front of one flat allocation, with whatever the last user
left in it. Nothing here outlives a step, so nothing here belongs in a checkpoint.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

ALIGNMENT: Final = 64
"""Elements to which `take_aligned` rounds the distance of matrices: at least one cache line in any dtype."""


class Scratch:
    """Named, reusable buffers on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised contiguous tensor of this shape. It is valid until the same name is taken again."""
        numel = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < numel:
            buffer = torch.empty(numel, dtype=dtype, device=self.device)
            self._buffers[name, dtype] = buffer
        return buffer[:numel].view(shape)

    def take_aligned(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """As `take`, for a stack (k, m, n) whose matrices all start at a multiple of ALIGNMENT elements.

        A matrix product may add in another order where its operands lie otherwise in memory (MKL does, in float32): so
        that a matrix gets the same bits whatever lies before it in the stack, each has to start like the first.
        """
        k, m, n = shape
        distance = -(-m * n // ALIGNMENT) * ALIGNMENT
        return self.take(name, (k, distance), dtype)[:, : m * n].view(shape)
