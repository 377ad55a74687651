"""How large everything is, in the full form and in the quick one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of everything. unit: T, in steps; trunk: steps before the data changes; after: steps that follow; probes:
    steps after the change at which x is measured; every: of the steps before it."""

    name: str
    unit: int
    trunk: int
    after: int
    warmup: int
    evaluate_every: int
    every: int
    probes: tuple[int, ...]
    rows: tuple[int, ...]
    hidden: int
    layers: int
    context: int
    block: int
    holdout_tokens: int
    probe_bytes: int
    stream_bytes: int


FULL: Final = Scale(
    name="full",
    unit=250,
    trunk=1000,
    after=1000,
    warmup=50,
    evaluate_every=25,
    every=100,
    probes=(0, 25, 50, 100, 150, 200, 250, 375, 500, 750, 1000),
    rows=(0, 100, 250, 500, 1000),
    hidden=128,
    layers=2,
    context=128,
    block=512,
    holdout_tokens=8192,
    probe_bytes=16_384,
    stream_bytes=3_200_000,
)
QUICK: Final = Scale(
    name="quick",
    unit=15,
    trunk=60,
    after=40,
    warmup=20,
    evaluate_every=10,
    every=60,
    probes=(0, 40),
    rows=(0, 40),
    hidden=32,
    layers=1,
    context=64,
    block=128,
    holdout_tokens=2048,
    probe_bytes=4096,
    stream_bytes=150_000,
)
