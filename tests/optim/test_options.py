"""Options: how matrices are orthogonalised, how steps are weighed, when the past is discounted; read at every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from anytimed.optim import AMUSE, ScheduleFree, SFNorMuon
from anytimed.optim.orthogonal import polar, working_dtype
from tests.optim.cases import OPTIMIZERS, ROADS, build, differing, everything, gradients, parameters, take, walk

SPECTRAL = ["sf_normuon", "amuse"]

# --- orthogonalisation


def first_direction(kind: str, road: str, shape: tuple[int, int], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What z moves by in the first step, and the gradient; momentum is a multiple of it then, in both optimizers."""
    p = nn.Parameter(torch.zeros(shape))
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    options = {"orthogonal_dtype": "float32", "warmup_steps": 0, "weight_decay": 0.0, **options}
    optimizer = take(road, OPTIMIZERS[kind]([{"rule": "spectral", "params": [p]}], **options))
    p.grad = g.clone()
    optimizer.step()
    return -optimizer.iterate()[p], g


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("shape", [(6, 17), (19, 5), (8, 8)])
def test_the_iteration_is_the_one_that_was_asked_for(
    shape: tuple[int, int], road: str, coefficients: str, gram: bool
) -> None:
    moved, g = first_direction("amuse", road, shape, orthogonal_coefficients=coefficients, orthogonal_gram=gram)
    expected = polar(g, dtype=torch.float32, coefficients=coefficients, gram=gram)  # type: ignore[arg-type]
    expected = 0.02 * 0.2 * max(shape) ** 0.5 * expected
    # The norm before the iteration is that of a multiple of g: other roundings, amplified as in test_orthogonal.
    assert float((moved - expected).norm() / expected.norm()) < 3e-5
    other = polar(
        g, dtype=torch.float32, coefficients="quintic" if coefficients == "polar_express" else "polar_express"
    )
    assert float((moved / expected.norm() - other / other.norm()).norm()) > 1e-2


@pytest.mark.parametrize("kind", SPECTRAL)
def test_options_of_the_iteration_are_read_at_every_step_and_by_group(kind: str) -> None:
    def run(early: str, late: str, group_says: str | None = None) -> torch.Tensor:
        params = {name: p for name, p in parameters().items() if name == "wide.0"}
        group: dict[str, Any] = {"rule": "spectral", "params": list(params.items())}
        if group_says is not None:
            group["orthogonal_coefficients"] = group_says
        optimizer = OPTIMIZERS[kind](
            [group], warmup_steps=0, orthogonal_dtype="float32", orthogonal_coefficients=early
        )  # fmt: skip
        walk(optimizer, params, 3)
        if late != early:
            optimizer.param_groups[0]["orthogonal_coefficients"] = late
        walk(optimizer, params, 3, seed=2)
        return params["wide.0"].detach()

    runs = [run(a, b) for a in ("quintic", "polar_express") for b in ("quintic", "polar_express")]
    assert all(not torch.equal(a, b) for i, a in enumerate(runs) for b in runs[:i])
    assert torch.equal(run("quintic", "quintic", group_says="polar_express"), runs[-1])


