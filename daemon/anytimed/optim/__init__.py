"""Schedule-free spectral optimizers: train without knowing when it ends, serve the averaged weights at any step.

    groups = param_groups(model.named_parameters(), roles)     by role: hidden matrices, and everything else
    optimizer = SFNorMuon(groups)
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    optimizer.averaged()                                       x, the weights to evaluate and export

`averaging` holds the algebra of x, y, z; `orthogonal`, `neuron_norm` and `adamw` the rules; `stacks` the layout of the
state; `schedule_free` what the optimizers share; `sf_normuon`, `amuse`, `sf_adamw` one optimizer each. Imports torch
and nothing of ours.
"""

from anytimed.optim.amuse import AMUSE
from anytimed.optim.param_groups import param_groups
from anytimed.optim.schedule_free import ScheduleFree
from anytimed.optim.sf_adamw import SFAdamW
from anytimed.optim.sf_normuon import SFNorMuon

__all__ = ["AMUSE", "SFAdamW", "SFNorMuon", "ScheduleFree", "param_groups"]
