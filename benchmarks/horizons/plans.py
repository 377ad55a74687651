"""Which runs there are, and the configuration of each.

One run of each schedule-free optimizer goes to the longest horizon, with one table of numbers. Against it, for every
horizon, stand the rivals that know it, each with the learning rate that is best for that horizon (`tuning`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from anytimed.contracts import Json

PILOT: Final[dict[str, dict[str, Any]]] = {
    "sf_normuon": {"type": "sf_normuon", "lr": 0.04, "aux_lr": 0.02, "beta": 0.9, "mu": 0.8},
    "amuse": {"type": "amuse", "lr": 0.02, "aux_lr": 0.01, "beta1": 0.6, "mu": 0.8, "rho": 0.4},
}
"""A pilot's numbers, the same at every horizon: `sensitivity.py` varies them, and `extend.py` trains with them."""

ONE_CONFIGURATION: Final[dict[str, dict[str, Any]]] = {
    "sf_normuon": {**PILOT["sf_normuon"], "lr": 0.02, "aux_lr": 0.01, "beta": 0.8, "mu": 0.6},
    "amuse": {**PILOT["amuse"], "mu": 0.7, "rho": 0.2},
    "sf_adamw": {"type": "sf_adamw", "lr": 0.006, "beta": 0.9},
}
"""The same at every horizon. What follows from the sensitivity of the pilot's at T and 4T; SF-NorMuon's learning rate
from a look at 8T too, where twice as much was 0.035 behind."""

ADAMW: Final[dict[str, float]] = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99}
"""Of every rival. beta2 by a pilot (AdamW, cosine, 500 steps, lr .008): .95 2.512, .98 2.489, .99 2.419, .999 2.506."""

ALLOWED: Final = (
    *(f"horizons.rivals:{name}" for name in ("AdamWCosine", "NorMuonCosine", "MuonWSD")),
    "horizons.decay:SFNorMuonDecayAtY",
)


