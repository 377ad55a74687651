"""The benchmark of the horizons works from end to end in its quick form; what it compares with is what it says; bars
can be missed; and what was extended is what had it all from the start."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Muon

from anytimed.config import Config
from anytimed.optim import SFNorMuon, param_groups
from anytimed.service.assembly import parts_of
from anytimed.service.check import footprint

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def _run(script: str, tmp_path: Path, *more: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    goal = tmp_path / "result.json"
    command = [sys.executable, f"benchmarks/{script}", "--quick", "--json", str(goal), "--scratch", str(tmp_path / "s")]
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False)
    assert goal.exists(), done.stdout + done.stderr
    return done, json.loads(goal.read_text())


@pytest.mark.timeout(900)  # 45 s on a free core
def test_the_quick_form_tunes_every_rival_and_keeps_what_it_trained(tmp_path: Path) -> None:
    done, found = _run("anytime.py", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    horizons = [str(h) for h in found["horizons"]]
    assert len(horizons) == 2
    for kind, runs in found["one"].items():
        for run in runs:
            steps = [point["step"] for point in run["seen"]]
            assert steps == sorted(set(steps)), kind
            assert {int(h) for h in horizons} <= set(steps), kind
            assert all(point["x"] < 6 for point in run["seen"]), kind
    for kind, by_horizon in found["rivals"].items():
        assert [*by_horizon] == horizons, kind
        for of in by_horizon.values():
            rates = [float(rate) for rate in of["tried"]]
            assert min(rates) < of["lr"] < max(rates), f"{kind}: the best rate is at the edge of {of['tried']}"
            assert of["losses"][0] == min(of["tried"].values())
    # A run that is measured where a rival ends, and a rival that ends there, have seen the same tokens.
    assert {tuple(found["table"][kind]) for kind in found["table"]} == {tuple(horizons)}
    drawn = ElementTree.fromstring((tmp_path / "result.svg").read_text())
    assert len(drawn.findall(".//{*}path[@class]")) > 6

    # All of it is kept, in the scratch folder and in the result; a missed bar is an exit code.
    curves = {path: path.stat().st_mtime_ns for path in tmp_path.glob("s/quick/curves/*")}
    assert len(curves) == len(found["runs"])
    time.sleep(0.02)
    again, same = _run("anytime.py", tmp_path, "--assert")
    assert same == found
    assert {path: path.stat().st_mtime_ns for path in curves} == curves
    assert again.returncode == (0 if all(bar["ok"] for bar in found["bars"]) else 1), again.stdout + again.stderr
    for path in curves:
        path.unlink()
    (tmp_path / "earlier.json").write_text(json.dumps(found))
    taken, same = _run("anytime.py", tmp_path, "--from", str(tmp_path / "earlier.json"))
    assert same == found, taken.stderr
    assert not [*tmp_path.glob("s/quick/curves/*")]


@pytest.mark.timeout(900)  # 30 s on a free core
def test_a_run_that_is_stopped_for_want_of_data_and_extended_is_the_run_that_had_it_all(tmp_path: Path) -> None:
    done, found = _run("stop_and_extend.py", tmp_path, "--only", "amuse")
    assert done.returncode == 0, done.stdout + done.stderr
    told = found["amuse"]
    assert told["equal"]
    assert found["horizons"][-1] // 2 <= told["stopped_at_step"] < told["steps"][0] == found["horizons"][-1]
    assert told["tensors"] > 100


def test_two_ends_that_are_not_equal_are_told_by_name() -> None:
    stop = importlib.import_module("stop_and_extend")
    assert stop.differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 0}) == ["a.c", "d"]
    assert stop._same(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not stop._same(torch.tensor(0.0), torch.tensor(-0.0))
    assert not stop._same(torch.zeros(2), torch.zeros(2, dtype=torch.int32))


def _tuned(losses: dict[float, float | None], centre: float) -> tuple[dict[float, float | None], list[float]]:
    tuning = importlib.import_module("horizons.tuning")
    asked: list[float] = []

    def measure(rates: Sequence[float]) -> list[float | None]:
        asked.extend(rates)
        return [losses[rate] for rate in rates]

    return tuning.tuned(centre, measure), asked


def test_a_grid_grows_until_its_best_lies_inside() -> None:
    tuning = importlib.import_module("horizons.tuning")
    falling = {2.0**k: abs(k - 5.0) for k in range(-9, 10)}
    found, asked = _tuned(dict(falling), 1.0)
    assert asked == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    assert tuning.best_of(found) == 32.0
    assert tuning.inside(found)
    found, asked = _tuned({2.0**k: abs(k + 2.0) for k in range(-9, 10)}, 1.0)
    assert asked == [0.5, 1.0, 2.0, 0.25, 0.125]
    assert tuning.best_of(found) == 0.25
    # One that diverges is worse than any; where all improve for ever, it is said that the best is at the edge.
    found, _ = _tuned({0.5: 2.0, 1.0: 1.0, 2.0: None}, 1.0)
    assert tuning.best_of(found) == 1.0
    endless, asked = _tuned({2.0**k: -float(k) for k in range(-2, 20)}, 1.0)
    assert len(asked) == tuning.MOST
    assert not tuning.inside(endless)


def test_the_schedules_warm_up_and_end_at_nothing() -> None:
    rivals = importlib.import_module("horizons.rivals")
    for shape in (rivals.cosine, rivals.stable_then_decay):
        factors = [shape(step, 100, 10) for step in range(1, 101)]
        assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
        assert max(factors) == 1.0
        assert all(one >= other for one, other in pairwise(factors[9:]))
        assert 0 < factors[-1] < 0.05
    assert rivals.cosine(101, 100, 10) == pytest.approx(0.0)
    assert rivals.cosine(55, 100, 10) == pytest.approx(0.5, abs=0.01)
    assert [rivals.stable_then_decay(step, 100, 10) for step in (11, 80)] == [1.0, 1.0]
    assert rivals.stable_then_decay(101, 100, 10) == pytest.approx(0.0)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.Linear(16, 32))


def _trained(model: nn.Module, optimizer: Any, steps: int = 30) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(0, 32, (64,))
        cross_entropy(model(tokens), (tokens * 7 + 3) % 32).backward()
        optimizer.step(gate=torch.tensor(True))
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    return param_groups(model, overrides={"4.weight": "head"})


def test_a_rival_without_matrices_is_torchs_own_adamw() -> None:
    rivals = importlib.import_module("horizons.rivals")
    told = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "horizon": 30, "warmup_steps": 5}
    settings = rivals.AdamWCosine.Settings(lr=0.01, **told)
    mine, plain = _model(), _model()
    roles = {name: "other" for name, _ in mine.named_parameters()}
    found = _trained(mine, rivals.AdamWCosine(settings).build(mine.named_parameters(), roles))

    class Plain(torch.optim.AdamW):
        def step(self, *, gate: torch.Tensor) -> None:  # type: ignore[override]
            self.taken = getattr(self, "taken", 0) + 1
            self.param_groups[0]["lr"] = 0.01 * rivals.cosine(self.taken, 30, 5)
            super().step()

    expected = _trained(plain, Plain(plain.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.1))
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def _over_one_matrix(kind: str) -> tuple[Any, nn.Module, Any, nn.Parameter]:
    """`rivals`, a model, the rival over it at lr 0.02 for 12 steps, 3 of warm-up, and the one weight that moves."""
    rivals = importlib.import_module("horizons.rivals")
    recipe, model = getattr(rivals, kind), _model()
    told = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "horizon": 12, "warmup_steps": 3, "mu": 0.95}
    settings = recipe.Settings(lr=0.02, aux_lr=1e-30, **told)
    names = {name: "other" for name, _ in model.named_parameters()} | {"1.weight": "matrix"}
    optimizer = recipe(settings).build(model.named_parameters(), names)
    return rivals, model, optimizer, model.get_parameter("1.weight")


def test_normuon_is_the_published_rule_without_any_averaging() -> None:
    """Against a plain loop in float64 with torch's own Newton-Schulz coefficients; the auxiliaries stand still."""
    rivals, model, optimizer, weight = _over_one_matrix("NorMuonCosine")
    w, momentum, v = weight.detach().double().clone(), torch.zeros(24, 16).double(), torch.zeros(24, 1).double()
    torch.manual_seed(2)
    for step in range(1, 13):
        g = torch.randn(24, 16)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        weight.grad = g.clone()
        optimizer.step(gate=torch.tensor(True))
        eta = 0.02 * rivals.cosine(step, 12, 3)
        momentum = 0.95 * momentum + 0.05 * g.double()
        x = momentum.T / (momentum.norm() + 1e-7)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        p = x.T
        v = 0.95 * v + 0.05 * p.square().mean(dim=1, keepdim=True)
        scaled = p / (v.sqrt() + 1e-8)
        w = w - eta * 0.1 * w - 0.2 * eta * (24 * 16) ** 0.5 / scaled.norm() * scaled
        # Newton-Schulz may run in bfloat16: a direction is then right to a percent, and an element moves by 0.2 eta.
        assert (weight.double() - w).norm() < 0.03 * 0.2 * 0.02 * (24 * 16) ** 0.5 * step
    assert torch.equal(optimizer.averaged()[weight], weight)


