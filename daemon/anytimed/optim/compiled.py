"""A step's work on single elements for torch.compile: one loop that reads and writes every element once.

`scaled_` does for a batch of matrices what follows their orthogonalisation: row norms, v, how far rows move; `sweep_`
is `sweep.sweep_`; `flat_` is all of a step under the AdamW rule. Each kind of call is compiled once (`_kernel`) and
serves all sizes; `fits` says which shapes go to the compiler at all, and where there is none, the error says what to
install.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from anytimed.optim.rules import AdamW, Scales
from anytimed.optim.sweep import Elements, Move, Pace


def decided(device: torch.device) -> bool:
    """Whether an optimizer compiles that was not told: on CUDA, where Triton is there and the C compiler it needs."""
    tools = importlib.util.find_spec("triton") and any(shutil.which(name) for name in ("cc", "gcc", "clang"))
    return device.type == "cuda" and bool(tools)


def fits(shape: Sequence[int]) -> bool:
    """Whether a stack of this shape is compiled. A length of 1 is a kind of its own to the compiler: rows, columns and
    single numbers are left to the eager functions, which are as quick at them."""
    return all(n > 1 for n in shape[-2:])


def scaled_(p: Tensor, v: Tensor, scales: Scales, eta: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor]:
    """How far a batch of matrices moves: scale and squares of `rules.Scaled`. v takes in the outcome, in place.

    p: (b, m, n); v: (b, m) or (b, 0); active: (b,), 0-d or None (all). Apart from `sweep_`, or the compiler works the
    scale of a row out again at each of its elements.
    """
    found: tuple[Tensor, Tensor] = _run(_scaled, (scales,), (p, v, eta, active))
    return found


def flat_(
    elements: Elements,
    v: Tensor,
    g: Tensor | None,
    corrected_by: Tensor,
    rule: AdamW,
    active: Tensor | None,
    pace: Pace,
) -> Tensor:
    """One step of z, x, y and v under the AdamW rule, in place; returns the squared norm of the update, 0-d float32.

    v, g, elements: (N,); g None: z and v stay; corrected_by, active: (N,), (1,) or 0-d; active None: all.
    """
    if g is None:
        sweep_(elements, None, pace)
        return torch.zeros_like(rule.eta)
    own = (v, g, corrected_by, rule.eta, active)
    squares: Tensor = _run(_flat, (rule.beta2, rule.eps, rule.moved), (*own, *elements, *_told(pace)))
    return squares


def sweep_(elements: Elements, move: Move | None, pace: Pace) -> None:
    """One step of z, x and y, in place. move None: z stays, x averages all the same."""
    if move is None:
        _run(_still, (), (*(None if part is None else part.view(-1) for part in elements), *_told(pace)))
    else:
        _run(_moved, (), (*move, *elements, *_told(pace)))


def _told(pace: Pace) -> tuple[Tensor | None, ...]:
    return pace.minus_decay, pace.c, pace.beta, pace.last_beta, pace.gate


# --- what the compiler sees -----------------------------------------------------------------------------------------


def _swept(
    move: tuple[Tensor, Tensor, Tensor | None] | None,
    z: Tensor,
    x: Tensor | None,
    comp: Tensor | None,
    y: Tensor,
    minus_decay: Tensor | None,
    c: Tensor,
    beta: Tensor,
    last_beta: Tensor | None,
    gate: Tensor | None,
) -> None:
    """`sweep.sweep_` without working memory. move: direction, scale, active. y has the bits that this gives it, in
    every kernel; `averaging.gradient_point` rounds once less on a CPU."""
    moved = z
    if move is not None:
        direction, scale, active = move
        if minus_decay is not None:
            moved = moved + moved * minus_decay
        moved = moved - direction * scale
        moved = moved if active is None else torch.where(active, moved, z)
    if x is not None and comp is not None:
        delta = comp.to(torch.float32) + c * (moved - x)
        total = x + delta
        owed = (delta + (x - total)).to(comp.dtype)
        if gate is not None:
            owed, total = torch.where(gate, owed, comp), torch.where(gate, total, x)
        comp.copy_(owed)
        x.copy_(total)
        point = _point(moved, total, beta)
    else:
        assert last_beta is not None
        recovered = z + (y - z) / last_beta
        point = _point(moved, recovered + c * (moved - recovered), beta)
        point = point if gate is None else torch.where(gate, point, y)
    y.copy_(point)
    if move is not None:
        z.copy_(moved)


def _point(z: Tensor, x: Tensor, beta: Tensor) -> Tensor:
    """(1 - beta) z + beta x, from x on: torch.lerp, which picks its side by beta, costs twice as much here."""
    return x + (1.0 - beta) * (z - x)


Body = Callable[..., Any]


def _scaled(scales: Scales) -> Body:
    def body(p: Tensor, v: Tensor, eta: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor]:
        scale, squares, new_v = scales(p.to(torch.float32), v, eta)
        if new_v is not None:
            v.copy_(new_v if active is None else torch.where(active.view(-1, 1), new_v, v))
        return scale, squares if active is None else torch.where(active, squares, torch.zeros_like(squares))

    return body


def _moved() -> Body:
    def body(direction: Tensor, scale: Tensor, active: Tensor | None, *rest: Any) -> None:
        _swept((direction, scale, active), *rest)

    return body


def _flat(beta2: float, eps: float, moved: bool) -> Body:
    def body(v: Tensor, g: Tensor, corrected_by: Tensor, eta: Tensor, active: Tensor | None, *rest: Any) -> Tensor:
        if not moved:
            new_v = v * beta2 + (1.0 - beta2) * (g * g)
            v.copy_(new_v if active is None else torch.where(active, new_v, v))
        direction = g / ((v * corrected_by).sqrt() + eps)
        _swept((direction, eta, active), *rest)
        counted = direction if active is None else torch.where(active, direction, torch.zeros_like(direction))
        return (counted * eta).square().sum()

    return body


def _still() -> Body:
    def body(*rest: Any) -> None:
        _swept(None, *rest)

    return body


# --- compiling ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _kernel(make: Callable[..., Body], told: tuple[Hashable, ...], kind: tuple[Hashable, ...]) -> Body:
    """A body, compiled, with code of its own: torch counts compilations by code, and stops at eight."""
    body = make(*told)
    assert isinstance(body, FunctionType)
    alone = FunctionType(body.__code__.replace(), body.__globals__, body.__name__, None, body.__closure__)
    return torch.compile(alone, dynamic=True, fullgraph=True)


def _run(make: Callable[..., Body], told: tuple[Any, ...], parts: tuple[Tensor | None, ...]) -> Any:
    """Calls the kernel of `make(*told)` on these parts; told: hashable, compiled in.

    The compiler runs at the first call of a kind (seconds); it needs a C++ compiler on a CPU, and Triton on CUDA.
    RuntimeError, with what to install, where it finds none.
    """
    # Detached, a view has forgotten its base, for whose shape the compiler would compile again.
    given = [None if part is None else part.detach() for part in parts]
    kind = tuple(None if part is None else (part.dtype, tuple(n == 1 for n in part.shape)) for part in given)
    try:
        return _kernel(make, told, kind)(*given)
    except RuntimeError as failed:
        found = f"{failed}"
        if "C++ compiler" not in found:
            raise
        raise RuntimeError(
            f"compiled=True: {found.partition(chr(10))[0]}; install one (apt-get install g++), or say compiled=False"
        ) from failed
