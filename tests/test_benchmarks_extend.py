"""The benchmark of the extended stream works from end to end: its quick form, what has to hold at any size, and bars
that can be missed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def _quick(tmp_path: Path, *more: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    goal = tmp_path / "extend.json"
    command = [sys.executable, "benchmarks/extend.py", "--quick", "--json", str(goal), "--scratch", str(tmp_path / "s")]
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False)
    assert goal.exists(), done.stdout + done.stderr
    return done, json.loads(goal.read_text())


@pytest.mark.timeout(900)  # 45 s on a free core
def test_the_quick_form_trains_every_run_and_keeps_its_curves(tmp_path: Path) -> None:
    done, found = _quick(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "plain averaging behind a fitting window" in done.stdout
    runs, trunk = found["runs"], found["trunk_steps"]
    assert len([name for name in runs if "/restarted/" not in name]) == 29
    for name, run in runs.items():
        steps = [point["step"] for point in run["probed"]]
        assert steps == sorted(steps), name
        assert (steps[0], steps[-1]) == (run["start"], run["end"]), name
        assert all(point["losses"].keys() == {"python", "headers"} for point in run["probed"]), name
        assert run["skipped"] == 0, name
    assert not [name for name, figure in found["figures"].items() if figure["found"] is None]
    ways = ("plain", "power-1", "power-4", "window-T", "window-4T", "unsteered")
    assert not [name for name, run in runs.items() if name.partition("@")[0].endswith(ways) and run["forgets"]]
    assert runs["switch/long/steered@1"]["forgets"], "x was a hundred times too old, and nobody noticed"
    # The change comes with the first block after the trunk's commit, for all of its branches at the same step.
    changed = {run["changed"] for name, run in runs.items() if name.startswith("switch/") and run["start"] == trunk}
    assert len(changed) == 1
    assert all(trunk < step < trunk + 60 for step in changed)
    # What the history is made of: the weight sum a hundredfold, or no more than the window.
    steps = runs["switch/long/plain@1"]["memory_steps"]
    assert steps > 50 * trunk
    assert runs["switch/long/power-1@1"]["memory_steps"] == pytest.approx(steps / 2, rel=0.02)
    assert runs["switch/short/power-4@1"]["memory_steps"] < runs["switch/short/power-1@1"]["memory_steps"] < trunk
    assert runs["switch/window-4T@1"]["memory_steps"] == trunk == 4 * runs["switch/window-T@1"]["memory_steps"]
    assert trunk < runs["switch/short/plain@1"]["memory_steps"] < 2 * trunk
    # A rival begins at what the trunk published, and has the learning rate that is best for what follows.
    x = runs["sf_normuon/trunk@1"]["probed"][-1]["losses"]
    for change, kinds in found["restarted"].items():
        for kind, of in kinds.items():
            assert runs[of["run"]]["probed"][0]["losses"] == x, (change, kind)
            assert of["loss"] == min(of["tried"].values())
            assert len(of["tried"]) >= 3
    assert found["restarted"].keys() == {"switch", "added"}
    rows = found["after"]["switch"]["long"]
    assert rows["plain"]["40"] == runs["switch/long/plain@1"]["probed"][-1]["losses"]
    assert rows["window-T"] == found["after"]["switch"]["short"]["window-T"]
    assert {bar["ok"] for bar in found["bars"]} <= {True, False}
    drawn = ElementTree.fromstring((tmp_path / "extend.svg").read_text())
    assert len(drawn.findall(".//{*}path[@class]")) > 7

    # All of it is kept; a missed bar is an exit code.
    curves = {path: path.stat().st_mtime_ns for path in tmp_path.glob("s/quick/curves/*")}
    time.sleep(0.02)
    again, same = _quick(tmp_path, "--assert")
    assert same == found
    assert {path: path.stat().st_mtime_ns for path in curves} == curves
    assert again.returncode == (0 if all(bar["ok"] for bar in found["bars"]) else 1), again.stdout + again.stderr


def test_what_is_measured_on_is_never_read(tmp_path: Path) -> None:
    corpora = importlib.import_module("extension.corpora")
    for name in corpora.SOURCES:
        corpus = corpora.gather(name, tmp_path, stream_bytes=100_000, probe_bytes=4096)
        assert corpora.gather(name, tmp_path, stream_bytes=100_000, probe_bytes=4096) == corpus
        read = [json.loads(line)["text"] for line in corpus.stream.read_text().splitlines()]
        assert sum(len(text.encode()) for text in read) == corpus.size >= 100_000
        assert not [text for text in corpus.probe if any(other.startswith(text) for other in read)]
    with pytest.raises(SystemExit, match=r"headers: found .* expected 1000000000000"):
        corpora.gather("headers", tmp_path, stream_bytes=10**12, probe_bytes=4096)


def test_a_bar_that_is_missed_is_said_to_be() -> None:
    report = importlib.import_module("extension.report")

    def told(*measured: float | None) -> list[bool]:
        return [bar["ok"] for bar in report.bars(*measured)]

    assert told(0, 0.05, 1.01) == [True, True, True]
    assert told(1, 0.051, 1.0) == [False, False, False]
    assert told(0, -0.2, 1.4) == [True, True, True]
    assert told(None, None, None) == [False, False, False]
