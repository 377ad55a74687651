"""What `benchmarks/optimizer.py` measures is what it says: the plain loops are our algorithms, the counts are right,
every contender gets the same rounds, and the script runs."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.optim.cases import OPTIMIZERS

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def shapes() -> ModuleType:
    return importlib.import_module("contest.shapes")


@pytest.mark.parametrize("which", ["sf_normuon", "amuse", "sf_adamw"])
def test_a_plain_loop_takes_the_steps_of_ours(which: str, shapes: ModuleType) -> None:
    from contest.plain_loops import PlainAMUSE, PlainSFAdamW, PlainSFNorMuon

    theirs = shapes.SHAPES["tiny"].weights(torch.device("cpu"))
    ours = theirs.copy()
    start = {name: p.detach().clone() for name, p in ours.named.items()}
    # A warm-up that ends on the way, so that AMUSE's beta moves too.
    loops: dict[str, Any] = {
        "sf_normuon": lambda w: PlainSFNorMuon(w.matrices, w.others, warmup_steps=3),
        "amuse": lambda w: PlainAMUSE(w.matrices, w.others, warmup_steps=3),
        "sf_adamw": lambda w: PlainSFAdamW(w.named.values(), warmup_steps=3),
    }
    optimizer = OPTIMIZERS[which](ours.groups(), warmup_steps=3)
    loop = loops[which](theirs)
    torch.manual_seed(1)
    for _ in range(6):
        for name, p in ours.named.items():
            p.grad = torch.randn_like(p)
            theirs.named[name].grad = p.grad.clone()
        optimizer.step()
        loop.step()
    # Newton-Schulz in bfloat16 leaves 1.4e-2 of the way between the two, in either dtype of ours; where there is none,
    # float32 leaves 3e-5. A beta that is off by 0.1 makes 6e-2 of y.
    for name, p in ours.named.items():
        q = theirs.named[name]
        limit = 0.03 if ours.roles[name] == "matrix" and which != "sf_adamw" else 1e-4
        pairs_of = {"y": (p, q)} | {s: (optimizer.state[p][s], loop.state[q][s]) for s in ("x", "z")}
        for sequence, (mine, plain) in pairs_of.items():
            way = torch.linalg.vector_norm(plain - start[name])
            assert way > 0
            apart = torch.linalg.vector_norm(mine - plain) / way
            assert apart < limit, (name, sequence, float(apart))


def test_the_large_shape_is_the_one_of_the_figures(shapes: ModuleType) -> None:
    from contest.parts import newton_schulz_flops

    weights = shapes.SHAPES["27m"].weights(torch.device("meta"))
    assert len(weights.matrices) == 84
    assert round(weights.elements / 1e6, 1) == 27.5
    # By hand: 48 of (384, 384) at 30 m^3, 36 of (384, 1024) at 20 m^2 n + 10 m^3.
    by_hand = 48 * 30 * 384**3 + 36 * (20 * 384**2 * 1024 + 10 * 384**3)
    assert newton_schulz_flops(Counter((1, p.shape[0], p.shape[1]) for p in weights.matrices)) == by_hand
    assert newton_schulz_flops({(4, 384, 384): 12, (3, 1024, 384): 8, (12, 384, 1024): 1}) == by_hand
    assert round(shapes.SHAPES["1m"].weights(torch.device("meta")).elements / 1e6, 2) == 0.86
    assert round(shapes.SHAPES["124m"].weights(torch.device("meta")).elements / 1e6) == 124


def test_state_is_counted_once_and_without_y() -> None:
    from contest.memory import state_bytes

    buffer = torch.zeros(10)  # 40 bytes, of which y has 16
    y = buffer[6:]
    state = {y: {"z": buffer[:3], "x": buffer[3:6], "nested": [{"v": torch.zeros(2, dtype=torch.bfloat16)}], "step": 1}}
    assert state_bytes([state, {y: {"z": buffer[:3]}}], [y]) == 40 - 16 + 4


def test_every_lane_runs_in_every_round_and_never_in_one_order() -> None:
    from contest.rounds import Lane, measure, ratio

    ran: list[str] = []
    clock = iter(range(1, 1000))
    lanes = [
        Lane(name, run=lambda name=name: ran.append(name), before=lambda name=name: ran.append(f"before {name}"))
        for name in "abc"
    ]

    def timer(run: Any) -> tuple[float, float]:
        run()
        return float(next(clock)), 0.0

    samples = measure(lanes, rounds=4, warmup=1, timer=timer, told=lambda what: None)
    rounds = [ran[i : i + 6] for i in range(0, len(ran), 6)]
    assert len(rounds) == 5
    for one in rounds:
        assert sorted(one[1::2]) == ["a", "b", "c"]
        assert one[::2] == [f"before {name}" for name in one[1::2]]
    assert len({tuple(one) for one in rounds[1:]}) == 4
    assert [len(samples[name].wall) for name in "abc"] == [4, 4, 4]
    paired = sorted(a / b for a, b in zip(samples["a"].wall, samples["b"].wall, strict=True))
    assert ratio(samples, "a", "b")["median"] == pytest.approx((paired[1] + paired[2]) / 2, abs=1e-3)


def test_who_cannot_run_is_told_of_and_ours_must(shapes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from contest import contenders, field

    def broken(weights: Any) -> Any:
        raise RuntimeError("no compiler here\nand more")

    def put(key: str, **changes: Any) -> None:
        monkeypatch.setitem(contenders.CONTENDERS, key, dataclasses.replace(contenders.CONTENDERS[key], **changes))

    put("zij_normuon", module="no_such_module_anywhere")
    put("torch_muon", make=broken)
    weights = shapes.SHAPES["tiny"].weights(torch.device("cpu"))
    gradients = shapes.Gradients.drawn(weights)
    found = field.enter(["zij_normuon", "torch_muon", "plain_amuse"], weights, gradients, lambda what: None)
    assert list(found.running) == ["plain_amuse"]
    assert found.absent == {
        "zij_normuon": {"status": "not installed", "install": "pip install --no-deps -r benchmarks/peers.txt"},
        "torch_muon": {"status": "unavailable", "reason": "RuntimeError: no compiler here"},
    }
    put("sf_normuon", make=broken)
    with pytest.raises(RuntimeError, match="no compiler"):
        field.enter(["sf_normuon"], weights, gradients, lambda what: None)


def test_the_training_step_that_waits_for_a_gpu_works_on_any_device(shapes: ModuleType) -> None:
    from contest.report import bars
    from contest.rounds import cpu_timer
    from contest.training_step import training_part

    keys = ["sf_normuon", "amuse", "plain_sf_normuon", "torch_muon"]
    found = training_part(
        torch.device("cpu"),
        shapes.SHAPES["tiny"],
        keys,
        rounds=2,
        warmup=1,
        timer=cpu_timer,
        told=lambda what: None,
        tokens=512,
        length=64,
        micro_batch=4,
    )
    assert (found["status"], found["tokens_a_step"]) == ("measured", 512)
    assert list(found["contenders"]) == keys
    assert found["host_syncs"] == {"sf_normuon": None, "amuse": None}
    mine = found["contenders"]["sf_normuon"]
    whole = found["forward_backward_ms"] + mine["wall_ms"]["median"]
    assert mine["share_of_training_step"] == pytest.approx(mine["wall_ms"]["median"] / whole, rel=0.01)
    of_gpu = [bar for bar in bars({"cuda": found}) if bar.name.startswith("GPU")]
    assert len(of_gpu) == 4
    assert all(bar.figure is not None for bar in of_gpu)


def test_a_bar_that_is_missed_is_said_to_be() -> None:
    from contest.report import bars

    def contender(kind: str, orthogonalises: bool, state: float, over: dict[str, float]) -> dict[str, Any]:
        return {
            "title": "T",
            "kind": kind,
            "orthogonalises": orthogonalises,
            "status": "measured",
            "state_bytes_per_parameter": state,
            "times_as_fast_as": {other: {"median": times} for other, times in over.items()},
        }

    contenders = {
        "sf_normuon": contender("ours", True, 14.2, {"plain_sf_normuon": 1.2, "slow": 3.0, "near": 0.9, "adam": 0.1}),
        "slow": contender("peer", True, 8, {}),
        "near": contender("peer", True, 8, {}),
        "adam": contender("peer", False, 8, {}),
    }
    found = {"threads": {"2": {"contenders": contenders, "parts": {"sf_normuon": {"share": {"median": 0.84}}}}}}
    told = {bar.name: bar for bar in bars({"cpu": {"shapes": {"27m": found, "1m": found}}})}
    assert told["27.5 M: SF-NorMuon over its plain loop"].ok is True
    assert told["0.86 M: SF-NorMuon over its plain loop"].ok is False
    assert told["27.5 M: AMUSE over its plain loop"].ok is None
    assert told["27.5 M: matrix part, of the rate of bmm"].ok is False
    assert told["27.5 M: state of T, bytes a parameter"].ok is False
    (ahead,) = (bar for name, bar in told.items() if name.startswith("0.86 M") and "fastest" in name)
    assert (ahead.figure, ahead.ok) == (0.9, False)  # not adam, which does not orthogonalise
    assert all(bar.ok is None for name, bar in told.items() if name.startswith("GPU"))


def test_the_script_runs_and_draws_its_table(tmp_path: Path) -> None:
    target = tmp_path / "optimizer.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "optimizer.py"), "--json", str(target)]
    only = "sf_normuon,plain_sf_normuon,torch_muon"
    subprocess.run([*script, "--quick", "--threads", "1", "--device", "cpu", "--only", only], check=True, cwd=ROOT)
    found = json.loads(target.read_text())
    shape = found["cpu"]["shapes"]["tiny"]
    at_one = shape["threads"]["1"]
    assert list(at_one["contenders"]) == only.split(",")
    for entry in at_one["contenders"].values():
        assert entry["status"] == "measured"
        assert entry["wall_ms"]["median"] > 0
    # z, x, v or momentum in float32, compensation in bfloat16, and little more.
    assert 14 <= at_one["contenders"]["sf_normuon"]["state_bytes_per_parameter"] < 14.2
    assert 12 <= at_one["contenders"]["plain_sf_normuon"]["state_bytes_per_parameter"] < 12.2
    part = at_one["parts"]["sf_normuon"]
    assert part["share"]["median"] > 0
    assert part["factor"]["median"] > 0
    assert part["matrix_ms"] + part["elementwise_ms"] == pytest.approx(
        at_one["contenders"]["sf_normuon"]["wall_ms"]["median"], rel=0.5
    )  # medians of three rounds
    assert shape["peak_bytes"]["sf_normuon"] > 0
    assert found["cuda"]["status"] == "not run"
    found["cpu"]["shapes"]["27m"] = found["cpu"]["shapes"]["1m"] = {**shape, "threads": {"1": at_one, "2": at_one}}
    target.write_text(json.dumps(found))
    drawn = subprocess.run([*script, "--table"], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert [line.split("|")[1].strip() for line in drawn.splitlines()][2:] == [
        "SF-NorMuon",
        "plain loop, SF-NorMuon",
        "torch Muon + AdamW",
    ]
    assert "not run" in drawn
