"""Where the optimizer's state lies: many parameters, few buffers.

Hidden matrices of one shape share (k, m, n) buffers (`MatrixStack`); everything else lies end to end in flat buffers
(`FlatStack`). A step then is a few large operations instead of a loop over parameters. `MatrixStack.gather` and
`FlatStack.gather` cut a group's parameters into stacks, and `state` gives each parameter views of the buffers in its
own shape, which never change identity: a checkpoint copies them out by parameter and back in, whatever the stacking.

How a step goes through a stack depends on where it lies (`Walk`). On a device that is fast and far away it takes the
whole stack at once: gradients are collected into one tensor (`gradients`), y is written out by one grouped copy
(`write_`). On a CPU, memory is what is slow: C reads and writes every element once (`native`); without it, large
parameters are taken one after the other in pieces that stay in the cache from the gradient to y, and only the small
ones together.

Bytes per element: z, x 4 each, comp 2, and by rule momentum 4 (matrices) or v 4 (the rest); matrices add 4 a row for v.
Lean stacks have no x and no comp: 8.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Final, Self

import torch
from torch import Tensor

from anytimed.optim.scratch import Scratch
from anytimed.optim.sweep import Averages, Elements

STACK_ELEMENTS: Final = 2**25
"""A stack of matrices ends here (128 MiB a float32 buffer), so that the scratch memory of a step stays small."""

PACKED_ELEMENTS: Final = 2**16
"""A parameter of fewer elements is packed with others into a flat stack; a larger one has a flat stack of its own, so
that nothing per element has to say which parameter it belongs to."""

PIECE_ELEMENTS: Final = 2**18
"""A CPU works through a parameter in pieces of about this size: 1 MiB a float32 tensor. Smaller ones stay in a nearer
cache and cost more calls than that saves (measured from 2^14 to 2^18)."""

TOGETHER_ELEMENTS: Final = 2**16
"""Matrices of fewer elements are swept a batch at a time, even on a CPU: one alone is too little work for two cores."""

GATHERED_ELEMENTS: Final = 2**12
"""Gradients of fewer elements are gathered into one tensor, even on a CPU; larger ones are read where they lie."""

BATCH_ELEMENTS: Final = 2**20
"""A CPU orthogonalises matrices of this many elements at a time: more fall out of the cache (measured at d = 384: 437
GFLOP/s for 4 matrices, 360 for 48), fewer leave cores idle between products."""


Piece = tuple[int, int, Tensor, Tensor | None, Tensor | None]
"""Where a piece starts and stops along the first dimension; its z, x and comp (None in a lean stack)."""


class Stack(ABC):
    """Parameters whose state lies in common buffers. z, x, comp: (k, m, n) or (N,); updates: (k,) int64. A lean one
    has no x and no comp (both empty)."""

    v: Tensor

    def __init__(self, params: list[Tensor], shape: tuple[int, ...], lean: bool) -> None:
        device = params[0].device
        self.params = params
        self.lean = lean
        self._pieces: dict[tuple[int, int], list[Piece]] = {}
        self.z = torch.empty(shape, dtype=torch.float32, device=device)
        self.x = torch.empty(0 if lean else shape, dtype=torch.float32, device=device)
        self.comp = torch.zeros(0 if lean else shape, dtype=torch.bfloat16, device=device)
        self.updates = torch.zeros(len(params), dtype=torch.int64, device=device)
        self.begin()

    def begin(self) -> None:
        """x = z = what the parameters hold."""
        torch.cat([p.detach().reshape(-1) for p in self.params], out=self.z.view(-1))
        if not self.lean:
            self.x.copy_(self.z)
            self.comp.zero_()

    @abstractmethod
    def split(self, buffer: Tensor, part: slice = slice(None)) -> list[Tensor]:
        """Views of a buffer shaped like z, one a parameter, in the parameter's shape; or of some parameters' part of
        it."""

    @abstractmethod
    def spread(self, per_parameter: Tensor) -> Tensor:
        """Something that broadcasts over z's shape, from (k,), one value a parameter, or from 0-d."""

    def averages(self, part: slice = slice(None)) -> Averages:
        """z, x and comp, or a part of them along the first dimension; x and comp None: lean."""
        return (self.z[part], None, None) if self.lean else (self.z[part], self.x[part], self.comp[part])

    def elements(self, y: Tensor, part: slice = slice(None)) -> Elements:
        """`averages` beside `y`, which has that shape."""
        return Elements(*self.averages(part), y)

    def pieces(self, i: int, shape: tuple[int, ...], most: int) -> list[Piece]:
        """Parameter i, seen in `shape`, cut along the first dimension into equal pieces of about `most` elements."""
        if (i, most) not in self._pieces:
            length = shape[0]
            count = min(length, max(1, round(self.z[i].numel() / most if len(shape) == 2 else length / most)))
            step = -(-length // count)
            z, x, comp = (b if not b.numel() or len(shape) == 1 else b[i] for b in (self.z, self.x, self.comp))
            self._pieces[i, most] = [
                (
                    start,
                    min(length, start + step),
                    z[start : start + step],
                    None if self.lean else x[start : start + step],
                    None if self.lean else comp[start : start + step],
                )
                for start in range(0, length, step)
            ]
        return self._pieces[i, most]

    @abstractmethod
    def state(self) -> list[dict[str, Tensor]]:
        """What `Optimizer.state` holds for each parameter: views of the buffers."""

    def missing(self) -> list[int]:
        """The indices of the parameters that have no gradient. ValueError on a sparse one."""
        for p in self.params:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise ValueError(
                    f"the gradient of a parameter of shape {tuple(p.shape)} is {p.grad.layout}, expected a dense one; "
                    "make the embedding with sparse=False"
                )
        return [i for i, p in enumerate(self.params) if p.grad is None]

    def gradients(self, scratch: Scratch, scale: Tensor | None) -> Tensor:
        """All gradients, times `scale`, in one float32 tensor of z's shape; zeros where there is none."""
        out = scratch.take("gradients", self.z.shape)
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in self.params]
        torch.cat(parts, out=out.view(-1))
        return out if scale is None else out.mul_(scale)

    def gradient(self, i: int, scratch: Scratch, scale: Tensor | None) -> Tensor:
        """The gradient of one parameter, times `scale`, float32, flat, in the order of z; the caller only reads it."""
        given = self.params[i].grad
        assert given is not None
        if given.dtype == torch.float32 and given.is_contiguous() and scale is None:
            return given.view(-1)
        out = scratch.take("gradient", (given.numel(),))
        out.view(given.shape).copy_(given)
        return out if scale is None else out.mul_(scale)

    def plain_gradients(self, part: slice) -> list[Tensor] | None:
        """The gradients of some parameters where all are float32 and contiguous, else None."""
        gs = [p.grad for p in self.params[part]]
        plain = all(g is not None and g.dtype == torch.float32 and g.is_contiguous() for g in gs)
        return [g for g in gs if g is not None] if plain else None

    def held(self, scratch: Scratch, part: slice = slice(None)) -> Tensor:
        """What the parameters hold, or some of them, in one float32 tensor of z's shape."""
        out = scratch.take("y", self.z[part].shape)
        torch.cat([p.detach().reshape(-1) for p in self.params[part]], out=out.view(-1))
        return out

    def active(self, missing: list[int], gate: Tensor | None) -> Tensor | None:
        """Who is updated: None (all), `gate` itself, or (k,) bool where some parameters have no gradient."""
        if not missing:
            return gate
        mask = torch.ones(len(self.params), dtype=torch.bool, device=self.z.device)
        for i in missing:
            mask[i].fill_(False)  # fills, not a copy from the host, which would wait for the device
        return mask if gate is None else mask & gate

    def count(self, missing: list[int], gate: Tensor | None) -> None:
        """Count this update of every parameter that has one."""
        active = self.active(missing, gate)
        self.updates.add_(1 if active is None else active)

    def mask(self, active: Tensor | None) -> Tensor | None:
        """`active` so that it broadcasts over z."""
        return None if active is None else self.spread(active)

    def write_(self, values: Tensor, part: slice = slice(None)) -> None:
        """Put values, shaped like z, into the parameters, or into some of them, rounded to their dtype."""
        torch._foreach_copy_(self.params[part], self.split(values, part))

    def _common_state(self) -> list[dict[str, Tensor]]:
        buffers = {"z": self.z} if self.lean else {"z": self.z, "x": self.x, "comp": self.comp}
        views = {name: self.split(buffer) for name, buffer in buffers.items()}
        return [
            {**{name: parts[i] for name, parts in views.items()}, "updates": self.updates[i]}
            for i in range(len(self.params))
        ]


