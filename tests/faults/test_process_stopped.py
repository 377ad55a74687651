"""Fault 16: SIGSTOP, for less and for longer than the watchdog allows. The test plays the service manager."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.faultlog import FULL, Injected
from tests.faults import moments

WATCHDOG_S = 3.0
POINTS = {
    "mid-step": moments.steps,
    "during a commit": moments.commits,
    "while an export is built": moments.builds,
    "while an export is uploaded": moments.uploads,
    "while an old commit is deleted": moments.retires,
    "idle": moments.waits,
}


class Manager:
    """What systemd does for `Type=notify`, `WatchdogSec=` and `Restart=always`: after READY=1 the watchdog has to be
    fed; where it is not, SIGABRT, then SIGKILL, then a new start. The end with exit 0 is the end."""

    def __init__(self, config: Path) -> None:
        self._config = config
        self._address = config.parent / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self._address))
        self._socket.settimeout(0.05)
        self.barked: list[int] = []
        self.process = self._start()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _start(self) -> subprocess.Popen[str]:
        watchdog = str(int(WATCHDOG_S * 1e6))
        return tiny.start("run", self._config, NOTIFY_SOCKET=str(self._address), WATCHDOG_USEC=watchdog)

    def _serve(self) -> None:
        fed: float | None = None
        while True:
            with contextlib.suppress(TimeoutError):
                told = self._socket.recv(4096).decode().splitlines()
                if "STOPPING=1" in told:
                    break
                if "READY=1" in told or (fed is not None and "WATCHDOG=1" in told):
                    fed = time.monotonic()
            if fed is not None and time.monotonic() - fed > WATCHDOG_S:
                process = self.process
                process.send_signal(signal.SIGABRT)
                time.sleep(0.2)
                process.kill()
                process.communicate()
                self.barked.append(process.pid)
                fed, self.process = None, self._start()

    def stop(self) -> None:
        """SIGTERM, and the exit code that has to be 0."""
        self.process.send_signal(signal.SIGTERM)
        self._thread.join(timeout=moments.DEADLINE_S)
        told, _ = self.process.communicate(timeout=moments.DEADLINE_S)
        assert self.process.returncode == 0, told

    def close(self) -> None:
        if self._thread.is_alive():
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
                last.sendto(b"STOPPING=1", str(self._address))
            self._thread.join()
        self.process.kill()
        self.process.communicate()
        self._socket.close()


@pytest.mark.fault(16)
@pytest.mark.timeout(3600)
def test_a_daemon_that_is_stopped_is_killed_by_the_watchdog_or_goes_on(tmp_path: Path, injected: Injected) -> None:
    files = 120 if FULL else 40
    expected = moments.undisturbed(tmp_path / "undisturbed", files)
    folder = tmp_path / "stopped"
    tiny.write_text(folder / "data", files)
    visited = [(name, long) for name in POINTS for long in (False, True)]
    if not FULL:
        visited = [("during a commit", True), ("idle", False)]
    manager = Manager(tiny.config(folder))
    try:
        for name, long in visited:
            process = manager.process
            moments.stopped_at(process, folder, POINTS[name])
            step = moments.status(folder)["step"]
            if long:
                restarted = time.monotonic() + moments.DEADLINE_S
                while manager.process is process:  # a stopped daemon feeds no watchdog
                    assert time.monotonic() < restarted, f"{name}: the watchdog did not bark"
                    time.sleep(0.05)
                assert process.pid in manager.barked
                moments.reached(manager.process, folder, moments.owned_by_another_than(process.pid))
                moments.reached(manager.process, folder, moments.trains)
            else:
                time.sleep(WATCHDOG_S / 4)
                process.send_signal(signal.SIGCONT)
                since = time.time()
                moments.reached(process, folder, lambda f, s=since, n=step: _went_on(f, s, n))  # type: ignore[misc]
                assert process.pid not in manager.barked, f"{name}: the watchdog killed it for a short stop"
            injected(16, f"{name}, {'longer' if long else 'shorter'} than the watchdog")
        moments.reached(manager.process, folder, moments.waits)
        manager.stop()
    finally:
        manager.close()
    tiny.assert_same_state(expected, tiny.newest_commit(folder))


def _went_on(folder: Path, since: float, step: int) -> bool:
    """It took a step, or waits and says so again."""
    told = moments.status(folder)
    return bool(told["step"] > step or (moments.waits(folder) and told["time"] > since))
