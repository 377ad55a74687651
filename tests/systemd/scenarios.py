"""Runs inside the booted system, as root: each scenario in turn, what it found as a JSON line on standard output.

In order: the program is put where services can read it; a daemon is installed and started as a user would; stops,
starts, reloads; kills and hangs, each restarted; configurations and runs that no restart helps; the limit of starts; a
consumer; the removal. What was found is judged outside, by the tests.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.systemd import machine
from tests.systemd.living import (
    installed,
    killed,
    reloads,
    stopped_and_resumed,
    stopped_by_sigstop,
    stopped_during_a_commit,
    stuck,
)
from tests.systemd.machine import TOML, WATCHDOG_S, call, dropin, journal
from tests.systemd.others import bad_configuration, consumer, of_a_user, refused, removed, start_limit


def prepare() -> dict[str, Any]:
    """The program, text to read, the same drop-in for all daemons: a shorter watchdog, no long waits."""
    machine.install_program()
    data = Path("/srv/data")
    data.mkdir(parents=True)
    for i in range(40):
        (data / f"doc{i:03}.txt").write_text(f"document {i} " + f"{i * i} words and more of them, " * 20)
    config = Path("/root/demo.toml")
    config.write_text(TOML)
    # An interpreter that was built into somebody's home looks for its library there, where no service sees it.
    for unit in ("anytimed@.service", "anytimed-pull@.service"):
        dropin(unit, "library", "Environment=LD_LIBRARY_PATH=/opt/python/lib")
    dropin(
        "anytimed@.service",
        "test",
        f"WatchdogSec={WATCHDOG_S}\nRestartSec=200ms\nTimeoutAbortSec=5",
        'Environment="ANYTIMED_ALLOW_ADAPTERS=slow_model:SlowLlama" PYTHONPATH=/opt/checkout/tests/systemd',
    )
    store = Path("/etc/credstore")
    store.mkdir(mode=0o700, exist_ok=True)
    (store / "anytimed.demo.control-token").write_text("a-token-of-the-test\n")
    encrypted = Path("/etc/credstore.encrypted")
    encrypted.mkdir(mode=0o700, exist_ok=True)
    Path("/root/hf-token").write_text("another token\n")
    call("systemd-creds", "encrypt", "--name=hf-token", "/root/hf-token", str(encrypted / "anytimed.demo.hf-token"))
    dropin("anytimed@demo.service", "encrypted", "LoadCredentialEncrypted=hf-token:anytimed.demo.hf-token")
    Path("/etc/anytimed").mkdir()
    Path("/etc/anytimed/failure.env").write_text("ANYTIMED_ON_FAILURE=systemd-cat -t told\n")
    return {"version": call("systemctl", "--version").stdout.splitlines()[0]}


ONE_AFTER_ANOTHER = [
    prepare, installed, stopped_and_resumed, reloads, killed, stuck, stopped_by_sigstop, refused, consumer,
    stopped_during_a_commit, removed,
]  # fmt: skip
BESIDE = [bad_configuration, start_limit, of_a_user]
"""While the daemon of the others waits for its watchdog."""


def main() -> None:
    signal.alarm(280)
    beside = threading.Thread(target=lambda: [told(scenario) for scenario in BESIDE])
    for scenario in ONE_AFTER_ANOTHER:
        if scenario is killed:
            beside.start()
        if scenario is removed:
            beside.join()
        if not told(scenario) and scenario in (prepare, installed):
            return


def told(scenario: Callable[[], dict[str, Any]]) -> bool:
    """Run it and print what it found; whether it came to its end."""
    began = time.monotonic()
    try:
        found = scenario()
    except BaseException:  # noqa: BLE001 - told as it is, judged outside
        lines = [one["text"] for one in journal("-n", "60")]
        found = {"error": traceback.format_exc() + "\n".join(["", "The journal:", *lines])}
    line = {"scenario": scenario.__name__, "took_s": round(time.monotonic() - began, 2), **found}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    return "error" not in found


if __name__ == "__main__":
    main()
