"""What a long benchmark keeps: each run's result in a file of its own, under a key that says what it came from.

Who stops such a benchmark loses the runs under way and no other. `alone` trains one in a process of its own; `text_of`
is JSON to be read and compared line by line.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from anytimed.contracts import Json

WIDTH: Final = 300
"""Of a line of a result: a point of a curve has room on one."""


def key_of(*made: Any) -> str:
    """SHA-256 of what a run came from, as JSON, and of the versions that decide its bits."""
    return hashlib.sha256(json.dumps([*made, torch.__version__, platform.python_version()]).encode()).hexdigest()


def curve_file(scratch: Path, name: str) -> Path:
    """Where the run of this name is kept."""
    return scratch / "curves" / f"{plain(name)}.json"


def plain(name: str) -> str:
    """A run's name as one of a file."""
    return re.sub(r"[^A-Za-z0-9._@-]+", "-", name)


def keep(path: Path, found: Json) -> None:
    """Write it as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(found))
    beside.replace(path)


def kept(path: Path, key: str) -> Json | None:
    """What lies there, if it came from the same."""
    try:
        found: Json = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if found["key"] == key else None


def alone(command: Sequence[str], name: str, *, one_thread: bool = True) -> None:
    """Run a command that finds its modules among the benchmarks. Raises SystemExit, naming the run, where it fails."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if one_thread else {}
    environment = {**os.environ, **threads, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}: exit {done.returncode}\n{done.stdout}{done.stderr}")


def machine() -> Json:
    """What a result tells of where it was measured."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"cores": os.cpu_count(), **gpu, "torch": torch.__version__, "python": platform.python_version()}


def text_of(result: Json) -> str:
    """JSON with everything on one line that has room on one."""
    return _lines(result, 0) + "\n"


def _lines(value: Any, indent: int) -> str:
    flat = json.dumps(value)
    if not isinstance(value, dict | list) or not value or len(flat) + indent <= WIDTH:
        return flat
    inner = " " * (indent + 1)
    if isinstance(value, dict):
        parts = [f"{inner}{json.dumps(name)}: {_lines(part, indent + 1)}" for name, part in value.items()]
    else:
        parts = [inner + _lines(part, indent + 1) for part in value]
    first, last = "{}" if isinstance(value, dict) else "[]"
    return first + "\n" + ",\n".join(parts) + "\n" + " " * indent + last
