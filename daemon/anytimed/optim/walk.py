"""How a step goes through the stacks: at once on a device, piece by piece on a CPU.

`Walk.matrices` takes a stack of matrices batch by batch: the rule takes in the gradients, orthogonalises and scales,
then every element is swept. `Walk.flat` does the same for a flat stack under the AdamW rule. Both write y into the
parameters. Three can do the work on single elements: torch's own operations, `native` on a CPU where it can, to the
same bits, and `compiled` where the optimizer is.

torch's operations take whole stacks on a device, masked where a gradient is missing or the gate is closed; on a CPU
they take pieces, which leave such parameters out, and the gate has been read before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from anytimed.optim import adamw, compiled, native, stacks
from anytimed.optim.averaging import gradient_point, settle_
from anytimed.optim.rules import AdamW, MatrixBatch, Parts, Spectral
from anytimed.optim.scratch import Scratch
from anytimed.optim.stacks import FlatStack, MatrixStack, Stack
from anytimed.optim.sweep import Elements, Move, Pace, sweep_


@dataclass(frozen=True, slots=True)
class Turn:
    """Some matrices of a stack whose turn it is. absent: those without a gradient, by their index in the stack; active:
    (b,), 0-d or None (all), who may change."""

    stack: MatrixStack
    batch: slice
    absent: frozenset[int]
    active: Tensor | None

    @property
    def members(self) -> range:
        return range(self.batch.start, self.batch.stop)

    @property
    def mask(self) -> Tensor | None:
        """`active`, to broadcast over (b, m, n)."""
        return self.stack.mask(self.active)


def _part(own: tuple[Tensor, Tensor] | None, start: int, stop: int) -> Move | None:
    """Some rows of a matrix that moves against direction (m, n) times scale (m, 1) or (1, 1); None: it does not."""
    if own is None:
        return None
    direction, scale = own
    return Move(direction[start:stop], scale[start:stop] if len(scale) > 1 else scale, None)


class Walk:
    """Goes through stacks on one device; keeps the scratch memory."""

    def __init__(self, device: torch.device, compiled: bool) -> None:
        self.scratch = Scratch(device)
        self.on_host = device.type == "cpu"
        self.compiled = compiled
        self.native = False

    def consider(self, elements: int) -> None:
        """The optimizer has so many elements by now: is it worth `native`?"""
        self.native = self.native or (self.on_host and not self.compiled and native.considered(elements))

    def _goes_native(self, stack: Stack) -> bool:
        return self.native and self.on_host and native.takes(stack.params, stack.lean)

    def _compiles(self, stack: Stack) -> bool:
        return self.compiled and compiled.fits(stack.z.shape)

    # --- matrices

    def matrices(self, stack: MatrixStack, pace: Pace, grad_scale: Tensor | None, rule: Spectral) -> list[Tensor]:
        """One step of a stack; returns the squared norms of the updates, before the decay."""
        missing = stack.missing()
        none_given = len(missing) == len(stack.params)
        if not none_given:
            stack.count(missing, pace.gate)
        active = stack.active(missing, pace.gate)
        told = native.told(pace) if self._goes_native(stack) else None
        apart = self.on_host and (told is not None or stack.rows * stack.columns >= stacks.GATHERED_ELEMENTS)
        gathered = None if apart or none_given else stack.gradients(self.scratch, grad_scale)
        squares: list[Tensor] = []
        for batch in self._batches(stack):
            absent = frozenset(i for i in missing if batch.start <= i < batch.stop)
            turn = Turn(stack, batch, absent, active[batch] if active is not None and active.ndim else active)
            if len(absent) == len(turn.members):
                self._swept(turn, None, pace)
                continue
            p = None
            if told is not None and not absent and grad_scale is None:
                p = self._native_polar(turn, rule)
            if p is None:
                p = rule.polar(rule.momentum(self._gradients_of(turn, gathered, grad_scale), self.scratch))
            if self._compiles(stack):
                squares.append(self._moved_by_compiler(turn, p, pace, rule))
            elif told is not None and not absent and p.is_contiguous():
                ys, averages, v = stack.params[batch], stack.averages(batch), stack.v[batch]
                squares.append(native.matrices_(ys, averages, p, v, rule.scales, rule.eta, told, self.scratch))
            else:
                squares.append(self._moved(turn, p, pace, rule))
        return squares

    def _batches(self, stack: MatrixStack) -> list[slice]:
        count = len(stack.params)
        size = count
        if self.on_host:
            size = min(count, max(1, stacks.BATCH_ELEMENTS // (stack.rows * stack.columns)))
        return [slice(i, min(i + size, count)) for i in range(0, count, size)]

    def _gradients_of(self, turn: Turn, gathered: Tensor | None, grad_scale: Tensor | None) -> MatrixBatch:
        stack, batch = turn.stack, turn.batch
        if gathered is None:
            parts = self._one_by_one(turn, grad_scale)
        else:
            parts = iter([(slice(None), gathered[batch], turn.mask)])
        return MatrixBatch(stack.momentum[batch], parts, turn.active)

    def _one_by_one(self, turn: Turn, grad_scale: Tensor | None) -> Parts:
        for at, i in enumerate(turn.members):
            if i not in turn.absent:
                g = turn.stack.gradient(i, self.scratch, grad_scale)
                yield at, g.view(turn.stack.rows, turn.stack.columns), None

    def _native_polar(self, turn: Turn, rule: Spectral) -> Tensor | None:
        """P of a batch whose gradients may be read where they lie, else None."""
        gs = turn.stack.plain_gradients(turn.batch)
        if gs is None or rule.polar.row_splits is not None:
            return None
        momentum = turn.stack.momentum[turn.batch]
        return rule.polar(native.momentum_(momentum, gs, rule.momentum, rule.polar, self.scratch), normalised=True)

    def _moved(self, turn: Turn, p: Tensor, pace: Pace, rule: Spectral) -> Tensor:
        """The rest of a batch's step once P is there; returns the squared norm of each update."""
        if self.on_host and p.dtype != torch.float32:  # once for the norms and the sweep, which would each convert it
            p = self.scratch.take("direction", p.shape).copy_(p)
        active, v = turn.active, turn.stack.v[turn.batch]
        scale, squares, new_v = rule.scales(p, v, rule.eta)
        if new_v is not None:
            settle_(v, new_v, None if active is None else active.view(-1, 1))
        self._swept(turn, Move(p, scale, turn.mask), pace)
        return squares if active is None else torch.where(active, squares, torch.zeros_like(squares))

    def _moved_by_compiler(self, turn: Turn, p: Tensor, pace: Pace, rule: Spectral) -> Tensor:
        scale, squares = compiled.scaled_(p, turn.stack.v[turn.batch], rule.scales, rule.eta, turn.active)
        self._swept(turn, Move(p, scale, turn.mask), pace)
        return squares

    def _swept(self, turn: Turn, move: Move | None, pace: Pace) -> None:
        """z, x and y of a batch. move None: z stays."""
        stack, batch = turn.stack, turn.batch
        compiles = self._compiles(stack)
        if self.on_host and not compiles and stack.rows * stack.columns >= stacks.TOGETHER_ELEMENTS:
            for at, i in enumerate(turn.members):
                own = None if move is None or i in turn.absent else (move.direction[at], move.scale[at])
                self._pieces(stack, i, (stack.rows, stack.columns), partial(_part, own), pace)
            return
        y = self._y(stack, batch)
        if compiles:
            compiled.sweep_(stack.elements(y, batch), move, pace)
        else:
            sweep_(stack.elements(y, batch), move, pace, self.scratch)
        stack.write_(y, batch)

    # --- everything else

    def flat(self, stack: FlatStack, pace: Pace, grad_scale: Tensor | None, rule: AdamW) -> list[Tensor]:
        """One step of a flat stack; returns the squared norms of the updates, before the decay."""
        missing = stack.missing()
        alone = len(stack.params) == 1
        g = None
        if len(missing) < len(stack.params):
            if not rule.moved:
                stack.count(missing, pace.gate)
            g = stack.gradient(0, self.scratch, grad_scale) if alone else stack.gradients(self.scratch, grad_scale)
        active = stack.active(missing, pace.gate)
        corrected_by = adamw.correction(stack.updates, rule.beta2)
        if not alone:
            # Mostly all have had the same number of updates; a CPU may look, and spares a number per element.
            alike = self.on_host and bool((stack.updates == stack.updates[0]).all())
            corrected_by = corrected_by[0] if alike else stack.spread(corrected_by)
        goes_native = self._goes_native(stack) and (g is None or (active is None and corrected_by.numel() == 1))
        if alone and not goes_native and not self._compiles(stack):
            return self._flat_in_pieces(stack, pace, g, rule, active, corrected_by)
        p = stack.params[0].detach()
        # In C, y is rounded as it is written: `takes` has seen to it that it can be, bfloat16 too.
        direct = alone and p.is_contiguous() and (goes_native or p.dtype == torch.float32)
        elements = stack.elements(p.view(-1) if direct else self._y(stack))
        if goes_native:
            squares = native.flat_(elements, stack.v, g, corrected_by, rule, native.told(pace))
        elif self._compiles(stack):
            squares = compiled.flat_(elements, stack.v, g, corrected_by, rule, stack.mask(active), pace)
        else:
            squares = self._flat_by_torch(elements, stack.v, g, corrected_by, rule, stack.mask(active), pace)
        if not direct:
            stack.write_(elements.y)
        return [squares] if g is not None else []

    def _flat_by_torch(
        self,
        elements: Elements,
        v: Tensor,
        g: Tensor | None,
        corrected_by: Tensor,
        rule: AdamW,
        mask: Tensor | None,
        pace: Pace,
    ) -> Tensor:
        """A whole stack at once; returns the squared norm of the update, 0-d. g None: z stays."""
        move, squares = None, torch.zeros_like(rule.eta)
        if g is not None:
            if not rule.moved:
                adamw.second_moment_(v, g, rule.beta2, mask, self.scratch)
            direction = adamw.direction(v, g, corrected_by, rule.eps, self.scratch)
            counted = direction if mask is None else torch.where(mask, direction, torch.zeros_like(direction))
            squares = (torch.linalg.vector_norm(counted) * rule.eta).square()
            move = Move(direction, rule.eta, mask)
        sweep_(elements, move, pace, self.scratch)
        return squares

    def _flat_in_pieces(
        self,
        stack: FlatStack,
        pace: Pace,
        g: Tensor | None,
        rule: AdamW,
        active: Tensor | None,
        corrected_by: Tensor,
    ) -> list[Tensor]:
        """Of a parameter that has the stack to itself: from its gradient to y, piece by piece."""
        squares: list[Tensor] = []

        def moved(start: int, stop: int) -> Move | None:
            if g is None:
                return None
            piece, v = g[start:stop], stack.v[start:stop]
            if not rule.moved:
                adamw.second_moment_(v, piece, rule.beta2, active, self.scratch)
            direction = adamw.direction(v, piece, corrected_by, rule.eps, self.scratch)
            squares.append((torch.linalg.vector_norm(direction) * rule.eta).square())
            return Move(direction, rule.eta, active)

        self._pieces(stack, 0, (stack.z.numel(),), moved, pace)
        return squares

    # --- one parameter

    def _pieces(
        self, stack: Stack, i: int, shape: tuple[int, ...], moved: Callable[[int, int], Move | None], pace: Pace
    ) -> None:
        """Sweep parameter i, seen in `shape`, in pieces along the first dimension. moved: how a piece does."""
        p = stack.params[i].detach()
        direct = p.dtype == torch.float32 and p.is_contiguous()
        held = p if direct else self.scratch.take("held", p.shape)
        if not direct and stack.lean:
            held.copy_(p)
        y = held.view(shape)
        piece_elements = stacks.PIECE_ELEMENTS if self.on_host else stacks.STACK_ELEMENTS
        for start, stop, z, x, comp in stack.pieces(i, shape, piece_elements):
            sweep_(Elements(z, x, comp, y[start:stop]), moved(start, stop), pace, self.scratch)
        if not direct:
            p.copy_(held)

    # --- y

    def _y(self, stack: Stack, batch: slice = slice(None)) -> Tensor:
        """Room for y of a batch; where x has to be recovered from it, with what the parameters hold."""
        return stack.held(self.scratch, batch) if stack.lean else self.scratch.take("y", stack.z[batch].shape)

    def write_y(self, stack: Stack, beta: Tensor) -> None:
        """y from z and x into the parameters: the bits that the last step left there."""
        y = self.scratch.take("y", stack.z.shape)
        if self._compiles(stack):  # a step whose gate is closed computes y as every other one did
            closed = Pace(None, beta, beta, None, gate=torch.zeros((), dtype=torch.bool, device=beta.device))
            compiled.sweep_(stack.elements(y), None, closed)
        else:
            gradient_point(stack.z, stack.x, beta, y)
        stack.write_(y)
