"""Records that could not be read or trained on: noted for a person, beside the run, never read back by the training.

A note that cannot be written costs the note, not the run: `failed` says so until one is written again. A poisoned
stream does not fill the disk either: at MAX_BYTES a source's file grows no further.
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

from anytimed.contracts import Json, Rejected
from anytimed.storage.durable import append_line

log = logging.getLogger("anytimed")

MAX_BYTES = 16 << 20


class Quarantine:
    """Appends what could not be read to `<source>.jsonl`, once for every place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, set[str]] = {}
        self.failed: str | None = None

    def __call__(self, source: str, place: Json, rejected: Rejected) -> None:
        path = self._folder / f"{source}.jsonl"
        told: dict[str, Any] = {"place": place, "reason": rejected.reason, "digest": rejected.digest}
        try:
            if self._noted(source, path, told):
                return
            log.warning("source %s: a record cannot be read: %s; noted in %s", source, rejected.reason, path)
            self._folder.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size >= MAX_BYTES:
                self.failed = f"{path}: {MAX_BYTES} bytes of bad records; no more are noted: move the file away"
                return
            append_line(path, json.dumps(told).encode() + b"\n")
            self._seen[source].add(_key(told))
            self.failed = None
        except OSError as error:
            self.failed = f"{path}: a bad record could not be noted: {error.strerror or error}"

    def _noted(self, source: str, path: Path, told: Json) -> bool:
        if source not in self._seen:
            lines = path.read_bytes().splitlines() if path.exists() else []
            seen: set[str] = set()
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a power cut has torn
                    seen.add(_key(json.loads(line)))
            self._seen[source] = seen
        return _key(told) in self._seen[source]


def noted(folder: Path, source: str) -> tuple[int, str | None]:
    """How many records of a source are noted in the folder, and why the last one could not be read; None for none.
    Raises OSError."""
    try:
        lines = (folder / f"{source}.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return 0, None
    reasons = []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a power cut has torn
            reasons.append(str(json.loads(line)["reason"]))
    return len(reasons), reasons[-1] if reasons else None


def _key(told: Json) -> str:
    return json.dumps(told["place"], sort_keys=True)
