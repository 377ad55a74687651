"""Trackers, read back: the same figures as metrics.jsonl, over kills, rollbacks and full disks."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from anytimed.config import load
from anytimed.contracts import ConfigError, Json, SinkRun
from anytimed.service.assembly import parts_of
from anytimed_adapters.sinks.tensorboard import TensorBoard
from anytimed_adapters.sinks.weights_and_biases import WeightsAndBiases
from tests import tiny
from tests.adapters import trackers
from tests.service.test_daemon import running, status, until

NAMES = {
    "training/loss": "loss",
    "training/tokens_per_s": "tokens_per_s",
    "training/grad_norm": "grad_norm",
    "training/skipped": "skipped",
    "training/batches_ready": "batches_ready",
}


def run_of(folder: Path, *, term: int = 1, step: int = 0) -> SinkRun:
    return SinkRun("a-run", term, {"run": {"seed": 7}}, "d" * 64, step, step * 100, folder)


def step(number: int, loss: float | None, **more: Any) -> Json:
    return {"kind": "step", "time": 1e9 + number, "step": number, "tokens": number * 100, "loss": loss, **more}


def rounded(line: dict[int, float]) -> dict[int, float]:
    """As float32 holds it."""
    return {at: float(np.float32(value)) for at, value in line.items()}


def replayed(status: Json) -> int:
    """Steps that a kill now would have taken again."""
    commit = status["commit"]
    return int(status["step"] - commit["step"]) if commit else 0


# --- a daemon ---------------------------------------------------------------------------------------------------------


def test_trackers_show_the_figures_of_a_run_that_was_killed_and_went_on(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 400)
    config = tiny.config(
        tmp_path,
        **{
            "logging": {"every_steps": 2},
            "commits": {"every_steps": 40},
            "sinks.board": {"type": "tensorboard", "directory": str(tmp_path / "boards"), "run_name": "one"},
            "sinks.bees": {"type": "wandb", "directory": str(tmp_path / "bees"), "project": "p", "mode": "offline"},
        },
    )
    told = tiny.run("check", config)
    assert "sink board" in told and "p, offline" in told
    with running(config) as process:
        until(process, lambda: status(tmp_path)["step"] >= 40)
        until(process, lambda: all(s["written"] > 15 for s in status(tmp_path)["sinks"].values()))
        until(process, lambda: len(trackers.history(trackers.wandb_lives(tmp_path / "bees")[0])) > 15)
        until(process, lambda: replayed(status(tmp_path)) >= 6)
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed_at = last_step(tmp_path)
    assert "resumed step" in tiny.run("run", config, "--steps", str(killed_at + 20))

    records = trackers.told(tmp_path / "run" / "metrics.jsonl")
    steps, evaluations = trackers.in_force(records, "step"), trackers.in_force(records, "evaluation")
    assert len(steps) < sum(record["kind"] == "step" for record in records), "no step was replayed"
    for axis, folder in (("step", "one"), ("tokens", "one/by_tokens")):
        found = trackers.tensorboard(tmp_path / "boards" / folder)
        for name, key in NAMES.items():
            assert found[name] == rounded({r[axis]: r[key] for r in steps}), (axis, name)
        assert found["prequential/main"] == rounded({r[axis]: r["prequential"]["main"] for r in steps})
    found = trackers.tensorboard(tmp_path / "boards" / "one")
    for which in "xyz":
        assert found[f"holdout/loss_{which}"] == rounded({r["step"]: r[f"loss_{which}"] for r in evaluations})
        of_main = {r["step"]: r["by_source"]["main"][f"loss_{which}"] for r in evaluations}
        assert found[f"holdout/main/loss_{which}"] == rounded(of_main)
    assert found["optimizer/beta"] == rounded({r["step"]: r["beta"] for r in evaluations})
    events = [record for record in records if record["kind"] == "event"]
    texts = trackers.tensorboard_texts(tmp_path / "boards" / "one" / "events")
    assert len(texts) == len(events) and all(e["what"] in t for e, t in zip(events, texts, strict=True))

    assert_bees_tell(tmp_path / "bees", records)


def last_step(folder: Path) -> int:
    """The last step that was told."""
    return int(max(record["step"] for record in trackers.told(folder / "run" / "metrics.jsonl")))


def assert_bees_tell(folder: Path, records: list[Json]) -> None:
    """W&B has one run with `step` as the axis of all, and every line of metrics.jsonl in order; but those that its own
    process had not on the disk at the kill."""
    lives = trackers.wandb_lives(folder)
    stored = [record for life in lives for record in life]
    runs = [record.run for record in stored if record.WhichOneof("record_type") == "run"]
    assert len({run.run_id for run in runs}) == 1 and {run.project for run in runs} == {"p"}
    metrics = [record.metric for record in stored if record.WhichOneof("record_type") == "metric"]
    assert {m.step_metric for m in metrics if m.glob_name == "*"} == {"step"}
    before, after = map(trackers.history, lives)
    assert len(before) > 15 and len(after) > 5
    assert after[0]["step"] <= max(record["step"] for record in records[: -len(after)]), "no step was told again"
    for row, record in [*zip(before, records, strict=False), *zip(after, records[-len(after) :], strict=True)]:
        assert (row["step"], row["time"]) == (record["step"], record["time"])
        match record["kind"]:
            case "step":
                assert {key: row[name] for name, key in NAMES.items()} == {key: record[key] for key in NAMES.values()}
                assert row["tokens"] == record["tokens"]
                assert row["prequential/main"] == record["prequential"]["main"]
            case "evaluation":
                assert [row[f"holdout/loss_{w}"] for w in "xyz"] == [record[f"loss_{w}"] for w in "xyz"]
            case _:
                assert record["what"] in row["event"]


def test_a_tracker_can_be_added_and_taken_away_while_it_runs(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 12)
    never = {"every_steps": None, "every_s": 100_000.0}
    config = tiny.config(tmp_path, exports=never)
    plain = config.read_text()
    with running(config) as process:
        until(process, lambda: status(tmp_path)["state"] == "waiting for data")
        began = status(tmp_path)["step"]
        config.write_text(f'{plain}\n[sinks.board]\ntype = "tensorboard"\n')
        assert "[sinks] board" in tiny.run("reload", tmp_path / "run")
        tiny.write_text(tmp_path / "data", 12, prefix="more")
        until(process, lambda: status(tmp_path)["sinks"]["board"]["written"] > 3)
        until(process, lambda: status(tmp_path)["state"] == "waiting for data")
        config.write_text(plain)
        assert "[sinks] board" in tiny.run("reload", tmp_path / "run")
        until(process, lambda: status(tmp_path)["sinks"] == {})
        told = status(tmp_path)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    found = trackers.tensorboard(tmp_path / "run" / "sinks" / "board" / told["run_id"])["training/loss"]
    expected = trackers.in_force(trackers.told(tmp_path / "run" / "metrics.jsonl"), "step")
    assert found == rounded({r["step"]: r["loss"] for r in expected if began < r["step"] <= told["step"]})


def test_a_tracker_that_cannot_be_reached_is_a_problem_and_no_obstacle(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 12)
    (tmp_path / "boards").touch()  # where a folder should be
    config = tiny.config(tmp_path, **{"sinks.board": {"type": "tensorboard", "directory": str(tmp_path / "boards")}})
    with running(config) as process:
        until(process, lambda: status(tmp_path)["state"] == "waiting for data")
        until(process, lambda: any("sink board: " in problem for problem in status(tmp_path)["degraded"]))
        (tmp_path / "boards").unlink()
        until(process, lambda: not status(tmp_path)["degraded"])
        assert status(tmp_path)["sinks"]["board"]["dropped"] == 0
    expected = trackers.in_force(trackers.told(tmp_path / "run" / "metrics.jsonl"), "step")
    (folder,) = (tmp_path / "boards").iterdir()
    assert trackers.tensorboard(folder)["training/loss"] == rounded({r["step"]: r["loss"] for r in expected})


# --- TensorBoard ------------------------------------------------------------------------------------------------------


@pytest.fixture
def board(tmp_path: Path) -> TensorBoard:
    sink = TensorBoard(TensorBoard.Settings(directory=str(tmp_path), run_name="r"), "board")
    sink.open(run_of(tmp_path))
    return sink


def test_a_rollback_supersedes_what_was_told_before_it(board: TensorBoard, tmp_path: Path) -> None:
    for number in range(1, 11):
        board.write(step(number, 1.0))
    board.write({"kind": "event", "time": 1e9, "what": "rollback", "step": 10, "to_step": 4, "told": "back"})
    assert set(trackers.tensorboard(tmp_path / "r")["training/loss"]) == {1, 2, 3, 4}
    for number in range(7, 13, 2):
        board.write(step(number, 2.0))
    expected = {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 7: 2.0, 9: 2.0, 11: 2.0}
    assert trackers.tensorboard(tmp_path / "r")["training/loss"] == expected
    by_tokens = trackers.tensorboard(tmp_path / "r" / "by_tokens")["training/loss"]
    # Of tokens only the next record says where they are now.
    assert by_tokens == {at * 100: loss for at, loss in expected.items()} | {500: 1.0, 600: 1.0}
    assert trackers.tensorboard_texts(tmp_path / "r" / "events") == ["step 10: rollback: back"]


def test_event_files_are_read_in_the_order_of_terms_whatever_the_clock_said(tmp_path: Path) -> None:
    for term, loss, first in ((9, 1.0, 0), (10, 2.0, 3), (11, 3.0, 4)):
        for _ in range(2):  # the second time after a failure
            sink = TensorBoard(TensorBoard.Settings(directory=str(tmp_path), run_name="r"), "board")
            sink.open(run_of(tmp_path, term=term, step=first))
            for number in range(first + 1, first + 4):
                sink.write(step(number, loss))
            sink.close()
    files = sorted(path.name for path in (tmp_path / "r").glob("events.out.*"))
    assert len(files) == 6
    for order, name in enumerate(files):  # older files with newer times
        os.utime(tmp_path / "r" / name, (1e9 - order, 1e9 - order))
    assert trackers.tensorboard(tmp_path / "r")["training/loss"] == {
        1: 1.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: 3.0, 6: 3.0, 7: 3.0
    }  # fmt: skip


def test_what_is_not_known_leaves_a_gap(board: TensorBoard, tmp_path: Path) -> None:
    board.write(step(1, None, grad_norm=None, prequential={"a": None, "b": 1.5}, skipped=3))
    board.write({"kind": "of tomorrow", "time": 1.0})
    board.flush()
    board.close()
    assert trackers.tensorboard(tmp_path / "r") == {"prequential/b": {1: 1.5}, "training/skipped": {1: 3.0}}


def test_what_the_disk_refuses_is_known_at_once() -> None:
    sink = TensorBoard(TensorBoard.Settings(directory="/dev/null/boards"), "board")
    with pytest.raises(OSError):
        sink.open(run_of(Path("/nowhere")))
    sink.close()


# --- Weights & Biases -------------------------------------------------------------------------------------------------


def test_without_a_key_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    sink = WeightsAndBiases(WeightsAndBiases.Settings(), "bees")
    for what in (sink.check, lambda: sink.open(run_of(tmp_path))):
        with pytest.raises(ConfigError, match="WANDB_API_KEY"):
            what()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "offline" in sink.check()


# --- what a mistake costs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "table", "expected"),
    [
        ("board", {"type": "tensorbord"}, r'\[sinks.board\] type: found "tensorbord", allowed: tensorboard, wandb'),
        ("board", {"type": "tensorboard", "folder": "x"}, r"\[sinks.board\] unknown key folder"),
        ("bees", {"type": "wandb", "mode": "on"}, r"\[sinks.bees\] mode: found \"on\", allowed: 'online' or 'offline'"),
        ("a b", {"type": "tensorboard"}, "sink name 'a b'"),
        ("board", {"directory": "x"}, r"\[sinks.board\] missing: type"),
    ],
)
def test_a_mistake_in_a_table_is_named(tmp_path: Path, name: str, table: Json, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parts_of(load(tiny.config(tmp_path, **{f'sinks."{name}"': table})))


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone" / "wandb").mkdir(parents=True)
    (tmp_path / "gone" / "wandb" / "__init__.py").write_text("raise ImportError('No module named wandb')\n")
    tiny.write_text(tmp_path / "data", 2)
    config = tiny.config(tmp_path, **{"sinks.bees": {"type": "wandb"}})
    told = tiny.run("check", config, expect=2, PYTHONPATH=str(tmp_path / "gone"))
    assert "pip install 'anytimed[wandb]'" in " ".join(told.split())


def test_secrets_of_the_configuration_are_told_to_no_tracker(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 6)
    secret = f"planted-{time.time_ns()}"
    config = tiny.config(
        tmp_path,
        **{
            "exports": {"storage_options": {"auto_mkdir": True, "note": secret}, "every_steps": None},
            "sinks.bees": {"type": "wandb", "mode": "offline", "directory": str(tmp_path / "bees")},
        },
    )
    tiny.run("run", config, "--steps", "2", WANDB_API_KEY=secret)
    files = [path for path in (tmp_path / "bees").rglob("*") if path.is_file()]
    assert any(b"run_id" in path.read_bytes() for path in files)
    assert not [path for path in files if secret.encode() in path.read_bytes()]


# --- the one in adapters/README.md ------------------------------------------------------------------------------------


class Hook(BaseHTTPRequestHandler):
    """Answers 500 to the first request of all, and keeps the bodies of the others."""

    asked = 0
    bodies: ClassVar[list[Json]] = []

    def do_POST(self) -> None:
        Hook.asked += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if Hook.asked > 1:
            Hook.bodies.append(body)
        self.send_response(500 if Hook.asked == 1 else 204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_the_sink_of_the_readme_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "adapters" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(import json\nimport urllib.*?)```", text, re.DOTALL)
    (tmp_path / "hooks.py").write_text(code)
    tiny.write_text(tmp_path / "data", 40)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        config = tiny.config(tmp_path, **{"sinks.hook": {"type": "hooks:Webhook", "url": url}})
        allowed = ("--allow-adapter", "hooks:Webhook")
        told = tiny.run("check", config, *allowed, PYTHONPATH=str(tmp_path))
        assert f"posts events to {url}" in told
        with running(config, *allowed, PYTHONPATH=str(tmp_path)) as process:
            until(process, lambda: status(tmp_path)["state"] == "waiting for data")
            until(process, lambda: Hook.bodies and not status(tmp_path)["degraded"])
            run_id = status(tmp_path)["run_id"]
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        server.shutdown()
    events = [r for r in trackers.told(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "event"]
    assert [{"run": run_id, **event} for event in events] == Hook.bodies  # the first one was tried again
    assert Hook.asked == len(events) + 1