def test_muon_is_torchs() -> None:
    """AMUSE with a memory of one step against torch.optim.Muon, whose Newton-Schulz is in bfloat16."""
    rivals, model, optimizer, weight = _over_one_matrix("MuonWSD")
    w = weight.detach().clone()
    theirs = Muon([w], lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    torch.manual_seed(2)
    way = 0.0
    for step in range(1, 13):
        before, g = weight.detach().clone(), torch.randn(24, 16)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        weight.grad, w.grad = g.clone(), g.clone()
        theirs.param_groups[0]["lr"] = 0.02 * rivals.stable_then_decay(step, 12, 3)
        theirs.step()
        optimizer.step(gate=torch.tensor(True))
        way += float((weight - before).detach().norm())
        assert (weight - w).norm() < 0.02 * way
    assert torch.equal(optimizer.averaged()[weight], weight)


def test_decay_at_y_takes_the_decay_from_the_parameters() -> None:
    decay = importlib.import_module("horizons.decay")
    model, plain = _model(), _model()
    at_y = decay.DecayAtY(_groups(model), 0.1, lr=0.02, warmup_steps=4)
    none = SFNorMuon(_groups(plain), lr=0.02, warmup_steps=4, weight_decay=0.0)
    torch.manual_seed(3)
    for step in range(1, 6):
        before = {name: (at_y.state[p]["z"].clone(), p.detach().clone()) for name, p in model.named_parameters()}
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
            none.state[q]["z"].copy_(before[name][0])
        at_y.step()
        none.step()
        eta = 0.02 * min(1.0, step / 4)
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            rate = eta if name in ("1.weight", "3.weight") else eta / 2
            expected = none.state[q]["z"] - rate * 0.1 * before[name][1]
            torch.testing.assert_close(at_y.state[p]["z"], expected, atol=1e-6, rtol=1e-5)


def test_a_bar_that_is_missed_is_said_to_be() -> None:
    report = importlib.import_module("horizons.report")
    plans = importlib.import_module("horizons.plans")

    def told(one: float | None, adamw: float | None, normuon: float) -> list[bool]:
        def row(mean: float | None) -> dict[str, dict[str, float | None]]:
            return {str(h): {"mean": mean, "seeds": 3} for h in plans.QUICK.horizons}

        # Of two momenta with every seed the better one counts; the first seed alone decides nothing.
        first, last = map(str, plans.QUICK.horizons)
        better, other = row(normuon), row(normuon)
        better[first] = {"mean": normuon + 1, "seeds": 3}
        other[last] = {"mean": normuon - 1, "seeds": 1}
        rivals = {"adamw": row(adamw), "normuon, mu 0.8": better, "normuon, mu 0.6": other}
        return [bar["ok"] for bar in report.bars({"sf_normuon": row(one), "amuse": row(one), **rivals}, plans.QUICK)]

    assert told(1.0, 1.1, 0.97) == [True, True, True, True]
    assert told(1.0, 1.09, 0.969) == [False, False, False, False]
    assert told(1.0, None, 1.0) == [False, True, False, True]
    assert told(None, 1.1, 1.0) == [False, False, False, False]
    assert report.spread([1.0, 3.0]) == {"mean": 2.0, "spread": 1.0, "seeds": 2}
    assert report.spread([1.0, None])["mean"] is None


def test_sensitivity_varies_what_it_says_and_every_configuration_is_allowed() -> None:
    sensitivity, plans = importlib.import_module("sensitivity"), importlib.import_module("horizons.plans")
    registry = importlib.import_module("anytimed.registry")
    for kind in sensitivity.VARIED:
        runs = sensitivity.varied(kind, plans.FULL)
        base = runs.pop("base")["seed 1"].optimizer
        assert len({run.name for by in runs.values() for run in by.values()}) == sum(map(len, runs.values()))
        for name, by in runs.items():
            for told, run in by.items():
                varied = {part.rsplit(" ", 1)[0] for part in told.split(", ")} if name == "together" else {name}
                changed = {key for key, value in run.optimizer.items() if base[key] != value}
                assert changed == ({"lr", "aux_lr"} if name == "lr times" else varied)
                assert run.optimizer.keys() == base.keys()
                config = Config.model_validate(plans.tables(run, plans.FULL, "texts", "folder"))
                registry.build("anytimed.optimizers", config.optimizer, "here", ("optimizer",))
                assert set(run.marks) == {250, 1000}


def test_each_place_of_the_decay_is_trained_through_the_daemon(tmp_path: Path) -> None:
    long_horizon, plans = importlib.import_module("long_horizon"), importlib.import_module("horizons.plans")
    runs, trainer = importlib.import_module("horizons.runs"), importlib.import_module("horizons.trainer")
    scale, seen = plans.QUICK, {}
    corpus = trainer.corpus_of(scale, tmp_path)
    for way in long_horizon.WAYS:
        run = replace(long_horizon.run_of(way, scale, 1), steps=6, marks=(3, 6))
        found = runs.train(run, scale, corpus, tmp_path / "run")
        assert [point["step"] for point in found["seen"]] == [3, 6]
        assert all(point.keys() >= set(long_horizon.FIGURES) for point in found["seen"])
        seen[way] = [point["z_norm"] for point in found["seen"]]
    assert seen["at z"] != seen["at y"] != seen["none"]
    assert max(seen["at z"][-1], seen["at y"][-1]) < seen["none"][-1], "what decays is not smaller"


def test_the_larger_model_reads_texts_of_ones_own(tmp_path: Path) -> None:
    plans, texts = importlib.import_module("horizons.plans"), importlib.import_module("horizons.texts")
    scale = plans.GPU.to((1, 2))
    assert (scale.horizons, scale.stream_bytes) == ((790, 1580), round(1.2 * 1580 * 65_536))
    config = Config.model_validate(plans.tables(plans.one_run("amuse", scale, 1), scale, "texts", "folder"))
    found = footprint(parts_of(config), "cuda", "bfloat16")
    assert 20e6 < found.parameters < 21e6
    assert plans.GPU.horizons[-1] * plans.GPU.tokens == pytest.approx(20 * found.parameters, rel=0.01)
    assert plans.GPU.stream_bytes > 1.2 * plans.GPU.horizons[-1] * plans.GPU.tokens

    (tmp_path / "in" / "deep").mkdir(parents=True)
    for number in range(40):
        lines = "".join(f"line {line} of file {number}, é\n" for line in range(1500))
        (tmp_path / "in" / "deep" / f"{number}.txt").write_text(lines, encoding="utf-8")
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG\xff\xfe" * 1000)
    pattern = f"{tmp_path}/in/**/*"
    corpus = texts.own_texts(pattern, tmp_path / "out", stream_bytes=300_000, probe_bytes=3000)
    assert texts.own_texts(pattern, tmp_path / "out", stream_bytes=300_000, probe_bytes=3000) == corpus
    read = [json.loads(line)["text"] for line in corpus.stream.read_text(encoding="utf-8").splitlines()]
    assert sum(len(text.encode()) for text in read) == corpus.size >= 300_000
    assert all(text.endswith("\n") and len(text.encode()) <= texts.DOCUMENT for text in read)
    of_files = {text.split("of file ")[1].split(",")[0] for text in read}
    held = {text.split("of file ")[1].split(",")[0] for text in corpus.probe}
    assert held
    assert not of_files & held
    with pytest.raises(SystemExit, match=r"found .* bytes of text in 41 files, expected 1,000,000,000"):
        texts.own_texts(pattern, tmp_path / "out", stream_bytes=10**9, probe_bytes=3000)


@pytest.mark.timeout(600)  # 15 s on a free core
def test_with_little_time_the_runs_come_in_the_order_of_what_they_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("larger", "plans", "trainer", "report", "picture")
    larger, plans, trainer, report, picture = (importlib.import_module(f"horizons.{name}") for name in names)
    scale = replace(plans.QUICK, unit=10)

    def asked(minutes: float | None) -> tuple[dict[str, Any], dict[str, Any]]:
        at = trainer.Trainer(scale, tmp_path, 1, here=True, earlier={})
        found = larger.measured(at, minutes)
        table = report.table_of(found, scale)
        told = {**found, "table": table, "bars": report.bars(table, scale), "runs": at.found}
        shown = {"horizons": list(scale.horizons), "tokens_per_step": scale.tokens, **told}
        assert len(report.tables(shown)) == 2
        ElementTree.fromstring(picture.drawn(shown))
        return told, at.found

    # A first run starts, for nobody knows yet how long it takes; the others would not end within a microsecond.
    told, runs = asked(1e-8)
    assert [*runs] == ["sf_normuon@1"]
    assert (told["rivals"], told["bars"]) == ({}, [])
    assert "left out, it would not end in time" in capsys.readouterr().err
    told, runs = asked(None)
    assert [*told["one"]] == ["sf_normuon", "amuse"]
    for kind in ("normuon, mu 0.8", "adamw"):
        first, last = (told["rivals"][kind][str(h)] for h in scale.horizons)
        assert f"{first['lr']:g}" == min(first["tried"], key=first["tried"].get)
        assert [*last["tried"]] == [f"{first['lr']:g}"]
    assert len(told["bars"]) == 4
    again, _ = asked(1e-8)
    assert again == told


def test_what_steering_costs_is_nothing_where_it_never_forgot(tmp_path: Path) -> None:
    steering, plans = importlib.import_module("steering"), importlib.import_module("horizons.plans")
    trainer = importlib.import_module("horizons.trainer")
    scale = replace(plans.QUICK, unit=6)
    found = steering.measured(trainer.Trainer(scale, tmp_path, 1, here=True, earlier={}))
    for kind in steering.KINDS:
        cost = found["cost"][kind]
        assert cost["forgets"] == [[]]
        assert [cost[str(h)]["mean"] for h in scale.horizons] == [0.0, 0.0]
    steering.table_of({"horizons": scale.horizons, **found})


def test_what_it_is_asked_for_is_checked() -> None:
    def told(*more: str) -> str:
        command = [sys.executable, "benchmarks/anytime.py", *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        return done.stderr

    assert "give --texts as well" in told("--gpu")
    assert "only with --gpu" in told("--minutes", "5")
    assert "expected ascending whole numbers" in told("--multiples", "2,1")
