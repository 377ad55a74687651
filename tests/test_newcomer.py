"""A newcomer's first hour, as a script of the commands that the README names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_first_hour(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = Path(__file__).with_name("newcomer.sh")
    done = subprocess.run(
        ["bash", str(script), str(tmp_path)], capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for said in (
        "Wrote my.toml", "ok  exports", "30 records", "waiting for data", "Published 00001-000001-", "bits/byte",
        "Published 00001-000002-", "waiting for data: ", "Stopped at step ", "ok  commit",
    ):  # fmt: skip
        assert said in done.stdout, (said, done.stdout)