class MatrixStack(Stack):
    """k matrices of one shape (m, n), rows = output neurons. momentum: (k, m, n); v: (k, m), (k, 0) if none is kept.

    A parameter of more dimensions counts as (out, everything else): a convolution is (out, in * kh * kw).
    """

    def __init__(self, params: list[Tensor], row_moments: bool, lean: bool) -> None:
        rows, columns = matrix_shape(params[0])
        super().__init__(params, (len(params), rows, columns), lean)
        self.rows, self.columns = rows, columns
        self.momentum = torch.zeros_like(self.z)
        self.v = torch.zeros(len(params), rows if row_moments else 0, dtype=torch.float32, device=self.z.device)

    @classmethod
    def gather(cls, params: Iterable[Tensor], row_moments: bool, lean: bool) -> list[Self]:
        """Stacks of equal shape, in order of first appearance, none larger than STACK_ELEMENTS (or one matrix)."""
        by_shape: dict[tuple[int, int], list[Tensor]] = {}
        for p in params:
            by_shape.setdefault(matrix_shape(p), []).append(p)
        stacks = []
        for (rows, columns), same in by_shape.items():
            at_once = max(1, STACK_ELEMENTS // max(1, rows * columns))
            stacks += [cls(same[i : i + at_once], row_moments, lean) for i in range(0, len(same), at_once)]
        return stacks

    def split(self, buffer: Tensor, part: slice = slice(None)) -> list[Tensor]:
        return [b.view(p.shape) for b, p in zip(buffer.unbind(0), self.params[part], strict=True)]

    def spread(self, per_parameter: Tensor) -> Tensor:
        return per_parameter.view(-1, 1, 1)

    def state(self) -> list[dict[str, Tensor]]:
        momentum = self.split(self.momentum)
        states = [s | {"momentum": momentum[i]} for i, s in enumerate(self._common_state())]
        return [s | {"v": self.v[i]} for i, s in enumerate(states)] if self.v.numel() else states


class FlatStack(Stack):
    """Parameters of any shape end to end, N elements in all. v: (N,)."""

    def __init__(self, params: list[Tensor], lean: bool) -> None:
        self.sizes = [p.numel() for p in params]
        super().__init__(params, (sum(self.sizes),), lean)
        self.v = torch.zeros_like(self.z)
        self._owner: Tensor | None = None
        if len(params) > 1:
            owner = torch.arange(len(params)).repeat_interleave(torch.tensor(self.sizes))
            self._owner = owner.to(self.z.device)

    @classmethod
    def gather(cls, params: Iterable[Tensor], lean: bool) -> list[Self]:
        """One stack for all small parameters, one for each large one."""
        small: list[Tensor] = []
        large: list[Tensor] = []
        for p in params:
            (small if p.numel() < PACKED_ELEMENTS else large).append(p)
        return [cls(ps, lean) for ps in [small, *([p] for p in large)] if ps]

    def split(self, buffer: Tensor, part: slice = slice(None)) -> list[Tensor]:
        parts = torch.split(buffer, self.sizes[part])
        return [b.view(p.shape) for b, p in zip(parts, self.params[part], strict=True)]

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
