"""systemd's side of a service: readiness, status text, the watchdog, longer allowances (sd_notify(3)).

One datagram to the socket that NOTIFY_SOCKET names; nothing at all when the daemon does not run under systemd.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from anytimed.contracts import Json


class Systemd:
    """Talks to the service manager, if there is one."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        environment = dict(os.environ) if environment is None else environment
        self._address = environment.get("NOTIFY_SOCKET", "")
        watchdog_us = int(environment.get("WATCHDOG_USEC", "0") or 0)
        if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            watchdog_us = 0
        self._ping_every_s = watchdog_us / 1e6 / 4
        self._pinged = 0.0
        self._went_round = time.monotonic()

    def notify(self, *assignments: str) -> None:
        """Send assignments such as "READY=1". A service manager that does not listen is no reason to stop training."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.sendto("\n".join(assignments).encode(), address)

    def ping(self) -> None:
        """Progress was made: feed the watchdog, at most four times per interval."""
        now = self._went_round = time.monotonic()
        if self._ping_every_s and now - self._pinged >= self._ping_every_s:
            self._pinged = now
            self.notify("WATCHDOG=1")

    def idle_s(self) -> float:
        """How long ago the last progress was; any thread may ask."""
        return time.monotonic() - self._went_round

    def extend(self, seconds: float) -> None:
        """Ask for a longer allowance than the unit gives, for a load, a compilation or the last commit."""
        self.notify(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}", "WATCHDOG=1")

    def phase(self, what: str, seconds: float) -> None:
        """Say what it does now, before it is ready, and how long that may take."""
        self.notify(f"STATUS={what}", f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}", "WATCHDOG=1")


def unit(environment: Mapping[str, str] = os.environ, cgroups: Path = Path("/proc/self/cgroup")) -> Json | None:
    """The unit that this process runs as: {"name", "user"}; None where systemd has not started it."""
    if "INVOCATION_ID" not in environment:
        return None
    try:
        lines = cgroups.read_text().splitlines()
    except OSError:
        return None
    # Unified (0::) or systemd's own hierarchy; the innermost service is the unit.
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" or controllers == "name=systemd":
            names = path.split("/")
            services = [name for name in names if name.endswith(".service") and not name.startswith("user@")]
            if services:
                return {"name": services[-1], "user": any(name.startswith("user@") for name in names)}
    return None
