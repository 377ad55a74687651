"""Steered memory, and decisions that wait for the journal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anytimed.config import load
from anytimed.contracts import AnytimedError, Evaluation, Json, StepReport
from anytimed.service.assembly import learner_of, parts_of
from anytimed.service.decisions import Decisions
from anytimed.service.steering import Steering
from anytimed.storage.journal import Journal
from anytimed.training.device import Device
from anytimed.training.learner import Learner
from tests import tiny
from tests.service.test_reloading import Run


def evaluation(step: int, x: float, y: float) -> Evaluation:
    return Evaluation(step, "digest", 100, x, y, 9.0)


class World:
    def __init__(self, folder: Path, **changes: dict[str, Any]) -> None:
        self.config = load(tiny.config(folder, **changes))
        self.learner: Learner = learner_of(parts_of(self.config), Device("cpu", threads=1))
        self.journal = Journal(folder / "journal.jsonl")
        self.told: list[Json] = []
        self.steering = Steering(self.config, Decisions(self.journal), self.learner, None, self.told.append)

    def advance(self, steps: int) -> None:
        """Steps of the clock, without a batch."""
        for clock in self.learner.optimizer._clocks:
            for _ in range(steps):
                clock.t += 1
                clock._numbers[1] = 1.0
                clock._numbers[0] += 1.0
                if int(clock.t) <= 10:
                    clock._numbers[3] = 1.0 / int(clock.t)


def test_y_better_than_x_halves_what_x_remembers_down_to_the_end_of_warm_up(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.advance(1000)
    assert world.learner.memory() == {"averaging_memory_steps": 1000.0}
    world.steering.evaluated(evaluation(20, 2.0, 2.1))
    world.steering.evaluated(evaluation(40, 2.0, 2.0))
    assert (world.told, world.learner.memory()) == ([], {"averaging_memory_steps": 1000.0})
    for step in range(60, 260, 20):
        world.steering.evaluated(evaluation(step, 2.0, 1.9))
    assert world.learner.memory() == {"averaging_memory_steps": 10.0}, "never below that of the end of warm-up"
    assert [entry["memory_steps"] for entry in world.told][:4] == [1000.0, 500.0, 250.0, 125.0]
    assert world.journal.entries("training") == world.told
    assert {entry["kind"] for entry in world.told} == {"forget"}
    world.steering.evaluated(evaluation(60, 2.0, 1.9))  # a replay says it again
    for nothing in (float("nan"), float("inf")):
        world.steering.evaluated(evaluation(400, nothing, 1.9))
        world.steering.evaluated(evaluation(400, 2.0, float("nan")))
    assert len(world.told) == 11, "that a replay of step 60 finds another memory is another decision"


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    world = World(tmp_path, training={"steered_memory": False})
    world.advance(100)
    world.steering.evaluated(evaluation(20, 2.0, 1.0))
    assert (world.told, world.learner.memory()) == ([], {"averaging_memory_steps": 100.0})


def test_what_the_journal_cannot_take_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path)

    def full(scope: str, entry: Json) -> None:
        raise AnytimedError("journal.jsonl: entry not written: No space left on device")

    append = world.journal.append
    monkeypatch.setattr(world.journal, "append", full)
    assert world.steering.reported([StepReport(3, 3, float("nan"), 1.0, True)]) is None
    assert "1 decisions about the training are not journalled yet" in str(world.steering.problem)
    monkeypatch.setattr(world.journal, "append", append)
    world.steering.reported([])
    assert world.steering.problem is None
    assert world.journal.entries("training") == world.told == [{"kind": "skipped", "step": 3, "batch": 3}]


def test_a_forgetting_is_part_of_the_commit_and_of_what_is_published(tmp_path: Path) -> None:
    """With a hold-out on which y is made better than x: at each evaluation x forgets, and a resume goes on from there,
    as the run that was not stopped."""
    states = []
    for name, stops in (("whole", []), ("stopped", [25, 33])):
        folder = tmp_path / name
        tiny.write_text(folder / "data", 150)
        hold = {"holdout": {"fraction": 0.4, "max_tokens": 512, "record_tokens": 128}}
        tiny.config(folder, evaluation={"every_steps": 5}, data=hold, exports={"every_steps": 1000})
        for upto in [*stops, 40]:
            with Run(folder) as run:
                learner = run.daemon._learner
                evaluate = learner.evaluate
                learner.evaluate = lambda holdout, of=evaluate: turned(of(holdout))  # type: ignore[method-assign]
                while learner.step_count < upto:
                    run.step()
        states.append(tiny.newest_commit(folder))
    tiny.assert_same_state(*states)
    lines = [json.loads(line) for line in (tmp_path / "stopped/run/journal.jsonl").read_text().splitlines()]
    forgot = [line["entry"]["step"] for line in lines if line["scope"] == "training"]
    assert forgot and forgot == sorted(set(forgot)), "each once"
    events = [json.loads(line) for line in (tmp_path / "whole/run/metrics.jsonl").read_text().splitlines()]
    memory = [e["averaging_memory_steps"] for e in events if e["kind"] == "evaluation"]
    assert memory and max(memory) < 20, "it stays near the end of warm-up"


def turned(found: Evaluation | None) -> Evaluation | None:
    """The same with the losses of x and y exchanged where y's is worse."""
    if found is None or found.loss_y < found.loss_x:
        return found
    return Evaluation(
        found.step, found.holdout, found.tokens, found.loss_y, found.loss_x, found.loss_z, found.by_source
    )
