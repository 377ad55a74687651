"""From names and roles to the two parameter groups: hidden matrices, and everything else.

Routing goes by role, never by the number of dimensions: embeddings and the head are two-dimensional too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from torch import Tensor

RULES: Final = {"matrix": "spectral", "embedding": "adamw", "head": "adamw", "norm": "adamw", "bias": "adamw"}
"""The rule of every role."""


def param_groups(named_parameters: Iterable[tuple[str, Tensor]], roles: Mapping[str, str]) -> list[dict[str, Any]]:
    """Groups for an optimizer of this room: {"rule": "spectral", …} and {"rule": "adamw", …}, an empty one left out.

    named_parameters: as `module.named_parameters()` gives them; roles: by the same names. Parameters that do not
    require a gradient are left out. Tied weights (one tensor, several names) are one parameter, under its first name.
    ValueError naming the parameter: no role, an unknown role, a matrix of fewer than two dimensions, two names of one
    tensor that ask for different rules. Add options to a returned group to override the optimizer's for it.
    """
    members: dict[str, list[tuple[str, Tensor]]] = {"spectral": [], "adamw": []}
    seen: dict[Tensor, tuple[str, str]] = {}
    for name, p in named_parameters:
        if not p.requires_grad:
            continue
        if p in seen and name not in roles:
            continue
        if name not in roles:
            raise ValueError(
                f"parameter {name} of shape {tuple(p.shape)} has no role; give it one of {', '.join(RULES)}"
            )
        role = roles[name]
        if role not in RULES:
            raise ValueError(f"parameter {name}: unknown role {role!r}, expected one of {', '.join(RULES)}")
        rule = RULES[role]
        if p in seen:
            first, first_rule = seen[p]
            if rule != first_rule:
                raise ValueError(
                    f"parameter {name} is tied to {first}: its role {role} asks for the rule {rule}, {first}'s for "
                    f"{first_rule}; give both names one role"
                )
            continue
        if rule == "spectral" and p.ndim < 2:
            raise ValueError(
                f"parameter {name} of shape {tuple(p.shape)} is no matrix; give it another role, such as bias"
            )
        seen[p] = name, rule
        members[rule].append((name, p))
    groups = [{"rule": rule, "params": named} for rule, named in members.items() if named]
    if not groups:
        raise ValueError("no parameter requires a gradient; expected a model with something to train")
    return groups
