"""Resuming by state_dict and by copying state and clocks into another stacking; y again from z and x; x in and out."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from anytimed.optim import ScheduleFree, SFAdamW, param_groups
from tests.optim.cases import OPTIMIZERS, ROLES, build, differing, everything, gradients, parameters, walk

DTYPES = [torch.float32, torch.bfloat16]


def one_group_each(kind: str, params: dict[str, nn.Parameter], **options: Any) -> ScheduleFree:
    """The same run in another stacking: parameters in reverse, every one in a group and a stack of its own."""
    groups = [group for item in reversed(params.items()) for group in param_groups([item], ROLES)]
    if kind != "sf_adamw":
        options.setdefault("orthogonal_dtype", "float32")
    return OPTIMIZERS[kind](groups, warmup_steps=10, **options)


def copy_over(
    source: ScheduleFree, mine: dict[str, nn.Parameter], target: ScheduleFree, theirs: dict[str, nn.Parameter]
) -> None:
    """What a commit does: tensors out and in by parameter, numbers through JSON, y computed again."""
    for name, p in mine.items():
        stored = {key: value.clone() for key, value in source.state[p].items()}
        assert stored.keys() == target.state[theirs[name]].keys()
        for key, value in stored.items():
            target.state[theirs[name]][key].copy_(value)
    target.load_clock_state(json.loads(json.dumps(source.clock_state())))
    target.restore_y()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stop", [0, 1, 6, 10, 40])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_copy_into_another_stacking_goes_on_bit_for_bit(kind: str, stop: int, dtype: torch.dtype) -> None:
    """Before the first step, in warm-up, at its end, after it. (On the CPU a product of a stack has the bits of the
    single products; cuBLAS promises that for equal stackings only, which equal groups give.)"""
    params, others = parameters(dtype), parameters(dtype, seed=99)
    optimizer, other = build(kind, params), one_group_each(kind, others)
    walk(optimizer, params, stop)
    copy_over(optimizer, params, other, others)
    assert differing(everything(optimizer, params), everything(other, others)) == []
    for run, mine in ((optimizer, params), (other, others)):
        walk(run, mine, 20, seed=5)
    assert differing(everything(optimizer, params), everything(other, others)) == []


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_dict_goes_round_bit_for_bit(kind: str) -> None:
    params, others = parameters(), parameters(seed=99)
    optimizer, other = build(kind, params, lr=0.007), build(kind, others)
    walk(optimizer, params, 15)
    identities = {name: {k: v.data_ptr() for k, v in other.state[p].items()} for name, p in others.items()}
    untouched = {name: p.detach().clone() for name, p in others.items()}
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(torch.equal(others[name], kept) for name, kept in untouched.items())
    assert other.param_groups[0]["lr"] == 0.007
    assert identities == {name: {k: v.data_ptr() for k, v in other.state[p].items()} for name, p in others.items()}
    other.restore_y()
    for run, mine in ((optimizer, params), (other, others)):
        walk(run, mine, 20, seed=5)
    assert differing(everything(optimizer, params), everything(other, others)) == []


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_deep_copy_is_a_run_of_its_own(kind: str) -> None:
    params = parameters()
    optimizer = build(kind, params)
    walk(optimizer, params, 12)
    other, others = copy.deepcopy((optimizer, params))
    before = everything(optimizer, params)
    walk(other, others, 5, seed=5)
    assert differing(before, everything(optimizer, params)) == []
    walk(optimizer, params, 5, seed=5)
    assert differing(everything(optimizer, params), everything(other, others)) == []


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    params = parameters()
    optimizer = build("sf_normuon", params)
    walk(optimizer, params, 3)
    before = everything(optimizer, params)
    state = copy.deepcopy(optimizer.state_dict())

    with pytest.raises(ValueError, match=r"groups \(rule, clock, parameters\) stored"):
        optimizer.load_state_dict(build("sf_adamw", parameters()).state_dict())
    narrow = copy.deepcopy(state)
    narrow["state"][3]["z"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"parameter 3: stored .*\(2, 2\).*, expected"):
        optimizer.load_state_dict(narrow)
    with pytest.raises(ValueError, match="2 clocks stored, this optimizer has 1"):
        optimizer.load_clock_state(optimizer.clock_state() * 2)
    (clock,) = optimizer.clock_state()
    del clock["reference_c"]
    with pytest.raises(ValueError, match=r"clock 0: found .* expected exactly"):
        optimizer.load_clock_state([clock])
    assert differing(before, everything(optimizer, params)) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_y_comes_again_from_z_x_and_the_clock(kind: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = build(kind, params)
    for steps in (0, 1, 9, 30):
        walk(optimizer, params, steps)
        before = everything(optimizer, params)
        for p in params.values():
            p.detach().fill_(7.0)
        optimizer.restore_y()
        assert differing(before, everything(optimizer, params)) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_eval_shows_x_and_train_brings_y_back(kind: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = build(kind, params)
    walk(optimizer, params, 25)
    before = everything(optimizer, params)
    optimizer.train()
    assert differing(before, everything(optimizer, params)) == []
    optimizer.eval()
    optimizer.eval()
    for p in params.values():
        assert torch.equal(p, optimizer.averaged()[p].to(dtype))
    with pytest.raises(RuntimeError, match="call train"):
        optimizer.step()
    optimizer.train()
    assert differing(before, everything(optimizer, params)) == []
    walk(optimizer, params, 1)


def test_x_and_z_are_handed_out_without_touching_a_parameter() -> None:
    params = parameters()
    optimizer = build("amuse", params)
    walk(optimizer, params, 5)
    before = everything(optimizer, params)
    averaged, iterate = optimizer.averaged(), optimizer.iterate()
    assert list(averaged) == list(iterate) == [p for g in optimizer.param_groups for p in g["params"]]
    for name, p in params.items():
        assert averaged[p].shape == p.shape and iterate[p].shape == p.shape
        assert torch.equal(averaged[p], before[f"x.{name}"]) and torch.equal(iterate[p], before[f"z.{name}"])
    assert differing(before, everything(optimizer, params)) == []


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_group_added_later_has_its_own_clock_and_resumes(kind: str) -> None:
    def grown(seed: int) -> tuple[dict[str, nn.Parameter], list[dict[str, Any]]]:
        params = parameters(seed=seed)
        late = {"wide.2", "norm"}
        return params, [
            g
            for chosen in ([i for i in params.items() if i[0] not in late], [i for i in params.items() if i[0] in late])
            for g in param_groups(chosen, ROLES)
        ]

    params, groups = grown(0)
    optimizer = OPTIMIZERS[kind](groups[:2], warmup_steps=10)
    early = {name: p for name, p in params.items() if name not in ("wide.2", "norm")}
    walk(optimizer, early, 30)
    for group in groups[2:]:
        optimizer.add_param_group({**group, "clock": 1, "warmup_steps": 5})
    assert torch.equal(optimizer.averaged()[params["norm"]], params["norm"])
    walk(optimizer, params, 7)
    first, second = optimizer.clock_state()
    assert (first["t"], second["t"]) == (37, 7)

    lr = optimizer.param_groups[2]["lr"]
    assert second["weight_sum"] == pytest.approx(sum((lr * min(1, t / 5)) ** 2 for t in range(1, 8)), rel=1e-14)

    others, groups = grown(99)
    for group in groups[2:]:
        group.update(clock=1, warmup_steps=5)
    other = OPTIMIZERS[kind](groups, warmup_steps=10)  # all at once, the clocks named
    copy_over(optimizer, params, other, others)
    for run, mine in ((optimizer, params), (other, others)):
        walk(run, mine, 20, seed=5)
    assert differing(everything(optimizer, params), everything(other, others)) == []


def test_a_late_group_leaves_the_others_as_they_would_have_been() -> None:
    alone, joined = parameters(), parameters()
    extra = nn.Parameter(torch.ones(4, 4))
    optimizers = build("sf_normuon", alone), build("sf_normuon", joined)
    optimizers[1].add_param_group({"rule": "spectral", "params": [("extra", extra)], "lr": 0.5})
    extra.grad = torch.randn(4, 4)
    for params, optimizer in zip((alone, joined), optimizers, strict=True):
        walk(optimizer, params, 12)
    told = [
        {k: v for k, v in everything(o, p).items() if "clock" not in k}
        for o, p in zip(optimizers, (alone, joined), strict=True)
    ]
    assert differing(*told) == []
    assert optimizers[0].clock_state() == optimizers[1].clock_state()[:1]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_state_lies_in_common_buffers_under_the_names_of_a_commit(kind: str) -> None:
    params = parameters()
    optimizer = build(kind, params)
    expected = {"sf_normuon": {"momentum", "v"}, "amuse": {"momentum"}, "sf_adamw": {"v"}}[kind]
    for name, p in params.items():
        state = optimizer.state[p]
        matrix = ROLES[name] == "matrix"
        assert state.keys() == {"z", "x", "comp", "updates"} | (expected if matrix else {"v"}), name
        assert state["updates"].dtype == torch.int64 and state["updates"].shape == ()
        assert state["comp"].dtype == torch.bfloat16
        for key in state.keys() - {"updates", "comp"}:
            rows_only = key == "v" and matrix and kind == "sf_normuon"
            assert state[key].dtype == torch.float32
            assert state[key].shape == (p.shape[:1] if rows_only else p.shape), (name, key)
    for same in (("wide.0", "wide.1", "wide.2"), ("norm", "scalar")):
        storages = {optimizer.state[params[name]]["z"].untyped_storage().data_ptr() for name in same}
        assert len(storages) == 1
    assert next(gradients(params, 1)).keys() == params.keys()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_on_the_meta_device_the_state_has_shapes_and_no_storage(kind: str) -> None:
    """How a run counts its bytes before it allocates any: 14 an element, 8 a parameter, 4 a row for SF-NorMuon's v."""
    params = {name: nn.Parameter(p.detach().to("meta")) for name, p in parameters().items()}
    optimizer = build(kind, params)
    found = sum(t.numel() * t.element_size() for p in params.values() for t in optimizer.state[p].values())
    rows = sum(p.shape[0] for name, p in params.items() if ROLES[name] == "matrix") if kind == "sf_normuon" else 0
    assert found == 14 * sum(p.numel() for p in params.values()) + 8 * len(params) + 4 * rows
    assert all(t.is_meta for t in optimizer.averaged().values())


def test_on_the_meta_device_a_large_parameter_costs_nothing() -> None:
    """A stack of one parameter writes no list of what belongs to which, 8 bytes an element: half a GB at 772 M."""
    huge = nn.Parameter(torch.empty(1 << 40, device="meta"))
    optimizer = SFAdamW([huge])
    assert optimizer.state[huge]["z"].shape == huge.shape
