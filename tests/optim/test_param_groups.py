"""Routing by role, tied weights, and the errors that name the parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from anytimed.optim import SFAdamW, SFNorMuon, param_groups


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.hidden = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4, bias=False)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight


ROLES = {
    "embedding.weight": "embedding",
    "hidden.weight": "matrix",
    "hidden.bias": "bias",
    "norm.weight": "norm",
    "head.weight": "head",
}


def names(groups: list[dict[str, object]]) -> dict[str, list[str]]:
    return {str(g["rule"]): [name for name, _ in g["params"]] for g in groups}  # type: ignore[attr-defined]


@pytest.mark.parametrize("remove_duplicate", [True, False])
def test_roles_route_and_tied_weights_come_once(remove_duplicate: bool) -> None:
    module = Tied()
    groups = param_groups(module.named_parameters(remove_duplicate=remove_duplicate), ROLES)
    assert names(groups) == {
        "spectral": ["hidden.weight"],
        "adamw": ["embedding.weight", "hidden.bias", "norm.weight"],
    }
    optimizer = SFNorMuon(groups)
    assert [g["param_names"] for g in optimizer.param_groups] == list(names(groups).values())
    assert len(optimizer.averaged()) == 4


def test_tied_weights_move_as_one_parameter() -> None:
    """Against the same model whose one tensor gets the sum of both gradients under one name."""
    torch.manual_seed(0)
    module = Tied()
    optimizer = SFNorMuon(param_groups(module.named_parameters(remove_duplicate=False), ROLES), warmup_steps=2)
    for _ in range(4):
        optimizer.zero_grad()
        tokens = torch.tensor([1, 2, 3])
        hidden = module.norm(module.hidden(module.embedding(tokens)))
        nn.functional.cross_entropy(module.head(hidden), tokens).backward()
        optimizer.step()
    assert module.head.weight is module.embedding.weight
    assert int(optimizer.state[module.head.weight]["updates"]) == 4


def test_frozen_parameters_need_no_role_and_empty_groups_are_left_out() -> None:
    module = Tied()
    module.hidden.weight.requires_grad_(False)
    roles = {name: role for name, role in ROLES.items() if name != "hidden.weight"}
    assert list(names(param_groups(module.named_parameters(), roles))) == ["adamw"]
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        param_groups([("p", nn.Parameter(torch.ones(2), requires_grad=False))], {})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"hidden.bias": None},
            r"parameter hidden\.bias of shape \(4,\) has no role; give it one of matrix, embedding",
        ),
        ({"norm.weight": "gain"}, r"parameter norm\.weight: unknown role 'gain', expected one of matrix"),
        ({"hidden.bias": "matrix"}, r"parameter hidden\.bias of shape \(4,\) is no matrix"),
        (
            {"head.weight": "matrix"},
            r"parameter head\.weight is tied to embedding\.weight: .* give both names one role",
        ),
    ],
)
def test_errors_name_the_parameter(changed: dict[str, str | None], message: str) -> None:
    roles = {name: role for name, role in {**ROLES, **changed}.items() if role is not None}
    with pytest.raises(ValueError, match=message):
        param_groups(Tied().named_parameters(remove_duplicate=False), roles)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"params": [torch.ones(2, 2)]}, r"rule None, expected one of spectral, adamw; make the groups with"),
        ({"rule": "muon", "params": [torch.ones(2, 2)]}, r"rule 'muon', expected one of spectral, adamw"),
        ({"rule": "spectral", "params": [("w", torch.ones(2))]}, r"parameter w of shape \(2,\).* is for matrices"),
        ({"rule": "adamw", "params": [("w", torch.ones(2).double())]}, r"parameter w .*expected float32 or bfloat16"),
        ({"rule": "adamw", "params": [("w", torch.ones(2, device="meta"))]}, r"parameter w .*: expected cpu"),
        ({"rule": "adamw", "params": []}, r"group without parameters; leave the group out"),
        ({"rule": "adamw", "params": [("w", torch.ones(2))], "lr": -1.0}, r"SFNorMuon: lr = -1\.0, expected a number"),
        ({"rule": "adamw", "params": [("w", torch.ones(2))], "clock": 7}, r"clock 7 of a parameter group: expected 0"),
        (
            {"rule": "adamw", "params": [("w", torch.ones(2))], "clock": 0, "beta": 0.5},
            r"groups of one clock share beta: found \[0\.5\] beside \[0\.9\]",
        ),
    ],
)
def test_a_group_that_cannot_be_is_refused_and_leaves_no_trace(group: dict[str, object], message: str) -> None:
    optimizer = SFNorMuon(param_groups(Tied().named_parameters(), ROLES))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 2
    assert len(optimizer.clock_state()) == 1
    optimizer.step()


def test_one_parameter_twice_in_a_group_is_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="twice in one group"):
        SFAdamW([p, p])


def test_sf_adamw_takes_plain_parameters_and_moves_every_group_alike() -> None:
    module = Tied()
    optimizer = SFAdamW(param_groups(module.named_parameters(), ROLES))
    assert [g["rule"] for g in optimizer.param_groups] == ["adamw", "adamw"]
    assert len(SFAdamW(module.parameters()).param_groups) == 1


def test_a_group_overrides_what_the_optimizer_says() -> None:
    groups = param_groups(Tied().named_parameters(), ROLES)
    groups[1].update(lr=0.125, weight_decay=0.0)
    optimizer = SFNorMuon(groups, lr=0.5, weight_decay=0.25)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.25), (0.125, 0.0)]
    spectral, adamw = SFNorMuon(param_groups(Tied().named_parameters(), ROLES), lr=0.5).param_groups
    assert (adamw["lr"], adamw["beta2"], adamw["weight_decay"]) == (0.25, 0.99, spectral["weight_decay"])
