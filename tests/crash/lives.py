"""A daemon that lives until it is killed, or until it has nothing left to read."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from pathlib import Path

from tests.crash.test_bit_for_bit import status_of


def until_it_trains(folder: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while status_of(folder).get("pid") != process.pid:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "it did not begin to train"
        time.sleep(0.01)


def until_it_commits(folder: Path, process: subprocess.Popen[str]) -> None:
    """There is a commit to resume from: else killing it proves nothing but that a run can begin again."""
    until = time.monotonic() + 60
    while not any(not path.name.startswith(".") for path in (folder / "run" / "commits").glob("*")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "it did not commit"
        time.sleep(0.01)


def killed(process: subprocess.Popen[str]) -> None:
    """SIGKILL, of one that is alive."""
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output


def stopped_when_dry(process: subprocess.Popen[str]) -> None:
    """SIGTERM once it waits for data; it has to end well."""
    assert process.stdout is not None
    patience = threading.Timer(120, process.kill)
    patience.start()
    said = []
    for line in process.stdout:
        said.append(line)
        if "waiting for data" in line:
            break
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    patience.cancel()
    assert process.returncode == 0, "".join(said) + output
