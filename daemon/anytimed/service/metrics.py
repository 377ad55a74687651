"""What is left in files for people and tools: metrics.jsonl, one JSON object a line, and status.json, replaced whole.

Neither is read back by the training, and neither is fsynced: a full disk or a power cut costs figures, never the run.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

from anytimed.contracts import Json


class Metrics:
    """`failed` says what could not be written, None when all is well again."""

    def __init__(self, path: Path, status: Path) -> None:
        self._path, self._status = path, status
        self.failed: str | None = None

    def show(self, status: Json) -> None:
        """Replace status.json."""
        beside = self._status.with_name(".tmp-status.json")
        try:
            beside.unlink(missing_ok=True)
            with _private(beside, os.O_EXCL) as file:
                file.write(json.dumps(status))
            beside.replace(self._status)
        except OSError as error:
            self.failed = f"{self._status}: {error}"

    def write(self, kind: str, **values: Any) -> None:
        told = {key: _json(value) for key, value in values.items()}
        line = json.dumps({"kind": kind, "time": round(time.time(), 3), **told}, separators=(",", ":"))
        try:
            with _private(self._path, os.O_APPEND) as file:
                file.write(line + "\n")
            self.failed = None
        except OSError as error:
            self.failed = f"{self._path}: {error}"


def _private(path: Path, flags: int) -> TextIO:
    """A file to write, for the owner's eyes, and never through a symlink."""
    return os.fdopen(os.open(path, flags | os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "w")


def _json(value: Any) -> Any:
    """JSON has no word for NaN and Inf: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
