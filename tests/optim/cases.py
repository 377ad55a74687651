"""The optimizers under test as a table, small parameters of every kind, and gradients that depend on nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anytimed.optim import AMUSE, ScheduleFree, SFAdamW, SFNorMuon, native, param_groups

OPTIMIZERS: dict[str, Callable[..., ScheduleFree]] = {
    "sf_normuon": partial(SFNorMuon, beta=0.9, mu=0.8, weight_decay=0.05),
    "amuse": partial(AMUSE, mu=0.95, rho=0.8, weight_decay=0.05),
    "sf_adamw": SFAdamW,
}
"""With the papers' values, which the twins and the bounds of these tests were written for; the defaults are others."""

SHAPES: dict[str, tuple[tuple[int, ...], str]] = {
    "row": ((1, 12), "matrix"),
    "embedding": ((7, 6), "embedding"),
    "square": ((8, 8), "matrix"),
    "wide.0": ((6, 17), "matrix"),
    "norm": ((9,), "norm"),
    "tall.0": ((19, 5), "matrix"),
    "wide.1": ((6, 17), "matrix"),
    "column": ((11, 1), "matrix"),
    "scalar": ((), "bias"),
    "wide.2": ((6, 17), "matrix"),
    "convolution": ((6, 2, 3, 1), "matrix"),
    "tall.1": ((19, 5), "matrix"),
    "head": ((5, 7), "head"),
    "large": ((20, 15), "embedding"),  # more than PACKED_ELEMENTS in these tests (conftest): a stack of its own
}
"""Name to shape and role: 1 x n, n x 1, wide, tall, square, several of one shape, a convolution, and auxiliaries."""

ROLES = {name: role for name, (_, role) in SHAPES.items()}


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, (shape, _) in SHAPES.items()
    }


def build(kind: str, params: dict[str, nn.Parameter], **options: Any) -> ScheduleFree:
    options.setdefault("warmup_steps", 10)
    if kind != "sf_adamw":
        options.setdefault("orthogonal_dtype", "float32")  # bfloat16 is the default where the hardware is quick at it
    return OPTIMIZERS[kind](param_groups(params.items(), ROLES), **options)


ROADS = ("host", "device", "native")
"""How a step goes through the state: as on a CPU; as on CUDA, which a CPU can do as well; as on a CPU with a compiler,
which only larger optimizers would take by themselves."""


def take(road: str, optimizer: ScheduleFree) -> ScheduleFree:
    optimizer._walk.on_host = road != "device"
    optimizer._walk.native = road == "native"
    if road == "native" and native.library() is None:
        pytest.skip(f"no native library: {native.why_not()}")
    return optimizer


def gradients(params: dict[str, nn.Parameter], steps: int, seed: int = 1) -> Iterator[dict[str, Tensor]]:
    """Noise around a direction that stays, the same for every run: no rounding of y can find its way back into it."""
    generator = torch.Generator().manual_seed(seed)
    drift = {name: torch.randn(p.shape, generator=generator) for name, p in params.items()}
    for _ in range(steps):
        yield {
            name: (drift[name] + torch.randn(p.shape, generator=generator)).to(p.dtype) for name, p in params.items()
        }


def walk(optimizer: ScheduleFree, params: dict[str, nn.Parameter], steps: int, seed: int = 1) -> None:
    for given in gradients(params, steps, seed):
        for name, p in params.items():
            p.grad = given[name]
        optimizer.step()


def everything(optimizer: ScheduleFree, params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """A copy of all that a step may change, by name: parameters, state, clocks."""
    told = {f"y.{name}": p.detach().clone() for name, p in params.items()}
    for name, p in params.items():
        told |= {f"{key}.{name}": value.clone() for key, value in optimizer.state[p].items()}
    for i, clock in enumerate(optimizer.clock_state()):
        told |= {f"clock.{i}.{key}": torch.tensor(float(value), dtype=torch.float64) for key, value in clock.items()}
    return told


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The names under which not all bits agree (0.0 and -0.0 differ; a NaN agrees with itself)."""
    assert a.keys() == b.keys()

    def bits(t: Tensor) -> Tensor:
        return t.contiguous().view(-1).view(torch.uint8)

    return [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(bits(a[name]), bits(b[name]))]
