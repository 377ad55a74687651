"""compiled=True: what the compiler makes of the elementwise part says the same as torch does, for all shapes at once.

These need a C++ compiler (apt-get install g++), and skip without one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from anytimed.optim import SFAdamW, SFNorMuon, compiled, param_groups
from anytimed.optim.averaging import average_
from anytimed.optim.scratch import Scratch
from anytimed.optim.sweep import Elements, Pace
from tests.optim.cases import OPTIMIZERS, build, differing, everything, gradients, parameters, take, walk

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler: apt-get install g++"
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The compiler's files go with the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def kernels() -> int:
    return int(compiled._kernel.cache_info().currsize)


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of each of x, y, z and the moments, by its own largest element, or by 1, from which they
    all came, where that went through 0; counters have to agree."""
    told = {}
    for name in differing(found, expected):
        if name.startswith("comp."):
            continue  # what the other sum lost, to the last bit: below 2^-24 of x in both
        assert name[:2] in ("x.", "y.", "z.", "v."), name
        size = expected[name].abs().max().clamp(min=1.0)
        told[name] = float((found[name].double() - expected[name].double()).abs().max() / size)
    return told


@needs_compiler
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("road", ["host", "device"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_same_values_as_eager(kind: str, road: str, lean: bool) -> None:
    """Thirty steps over every shape of `cases`; on the device road with gates, and gradients missing now and then."""
    params, others = parameters(), parameters()
    fused = take(road, build(kind, params, compiled=True, lean=lean))
    eager = take(road, build(kind, others, lean=lean))
    for step, given in enumerate(gradients(params, 30)):
        for i, name in enumerate(params):
            absent = i % 3 == 0 if step % 6 == 4 else step % 6 == 5 and name in ("tall.0", "tall.1", "norm", "large")
            absent = absent and road == "device"
            params[name].grad = None if absent else given[name]
            others[name].grad = None if absent else given[name].clone()
        gate = torch.tensor(step % 5 != 2)
        fused.step(gate=gate)
        eager.step(gate=gate)
    # A product and its sum are rounded once by torch and twice by the compiled code: 6e-8 of the term a step, at
    # random (found: 2e-7, two units in the last place).
    found = apart(everything(fused, params), everything(eager, others))
    assert max(found.values()) < 1e-6, found


@needs_compiler
def test_parameters_and_products_in_bfloat16() -> None:
    params, others = parameters(torch.bfloat16), parameters(torch.bfloat16)
    fused = build("sf_normuon", params, compiled=True, orthogonal_dtype="bfloat16")
    eager = build("sf_normuon", others, orthogonal_dtype="bfloat16")
    walk(fused, params, 10)
    walk(eager, others, 10)
    found = apart(everything(fused, params), everything(eager, others))
    assert max(v for n, v in found.items() if n[0] in "xz") < 1e-6, found
    # y is rounded to bfloat16: where the float32 one lies at a tie, a last bit, 2^-8 of it
    assert max([0.0, *(v for n, v in found.items() if n[0] == "y")]) < 2**-8, found


@needs_compiler
@pytest.mark.parametrize("road", ["host", "device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_closed_gate_y_again_and_a_resumed_run_to_the_bit(dtype: torch.dtype, road: str) -> None:
    """Compiled and eager y differ in last bits. All y of one run come from one of them, whoever writes it."""
    params, others = parameters(dtype), parameters(dtype, seed=99)
    optimizer, other = (take(road, build("amuse", p, compiled=True)) for p in (params, others))
    walk(optimizer, params, 15)
    before = everything(optimizer, params)
    for p in params.values():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step(gate=torch.tensor(False))
    assert differing(before, everything(optimizer, params)) == []
    optimizer.restore_y()
    optimizer.step(gate=torch.tensor(False))
    optimizer.eval()
    optimizer.train()
    assert differing(before, everything(optimizer, params)) == []
    other.load_state_dict(optimizer.state_dict())
    other.restore_y()
    for run, mine in ((optimizer, params), (other, others)):
        walk(run, mine, 10, seed=5)
    assert differing(everything(optimizer, params), everything(other, others)) == []


@needs_compiler
def test_one_compilation_serves_all_shapes() -> None:
    """Of matrices, a convolution, rows, columns; of anything flat, down to scalars; in three optimizers. torch gives up
    after eight compilations of one function, so a shape must not cost one."""
    torch._dynamo.reset()
    compiled._kernel.cache_clear()
    counters.clear()
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (8, 8), (6, 17), (19, 5), (1, 12), (11, 1), (12, 2, 3, 1), (64, 64), (3, 200), (2, 2), (40, 8)]
    flats = [(300,), (7,), (), (1,), (20, 15), (9, 31), (2, 3, 4)]
    for kind, expected in ((SFNorMuon, (3, 5)), (OPTIMIZERS["amuse"], (4, 6))):
        ps = [nn.Parameter(torch.randn(s, generator=generator)) for s in (*shapes, *flats)]
        groups: list[dict[str, Any]] = [{"rule": "spectral", "params": [p]} for p in ps[: len(shapes)]]
        groups += [{"rule": "adamw", "params": [p]} for p in ps[len(shapes) :]]
        optimizer = kind(groups, compiled=True, warmup_steps=0, orthogonal_dtype="float32")
        for _ in range(2):
            for p in ps:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        # The rule's scales, the sweep of matrices, all of the rest; and torch takes the first matrix, a square, for a
        # sign that all are.
        assert (kernels(), graphs()) == expected, dict(counters)
    plain = [nn.Parameter(torch.randn(s, generator=generator)) for s in flats]
    for p in plain:
        p.grad = torch.ones_like(p)
    SFAdamW(plain, compiled=True).step()
    assert (kernels(), graphs()) == (5, 7)  # here several share a stack, and one bias correction
    assert not counters["graph_break"] and not counters["unimplemented"]


@needs_compiler
def test_more_kinds_of_calls_than_torch_compiles_of_one_function() -> None:
    """Gates, missing gradients, no decay, lean, bfloat16 products: more than eight, and each still compiled once."""
    torch._dynamo.reset()
    compiled._kernel.cache_clear()
    counters.clear()
    for options in ({}, {"weight_decay": 0.0}, {"lean": True}, {"orthogonal_dtype": "bfloat16"}):
        params = {name: p for name, p in parameters().items() if name in ("wide.0", "wide.1", "norm", "head")}
        optimizer = take("device", build("sf_normuon", params, compiled=True, **options))
        walk(optimizer, params, 2)
        for p in list(params.values())[::2]:
            p.grad = None
        optimizer.step(gate=torch.tensor(True))
    assert kernels() == graphs() > 8


@needs_compiler
def test_the_compensation_survives_the_compiler() -> None:
    """No fast-math: (x + d) - x is not d. The mean of 20,000 noisy z, against float64; without compensation it is off
    by some 1e-6, in float32 as well as by a compiler that simplifies the sum away."""
    generator = torch.Generator().manual_seed(0)
    scratch = Scratch(torch.device("cpu"))
    z = torch.randn(8, 32, generator=generator)
    start, steps = z.clone(), 20_000
    runs = {name: (z.clone(), torch.zeros(8, 32, dtype=torch.bfloat16)) for name in ("compiled", "eager")}
    naive, exact, y = z.clone(), z.double(), torch.empty(8, 32)
    one = torch.ones(())
    with torch.no_grad():
        for t in range(1, steps + 1):
            z = start + 0.1 * torch.randn(8, 32, generator=generator)
            c = torch.tensor(1 / t)
            compiled.sweep_(Elements(z, *runs["compiled"], y), None, Pace(None, c, one, None, None))
            average_(*runs["eager"], z, c, None, scratch)
            naive += c * (z - naive)
            exact += c.double() * (z.double() - exact)

    def error(found: Tensor) -> float:
        return float((found.double() - exact).norm() / exact.norm())

    # a rounding of x itself is 3e-8, and what `test_averaging` allows the eager one
    assert error(runs["compiled"][0]) < 6e-8 and error(runs["eager"][0]) < 6e-8
    assert error(naive) > 5e-7
    assert torch.equal(y, runs["compiled"][0])  # beta = 1: y is x


@needs_compiler
def test_a_model_compiled_by_inductor_trains_as_the_plain_one() -> None:
    inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    losses = {}
    for inductor in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        called = torch.compile(model) if inductor else model
        groups = param_groups(called, overrides={"2.weight": "head"})
        optimizer = SFNorMuon(groups, warmup_steps=5, compiled=inductor, orthogonal_dtype="float32")
        told = []
        for _ in range(25):
            optimizer.zero_grad()
            loss = (called(inputs) - inputs[:, :3].sin()).square().mean()
            loss.backward()
            optimizer.step()
            told.append(float(loss.detach()))
        losses[inductor] = told
    assert losses[False][-1] < 0.8 * losses[False][0]
    # kernels of another order of summation: 1e-7 each, fed back 25 times
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


def test_a_missing_compiler_is_named_with_what_to_install(tmp_path: Path) -> None:
    code = (
        "import torch; from anytimed.optim import SFAdamW\n"
        "p = torch.nn.Parameter(torch.ones(8)); p.grad = torch.ones(8)\n"
        "o = SFAdamW([p], compiled=True)\n"
        "try: o.step()\n"
        "except RuntimeError as failed: print(failed)\n"
    )
    env = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.startswith("compiled=True: "), done.stdout + done.stderr
    assert "No working C++ compiler found" in done.stdout and "no-such-compiler" in done.stdout
    assert done.stdout.strip().endswith("install one (apt-get install g++), or say compiled=False")


def test_who_compiles_is_decided_once_and_part_of_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the device, unless the constructor was told; a commit's word goes first where the machine can keep it."""

    def made(told: bool | None) -> SFAdamW:
        return SFAdamW([nn.Parameter(torch.ones(8))], compiled=told)

    assert not compiled.decided(torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(compiled.importlib.util, "find_spec", lambda name: name == "triton")
        patch.setattr(compiled.shutil, "which", lambda name: f"/usr/bin/{name}")
        assert compiled.decided(torch.device("cuda")) and not compiled.decided(torch.device("cpu"))
        patch.setattr(compiled.shutil, "which", lambda name: None)
        assert not compiled.decided(torch.device("cuda"))
    for able in (False, True):
        monkeypatch.setattr(compiled, "decided", lambda device, able=able: able)
        assert made(None).arithmetic() == {"elements_by": "compiler" if able else "torch"}
        for told in (False, True):
            other = made(told)
            other.load_arithmetic({"elements_by": "torch" if told else "compiler"})
            assert other.arithmetic() == {"elements_by": "compiler" if told else "torch"}
        for stored in ("torch", "compiler"):
            undecided = made(None)
            undecided.load_arithmetic({"elements_by": stored})
            assert undecided.arithmetic() == {"elements_by": stored if able else "torch"}
            undecided.load_arithmetic({})  # of a commit from before it stood there
            assert undecided.arithmetic() == {"elements_by": stored if able else "torch"}
    with pytest.raises(ValueError, match="elements_by = 'hand', expected"):
        made(None).load_arithmetic({"elements_by": "hand"})
