"""The benchmark of the commits works from end to end: its quick form, and what its figures must satisfy anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_quick_form_measures_everything(tmp_path: Path) -> None:
    goal = tmp_path / "commit.json"
    command = [sys.executable, "benchmarks/commit.py", "--quick", "--json", str(goal)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "written / state" in done.stdout
    found = json.loads(goal.read_text())["small"]
    assert found["state_bytes"] > 14 * 90_000
    written = found["bytes_written_over_state"]
    # Counted by the kernel and by the files, three times each: no byte of the state is written twice.
    assert 1.0 < written["files"] == written["handed to write"] < 1.05
    assert all(found[key] > 0 for key in ("median_step_ms", "median_stall_ms", "median_copy_ms"))
    assert found["resume"]["median_to_first_step_s"] > found["resume"]["median_bare_load_s"] > 0