@dataclass(frozen=True, slots=True)
class Rival:
    """A scheduled optimizer whose learning rate is tuned for each horizon. centre: where the grid begins; matrices:
    whether the rest has a learning rate of its own, half of that; decides: the one run is judged beside it."""

    type: str
    centre: float
    matrices: bool
    decides: bool = True
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def table(self, lr: float, horizon: int, warmup: int) -> Json:
        aux = {"aux_lr": lr / 2} if self.matrices else {}
        told = {"type": f"horizons.rivals:{self.type}", "lr": lr, **aux, **ADAMW, **self.numbers}
        return {**told, "horizon": horizon, "warmup_steps": min(warmup, horizon // 10)}


RIVALS: Final[dict[str, Rival]] = {
    "adamw": Rival("AdamWCosine", 0.004, matrices=False),
    "normuon": Rival("NorMuonCosine", 0.02, matrices=True, numbers={"mu": 0.95}),
    "normuon, mu 0.8": Rival("NorMuonCosine", 0.02, matrices=True, numbers={"mu": 0.8}),
    "normuon, mu 0.6": Rival("NorMuonCosine", 0.02, matrices=True, numbers={"mu": 0.6}),
    "muon_wsd": Rival("MuonWSD", 0.02, matrices=True, decides=False, numbers={"mu": 0.95}),
}
FAMILIES: Final = {
    "adamw": ("adamw",),
    "normuon": ("normuon, mu 0.8", "normuon, mu 0.6"),
    "muon_wsd": ("muon_wsd",),
}
"""Of several kinds of one optimizer, the best at a horizon is what the one run is judged beside there: that one is
trained with every seed, the others with the first. NorMuon's published momentum, 0.95, was 0.07 to 0.18 nats behind
0.8 at the best rate of every horizon (2T to 8T), 0.05 to 0.37 at others."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of everything. unit: T, in steps; multiples: the horizons, in T."""

    name: str
    unit: int
    multiples: tuple[int, ...]
    seeds: int
    warmup: int
    evaluate_every: int
    hidden: int
    layers: int
    heads: int
    context: int
    batch: int
    block: int
    holdout_tokens: int
    probe_bytes: int
    stream_bytes: int
    micro_batch: int | None = None
    gpu: bool = False

    @property
    def horizons(self) -> tuple[int, ...]:
        return tuple(self.unit * m for m in self.multiples)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.context

    def to(self, multiples: tuple[int, ...]) -> Scale:
        """With other horizons, and as much text as these need: a tenth is held out."""
        return replace(self, multiples=multiples, stream_bytes=round(1.2 * self.unit * max(multiples) * self.tokens))

    def marks(self) -> tuple[int, ...]:
        """Steps at which the one run is measured: three to an octave, and every horizon."""
        last, first = self.horizons[-1], self.unit / 10
        found = {round(first * 2 ** (k / 3)) for k in range(int(3 * math.log2(last / first)) + 1)}
        return tuple(sorted(found | set(self.horizons)))


FULL: Final = Scale("full", 250, (1, 2, 4, 8), 3, 50, 25, 128, 2, 4, 128, 8, 512, 8192, 32_768, 3_200_000)
LONG: Final = Scale("long", 250, (1, 4, 20), 1, 50, 25, 64, 2, 4, 128, 8, 512, 8192, 32_768, 6_000_000)
"""A smaller model, to twenty times T."""
QUICK: Final = Scale("quick", 20, (1, 2), 1, 5, 10, 32, 2, 4, 64, 8, 128, 2048, 4096, 150_000)
GPU: Final = Scale(
    "gpu", 790, (1, 8), 1, 200, 100, 512, 6, 8, 1024, 64, 16_384, 131_072, 262_144, 500_000_000, gpu=True
)
"""20.7 M parameters, 65,536 tokens a step; 8 T are 414 M tokens, twenty for each parameter. Longer needs more text."""
SCALES: Final = {scale.name: scale for scale in (FULL, LONG, QUICK, GPU)}


@dataclass(frozen=True, slots=True)
class Run:
    """A run from a fresh start. optimizer: its table; marks: steps where it is measured; at: the weights that are."""

    name: str
    optimizer: Json
    steps: int
    seed: int
    marks: tuple[int, ...]
    at: tuple[str, ...] = ("x", "y", "z")
    steered: bool = True

    def told(self) -> Json:
        return {slot: getattr(self, slot) for slot in self.__slots__}


def one_run(kind: str, scale: Scale, seed: int) -> Run:
    """The run of a schedule-free optimizer to the longest horizon."""
    return _to_the_end(f"{kind}@{seed}", ONE_CONFIGURATION[kind], scale, seed)


def pilot_run(kind: str, scale: Scale, seed: int) -> Run:
    """The same with the pilot's numbers."""
    return _to_the_end(f"{kind}, pilot@{seed}", PILOT[kind], scale, seed)


def _to_the_end(name: str, numbers: Mapping[str, Any], scale: Scale, seed: int) -> Run:
    optimizer = {**numbers, "weight_decay": 0.1, "warmup_steps": scale.warmup}
    return Run(name, optimizer, scale.horizons[-1], seed, scale.marks())


def rival_run(kind: str, horizon: int, lr: float, scale: Scale, seed: int) -> Run:
    """A scheduled run to its own horizon, measured at its end."""
    table = RIVALS[kind].table(lr, horizon, scale.warmup)
    return Run(f"{kind}/{horizon}/{lr:g}@{seed}", table, horizon, seed, (horizon,), ("x",), steered=False)


NEVER: Final = 10**9


def llama(hidden: int, layers: int, heads: int) -> Json:
    """The table of a byte model."""
    return {
        "type": "llama",
        "hidden_size": hidden,
        "layers": layers,
        "heads": heads,
        "intermediate_size": 3 * hidden,
        "context_length": 1024,
        "tie_embeddings": False,
    }


def data(context: int, batch: int, block: int, holdout_tokens: int, micro_batch: int | None = None) -> Json:
    """The table of what is read; nothing new is looked for."""
    return {
        "sequence_length": context,
        "batch_size": batch,
        **({} if micro_batch is None else {"micro_batch_size": micro_batch}),
        "shuffle_block_sequences": block,
        "discover": {"every_s": 3600.0},
        "holdout": {"fraction": 0.1, "max_tokens": holdout_tokens, "record_tokens": 1024},
    }


def tables(run: Run, scale: Scale, stream: str, folder: str) -> Json:
    """The configuration of a run, as its file would say it."""
    where = (
        {"device": "cuda", "precision": "bfloat16", "compile": True} if scale.gpu else {"device": "cpu", "threads": 1}
    )
    return {
        "run": {"directory": f"{folder}/run", "seed": run.seed, **where},
        "model": llama(scale.hidden, scale.layers, scale.heads),
        "tokenizer": {"type": "bytes"},
        "data": data(scale.context, scale.batch, scale.block, scale.holdout_tokens, scale.micro_batch),
        "sources": {"python": {"type": "jsonl", "url": stream}},
        "optimizer": run.optimizer,
        "training": {"steered_memory": run.steered},
        "evaluation": {"every_steps": scale.evaluate_every if run.steered else NEVER, "batch_size": 64},
        "commits": {"every_s": None},
        "exports": {"url": f"{folder}/published"},
    }
