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
from anytimed.service.history import History


class Metrics:
    """`failed` says what could not be written, None when all is well again."""

    def __init__(self, path: Path, status: Path) -> None:
        self._path, self._status = path, status
        self.history = History(path)
        self._failures: dict[Path, str] = {}
        try:
            self.history.load()
        except OSError as error:
            self._failures[path] = f"{path}: {error}"

    @property
    def failed(self) -> str | None:
        return "; ".join(filter(None, (*self._failures.values(), self.history.problem))) or None

    def show(self, status: Json) -> None:
        """Replace status.json."""
        beside = self._status.with_name(".tmp-status.json")
        try:
            beside.unlink(missing_ok=True)
            with _private(beside, os.O_EXCL) as file:
                file.write(json.dumps(status))
            beside.replace(self._status)
            self._failures.pop(self._status, None)
        except OSError as error:
            self._failures[self._status] = f"{self._status}: {error}"

    def write(self, kind: str, **values: Any) -> None:
        told = {key: _json(value) for key, value in values.items()}
        try:
            self.history.append({"kind": kind, "time": round(time.time(), 3), **told})
            self._failures.pop(self._path, None)
        except OSError as error:
            self._failures[self._path] = f"{self._path}: {error}"


def _private(path: Path, flags: int) -> TextIO:
    """A file to write, for the owner's eyes, and never through a symlink."""
    return os.fdopen(os.open(path, flags | os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "w")


def _json(value: Any) -> Any:
    """JSON has no word for NaN and Inf: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