@pytest.mark.parametrize("kind", [SFNorMuon, AMUSE])
def test_the_dtype_of_the_products_is_decided_once_and_part_of_the_state(kind: Any) -> None:
    def optimizer(dtype: torch.dtype | str | None) -> ScheduleFree:
        groups = [{"rule": "spectral", "params": [nn.Parameter(torch.randn(4, 6))]}]
        made: ScheduleFree = kind(groups, orthogonal_dtype=dtype)
        return made

    quick = str(working_dtype(torch.device("cpu"))).removeprefix("torch.")
    for given, expected in (
        (None, quick), (torch.float32, "float32"), ("float32", "float32"), (torch.bfloat16, "bfloat16"),
    ):  # fmt: skip
        made = optimizer(given)
        assert made.param_groups[0]["orthogonal_dtype"] == expected
        assert made.arithmetic() == {"orthogonal_dtype": expected, "elements_by": "torch"}
    source, target = optimizer("bfloat16"), optimizer("float32")
    target.load_state_dict(source.state_dict())
    assert target.arithmetic()["orthogonal_dtype"] == "bfloat16"
    decided = optimizer(None)
    for dtype in ("float32", "bfloat16"):
        decided.load_arithmetic({"orthogonal_dtype": dtype})
        assert decided.arithmetic()["orthogonal_dtype"] == dtype
    target.load_arithmetic({"orthogonal_dtype": "float32"})  # what the constructor was told stays
    assert target.arithmetic()["orthogonal_dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="orthogonal_dtype = 'float8', expected"):
        decided.load_arithmetic({"orthogonal_dtype": "float8"})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("orthogonal_coefficients", "cubic"), ("orthogonal_gram", "yes"), ("orthogonal_dtype", "float16"),
        ("orthogonal_dtype", torch.float64), ("averaging_lr_power", -1.0), ("averaging_window_steps", 10.5),
        ("weight_decay", -0.1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", SPECTRAL)
def test_what_no_option_can_be_is_refused_with_what_it_can(kind: str, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"(SFNorMuon|AMUSE): {option} = .*, expected"):
        build(kind, parameters(), **{option: value})


# --- averaging


def weights_of(options: dict[str, Any], steps: int) -> tuple[list[float], list[float]]:
    """c_1, c_2, … as the optimizer says, and as definitions make it: the share of step t in the weighted mean."""
    params = parameters()
    optimizer = build("sf_adamw", params, lr=0.5, warmup_steps=4, **options)
    found, expected, total = [], [], 0.0
    for t in range(1, steps + 1):
        walk(optimizer, params, 1)
        found.append(float(optimizer.metrics()["c"]))
        eta = 0.5 * min(1.0, t / 4)
        w = t ** options.get("averaging_power", 0.0) * eta ** options.get("averaging_lr_power", 2.0)
        total = min(total + w, w * (options.get("averaging_window_steps") or float("inf")))
        expected.append(w / total)
    return found, expected


@pytest.mark.parametrize(
    "options",
    [
        {}, {"averaging_power": 1.0}, {"averaging_power": 2.5}, {"averaging_lr_power": 0.0},
        {"averaging_lr_power": 1.0}, {"averaging_window_steps": 5}, {"averaging_window_steps": 1},
        {"averaging_power": 1.0, "averaging_window_steps": 7},
    ],
)  # fmt: skip
def test_what_a_step_weighs(options: dict[str, Any]) -> None:
    found, expected = weights_of(options, 20)
    assert found == pytest.approx(expected, rel=1e-13)  # float64
    assert found[0] == 1.0
    if options.get("averaging_window_steps") == 1:
        assert found == [1.0] * 20  # x is z


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_x_is_the_mean_that_the_weights_say(kind: str) -> None:
    """Of all z so far, with a power, a learning rate that moves, and a past that is discounted on the way."""
    params = parameters()
    optimizer = build(kind, params, lr=lambda t: 0.02 / t.sqrt(), averaging_power=0.5, warmup_steps=5)
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in params.items()}
    total = 0.0
    for t, given in enumerate(gradients(params, 40), 1):
        for name, p in params.items():
            p.grad = given[name]
        optimizer.step()
        w = t**0.5 * (0.02 * t**-0.5 * min(1.0, t / 5)) ** 2
        total += w
        for name, p in params.items():
            sums[name] += w * optimizer.state[p]["z"].double()
        if t == 25:
            optimizer.forget(0.25)
            (clock,) = optimizer.clock_state()
            kept = clock["weight_sum"] / total
            assert kept == pytest.approx(0.25, rel=1e-12)
            total *= kept
            sums = {name: s * kept for name, s in sums.items()}
    for name, p in params.items():
        exact = sums[name] / total
        # x is stored in float32 and its sum compensated: a rounding of x, 6e-8, and of z's own float32 none
        assert torch.allclose(optimizer.averaged()[p].double(), exact, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_forgetting_touches_one_number(kind: str) -> None:
    params = parameters()
    optimizer = build(kind, params)
    walk(optimizer, params, 60)
    before = everything(optimizer, params)
    optimizer.forget(1.0)
    assert differing(before, everything(optimizer, params)) == []
    optimizer.forget(0.5)
    after = everything(optimizer, params)
    assert differing(before, after) == ["clock.0.weight_sum"]
    assert torch.equal(after["clock.0.weight_sum"], before["clock.0.weight_sum"] / 2)
    for factor in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"expected a number in \(0, 1\]"):
            optimizer.forget(factor)


def test_groups_of_one_clock_agree_on_what_the_clock_reads() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2))], "beta": beta} for beta in (0.9, 0.8)]
    with pytest.raises(ValueError, match=r"groups of one clock share beta: found \[0.8\] beside \[0.9\]"):
        OPTIMIZERS["sf_adamw"](groups)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_group_has_its_own_numbers_and_the_clock_its_driver(kind: str) -> None:
    """Learning rate, warm-up and decay of a group are its own; the weights follow the first spectral group's, or the
    first one's where there is none."""
    params = {name: p for name, p in parameters().items() if name in ("square", "norm")}
    groups = [
        {"rule": "adamw", "params": [("norm", params["norm"])], "lr": 0.125, "warmup_steps": 0, "weight_decay": 0.0},
        {"rule": "spectral", "params": [("square", params["square"])], "lr": 0.5, "warmup_steps": 4},
    ]
    optimizer = OPTIMIZERS[kind](groups)
    z = optimizer.iterate()[params["norm"]].clone()
    walk(optimizer, params, 1)
    moved = (z - optimizer.iterate()[params["norm"]]).abs()
    # the first step of AdamW is eta in every element, but for eps and the rounding of z near 1
    assert torch.allclose(moved, torch.tensor(0.125), rtol=1e-5)
    (clock,) = optimizer.clock_state()
    assert clock["weight_sum"] == (0.125**2 if kind == "sf_adamw" else (0.5 / 4) ** 2)
