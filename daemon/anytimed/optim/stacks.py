"""Where the optimizer's state lies: many parameters, few buffers.

Hidden matrices of one shape share (k, m, n) buffers (`MatrixStack`); everything else lies end to end in flat buffers
(`FlatStack`). A step then is a few large operations instead of a loop over parameters. `MatrixStack.gather` and
`FlatStack.gather` cut a group's parameters into stacks; `gradients` collects .grad into one float32 tensor, `write_`
puts values into the parameters, and `state` gives each parameter views of the buffers in its own shape, which never
change identity: a checkpoint copies them out by parameter and back in, whatever the stacking.

Bytes per element: z, x 4 each, comp 2, and by rule momentum 4 (matrices) or v 4 (the rest); matrices add 4 a row for v.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Final, Self

import torch
from torch import Tensor

from anytimed.optim.scratch import Scratch

STACK_ELEMENTS: Final = 2**25
"""A stack of matrices ends here (128 MiB a float32 buffer), so that the scratch memory of a step stays small."""

PACKED_ELEMENTS: Final = 2**16
"""A parameter of fewer elements is packed with others into a flat stack; a larger one has a flat stack of its own, so
that nothing per element has to say which parameter it belongs to."""


class Stack(ABC):
    """Parameters whose state lies in common buffers. z, x, comp: (k, m, n) or (N,); updates: (k,) int64."""

    v: Tensor

    def __init__(self, params: list[Tensor], shape: tuple[int, ...]) -> None:
        device = params[0].device
        self.params = params
        self.z = torch.empty(shape, dtype=torch.float32, device=device)
        torch.cat([p.detach().reshape(-1) for p in params], out=self.z.view(-1))
        self.x = self.z.clone()
        self.comp = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        self.updates = torch.zeros(len(params), dtype=torch.int64, device=device)

    @abstractmethod
    def split(self, buffer: Tensor) -> list[Tensor]:
        """Views of a buffer shaped like z, one a parameter, in the parameter's shape."""

    @abstractmethod
    def spread(self, per_parameter: Tensor) -> Tensor:
        """Something that broadcasts over z's shape, from (k,), one value a parameter, or from 0-d."""

    @abstractmethod
    def state(self) -> list[dict[str, Tensor]]:
        """What `Optimizer.state` holds for each parameter: views of the buffers."""

    def gradients(self, scratch: Scratch) -> tuple[Tensor, list[int]]:
        """All gradients in one float32 tensor of z's shape, and the indices of the parameters that have none
        (zeros)."""
        missing = [i for i, p in enumerate(self.params) if p.grad is None]
        out = scratch.take("gradients", self.z.shape)
        if len(missing) < len(self.params):
            parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in self.params]
            torch.cat(parts, out=out.view(-1))
        return out, missing

    def active(self, missing: list[int], gate: Tensor | None) -> Tensor | None:
        """Who is updated: None (all), `gate` itself, or (k,) bool where some parameters have no gradient."""
        if not missing:
            return gate
        mask = torch.ones(len(self.params), dtype=torch.bool, device=self.z.device)
        for i in missing:
            mask[i].fill_(False)  # fills, not a copy from the host, which would wait for the device
        return mask if gate is None else mask & gate

    def mask(self, active: Tensor | None) -> Tensor | None:
        """`active` so that it broadcasts over z."""
        return None if active is None else self.spread(active)

    def write_(self, values: Tensor) -> None:
        """Put values, shaped like z, into the parameters, rounded to their dtype."""
        torch._foreach_copy_(self.params, self.split(values))

    def _common_state(self) -> list[dict[str, Tensor]]:
        z, x, comp = self.split(self.z), self.split(self.x), self.split(self.comp)
        return [{"z": z[i], "x": x[i], "comp": comp[i], "updates": self.updates[i]} for i in range(len(self.params))]


class MatrixStack(Stack):
    """k matrices of one shape (m, n), rows = output neurons. momentum: (k, m, n); v: (k, m), (k, 0) if none is kept.

    A parameter of more dimensions counts as (out, everything else): a convolution is (out, in * kh * kw).
    """

    def __init__(self, params: list[Tensor], row_moments: bool) -> None:
        rows, columns = matrix_shape(params[0])
        super().__init__(params, (len(params), rows, columns))
        self.rows, self.columns = rows, columns
        self.momentum = torch.zeros_like(self.z)
        self.v = torch.zeros(len(params), rows if row_moments else 0, dtype=torch.float32, device=self.z.device)

    @classmethod
    def gather(cls, params: Iterable[Tensor], row_moments: bool) -> list[Self]:
        """Stacks of equal shape, in order of first appearance, none larger than STACK_ELEMENTS (or one matrix)."""
        by_shape: dict[tuple[int, int], list[Tensor]] = {}
        for p in params:
            by_shape.setdefault(matrix_shape(p), []).append(p)
        stacks = []
        for (rows, columns), same in by_shape.items():
            at_once = max(1, STACK_ELEMENTS // max(1, rows * columns))
            stacks += [cls(same[i : i + at_once], row_moments) for i in range(0, len(same), at_once)]
        return stacks

    def split(self, buffer: Tensor) -> list[Tensor]:
        return [b.view(p.shape) for b, p in zip(buffer.unbind(0), self.params, strict=True)]

    def spread(self, per_parameter: Tensor) -> Tensor:
        return per_parameter.view(-1, 1, 1)

    def row_mask(self, active: Tensor | None) -> Tensor | None:
        """`active` over (k, m)."""
        return None if active is None else active.view(-1, 1)

    def state(self) -> list[dict[str, Tensor]]:
        momentum = self.split(self.momentum)
        states = [s | {"momentum": momentum[i]} for i, s in enumerate(self._common_state())]
        return [s | {"v": self.v[i]} for i, s in enumerate(states)] if self.v.numel() else states


class FlatStack(Stack):
    """Parameters of any shape end to end, N elements in all. v: (N,)."""

    def __init__(self, params: list[Tensor]) -> None:
        self.sizes = [p.numel() for p in params]
        super().__init__(params, (sum(self.sizes),))
        self.v = torch.zeros_like(self.z)
        owner = torch.arange(len(params)).repeat_interleave(torch.tensor(self.sizes))
        self._owner = owner.to(self.z.device) if len(params) > 1 else None

    @classmethod
    def gather(cls, params: Iterable[Tensor]) -> list[Self]:
        """One stack for all small parameters, one for each large one."""
        small: list[Tensor] = []
        large: list[Tensor] = []
        for p in params:
            (small if p.numel() < PACKED_ELEMENTS else large).append(p)
        return [cls(ps) for ps in [small, *([p] for p in large)] if ps]

    def split(self, buffer: Tensor) -> list[Tensor]:
        return [b.view(p.shape) for b, p in zip(torch.split(buffer, self.sizes), self.params, strict=True)]

    def spread(self, per_parameter: Tensor) -> Tensor:
        if self._owner is None or per_parameter.ndim == 0:
            return per_parameter
        return per_parameter.index_select(0, self._owner)

    def state(self) -> list[dict[str, Tensor]]:
        v = self.split(self.v)
        return [s | {"v": v[i]} for i, s in enumerate(self._common_state())]


def matrix_shape(p: Tensor) -> tuple[int, int]:
    """(m, n) of a parameter of two or more dimensions: the first one, and all others together."""
    rows = p.shape[0]
    return rows, p[0].numel() if rows else 0
