"""Failures that the process itself recorded while it trained, counted by the batch that it trained on.

An exception out of a step and a dump of the fault handler are noted with the number of the batch; a kill from outside
leaves no note, and never counts. The number stands in a small mapped file that a step writes without waiting for the
disk: it survives the process, and a power cut is no failure of ours.

At a start: a batch at which it failed three times is passed over, a decision that is journalled; three failures at
different batches since the newest commit are something else than a bad batch, and end the run until somebody looked.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import mmap
import os
import struct
import time
from collections import Counter
from pathlib import Path
from typing import IO

from anytimed.contracts import AnytimedError, Json, Refused
from anytimed.service.decisions import Decisions
from anytimed.storage.durable import append_line
from anytimed.training.device import inexact
from anytimed.urls import told

log = logging.getLogger("anytimed")

TIMES = 3
_FAULT_CHARACTERS = 2_000


class TrainingFailed(AnytimedError):
    """A step raised: what is in memory cannot be trusted, so nothing is saved. The next start resumes."""


class NotDeterministic(TrainingFailed):
    """The model has an operation that adds up in any order, and `[run] deterministic` does not allow it."""

    exit_code = 2


def not_deterministic(error: BaseException) -> NotDeterministic | None:
    """What ends a run whose step torch refused for that reason; None where it is another error."""
    refused = inexact(error)
    if refused is None:
        return None
    return NotDeterministic(
        f"[run] deterministic = true, with which a resume is bit for bit: found an operation in the model that torch "
        f"has in no such form here ({refused}); use another one there, or set deterministic = false"
    )


class Failures:
    """Those of one run. Only its owner makes one."""

    def __init__(self, run: Path) -> None:
        self._path, self._dump = run / "failures.jsonl", run / "fault.log"
        file = os.open(run / "at_batch", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(file, 8)
            self._at = mmap.mmap(file, 8)
        finally:
            os.close(file)
        self._take_dump()
        self._dump_file: IO[bytes] | None = None

    def watch(self) -> None:
        """Have Python note a fatal signal of this process from now on."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._dump_file = os.fdopen(os.open(self._dump, flags, 0o600), "ab", buffering=0)
        faulthandler.enable(self._dump_file, all_threads=False)

    def close(self) -> None:
        """Watch no longer."""
        if self._dump_file is not None:
            faulthandler.disable()
            self._dump_file.close()
            self._dump_file = None
            if not self._dump.stat().st_size:
                self._dump.unlink()

    def at(self, batch: int) -> None:
        """The training is at this batch."""
        struct.pack_into("<q", self._at, 0, batch)

    def record(self, error: BaseException) -> TrainingFailed:
        """Note that a step has failed; what ends the run. What no batch can help is not noted."""
        if (refused := not_deterministic(error)) is not None:
            return refused
        (batch,) = struct.unpack_from("<q", self._at)
        why = f"{type(error).__name__}: {error}"
        self._note(batch, why)
        return TrainingFailed(
            f"batch {batch}: {told(why)}. Nothing was saved of the steps since the last commit: a start resumes there, "
            f"and passes a batch over at which this happens {TIMES} times"
        )

    def judge(self, decisions: Decisions, step: int, since: int) -> None:
        """At a start from a commit after `since` batches: journal what is to be passed over. Raises Refused where it
        failed too often at different batches."""
        noted = [one for one in self._noted() if one["batch"] > since and not decisions.jumped(one["batch"])]
        counts = Counter(one["batch"] for one in noted)
        for batch, count in sorted(counts.items()):
            if count >= TIMES:
                why = f"failed {count} times: {noted[-1]['why']}"[:500]
                at = {"step": step, "batch": batch, "first_batch": batch, "last_batch": batch}
                decisions.note({"kind": "jump", **at, "why": why})
                log.warning("batch %d %s; it is passed over", batch, told(why))
        rest = {batch: one for one in noted if counts[batch := one["batch"]] < TIMES}
        if len(rest) >= TIMES:
            last = list(rest.values())[-TIMES:]
            listed = "; ".join(f"batch {one['batch']}: {told(one['why'])}" for one in last)
            raise Refused(
                f"{self._path}: the training failed at {len(rest)} different batches since the last commit: {listed}. "
                "That is no bad batch: look at the device, then delete this file and start again"
            )

    # --- within -------------------------------------------------------------------------------------------------------

    def _note(self, batch: int, why: str) -> None:
        try:
            line = json.dumps({"batch": batch, "why": why[:_FAULT_CHARACTERS], "time": round(time.time(), 3)})
            append_line(self._path, line.encode() + b"\n")
        except OSError as error:
            log.error("%s: a failure could not be noted: %s", self._path, error.strerror)

    def _noted(self) -> list[Json]:
        found: list[Json] = []
        for line in self._path.read_bytes().splitlines() if self._path.exists() else ():
            try:
                one = json.loads(line)
                found.append({"batch": int(one["batch"]), "why": str(one["why"])})
            except (ValueError, LookupError, TypeError):
                continue  # torn by what it notes
        return found

    def _take_dump(self) -> None:
        """What the fault handler of an earlier process left counts as a failure, once."""
        if self._dump.exists():
            text = self._dump.read_text(errors="replace")[:_FAULT_CHARACTERS]
            if text.strip():
                (batch,) = struct.unpack_from("<q", self._at)
                self._note(batch, text.splitlines()[0])
                log.warning("the process before this one ended in batch %d: %s", batch, told(text.splitlines()[0]))
            self._dump.unlink()
