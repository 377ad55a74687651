"""The exporter's process from the test's side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from anytimed.contracts import Json

ROOT = Path(__file__).parents[2]


class Exporter:
    """Starts `tests.faults.exporter` on a run directory and a prefix. One order at a time."""

    def __init__(self, folder: Path, url: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.exporter", str(folder), url],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.told: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def prepare(self, **order: Any) -> int:
        """Fork a child that will carry the order out; its pid. It waits for `go`."""
        self._say(json.dumps(order))
        pid = self._hear()["pid"]
        assert isinstance(pid, int)
        return pid

    def begin(self) -> None:
        """Let the prepared child go; `end` waits for it."""
        self._say("go")

    def end(self) -> int:
        """Wait for the child: its exit code, or minus the signal that ended it. `told` is what it said."""
        self.told = []
        while "exit" not in (heard := self._hear()):
            self.told.append(str(heard.get("told")))
        return int(heard["exit"])

    def wait_held(self) -> None:
        """For an order with `hold`: wait until its export is published; the child then stays, lease in hand, until
        `begin` is called again."""
        while not (heard := self._hear()).get("holds"):
            assert "exit" not in heard, (heard, self.told)
            self.told.append(str(heard.get("told")))

    def go(self) -> int:
        self.begin()
        return self.end()

    def run(self, **order: Any) -> int:
        """Prepare, go, wait."""
        self.prepare(**order)
        return self.go()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _hear(self) -> Json:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the exporter is gone"
        heard: Json = json.loads(line)
        return heard


KILLED = -signal.SIGKILL
