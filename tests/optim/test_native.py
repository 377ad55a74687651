"""The sweep in C: the bits of torch's operations, or it is not used; nothing else about it shows."""

from __future__ import annotations

import copy
import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from anytimed.optim import ScheduleFree, SFNorMuon, native, param_groups
from tests.optim.cases import OPTIMIZERS, ROLES, build, differing, everything, gradients, parameters, take

needs_library = pytest.mark.skipif(native.library() is None, reason=f"no native library: {native.why_not()}")


def pair(kind: str, dtype: torch.dtype, **options: Any) -> tuple[dict[str, nn.Parameter], ScheduleFree, Any, Any]:
    params, others = parameters(dtype), parameters(dtype)
    splits = {"square": (3, 5), "tall.0": (10, 9), "wide.0": (2, 2, 2), "wide.1": (2, 2, 2)}

    def made(which: dict[str, nn.Parameter]) -> ScheduleFree:
        groups = param_groups(which.items(), ROLES, row_splits=splits)
        return OPTIMIZERS[kind](groups, warmup_steps=5, **options)

    return params, take("native", made(params)), others, take("host", made(others))


@pytest.mark.skipif("CI" not in os.environ, reason="a user's machine may have no compiler")
def test_the_machine_of_ci_has_the_library() -> None:
    """Or what needs it would be passed over in silence."""
    assert native.library() is not None, native.why_not()


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("products", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("dtype", "lean"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)], ids=str
)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_bits_of_torch(kind: str, dtype: torch.dtype, products: str, lean: bool, threads: int) -> None:
    """Thirty steps over every shape of `cases`, fused matrices among them; now and then without gradients, or with
    gradients that are not laid out as the parameter."""
    options: dict[str, Any] = {} if kind == "sf_adamw" else {"orthogonal_dtype": products}
    params, fast, others, plain = pair(kind, dtype, lean=lean, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step, given in enumerate(gradients(params, 30)):
            for i, name in enumerate(params):
                absent = i % 3 == 0 if step % 6 == 4 else step % 6 == 5 and name in ("wide.1", "norm", "large")
                g = given[name]
                if step % 5 == 3 and g.ndim == 2:
                    g = g.t().contiguous().t()
                params[name].grad, others[name].grad = (None, None) if absent else (g, g.clone())
            fast.step()
            plain.step()
            assert differing(everything(fast, params), everything(plain, others)) == [], step
    finally:
        torch.set_num_threads(before)
    found, expected = fast.metrics(), plain.metrics()
    for name in expected:  # the squares of the updates are added up in another order
        assert torch.allclose(found[name], expected[name], rtol=1e-5), name


@needs_library
@pytest.mark.parametrize("options", [{"weight_decay": 0.0}, {"beta": 0.2}, {"beta2": 0.4, "mu": 0.3}])
def test_the_bits_of_torch_on_the_other_side_of_each_branch(options: dict[str, float]) -> None:
    """No decay; weights below and above one half, where torch.lerp changes sides."""
    params, fast, others, plain = pair("sf_normuon", torch.float32, **options)
    for given in gradients(params, 12):
        for name in params:
            params[name].grad, others[name].grad = given[name], given[name].clone()
        fast.step()
        plain.step()
    assert differing(everything(fast, params), everything(plain, others)) == []


@needs_library
def test_threads_do_not_show() -> None:
    """Beyond torch's products, which may add in another order: SF-AdamW has none."""
    start = torch.randn(300, 211, generator=torch.Generator().manual_seed(0))
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    before = torch.get_num_threads()
    try:
        for p, threads in zip(params, (1, 2), strict=True):
            optimizer = take("native", OPTIMIZERS["sf_adamw"]([p]))
            torch.set_num_threads(threads)
            for step in range(5):
                p.grad = (start * step).sin()
                optimizer.step()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*params)


