"""The machine inside: what the scenarios use of systemd, the journal and the daemon's socket."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from anytimed.service.control import ask

T = TypeVar("T")
PROGRAM = "/opt/anytimed/bin/anytimed"
STATE = Path("/var/lib/private/anytimed/demo")
RUN = STATE / "state/run"
DEMO = "anytimed@demo"
CONFIG = Path("/etc/anytimed/demo.toml")
WATCHDOG_S = 7

TOML = """\
[run]
directory = "state/run"
threads = 1
[model]
type = "slow_model:SlowLlama"
hidden_size = 32
layers = 2
heads = 2
intermediate_size = 64
[tokenizer]
type = "bytes"
[data]
sequence_length = 32
batch_size = 4
shuffle_block_sequences = 64
[data.holdout]
fraction = 0.25
max_tokens = 512
[sources.main]
type = "text"
url = "/srv/data/*.txt"
when_dry = "replay"
passes = 100000
[optimizer]
type = "sf_normuon"
[evaluation]
every_steps = 25
[commits]
every_steps = 10
[exports]
url = "state/published"
every_steps = 30
[logging]
every_steps = 5
"""


def install_program() -> None:
    """/opt/anytimed, a virtual environment that every user can read, of what the tests run with."""
    home = Path("/opt/anytimed")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    base = Path("/opt/python") if Path("/opt/python").exists() else Path(sys.base_prefix)
    packages = home / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (home / "bin").mkdir()
    (home / "pyvenv.cfg").write_text(f"home = {base}/bin\n")
    (home / "bin/python").symlink_to(base / "bin" / version)
    sites = sorted(Path("/opt/sites").iterdir())
    paths = ["/opt/checkout/daemon", "/opt/checkout/adapters", *map(str, sites)]
    (packages / "all.pth").write_text("\n".join(paths) + "\n")
    script = home / "bin/anytimed"
    script.write_text(f"#!{home}/bin/python\nfrom anytimed.cli import main\n\nmain()\n")
    script.chmod(0o755)


def call(*words: str, expect: int | None = 0, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)
    if expect is not None and done.returncode != expect:
        raise AssertionError(f"{words}: exit {done.returncode}, expected {expect}\n{done.stdout}\n{done.stderr}")
    return done


def anytimed(*words: str, expect: int | None = 0) -> str:
    done = call(PROGRAM, *words, expect=expect)
    return done.stdout + done.stderr


def show(unit: str, *before: str) -> dict[str, str]:
    """A few properties of a unit. `before`: how systemctl is called, if not as root."""
    names = "ActiveState,SubState,MainPID,NRestarts,StatusText,Result,ExecMainStatus,ExecMainCode,UnitFileState"
    lines = call(*(before or ("systemctl",)), "show", unit, "-p", names).stdout.splitlines()
    return dict(line.split("=", 1) for line in lines)


def journal(*match: str) -> list[dict[str, Any]]:
    """Lines of the journal, oldest first: `time` in seconds, `text`, `priority`."""
    call("journalctl", "--sync")
    lines = call("journalctl", "-o", "json", "--no-pager", *match).stdout.splitlines()
    told = map(json.loads, lines)
    return [
        {
            "time": int(one["__REALTIME_TIMESTAMP"]) / 1e6,
            "text": one["MESSAGE"] if isinstance(one["MESSAGE"], str) else bytes(one["MESSAGE"]).decode(),
            "priority": int(one.get("PRIORITY", 6)),
        }
        for one in told
    ]


def until(what: Callable[[], T | None], why: str, seconds: float = 60, every_s: float = 0.05) -> T:
    """The first answer that is not None, False or empty."""
    ends = time.monotonic() + seconds
    while True:
        found = what()
        if found:
            return found
        if time.monotonic() > ends:
            raise AssertionError(f"not within {seconds:g} s: {why}")
        time.sleep(every_s)


def status() -> dict[str, Any]:
    with suppress(OSError):
        return ask(RUN / "control.sock", "GET", "/status", timeout_s=5)
    return {"step": 0, "state": "", "commit": None, "export": None, "reload": None}


def trained(steps: int, unit: str = "anytimed@demo") -> dict[str, Any]:
    """The status once the daemon is active and at least at a step."""

    def at() -> dict[str, Any] | None:
        if show(unit)["ActiveState"] != "active":
            return None
        found = status()
        return found if found["step"] >= steps else None

    return until(at, f"{unit} active at step {steps}")


def committed() -> int:
    """The step of the newest commit on the disk."""
    names = [path.name for path in (RUN / "commits").iterdir() if not path.name.startswith(".")]
    return max(int(name.rsplit("-", 1)[1]) for name in names)


def steps_told(unit: str, what: str, since: float) -> list[int]:
    """The steps in the lines of the journal since then that say `what`, as in "resumed step 30 from"."""
    lines = [one["text"] for one in journal("-u", unit) if one["time"] >= since]
    return [int(re.split(r"\D", text.split(what)[1])[0]) for text in lines if what in text]


def dropin(unit: str, name: str, *lines: str) -> None:
    folder = Path(f"/etc/systemd/system/{unit}.d")
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.conf").write_text("[Service]\n" + "\n".join(lines) + "\n")
    call("systemctl", "daemon-reload")
