"""Promises of the room as a whole: no horizon, the public names, torch's interface, gradients only read, it trains."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import anytimed.optim
from anytimed.optim import averaging
from tests.optim.cases import OPTIMIZERS, build, differing, everything, gradients, parameters, walk

ROOM = Path(anytimed.optim.__file__).parent


def test_public_names() -> None:
    assert sorted(anytimed.optim.__all__) == ["AMUSE", "SFAdamW", "SFNorMuon", "ScheduleFree", "param_groups"]


def test_nothing_takes_a_horizon() -> None:
    """Every argument and attribute of the room: the only steps are those of warm-up and of the averaging window."""
    horizon = re.compile(r"total|max_|horizon|epoch|num_|n_steps|iters|decay_steps|until|end_|final|budget|steps")
    # `total`: a sum, in averaging; `num_embeddings`, `get_num_threads`: torch's, in roles and native
    allowed = {"warmup_steps", "averaging_window_steps", "total", "num_embeddings", "get_num_threads"}
    found = set()
    for file in ROOM.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.Attribute):
                found.add(node.attr)
    assert {"lr", "warmup_steps"} <= found
    assert {name for name in found if horizon.search(name)} <= allowed
    for kind in OPTIMIZERS.values():
        assert not {name for name in inspect.signature(kind).parameters if horizon.search(name)} - allowed


def test_the_room_imports_torch_and_the_standard_library_alone() -> None:
    modules = set()
    for file in ROOM.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(str(node.module))
    ours = {name for name in modules if name.startswith("anytimed")}
    assert all(f"{name}.".startswith("anytimed.optim.") for name in ours)
    assert {name.split(".")[0] for name in modules - ours} <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_gradients_are_only_read(kind: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = build(kind, params)
    (given,) = gradients(params, 1)
    for name, p in params.items():
        p.grad = given[name].clone()
    kept = {name: p.grad for name, p in params.items()}
    optimizer.step()
    for name, p in params.items():
        assert p.grad is kept[name]
        assert torch.equal(p.grad, given[name])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_closure_gives_gradients_and_loss(kind: str) -> None:
    params, others = parameters(), parameters()
    optimizer, other = build(kind, params), build(kind, others)

    def loss(of: dict[str, nn.Parameter]) -> Tensor:
        total = torch.stack([(p - 1).square().sum() for p in of.values()]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach()

    for _ in range(3):
        optimizer.zero_grad()
        other.zero_grad()
        told = optimizer.step(lambda: loss(params))  # type: ignore[arg-type, return-value]
        assert told == loss(others)
        other.step()
    assert differing(everything(optimizer, params), everything(other, others)) == []


def test_a_non_contiguous_gradient_and_parameter_are_taken_in_logical_order() -> None:
    weight = torch.randn(6, 4, 3, 3)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(weight.clone(memory_format=layout))
        optimizer = OPTIMIZERS["sf_normuon"]([{"rule": "spectral", "params": [p]}], warmup_steps=1)
        p.grad = weight.sin().contiguous(memory_format=layout)
        optimizer.step()
        results.append(p.detach().contiguous())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], weight)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_learning_rate_as_tensor_equals_the_number(kind: str) -> None:
    params, others = parameters(), parameters()
    optimizer, other = build(kind, params), build(kind, others)
    for group in other.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    for run, mine in ((optimizer, params), (other, others)):
        walk(run, mine, 12)
    assert differing(everything(optimizer, params), everything(other, others)) == []


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_schedulers_of_torch_drive_it(kind: str) -> None:
    params = parameters()
    optimizer = build(kind, params)
    first = optimizer.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(4):
        walk(optimizer, params, 1)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(first / 5)
    (clock,) = optimizer.clock_state()
    expected = sum((first / t * min(1, t / 10)) ** 2 for t in range(1, 5))
    assert clock["weight_sum"] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_it_learns_and_the_mean_is_nearer_the_truth_than_what_it_averages(kind: str) -> None:
    """A noisy linear regression at a large learning rate: z circles the truth, x and y are near it."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(6, 10, generator=generator)
    w = nn.Parameter(torch.zeros(6, 10))
    rule = {"rule": "spectral", "params": [w]}
    optimizer = OPTIMIZERS[kind]([rule], lr=0.05, warmup_steps=20, weight_decay=0.0)

    def distance(of: Tensor) -> float:
        return float((of - truth).norm() / truth.norm())

    for _ in range(600):
        inputs = torch.randn(16, 10, generator=generator)
        targets = inputs @ truth.T + torch.randn(16, 6, generator=generator)
        optimizer.zero_grad()
        (inputs @ w.T - targets).square().mean().backward()
        optimizer.step()
    x, y, z = distance(optimizer.averaged()[w]), distance(w.detach()), distance(optimizer.iterate()[w])
    assert x < 0.15
    assert max(x, y) < z


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        ("sf_normuon", "lr", -0.1), ("sf_normuon", "mu", 1.0), ("sf_normuon", "beta2", -0.1),
        ("sf_normuon", "beta", 1.1), ("sf_normuon", "eps", 0.0), ("sf_normuon", "warmup_steps", -1),
        ("sf_normuon", "warmup_steps", 1.5),
        ("sf_normuon", "weight_decay", float("nan")), ("sf_normuon", "averaging_window_steps", 0),
        ("sf_normuon", "averaging_power", -1.0), ("amuse", "rho", 1.5), ("amuse", "beta1", -0.5),
        ("amuse", "scale", "rms"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(kind: str, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{option} = .*, expected"):
        build(kind, parameters(), **{option: value})


def test_no_part_of_the_algebra_keeps_a_mode() -> None:
    """`averaging` is functions and a clock of tensors; a fresh clock has seen nothing."""
    clock = averaging.Clock(torch.device("cpu"), 0.6)
    assert clock.numbers() == {
        "t": 0, "weight_sum": 0.0, "weight": 0.0, "reference_sum": 0.0, "reference_c": 0.0, "beta": 0.6,
    }  # fmt: skip
