"""Sources that come, go and change their weights while it trains, by reload and by restart: the same line of steps."""

from __future__ import annotations

import json
import random
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from anytimed.config import load
from anytimed.contracts import Batch
from anytimed.service.console import View
from anytimed.service.loop import Daemon
from anytimed.service.recovery import recover
from anytimed.service.requests import Mailbox
from anytimed.storage.run_directory import RunDirectory
from tests import tiny

NAMES = ("a", "b", "c")
DOCUMENTS = 400


def written(folder: Path, weights: dict[str, float], more: dict[str, dict[str, Any]] | None = None) -> Path:
    """The config with these sources of folder/data/NAME; what takes no part is not in it."""
    tables: dict[str, dict[str, Any]] = {
        f"sources.{name}": {"type": "text", "url": str(folder / "data" / name / "*.txt"), "weight": weight}
        for name, weight in weights.items()
    }
    tables |= {
        "data": {"shuffle_block_sequences": 8, "discover": {"every_s": 3600.0}},
        "commits": {"every_steps": None, "every_s": 3600.0},
        "exports": {"every_steps": 10_000},
    }
    for name, table in (more or {}).items():
        tables[name] = {**tables.get(name, {}), **table}
    return tiny.config(folder, without=["sources.main"], **tables)


def changes(count: int, every: int) -> dict[int, dict[str, float]]:
    """By step what the mixture becomes: sources added, removed, weighed otherwise."""
    draw = random.Random(5)
    found, last = {}, {"a": 1.0, "b": 1.0}
    for i in range(1, count + 1):
        while True:
            new = {n: draw.choice([0.5, 1.0, 4.0]) for n in NAMES if draw.random() < 0.7}
            if new and new != last:
                break
        found[i * every + draw.randrange(every - 1)] = last = new
    return found


def data(folder: Path) -> None:
    for name in NAMES:
        tiny.write_text(folder / "data" / name, DOCUMENTS, words=12, prefix=name)


