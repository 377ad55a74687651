"""A contender's process and its workers, seen from outside.

A contender leads a session of its own, and its workers stay in it: they are frozen and let go together, their memory is
the sum of their proportional set sizes (a page that k processes map counts 1/k in each), their CPU time the sum of
theirs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from throughput.peers import Setting

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")
_EVERY_S = 0.02
_ENDING_S = 10.0
BENCHMARKS = Path(__file__).resolve().parents[1]


class Runner:
    """A contender's process, frozen but for its turns. A context manager; ends everything of its session."""

    def __init__(self, key: str, kind: str, setting: Setting, corpus: Path, scratch: Path) -> None:
        self._log = scratch.with_suffix(".log")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        told = [key, kind, str(setting.workers), str(int(setting.threads)), str(corpus), str(scratch)]
        path = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "throughput.turns", *told],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("wb"),
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": f"{scratch}-hf"},
            start_new_session=True,
            text=True,
        )

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let it end by itself, so that it removes its shared memory; then end what is left of its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGCONT)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDING_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def turn(self, batches: int) -> dict[str, Any]:
        """Let it take that many batches: {"seconds", "tokens", "cpu_s" of the whole session}."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        stdin.write(f"{batches}\n")
        stdin.flush()
        before = 0.0
        while (answer := stdout.readline()) == "began\n":  # again, where a pass ended inside of the turn
            before = self._cpu_s()
        after = self._cpu_s()
        if not answer:
            raise RuntimeError(f"it ended with {self._process.wait()}:\n{self._log.read_text()[-2000:]}")
        os.killpg(self._process.pid, signal.SIGSTOP)
        return {**json.loads(answer), "cpu_s": after - before}

    def peak_bytes(self, turns: int, batches: int) -> int:
        """The most memory that the session takes over some turns, its start included."""
        most, done = [0], threading.Event()

        def look() -> None:
            while not done.wait(_EVERY_S):
                most[0] = max(most[0], self._pss())

        watch = threading.Thread(target=look)
        watch.start()
        try:
            for _ in range(turns):
                self.turn(batches)
        finally:
            done.set()
            watch.join()
        return most[0]

    def _session(self) -> Iterator[tuple[Path, list[str]]]:
        """Folder and fields of /proc/N/stat, from the state on, of every process of the session."""
        for folder in _PROC.iterdir():
            if folder.name.isdigit():
                try:
                    fields = (folder / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[3]) == self._process.pid:
                    yield folder, fields

    def _cpu_s(self) -> float:
        return sum(int(f[11]) + int(f[12]) for _, f in self._session()) / _TICKS

    def _pss(self) -> int:
        found = 0
        for folder, _ in self._session():
            try:
                lines = (folder / "smaps_rollup").read_text().splitlines()
            except OSError:  # it has just ended
                continue
            found += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return 1024 * found
