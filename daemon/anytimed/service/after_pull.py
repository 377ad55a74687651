"""The command that a follower runs after each new checkpoint, say to have a server load it.

It is split as a shell would and run without one; {path}, {id} and {step} in its words are replaced, and ANYTIMED_…
variables say the same. It runs in a process group of its own: when its time is up, or the follower is told to stop, the
whole group gets SIGTERM, and SIGKILL a few seconds later. Standard input is empty; what it writes goes where the
follower's goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from anytimed.contracts import ConfigError
from anytimed.storage.manifest import Manifest

TERMINATE_S = 10.0
"""From SIGTERM to SIGKILL."""
_TICK_S = 0.5
_PLACE = re.compile(r"\{(path|id|step)\}")
_OF_THE_SERVICE = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
"""Variables that are for the follower alone: a command must not speak to the service manager in its name."""


class Command:
    """A command line. `digest` (SHA-256, hex) says which, without telling what may be secret in it."""

    def __init__(self, line: str, timeout_s: float) -> None:
        """Raises ConfigError where it is none, or its program is not there."""
        try:
            self._words = shlex.split(line)
        except ValueError as error:
            raise ConfigError(f"--exec: {error}; found {line!r}") from None
        if not self._words:
            raise ConfigError('--exec: empty; expected a command, as "systemctl reload my-server"')
        program = self._words[0]
        if not _PLACE.search(program) and shutil.which(program) is None:
            raise ConfigError(f"--exec: {program!r} is not found, or cannot be executed; it is run without a shell")
        self._timeout_s = timeout_s
        self.digest = hashlib.sha256(line.encode()).hexdigest()

    def run(
        self, manifest: Manifest, path: Path, previous: str, stop: threading.Event, tick: Callable[[], None]
    ) -> str | None:
        """Run it for a checkpoint in `path`; None once it has succeeded, else what went wrong. previous: the id that it
        last succeeded for, or "". `tick` is called about twice a second; `stop` ends the command."""
        told = {"path": str(path), "id": manifest.id, "step": str(manifest.step)}
        words = [_PLACE.sub(lambda found: told[found[1]], word) for word in self._words]
        environment = {name: value for name, value in os.environ.items() if name not in _OF_THE_SERVICE}
        environment |= {
            "ANYTIMED_CHECKPOINT": manifest.id,
            "ANYTIMED_PATH": str(path),
            "ANYTIMED_STEP": str(manifest.step),
            "ANYTIMED_TOKENS": str(manifest.tokens),
            "ANYTIMED_RUN_ID": manifest.run_id,
            "ANYTIMED_PREVIOUS": previous,
        }
        try:
            process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, process_group=0)
        except OSError as error:
            return f"cannot be run: {error.strerror or error} ({words[0]})"
        except ValueError as error:  # a manifest with a NUL in its run id
            return f"cannot be run: {error}"
        ends = time.monotonic() + self._timeout_s
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(min(_TICK_S, max(ends - time.monotonic(), 0.0)))
                return None if code == 0 else _ended(code)
            tick()
            if stop.is_set():
                return f"stopped with the follower, {_end(process)}"
            if time.monotonic() >= ends:
                return f"not done after {self._timeout_s:g} s, {_end(process)}"


def _end(process: subprocess.Popen[bytes]) -> str:
    """SIGTERM to the group, SIGKILL if need be; how it ended."""
    _to_group(process, signal.SIGTERM)
    try:
        process.wait(TERMINATE_S)
    except subprocess.TimeoutExpired:
        _to_group(process, signal.SIGKILL)
        process.wait()
    return _ended(process.returncode)


def _to_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"
