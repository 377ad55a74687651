"""In which order runs are asked for: what decides first, so that a study that is cut short has it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from statistics import fmean

from horizons.plans import RIVALS
from horizons.tuning import best_of, tuned

from anytimed.contracts import Json
from extension import plans
from extension.training import NotKept, Trainer


def measured(trainer: Trainer, seeds: int) -> Json:
    """Every run's curve by its name, and by change and kind what the restarted rivals came to. Where nothing may be
    trained, what is kept of it."""
    scale = trainer.scale
    rivals: dict[str, dict[str, Json | None]] = {"switch": {}, "added": {}}
    for stage in ([plans.trunk("sf_normuon", 1, scale)], plans.decisive(1, scale), plans.short(1, scale)):
        _some(trainer, stage)
    first, *others = plans.RESTARTED
    rivals["switch"][first] = _restarted(trainer, "switch", first)
    for stage in (plans.powers(1, scale), plans.added(1, scale)):
        _some(trainer, stage)
    for seed in range(2, seeds + 1):
        _some(trainer, [plans.trunk("sf_normuon", seed, scale)])
        if (rival := rivals["switch"][first]) is not None:
            _some(trainer, [plans.restarted("switch", first, rival["lr"], seed, scale)])
        _some(trainer, plans.decisive(seed, scale))
    for kind in others:
        rivals["switch"][kind] = _restarted(trainer, "switch", kind)
    for stage in ([plans.both(1, scale), plans.trunk("amuse", 1, scale)], plans.amuse(1, scale)):
        _some(trainer, stage)
    _some(trainer, plans.stationary(1, scale))
    rivals["added"][first] = _restarted(trainer, "added", first)
    _some(trainer, plans.rest(1, scale))
    made = {change: {kind: of for kind, of in kinds.items() if of} for change, kinds in rivals.items()}
    return {"runs": trainer.found, "restarted": made}


def _some(trainer: Trainer, wanted: Sequence[plans.Plan]) -> None:
    with contextlib.suppress(NotKept):
        trainer.all_of(wanted)


def _restarted(trainer: Trainer, change: str, kind: str) -> Json | None:
    """A rival with the learning rate that is best for the steps after the change, by the mean over the texts in it."""
    scale, texts = trainer.scale, plans.CHANGES[change]

    def losses(rates: Sequence[float]) -> list[float | None]:
        found = trainer.all_of([plans.restarted(change, kind, lr, 1, scale) for lr in rates])
        ends = [of["probed"][-1]["losses"] for of in found]
        return [None if None in end.values() else round(fmean(end[text] for text in texts), 5) for end in ends]

    try:
        tried = tuned(RIVALS[kind].centre, losses)
    except NotKept:
        return None
    best = best_of(tried)
    name = plans.restarted(change, kind, best, 1, scale).name
    return {"tried": {f"{lr:g}": loss for lr, loss in tried.items()}, "lr": best, "loss": tried[best], "run": name}
