"""Working memory of the optimizers: named buffers that grow once and are used again at every step.

A step asks for a buffer by name, shape and dtype and gets the front of one flat allocation, with whatever the last user
left in it. Nothing here outlives a step, so nothing here belongs in a checkpoint.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
