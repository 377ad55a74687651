"""What an attack costs: a function runs in a process of its own, and its peak memory above what the imports took is
read from the kernel (VmHWM, reset right before)."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anytimed.contracts import AnytimedError

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Cost:
    """`said`: the error's class and text, or what the function returned. `grew_bytes`: the peak above the start."""

    said: str
    grew_bytes: int


def measured(attack: Callable[..., Any], *arguments: str | int, timeout_s: float = 120) -> Cost:
    """Run a module-level function; an error that is none of ours fails the test with its traceback."""
    told = json.dumps([attack.__module__, attack.__name__, arguments])
    done = subprocess.run(
        [sys.executable, "-m", "tests.security.measured", told],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    return Cost(answer["said"], answer["grew"])


def _memory(line: str) -> int:
    told = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(line))
    return int(told.split()[1]) * 1024


def _child(module: str, name: str, arguments: list[Any]) -> None:
    attack = getattr(importlib.import_module(module), name)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is in use now
    before = _memory("VmRSS")
    try:
        said = str(attack(*arguments))
    except AnytimedError as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps({"said": said, "grew": _memory("VmHWM") - before}))


if __name__ == "__main__":
    _child(*json.loads(sys.argv[1]))
