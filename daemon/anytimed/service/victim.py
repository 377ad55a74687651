"""A run that is watched and killed: real `anytimed run` processes in a folder of their own, one after the other.

In order: `Life` is one process: what it says in status.json, what it was doing (the half-written folders show it),
its end by itself, by SIGTERM or by SIGKILL; `to_the_end` waits for one that nobody kills. `moments` draws when to kill,
over the whole of a life: while it starts, between steps, while a commit or an export is written. `await_moment` waits
for one of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anytimed.contracts import AnytimedError, ConfigError, Json

POLL_S = 0.0005
"""A tiny commit is written in a few milliseconds."""

WAITING = "waiting for data"
DRY_S, UNAVAILABLE_S = 1.0, 60.0
"""How long a run waits for data before the stream counts as dry: all of it is read; a source does not answer."""
OF_THE_MANAGER = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM")
"""What a service manager told us is not for our children."""

Kind = Literal["start-up", "steps", "commit", "export"]


class Life:
    """One process of the run in `folder`, which holds config.toml; its output goes to `folder`/log.txt."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder = folder
        self._seen: tuple[int, int] = (0, 0)
        self._status: Json | None = None
        environment = {key: value for key, value in os.environ.items() if key not in OF_THE_MANAGER}
        with (folder / "log.txt").open("ab") as log:
            self.log_from = log.tell()
            self.began = time.monotonic()
            # -P: what lies in the working directory must not be imported, as with the installed command.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "anytimed.cli", "run", str(folder / "config.toml"), "--steps", str(steps)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # a Ctrl-C is ours to handle
            )
        self.trained_from: float | None = None

    def status(self) -> Json | None:
        """The last status of this process; None before it trains."""
        with contextlib.suppress(FileNotFoundError):
            path = self.folder / "run" / "status.json"
            stat = path.stat()
            if (stat.st_ino, stat.st_mtime_ns) != self._seen:
                told = json.loads(path.read_text(encoding="utf-8"))
                self._seen = stat.st_ino, stat.st_mtime_ns
                if told["pid"] == self._process.pid:
                    self._status = told
                    self.trained_from = self.trained_from or time.monotonic()
        return self._status

    def doing(self) -> str:
        """What it is doing, or was when it was killed, as what it left half done tells."""
        if self.status() is None:
            return "while it started"
        if _half_written(self.folder / "run" / "commits"):
            return "during a commit"
        if any((self.folder / "run" / "spool").iterdir()):
            return "during an export"
        return WAITING if self._status and self._status["state"] == WAITING else "in or between steps"

    def ended(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def kill(self) -> bool:
        """SIGKILL. Whether that was what ended it."""
        self._process.kill()
        return self._process.wait() == -signal.SIGKILL

    def stop(self) -> None:
        """SIGTERM: it commits and ends."""
        self._process.terminate()
        self._process.wait()

    def failed(self, code: int) -> AnytimedError:
        """The error for an end that nobody asked for, with the last thing it said."""
        with (self.folder / "log.txt").open("rb") as log:
            log.seek(self.log_from)
            lines = log.read().decode(errors="replace").splitlines()
        said = next((i for i, line in enumerate(lines) if line.startswith("anytimed: ")), len(lines) - 3)
        text = "\n".join(lines[max(said, 0) :]).removeprefix("anytimed: ")
        kind = ConfigError if code == ConfigError.exit_code else AnytimedError
        return kind(f"`anytimed run` ended by itself with exit {code}: {text}")


def committed_step(folder: Path) -> int:
    """The step that the next life resumes at, as far as names tell."""
    with contextlib.suppress(FileNotFoundError):
        names = [entry.name for entry in os.scandir(folder / "run" / "commits") if not entry.name.startswith(".")]
        return int(max(names).rpartition("-")[2]) if names else 0
    return 0


def to_the_end(life: Life, tell: Callable[[Json], None]) -> str | None:
    """Wait until it ends by itself; None then. Where its stream runs dry before, it is stopped, and why it was dry is
    the answer. tell: gets every status. Raises what `Life.failed` makes of an end with an error."""
    dry_since, dry = None, None
    try:
        while (code := life.ended()) is None:
            if (status := life.status()) is not None:
                tell(status)
                dry_since = (dry_since or time.monotonic()) if status["state"] == WAITING else None
                silent = any(source["unavailable"] for source in status["sources"].values())
                if dry_since and time.monotonic() - dry_since > (UNAVAILABLE_S if silent else DRY_S):
                    dry = str(status["reason"])
                    life.stop()
            time.sleep(0.02)
    finally:
        life.kill()
    if code:
        raise life.failed(code)
    return dry


# --- when to kill -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Moment:
    """`at` in [0, 1): how far into the start-up, into the steps that this life may take, or into a commit or export."""

    kind: Kind
    at: float


def moments(kills: int, seed: int) -> list[Moment]:
    """A fifth of the kills each while it starts, commits and exports, the others at any time, in random order."""
    draw = random.Random(seed)
    share = kills // 5
    kinds: list[Kind] = [*["start-up"] * share, *["commit"] * share, *["export"] * share]  # type: ignore[list-item]
    kinds += ["steps"] * (kills - len(kinds))
    draw.shuffle(kinds)
    return [Moment(kind, draw.random()) for kind in kinds]


def await_moment(life: Life, moment: Moment, *, startup_s: float, steps_s: float, limit: int) -> int | None:
    """Wait until the moment has come; None then, or the exit code where the process ended before it.

    startup_s: how long a start takes. steps_s: how long this life may take steps. limit: the step at which it is
    killed in any case, so that there is something left for the kills after it."""
    due = life.began + moment.at * startup_s if moment.kind == "start-up" else None
    while (code := life.ended()) is None:
        status, now = life.status(), time.monotonic()
        if due is None and life.trained_from is not None:
            due = _due(life, moment, now, steps_s)
        if due is not None and now >= due:
            return None
        if status is not None and (status["step"] >= limit or status["state"] == WAITING):
            return None
        time.sleep(POLL_S)
    return code


def _due(life: Life, moment: Moment, now: float, steps_s: float) -> float | None:
    """When to kill a life that trains, as soon as that is known."""
    assert life.trained_from is not None
    if moment.kind == "steps":
        return life.trained_from + moment.at * steps_s
    if _half_written(life.folder / "run" / ("commits" if moment.kind == "commit" else "spool")):
        # Half of them at once; the others after 1 to 500 ms, spread over the orders of magnitude that writing takes.
        return now + (0.0 if moment.at < 0.5 else 0.001 * 500 ** (2 * moment.at - 1))
    return None


def _half_written(folder: Path) -> bool:
    return any(entry.name.startswith(".tmp-") for entry in os.scandir(folder))
