"""Routing by role, tied weights, and the errors that name the parameter."""

from __future__ import annotations

import re

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
    optimizer = SFNorMuon(param_groups(Tied().named_parameters(), ROLES), beta=0.9)
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


# --- overrides and row_splits -----------------------------------------------------------------------------------------


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.qkv = nn.ModuleList([nn.Linear(4, 12), nn.Linear(4, 12)])
        self.kv = nn.Linear(4, 8, bias=False)
        self.lm_head = nn.Linear(4, 9, bias=False)


def test_named_parameters_need_roles() -> None:
    with pytest.raises(TypeError, match=r"need roles, by name; or give the nn\.Module"):
        param_groups(Tied().named_parameters())
    with pytest.raises(TypeError, match="named parameters need roles"):
        param_groups(Tied().parameters())  # type: ignore[arg-type]


def test_given_roles_rule_over_what_a_module_says() -> None:
    module = Tied()
    roles = ROLES | {"hidden.weight": "embedding"}
    assert list(names(param_groups(module, roles))) == ["adamw"]
    assert names(param_groups(module, ROLES)) == names(param_groups(module.named_parameters(), ROLES))
    with pytest.raises(ValueError, match=r"parameter hidden\.weight of shape \(4, 4\) has no role"):
        param_groups(module, {name: role for name, role in ROLES.items() if name != "hidden.weight"})


def test_overrides_win_and_the_last_that_matches_wins_among_them() -> None:
    module = Fused()
    roles = {name: "bias" for name, _ in module.named_parameters()}
    told = {"*.weight": "matrix", "qkv.[0-9].weight": "embedding", "lm_*": "head", "qkv.1.weight": "matrix"}
    expected = ["embedding.weight", "qkv.1.weight", "kv.weight"]
    for groups in (
        param_groups(module, overrides=told),
        param_groups(module.named_parameters(), roles, overrides=told),
    ):
        assert names(groups)["spectral"] == expected
    assert names(param_groups(module, overrides={"*": "norm"})).keys() == {"adamw"}


def test_an_override_of_one_name_is_the_word_for_a_tied_tensor() -> None:
    for roles in (None, ROLES):
        groups = param_groups(Tied(), roles, overrides={"head.weight": "matrix"})
        assert names(groups)["spectral"] == ["embedding.weight", "hidden.weight"]
    with pytest.raises(
        ValueError, match=r"parameter head\.weight is tied to embedding\.weight: .* give both names one"
    ):
        param_groups(Tied(), overrides={"head.weight": "matrix", "embedding.weight": "embedding"})


@pytest.mark.parametrize("argument", ["overrides", "row_splits"])
def test_a_pattern_that_matches_nothing_is_an_error(argument: str) -> None:
    module = Fused()
    module.kv.requires_grad_(False)
    for pattern in ("qvk.*", "kv.weight", "QKV.0.weight"):
        with pytest.raises(ValueError, match=rf"{argument}: '{re.escape(pattern)}' matches no trainable parameter"):
            param_groups(module, **{argument: {pattern: "matrix" if argument == "overrides" else (4, 4)}})  # type: ignore[arg-type]


@pytest.mark.parametrize("inferred", [True, False])
def test_fused_matrices_have_groups_of_their_own(inferred: bool) -> None:
    module = Fused()
    roles = {name: "matrix" if p.ndim == 2 else "bias" for name, p in module.named_parameters()}
    roles |= {"embedding.weight": "embedding", "lm_head.weight": "head"}
    splits = {"qkv.*.weight": (4, 4, 4), "kv.weight": [4, 4], "qkv.1.weight": (6, 6)}
    groups = param_groups(module, None if inferred else roles, row_splits=splits)
    assert [(g["rule"], g.get("row_splits"), [name for name, _ in g["params"]]) for g in groups] == [
        ("spectral", (4, 4, 4), ["qkv.0.weight"]),
        ("spectral", (6, 6), ["qkv.1.weight"]),
        ("spectral", (4, 4), ["kv.weight"]),
        ("adamw", None, ["embedding.weight", "qkv.0.bias", "qkv.1.bias", "lm_head.weight"]),
    ]


def test_one_split_is_one_group_after_the_matrices_without() -> None:
    together = param_groups(Fused(), row_splits={"qkv.*.weight": (4, 4, 4)})
    assert [[name for name, _ in g["params"]] for g in together[:2]] == [
        ["kv.weight"],
        ["qkv.0.weight", "qkv.1.weight"],
    ]
    assert "row_splits" not in together[0]


def test_one_block_of_rows_is_no_split() -> None:
    module = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 1), "head": nn.Linear(4, 2)})
    assert param_groups(module)[1]["row_splits"] == (4, 4, 4)
    whole = param_groups(module, row_splits={"attention.in_proj_weight": (12,)})
    assert names(whole)["spectral"] == ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert not any("row_splits" in g for g in whole)


@pytest.mark.parametrize(
    ("pattern", "rows", "message"),
    [
        (
            "kv.weight",
            (4, 5),
            r"kv\.weight of shape \(8, 4\): found \(4, 5\), expected whole numbers .* to 8",
        ),
        ("kv.weight", (8, 0), r"kv\.weight of shape \(8, 4\): found \(8, 0\)"),
        ("kv.weight", (9, -1), r"found \(9, -1\)"),
        ("kv.weight", (4.0, 4.0), r"found \(4\.0, 4\.0\)"),
        ("kv.weight", (), r"found \(\)"),
        ("qkv.0*", (4, 4, 4), r"qkv\.0\.bias of shape \(12,\) has role bias, expected matrix"),
        ("lm_head.weight", (4, 5), r"lm_head\.weight of shape \(9, 4\) has role head, expected matrix"),
    ],
)
def test_splits_that_do_not_fit_are_refused(pattern: str, rows: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match="row_splits: parameter .*" + message):
        param_groups(Fused(), row_splits={pattern: rows})


def test_a_tied_matrix_has_one_split() -> None:
    module, told = Tied(), {"head.weight": "matrix"}
    for rows in ({"head.weight": (4, 5)}, {"head.weight": (4, 5), "embedding.weight": (4, 5)}):
        cut = param_groups(module, overrides=told, row_splits=rows)[1]
        assert (cut["row_splits"], [name for name, _ in cut["params"]]) == ((4, 5), ["embedding.weight"])
    with pytest.raises(ValueError, match=r"parameter head\.weight is tied: found \(4, 5\) and \(5, 4\)"):
        param_groups(module, overrides=told, row_splits={"head.weight": (4, 5), "embedding.weight": (5, 4)})


def test_a_name_that_looks_like_a_pattern_is_still_a_name() -> None:
    module = nn.ModuleDict({"part[0]": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert names(param_groups(module, overrides={"part[0].weight": "norm"})).keys() == {"adamw"}
