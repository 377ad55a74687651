"""Everything that takes part: our optimizers, the plain loops, and the peers from PyPI.

A contender makes a `Running` from weights of its own. All decay by 0.05 where they can, learning rates are small, and
what a peer leaves to the user is set so that it does the least work for the same algorithm: no Nesterov step where
SF-NorMuon has none, torch's fused AdamW beside torch's Muon. What is left out, and why, the end of `CONTENDERS` says.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from anytimed.optim import AMUSE, SFAdamW, SFNorMuon
from contest.plain_loops import PlainAMUSE, PlainSFAdamW, PlainSFNorMuon
from contest.shapes import Weights

DECAY: Final = 0.05


@dataclass(frozen=True)
class Running:
    """A contender with its weights. states: every mapping in which it keeps tensors between steps."""

    step: Callable[[], object]
    states: Sequence[Mapping[Any, Any]]


@dataclass(frozen=True)
class Contender:
    """module: what has to be installed for it. compiles: its first steps take seconds to minutes. on_request: measured
    only where --only names it."""

    key: str
    title: str
    kind: Literal["ours", "plain", "peer"]
    orthogonalises: bool
    make: Callable[[Weights], Running]
    module: str | None = None
    compiles: bool = False
    on_request: bool = False

    @property
    def installed(self) -> bool:
        return self.module is None or importlib.util.find_spec(self.module) is not None


# --- ours ---------------------------------------------------------------------------------------------------------


def _ours(cls: Callable[..., Any], by_torch: bool = False, **arguments: Any) -> Callable[[Weights], Running]:
    """by_torch: without the sweep in C, and not compiled."""
    if by_torch:
        arguments["compiled"] = False

    def make(weights: Weights) -> Running:
        optimizer = cls(weights.groups(), **arguments)
        if by_torch:
            optimizer._walk.native = False
        return Running(optimizer.step, [optimizer.state])

    return make


# --- the plain loops ----------------------------------------------------------------------------------------------


def _plain_sf_normuon(weights: Weights) -> Running:
    loop = PlainSFNorMuon(weights.matrices, weights.others)
    return Running(loop.step, [loop.state])


def _plain_amuse(weights: Weights) -> Running:
    loop = PlainAMUSE(weights.matrices, weights.others)
    return Running(loop.step, [loop.state])


def _plain_sf_adamw(weights: Weights) -> Running:
    loop = PlainSFAdamW(weights.named.values())
    return Running(loop.step, [loop.state])


# --- peers --------------------------------------------------------------------------------------------------------


def _both(first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> Running:
    def step() -> None:
        first.step()
        second.step()

    return Running(step, [first.state, second.state])


def _torch_muon(weights: Weights) -> Running:
    return _both(
        torch.optim.Muon(weights.matrices, lr=1e-3, weight_decay=DECAY),
        torch.optim.AdamW(weights.others, lr=1e-3, weight_decay=DECAY, fused=True),
    )


def _schedulefree(weights: Weights) -> Running:
    import schedulefree

    optimizer = schedulefree.AdamWScheduleFree(weights.named.values(), lr=1e-3, weight_decay=DECAY)
    optimizer.train()
    return Running(optimizer.step, [optimizer.state])


def _by_use_muon(weights: Weights, **muon: Any) -> list[dict[str, Any]]:
    """Groups as pytorch-optimizer and zij want them."""
    return [
        {"params": weights.matrices, "lr": 1e-3, "weight_decay": DECAY, "use_muon": True, **muon},
        {"params": weights.others, "lr": 1e-3, "weight_decay": DECAY, "use_muon": False},
    ]


def _wrapped(wrapper: Callable[..., Any], base: torch.optim.Optimizer) -> Running:
    optimizer = wrapper(base, momentum=0.9)
    optimizer.train()
    return Running(optimizer.step, [optimizer.state, base.state])


def _pytorch_optimizer_schedule_free(weights: Weights) -> Running:
    from pytorch_optimizer import NorMuon, ScheduleFreeWrapper

    groups = _by_use_muon(weights, momentum=0.8, nesterov=False, update_scale="match_rms")
    return _wrapped(ScheduleFreeWrapper, NorMuon(groups))


def _pytorch_optimizer_muon(weights: Weights) -> Running:
    from pytorch_optimizer import Muon

    optimizer = Muon(_by_use_muon(weights))
    return Running(optimizer.step, [optimizer.state])


def _zij_schedule_free(weights: Weights) -> Running:
    from zij import ScheduleFreeWrapper, SingleDeviceNorMuonWithAuxAdam

    return _wrapped(ScheduleFreeWrapper, SingleDeviceNorMuonWithAuxAdam(_by_use_muon(weights)))


def _zij_normuon(weights: Weights) -> Running:
    from zij import SingleDeviceNorMuonWithAuxAdam

    optimizer = SingleDeviceNorMuonWithAuxAdam(_by_use_muon(weights))
    return Running(optimizer.step, [optimizer.state])


def _heavyball_muon(compile_step: bool) -> Callable[[Weights], Running]:
    def make(weights: Weights) -> Running:
        import heavyball

        options = {"lr": 1e-3, "weight_decay": DECAY, "consume_grad": False, "compile_step": compile_step}
        optimizer = heavyball.SplitOpt(
            [
                {"params": weights.matrices, "optimizer": heavyball.Muon, **options},
                {"params": weights.others, "optimizer": heavyball.AdamW, **options},
            ]
        )
        return Running(optimizer.step, [inner.state for inner in optimizer.optimizers])

    return make


def _heavyball_sf_adamw(compile_step: bool) -> Callable[[Weights], Running]:
    def make(weights: Weights) -> Running:
        import heavyball

        optimizer = heavyball.SFAdamW(
            weights.named.values(), lr=1e-3, weight_decay=DECAY, consume_grad=False, compile_step=compile_step
        )
        return Running(optimizer.step, [optimizer.state])

    return make


CONTENDERS: Final = {
    contender.key: contender
    for contender in (
        Contender("sf_normuon", "SF-NorMuon", "ours", True, _ours(SFNorMuon)),
        Contender("sf_normuon_gram", "SF-NorMuon, Gram", "ours", True, _ours(SFNorMuon, orthogonal_gram=True)),
        Contender("sf_normuon_lean", "SF-NorMuon, lean", "ours", True, _ours(SFNorMuon, lean=True)),
        Contender("amuse", "AMUSE", "ours", True, _ours(AMUSE)),
        Contender("amuse_gram", "AMUSE, Gram", "ours", True, _ours(AMUSE, orthogonal_gram=True)),
        Contender("sf_adamw", "SF-AdamW", "ours", False, _ours(SFAdamW)),
        Contender("plain_sf_normuon", "plain loop, SF-NorMuon", "plain", True, _plain_sf_normuon),
        Contender("plain_amuse", "plain loop, AMUSE", "plain", True, _plain_amuse),
        Contender("plain_sf_adamw", "plain loop, SF-AdamW", "plain", False, _plain_sf_adamw),
        Contender("torch_muon", "torch Muon + AdamW", "peer", True, _torch_muon),
        Contender(
            "pytorch_optimizer_sf_normuon",
            "pytorch-optimizer ScheduleFreeWrapper(NorMuon)",
            "peer",
            True,
            _pytorch_optimizer_schedule_free,
            "pytorch_optimizer",
        ),
        Contender(
            "pytorch_optimizer_muon",
            "pytorch-optimizer Muon",
            "peer",
            True,
            _pytorch_optimizer_muon,
            "pytorch_optimizer",
        ),
        Contender("zij_sf_normuon", "zij ScheduleFreeWrapper(NorMuon)", "peer", True, _zij_schedule_free, "zij"),
        Contender("zij_normuon", "zij NorMuon", "peer", True, _zij_normuon, "zij"),
        Contender(
            "heavyball_muon", "heavyball Muon + AdamW", "peer", True, _heavyball_muon(False), "heavyball", compiles=True
        ),
        Contender("schedulefree", "schedulefree AdamWScheduleFree", "peer", False, _schedulefree, "schedulefree"),
        Contender(
            "heavyball_sf_adamw",
            "heavyball SFAdamW",
            "peer",
            False,
            _heavyball_sf_adamw(False),
            "heavyball",
            compiles=True,
        ),
        Contender(
            "sf_normuon_by_torch",
            "SF-NorMuon, torch's operations alone",
            "ours",
            True,
            _ours(SFNorMuon, by_torch=True),
            on_request=True,
        ),
        # heavyball can compile a whole step into one graph, an option that is off by default. It was worth 14 % of Muon
        # and 11 % of SFAdamW at 0.86 M, for half a minute of tracing at 28 matrices, at every start and for every
        # number of threads. zij's Muon is torch's, copied; its ScheduleFree optimizers are schedulefree's.
        Contender(
            "heavyball_muon_compile_step",
            "heavyball Muon + AdamW, compile_step",
            "peer",
            True,
            _heavyball_muon(True),
            "heavyball",
            compiles=True,
            on_request=True,
        ),
        Contender(
            "heavyball_sf_adamw_compile_step",
            "heavyball SFAdamW, compile_step",
            "peer",
            False,
            _heavyball_sf_adamw(True),
            "heavyball",
            compiles=True,
            on_request=True,
        ),
    )
}
