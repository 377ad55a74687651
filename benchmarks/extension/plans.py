"""Which runs there are: a trunk, branches that go on from its commit, and rivals that restart from what it published.

A branch has a change of the stream (`CHANGES`), a way to remember, and a history: short, as it is, or long, an emulated
one. A window does not know how long the history was, so it has none in its name. Every way branches off the same trunk:
up to there they differ by what they would have forgotten of it, and after 1,000 more steps nothing is left of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from horizons.plans import NEVER, PILOT, RIVALS, data, llama

from anytimed.contracts import Json
from extension.scales import Scale

OPTIMIZERS: Final = {kind: {**PILOT[kind], "weight_decay": 0.1} for kind in ("sf_normuon", "amuse")}
TEXTS: Final = ("python", "headers")
"""The old text and the new one; every run is measured on both."""
CHANGES: Final[dict[str, tuple[str, ...]]] = {
    "stationary": TEXTS[:1],
    "switch": TEXTS[1:],
    "added": TEXTS,
}
"""The mixture, at equal weights, of what follows the trunk."""
HISTORIES: Final = {"short": 1, "long": 100}
"""How many times the steps of the trunk are taken to have gone before."""
RESTARTED: Final = ("normuon, mu 0.8", "normuon")
"""Of `horizons.plans.RIVALS`; the first is restarted on the mixture and with every seed, too."""


BATCH: Final = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """A run. optimizer: its table without warm-up. sources: the mixture. start: the run whose commit it goes on from.
    restart: it begins with what that run published instead, and with the changed stream. steps: where it ends; None:
    `Scale.after` steps after the first batch of new data. history: how many times the steps of its start have gone
    before."""

    name: str
    optimizer: Json
    sources: tuple[str, ...]
    seed: int
    start: str | None = None
    restart: bool = False
    steps: int | None = None
    steered: bool = False
    history: int = 1

    def told(self) -> Json:
        return {slot: getattr(self, slot) for slot in self.__slots__}

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Plan:
        """The inverse of `told`, also from JSON."""
        return cls(**{**told, "sources": tuple(told["sources"])})


def trunk(kind: str, seed: int, scale: Scale) -> Plan:
    return Plan(f"{kind}/trunk@{seed}", OPTIMIZERS[kind], TEXTS[:1], seed, steps=scale.trunk, steered=True)


def unsteered(kind: str, seed: int, scale: Scale) -> Plan:
    """The trunk again, never steered: what its forgettings cost on a stream that does not change."""
    return Plan(f"{kind}/unsteered@{seed}", OPTIMIZERS[kind], TEXTS[:1], seed, steps=scale.trunk)


def both(seed: int, scale: Scale) -> Plan:
    """Both texts from the start, for as long as a branch takes: that begins the new text at its next block."""
    end = scale.trunk + scale.block // BATCH + scale.after
    return Plan(f"both@{seed}", OPTIMIZERS["sf_normuon"], TEXTS, seed, steps=end, steered=True)


def ways(scale: Scale) -> dict[str, dict[str, Any]]:
    """How x may remember: what each adds to the optimizer's table."""
    return {
        "plain": {},
        "steered": {},
        "power-1": {"averaging_power": 1.0},
        "power-4": {"averaging_power": 4.0},
        "window-T": {"averaging_window_steps": scale.unit},
        "window-4T": {"averaging_window_steps": scale.trunk},
    }


def branch(change: str, history: str | None, way: str, seed: int, scale: Scale, kind: str = "sf_normuon") -> Plan:
    """history: of `HISTORIES`; None: it makes no difference."""
    told = way if kind == "sf_normuon" else f"{kind}-{way}"
    return Plan(
        "/".join(part for part in (change, history, told) if part) + f"@{seed}",
        {**OPTIMIZERS[kind], **ways(scale)[way]},
        CHANGES[change],
        seed,
        start=f"{kind}/trunk@{seed}",
        steps=scale.trunk + scale.after if change == "stationary" else None,
        steered=way == "steered",
        history=HISTORIES[history] if history else 1,
    )


def restarted(change: str, kind: str, lr: float, seed: int, scale: Scale) -> Plan:
    """A rival that begins at the trunk's published x and knows how many steps it has."""
    table = RIVALS[kind].table(lr, scale.after, scale.warmup)
    del table["warmup_steps"]
    return Plan(
        f"{change}/restarted/{kind}/{lr:g}@{seed}",
        table,
        CHANGES[change],
        seed,
        start=f"sf_normuon/trunk@{seed}",
        restart=True,
        steps=scale.after,
    )


def decisive(seed: int, scale: Scale) -> list[Plan]:
    """The switch after a long history."""
    found = [("long", "steered"), (None, "window-4T"), ("long", "plain"), (None, "window-T")]
    return [branch("switch", history, way, seed, scale) for history, way in found]


def short(seed: int, scale: Scale) -> list[Plan]:
    """With the history that there is: what plain averaging does by itself, and what steering makes of the mixture."""
    found = [("switch", "plain"), ("added", "plain"), ("added", "steered")]
    return [branch(change, "short", way, seed, scale) for change, way in found]


def powers(seed: int, scale: Scale) -> list[Plan]:
    found = [("short", "steered"), ("short", "power-1"), ("long", "power-1")]
    return [branch("switch", history, way, seed, scale) for history, way in found]


def added(seed: int, scale: Scale) -> list[Plan]:
    """The other ways, with the new text beside the old one."""
    found = [(None, "window-T"), ("long", "steered"), ("short", "power-1"), (None, "window-4T"), ("long", "plain")]
    return [branch("added", history, way, seed, scale) for history, way in found]


def amuse(seed: int, scale: Scale) -> list[Plan]:
    """AMUSE after a long history."""
    found = [branch("switch", "long", way, seed, scale, "amuse") for way in ("steered", "plain")]
    return [*found, branch("switch", None, "window-4T", seed, scale, "amuse")]


def stationary(seed: int, scale: Scale) -> list[Plan]:
    """What every way costs where nothing changes."""
    return [
        *(branch("stationary", None, way, seed, scale) for way in ("steered", "window-T", "power-1", "window-4T")),
        unsteered("amuse", seed, scale),
    ]


def rest(seed: int, scale: Scale) -> list[Plan]:
    """What is less likely to surprise."""
    power = [branch("switch", history, "power-4", seed, scale) for history in HISTORIES]
    return [*power, branch("added", "long", "power-1", seed, scale)]


def tables(plan: Plan, scale: Scale, streams: Mapping[str, str], folder: str, published: Sequence[str]) -> Json:
    """The configuration of a run, as its file would say it. published: where it publishes, and where its start did."""
    begins = plan.start is None
    return {
        "run": {"directory": folder, "seed": plan.seed, "device": "cpu", "threads": 1},
        "model": {
            **llama(scale.hidden, scale.layers, 4),
            "init_from": published[1] if plan.restart else None,
        },
        "tokenizer": {"type": "bytes"},
        "data": data(scale.context, BATCH, scale.block, scale.holdout_tokens),
        "sources": {name: {"type": "jsonl", "url": streams[name]} for name in plan.sources},
        "optimizer": {**plan.optimizer, "warmup_steps": scale.warmup},
        "training": {"steered_memory": plan.steered},
        "evaluation": {"every_steps": scale.evaluate_every if plan.steered else NEVER, "batch_size": 64},
        "commits": {"every_s": None},
        "exports": {"url": published[0], "every_steps": plan.steps if begins else None},
    }