class Run:
    """The daemon in this process, a step at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches: list[Batch] = []

    def __enter__(self) -> Run:
        self._directory = RunDirectory(self.folder / "run")
        self._directory.acquire()
        self._session = recover(load(self.folder / "config.toml"), self._directory)
        self.daemon = Daemon(self._session, Mailbox(), View(Console(quiet=True), ""))
        self.daemon._board.start()
        self.daemon._reader.start()
        return self

    def step(self) -> None:
        batch = self.daemon._reader.get(30)
        assert isinstance(batch, Batch), batch
        self.daemon._step(batch)
        self.batches.append(batch)

    def reload(self) -> None:
        self.daemon._reload()
        assert "reload" not in self.daemon._board.problems, self.daemon._board.problems

    def __exit__(self, *_: object) -> None:
        self.daemon._final_commit()
        self.daemon._reader.close()
        self.daemon._saving.close()
        self.daemon._board.close()
        self._session.failures.close()
        self._session.journal.close()
        self._directory.release()


def test_fifty_reloads_equal_fifty_restarts_with_the_same_changes_bit_for_bit(tmp_path: Path) -> None:
    due = changes(50, 6)
    last = max(due) + 10
    for name in ("live", "restarted"):
        data(tmp_path / name)
        written(tmp_path / name, {"a": 1.0, "b": 1.0})
    live = Run(tmp_path / "live")
    with live:
        for step in range(1, last + 1):
            live.step()
            if step in due:
                written(tmp_path / "live", due[step])
                live.reload()
    restarted = Run(tmp_path / "restarted")
    at = 0
    for upto in [*due, last]:
        with restarted:
            while at < upto:
                restarted.step()
                at += 1
        if at in due:
            written(tmp_path / "restarted", due[at])
    tiny.assert_same_state(tiny.newest_commit(tmp_path / "live"), tiny.newest_commit(tmp_path / "restarted"))
    assert [b.tokens.tolist() for b in live.batches] == [b.tokens.tolist() for b in restarted.batches]
    told = [list(batch.mixture) for batch in live.batches]
    assert sum(one != other for one, other in pairwise(told)) > 25, "the mixture changed that often"

    # the state says where every source stands, those that take no part included, and what the mixture is
    position = tiny.state_of(tiny.newest_commit(tmp_path / "live"))[1]["position"]
    assert set(position["sources"]) == set(NAMES)
    assert {name: rule["weight"] for name, rule in position["mixture"].items()} == due[max(due)]
    held = sum(at["held_out"] for at in position["sources"].values())
    assert held > 0
    packed = sum(at.tokens for at in live.batches[-1].read.values())
    trained = sum(batch.labels.size for batch in live.batches)
    block = 8 + 4  # sequences that a block has at most, with those of a batch begun
    assert 0 <= packed - 1 - trained <= block * 32


def test_reloads_under_load_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """A process that is signalled while it trains. What it read of each source is exactly what its batches held."""
    data(tmp_path)
    draw = random.Random(3)
    config = written(tmp_path, {"a": 1.0, "b": 1.0})
    process = tiny.start("run", config)
    weights: dict[str, float] = {}
    try:
        told: list[str] = []
        deadline = time.monotonic() + 120

        def until(text: str) -> None:
            assert process.stdout is not None
            for line in process.stdout:
                told.append(line)
                assert time.monotonic() < deadline, told
                if text in line:
                    return
            raise AssertionError("".join(told))

        until("training | step 0")
        for _ in range(6):
            weights = {n: draw.choice([0.5, 1.0, 4.0]) for n in NAMES if draw.random() < 0.8} or {"c": 1.0}
            written(tmp_path, weights)
            process.send_signal(signal.SIGHUP)
            until("reloaded")
            time.sleep(draw.random() / 4)
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, rest
    # a replay of the journal from the beginning comes to the same state
    stopped = tiny.newest_commit(tmp_path)
    state = tiny.state_of(stopped)[1]
    other = tmp_path / "other"
    data(other)
    written(other, weights)
    (other / "run").mkdir(mode=0o700)
    (other / "run" / "journal.jsonl").write_bytes((tmp_path / "run" / "journal.jsonl").read_bytes())
    (other / "run" / "journal.jsonl").chmod(0o600)
    tiny.run("run", other / "config.toml", "--steps", str(state["learner"]["step"]))
    tiny.assert_same_state(stopped, tiny.newest_commit(other))


def test_a_reload_that_cannot_be_changes_nothing_and_says_why(tmp_path: Path) -> None:
    data(tmp_path)
    written(tmp_path, {"a": 1.0, "b": 1.0})
    with Run(tmp_path) as run:
        for _ in range(3):
            run.step()
        before = run.daemon._config
        mistakes: list[tuple[dict[str, dict[str, Any]], str]] = [
            ({"sources.a": {"encoding_errors": "reject"}}, "source 'a' reads something else than before"),
            ({"sources.a": {"weight": -1.0}}, "weight: found -1.0"),
            ({"sources.b": {"when_dry": "replay"}}, "passes: at least 2"),
            ({"model": {"hidden_size": 64}}, "only a restart changes [model] hidden_size"),
        ]
        for change, expected in mistakes:
            written(tmp_path, {"a": 1.0, "b": 1.0}, change)
            run.daemon._reload()
            assert expected in run.daemon._board.problems["reload"], run.daemon._board.problems
            assert run.daemon._config is before
        run.step()


def test_a_setting_that_makes_no_other_source_takes_effect_without_a_change_of_the_mixture(tmp_path: Path) -> None:
    data(tmp_path)
    written(tmp_path, {"a": 1.0}, {"sources.a": {"exclude": ["a03*.txt"]}})

    def entries() -> int:
        return int(run.daemon._reader.status()["sources"]["a"]["entries"])

    with Run(tmp_path) as run:
        for _ in range(3):
            run.step()
        assert entries() == DOCUMENTS - 100
        written(tmp_path, {"a": 1.0}, {"sources.a": {"exclude": []}})
        run.reload()
        while isinstance(run.daemon._reader.get(30), Batch):
            pass  # until there is nothing more to read
        assert entries() == DOCUMENTS
    kinds = [json.loads(line)["entry"]["kind"] for line in (tmp_path / "run/journal.jsonl").read_text().splitlines()]
    assert kinds.count("mixture") == 1


@pytest.mark.parametrize("live", [True, False])
def test_evaluations_change_their_interval_at_a_step_that_is_journalled(tmp_path: Path, live: bool) -> None:
    tiny.write_text(tmp_path / "data", 100)
    data = {"holdout": {"fraction": 0.4, "max_tokens": 512, "record_tokens": 128}}
    tiny.config(tmp_path, evaluation={"every_steps": 5}, commits={"every_steps": 4}, data=data)
    with Run(tmp_path) as run:
        while run.daemon._learner.step_count < 12:
            run.step()
        if live:
            tiny.config(tmp_path, evaluation={"every_steps": 3}, commits={"every_steps": 4}, data=data)
            run.reload()
    tiny.config(tmp_path, evaluation={"every_steps": 3}, commits={"every_steps": 4}, data=data)
    with Run(tmp_path) as run:
        while run.daemon._learner.step_count < 18:
            run.step()
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "evaluation"] == [5, 10, 15, 18]
    decided = [json.loads(line)["entry"] for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    [entry] = [entry for entry in decided if entry["kind"] == "evaluations"]
    assert (entry["step"], entry["every_steps"]) == (12, 3)
