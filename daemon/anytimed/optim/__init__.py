"""Schedule-free spectral optimizers: train without knowing when it ends, serve the averaged weights at any step.

    optimizer = SFNorMuon(param_groups(model), lr=0.01)        hidden matrices by their rule, the rest by AdamW
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    optimizer.averaged()                                       x, the weights to evaluate and export

`param_groups` and `roles` sort a model's parameters; `averaging` holds the algebra of x, y, z; `orthogonal`,
`neuron_norm`, `adamw` and `polyak` that of the rules, `rules` their form; `stacks` the layout of the state; `walk` how
a step goes through it, with `sweep` (torch's operations), `native` (C, on a CPU, the same bits) or `compiled` (torch's
compiler, on CUDA) for every element; `schedule_free` what the optimizers share; `sf_normuon`, `amuse`, `sf_adamw` one
optimizer each, with its page in the class's docstring. Imports torch and nothing of ours.
"""

from anytimed.optim.amuse import AMUSE
from anytimed.optim.param_groups import param_groups
from anytimed.optim.schedule_free import ScheduleFree
from anytimed.optim.sf_adamw import SFAdamW
from anytimed.optim.sf_normuon import SFNorMuon

__all__ = ["AMUSE", "SFAdamW", "SFNorMuon", "ScheduleFree", "param_groups"]