@needs_library
def test_a_channels_last_convolution_keeps_its_layout() -> None:
    weights = [nn.Parameter(torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    weights[0].data = weights[0].data.to(memory_format=torch.channels_last)
    for p, road in zip(weights, ("native", "host"), strict=True):
        optimizer = take(road, SFNorMuon([{"rule": "spectral", "params": [p]}], orthogonal_dtype="float32"))
        for _ in range(3):
            p.grad = torch.ones(6, 3, 2, 2)
            optimizer.step()
    assert weights[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(*weights)


@needs_library
@pytest.mark.parametrize("given", [True, False])
def test_autograd_sees_that_parameters_changed(given: bool) -> None:
    """A graph from before the step does not run backward with the weights from after it."""
    params = {name: p for name, p in parameters().items() if name in ("square", "wide.0", "norm", "large")}
    optimizer = take("native", build("sf_normuon", params))
    kept = torch.stack([p.square().sum() for p in params.values()]).sum()
    for p in params.values():
        p.grad = torch.ones_like(p) if given else None
    before = {name: p._version for name, p in params.items()}
    optimizer.step()
    assert all(p._version > before[name] for name, p in params.items())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()  # type: ignore[no-untyped-call]


@needs_library
def test_only_a_large_optimizer_asks_for_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("the compiler was called")

    with monkeypatch.context() as patch:
        patch.setattr(native, "library", refuse)
        assert not build("sf_normuon", parameters())._walk.native
        assert not SFNorMuon(
            [{"rule": "adamw", "params": [nn.Parameter(torch.ones(2**18))]}], compiled=True
        )._walk.native
    large = SFNorMuon([{"rule": "adamw", "params": [nn.Parameter(torch.ones(native.ELEMENTS))]}])
    assert large._walk.native
    large.param_groups[0]["params"][0].grad = torch.ones(native.ELEMENTS)
    copied = copy.deepcopy(large)
    large.step()
    (p,) = copied.param_groups[0]["params"]
    p.grad = torch.ones(native.ELEMENTS)
    copied.step()
    assert torch.equal(p, large.param_groups[0]["params"][0])


def test_it_grows_into_it() -> None:
    optimizer = SFNorMuon([{"rule": "adamw", "params": [nn.Parameter(torch.ones(7))]}])
    assert not optimizer._walk.native
    optimizer.add_param_group({"rule": "adamw", "params": [nn.Parameter(torch.ones(native.ELEMENTS))]})
    assert optimizer._walk.native == (native.library() is not None)


CODE = """
import torch
from anytimed.optim import SFNorMuon, native
p = torch.nn.Parameter(torch.ones(2**17)); p.grad = torch.ones(2**17)
o = SFNorMuon([{"rule": "adamw", "params": [p]}])
o.step()
print(o._walk.native, native.why_not(), float(p.sum()))
"""


def alone(**env: str) -> str:
    done = subprocess.run([sys.executable, "-c", CODE], env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_a_compiler_torch_does_it(tmp_path: Path) -> None:
    """None there, none that works, none wanted: a step is a step."""
    expected = alone().split()[-1]
    bad = tmp_path / "cc"
    bad.write_text("#!/bin/sh\necho no such target >&2\nexit 3\n")
    bad.chmod(0o755)
    cases = {
        "no C compiler: apt-get install gcc, or set CC": alone(CC="", PATH=str(tmp_path / "empty")),
        f"{bad} ended with 3: no such target": alone(CC=str(bad)),
        "ANYTIMED_NATIVE=0": alone(ANYTIMED_NATIVE="0"),
    }
    for why, said in cases.items():
        assert said == f"False {why} {expected}"
    assert "does-not-exist" in alone(CC="does-not-exist")
    assert alone(CC='"') == f"False No closing quotation {expected}"


@needs_library
@pytest.mark.parametrize(
    ("mine", "other"),
    [
        ("fmaf(-direction, scale, now)", "now - direction * scale"),
        ("(bits >> 16 & 1)", "1"),
        ("sum = i < n / 4 * 4 ? sum + v * v : fmaf(v, v, sum);", "sum += v * v;"),
        ("fabsf(weight) < 0.5f", "1"),
        ("1.0f / (1.0f / sqrtf(x))", "sqrtf(x)"),
        ("beta2_weight * g[i]", "beta2_weight * g[i] * 1.0001f"),
    ],
)
def test_other_bits_are_refused(mine: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rounding less, a tie the other way, one formula for another, a factor: no such library is used."""
    source = native.SOURCE.read_text()
    assert source.count(mine) == 1
    changed = tmp_path / "native.c"
    changed.write_text(source.replace(mine, other))
    monkeypatch.setattr(native, "SOURCE", changed)
    monkeypatch.setattr(native, "_found", native._found.__wrapped__)
    assert native.library() is None
    assert str(native.why_not()).endswith(f"other bits than those of torch {torch.__version__}")


@needs_library
def test_nothing_is_left_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert isinstance(native._built(), ctypes.CDLL)
    assert list(tmp_path.iterdir()) == []
