"""Fault 17: SIGTERM while a commit is written, and at every other time: exit 0, with a commit of the last step."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.faultlog import FULL, Injected
from tests.faults import moments

FSYNC_MS = 60
POINTS = {
    "a commit's tensors": moments.commits_up_to("rank-00000-of-00001.safetensors"),
    "a commit's state": moments.commits_up_to("state.json"),
    "a commit's manifest": moments.commits_up_to("MANIFEST.json"),
    "an export built": moments.builds,
    "an export uploaded": moments.uploads,
    "steps": moments.steps,
    "start-up": moments.starts,
    "waiting for data": moments.waits,
}


@pytest.mark.fault(17)
@pytest.mark.timeout(3600)
def test_sigterm_at_any_time_leaves_a_commit_of_the_last_step(tmp_path: Path, injected: Injected) -> None:
    files = 150 if FULL else 24
    expected = moments.undisturbed(tmp_path / "undisturbed", files)
    folder = tmp_path / "terminated"
    tiny.write_text(folder / "data", files)
    visited = [(name, times) for name in POINTS for times in (1, 2)]
    if not FULL:
        visited = [("a commit's state", 1), ("start-up", 1)]
    for name, times in visited:
        committed, before = _committed(folder), moments.owner(folder)
        process = moments.slowly(tiny.config(folder), FSYNC_MS)
        moments.reached(process, folder, moments.owned_by_another_than(before))
        moments.reached(process, folder, POINTS[name])
        for _ in range(times):
            os.kill(moments.owner(folder), signal.SIGTERM)
            time.sleep(0.01)
        told, _ = process.communicate(timeout=moments.DEADLINE_S)
        assert process.returncode == 0, told
        assert "Traceback" not in told
        assert times == 2 or "SIGTERM again" not in told, told
        last = moments.status(folder)
        assert last["state"] == "stopped"
        assert _committed(folder) == last["step"] >= committed, f"{name}: steps after the last commit were lost"
        if last["step"]:
            assert re.search(rf"Committed step {last['step']} in ", told)
        assert not [p for p in (folder / "run" / "commits").iterdir() if p.name.startswith(".tmp-")]
        injected(17, f"{name}, {times} x SIGTERM")
    before = moments.owner(folder)
    process = tiny.start("run", tiny.config(folder))
    moments.reached(process, folder, moments.owned_by_another_than(before))
    moments.reached(process, folder, moments.waits)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=moments.DEADLINE_S)
    assert process.returncode == 0, told
    tiny.assert_same_state(expected, tiny.newest_commit(folder))


def _committed(folder: Path) -> int:
    """The step of the newest commit; 0 for none."""
    if not (folder / "run" / "commits").is_dir() or not any((folder / "run" / "commits").iterdir()):
        return 0
    return int(tiny.newest_commit(folder).name.rpartition("-")[2])
