"""Which runs there are: every one is the trunk, a fresh start, or a branch that goes on from the trunk's commit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from anytimed.contracts import Json

OPTIMIZERS: Final[dict[str, dict[str, Any]]] = {
    "sf_normuon": {"lr": 0.04, "aux_lr": 0.02, "beta": 0.9, "mu": 0.8},
    "amuse": {"lr": 0.02, "aux_lr": 0.01, "beta1": 0.6, "mu": 0.8, "rho": 0.4},
}


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of everything. trunk: steps before the data changes; after: steps that follow."""

    name: str
    trunk: int
    after: int
    warmup: int
    evaluate_every: int
    probe_every: int
    hidden: int
    layers: int
    context: int
    block: int
    holdout_tokens: int
    probe_bytes: int
    stream_bytes: int


FULL: Final = Scale("full", 1000, 1000, 50, 25, 50, 128, 2, 128, 512, 8192, 16_384, 3_200_000)
QUICK: Final = Scale("quick", 60, 40, 20, 10, 20, 32, 2, 64, 128, 2048, 4096, 150_000)
BATCH: Final = 8
HISTORY: Final = 100
"""What the weight sum is multiplied by at the change: 1,000 steps then weigh as 100,000."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A run. start: the run whose commit it goes on from. sources: the mixture, at equal weights. steps: where it ends;
    None: `Scale.after` steps after the first batch of new data. history: factor on the weight sum at the start. window:
    `averaging_window_steps`."""

    name: str
    optimizer: str
    sources: tuple[str, ...]
    probes: tuple[str, ...]
    start: str | None = None
    steps: int | None = None
    steered: bool = True
    history: int = 1
    window: int | None = None
    seed: int = 1

    def told(self) -> Json:
        return {slot: getattr(self, slot) for slot in self.__slots__}


def plans(scale: Scale, seed: int) -> list[Plan]:
    """All runs of a seed, those first that others go on from."""
    both = ("python", "headers")
    end = scale.trunk + scale.after

    def plan(name: str, optimizer: str, sources: tuple[str, ...], probes: tuple[str, ...], **more: Any) -> Plan:
        start = more.pop("start", None)
        start = f"{start}@{seed}" if start else None
        return Plan(f"{name}@{seed}", optimizer, sources, probes, start, **more, seed=seed)

    def switch(name: str, optimizer: str = "sf_normuon", **more: Any) -> Plan:
        return plan(name, optimizer, both[1:], both[1:], start=f"{optimizer}/trunk", **more)

    found = [plan(f"{o}/trunk", o, both[:1], both[:1], steps=scale.trunk) for o in OPTIMIZERS]
    found += [
        switch("switch/long/plain", steered=False, history=HISTORY),
        switch("switch/long/steered", history=HISTORY),
        switch("switch/long/window", steered=False, history=HISTORY, window=scale.trunk),
    ]
    if seed > 1:  # further seeds are for the decisive comparison
        return [each for each in found if each.optimizer == "sf_normuon"]
    return [
        *found,
        plan("extend/both", "sf_normuon", both, both, steps=end),
        plan("extend/added", "sf_normuon", both, both, start="sf_normuon/trunk", steps=end),
        plan("sf_normuon/stationary", "sf_normuon", both[:1], both[:1], start="sf_normuon/trunk", steps=end),
        plan("amuse/stationary", "amuse", both[:1], both[:1], start="amuse/trunk", steps=end),
        switch("switch/long/amuse", "amuse", history=HISTORY),
        switch("switch/short/steered"),
        plan("amuse/unsteered", "amuse", both[:1], both[:1], steps=end, steered=False),
        plan("extend/unsteered", "sf_normuon", both, both, start="sf_normuon/trunk", steps=end, steered=False),
        switch("switch/short/plain", steered=False),
    ]


def tables(plan: Plan, scale: Scale, streams: dict[str, str], folder: str, published: str) -> Json:
    """The configuration of a run, as its file would say it."""
    optimizer = {"type": plan.optimizer, **OPTIMIZERS[plan.optimizer], "weight_decay": 0.1}
    if plan.window is not None:
        optimizer["averaging_window_steps"] = plan.window
    return {
        "run": {"directory": folder, "seed": plan.seed, "device": "cpu", "threads": 1},
        "model": {
            "type": "llama",
            "hidden_size": scale.hidden,
            "layers": scale.layers,
            "heads": 4,
            "intermediate_size": 3 * scale.hidden,
            "context_length": 1024,
            "tie_embeddings": False,
        },
        "tokenizer": {"type": "bytes"},
        "data": {
            "sequence_length": scale.context,
            "batch_size": BATCH,
            "shuffle_block_sequences": scale.block,
            "discover": {"every_s": 3600.0},
            "holdout": {"fraction": 0.1, "max_tokens": scale.holdout_tokens, "record_tokens": 1024},
        },
        "sources": {name: {"type": "jsonl", "url": streams[name]} for name in plan.sources},
        "optimizer": {**optimizer, "warmup_steps": scale.warmup},
        "training": {"steered_memory": plan.steered},
        "evaluation": {"every_steps": scale.evaluate_every, "batch_size": 64},
        "commits": {"every_s": None},
        "exports": {"url": published},
    }
