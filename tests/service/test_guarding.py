"""A run that meets trouble: it goes back and around, within a budget; it passes over a batch that ends it again and
again; a kill from outside teaches it nothing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from anytimed.contracts import Json, Refused
from anytimed.service.decisions import Decisions
from anytimed.service.failures import Failures
from anytimed.storage.journal import Journal
from anytimed.storage.pull import list_checkpoints
from tests import tiny
from tests.service.troubled import ABORTS, INEXACT, NAN, RAISES

MODEL = "tests.service.troubled:TroubledLlama"


def troubled(folder: Path, text: str, at: list[int], **changes: Any) -> tuple[Path, dict[str, str]]:
    """A config whose documents `at` hold `text` somewhere in their middle, and the environment to run it in."""
    for i, path in enumerate(tiny.write_text(folder / "data", 300, words=10)):
        if i in at:
            content, stat = path.read_text(), path.stat()
            path.write_text(content[:30] + text + content[30:])
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    config = tiny.config(
        folder,
        model={"type": MODEL},
        data={"shuffle_block_sequences": 8, "holdout": {"fraction": 0.01, "max_tokens": 512, "record_tokens": 128}},
        **{"commits": {"every_steps": 10, "keep": 3}, **changes},
    )
    (folder / "audit").mkdir(exist_ok=True)
    return config, {"ANYTIMED_ALLOW_ADAPTERS": MODEL, "AUDIT": str(folder / "audit"), "PYTHONPATH": str(Path.cwd())}


def decided(folder: Path) -> list[Json]:
    lines = [json.loads(line) for line in (folder / "run" / "journal.jsonl").read_text().splitlines()]
    return [line["entry"] for line in lines if line["scope"] == "training"]


def test_goes_back_to_a_commit_and_around_what_is_not_finite_and_every_view_tells_it(tmp_path: Path) -> None:
    guard = {"window_steps": 16, "skipped_steps": 3}
    states = []
    for name in ("one", "two"):
        config, environment = troubled(tmp_path / name, NAN, [40, 44, 48], guard=guard)
        told = tiny.run("run", config, "--steps", "60", **environment)
        assert "3 skipped steps within 16; back to step" in told, told
        states.append(tiny.newest_commit(tmp_path / name))
    tiny.assert_same_state(*states)

    entries = decided(tmp_path / "one")
    [rollback] = [entry for entry in entries if entry["kind"] == "rollback"]
    skipped = [entry for entry in entries if entry["kind"] == "skipped"]
    assert [entry["batch"] for entry in skipped][:3] == sorted(entry["batch"] for entry in skipped[:3])
    assert rollback["first_batch"] == skipped[0]["batch"]
    assert rollback["last_batch"] >= skipped[2]["batch"]
    assert rollback["to_step"] < skipped[0]["step"]
    state = tiny.state_of(states[0])[1]
    around = rollback["last_batch"] - rollback["first_batch"] + 1
    assert state["position"]["batches"] == 60 + around
    events = [json.loads(line) for line in (tmp_path / "one/run/metrics.jsonl").read_text().splitlines()]
    assert [e["to_step"] for e in events if e["kind"] == "event" and e["what"] == "rollback"] == [rollback["to_step"]]
    newest = max(list_checkpoints(str(tmp_path / "one/published")), key=lambda manifest: manifest.order)
    assert rollback in newest.interventions
    aside = [p.name for p in (tmp_path / "one/run/quarantine/commits").iterdir() if p.is_dir()]
    assert all(int(name.split("-")[1]) > rollback["to_step"] for name in aside)


def test_a_rollback_does_not_restore_its_own_budget(tmp_path: Path) -> None:
    guard = {"window_steps": 16, "skipped_steps": 2, "rollbacks": 1}
    config, environment = troubled(tmp_path, NAN, [40, 44, 90, 94], guard=guard)
    told = tiny.run("run", config, "--steps", "100", expect=1, **environment)
    assert "1 rollbacks within 10000 batches did not help" in told
    assert "Traceback" not in told
    again = tiny.run("run", config, "--steps", "100", expect=1, **environment)
    assert "did not help" in again
    assert len([entry for entry in decided(tmp_path) if entry["kind"] == "rollback"]) == 1


@pytest.mark.parametrize(("text", "code"), [(RAISES, 1), (ABORTS, -signal.SIGABRT)])
def test_a_batch_that_ends_it_three_times_is_passed_over(tmp_path: Path, text: str, code: int) -> None:
    config, environment = troubled(tmp_path, text, [40])
    for _ in range(3):
        told = tiny.run("run", config, "--steps", "60", expect=code, **environment)
        assert "Traceback" not in told.partition("Fatal Python error")[0]
        if text == RAISES:
            assert "illegal memory access" in told
    told = tiny.run("run", config, "--steps", "60", **environment)
    [jump] = [entry for entry in decided(tmp_path) if entry["kind"] == "jump"]
    assert f"batch {jump['first_batch']} is passed over" in told
    assert jump["first_batch"] == jump["last_batch"]
    assert tiny.state_of(tiny.newest_commit(tmp_path))[1]["position"]["batches"] == 61
    told = tiny.run("run", config, "--steps", "70", **environment)
    assert "passed over" not in told, "it lies behind the commit"


def test_what_adds_up_in_any_order_is_refused_and_is_no_bad_batch(tmp_path: Path) -> None:
    config, environment = troubled(tmp_path, INEXACT, [40])
    for _ in range(4):
        told = tiny.run("run", config, "--steps", "60", expect=2, **environment)
        assert "put_ does not have a deterministic implementation" in told
        assert "set deterministic = false" in told
        assert "Traceback" not in told
    assert not (tmp_path / "run" / "failures.jsonl").exists()
    config.write_text(config.read_text().replace("[run]", "[run]\ndeterministic = false", 1))
    told = tiny.run("run", config, "--steps", "60", **environment)
    assert "put_" not in told
    assert tiny.state_of(tiny.newest_commit(tmp_path))[1]["position"]["batches"] == 60


def test_a_kill_from_outside_never_counts(tmp_path: Path) -> None:
    config, environment = troubled(tmp_path, "", [])
    for _ in range(4):
        process = tiny.start("run", config, "--steps", "100000", **environment)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if "committed" in line or "resumed" in line:
                    break
        finally:
            process.kill()
            process.wait()
    tiny.run("run", config, "--steps", "40", **environment)
    assert decided(tmp_path) == []
    assert not (tmp_path / "run" / "failures.jsonl").exists()
    assert not (tmp_path / "run" / "fault.log").exists()


def test_three_failures_at_different_batches_are_no_bad_batch(tmp_path: Path) -> None:
    def failing(*batches: int) -> Failures:
        failures = Failures(tmp_path)
        for batch in batches:
            failures.at(batch)
            failures.record(RuntimeError("CUDA error: device lost"))
        return failures

    journal = Journal(tmp_path / "journal.jsonl")
    failing(5, 7).judge(Decisions(journal), 3, since=4)
    failing(9).judge(Decisions(journal), 8, since=8), "the first two lie behind the commit"
    with pytest.raises(Refused, match=r"failed at 3 different batches since the last commit: batch 5: .*device lost"):
        failing().judge(Decisions(journal), 3, since=4)
    failing(7, 7).judge(Decisions(journal), 3, since=4)
    decisions = Decisions(journal)
    assert [decisions.jumped(batch) for batch in (5, 7, 9)] == [False, True, False]
