"""Runs inside the booted system, as root: each scenario in turn, what it found as a JSON line on standard output.

In order: the program is put where services can read it; a daemon is installed and started as a user would; stops,
starts, reloads; kills and hangs, each restarted; configurations and runs that no restart helps; the limit of starts; a
consumer; the removal. What was found is judged outside, by the tests.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from anytimed.contracts import AnytimedError
from anytimed.service.control import ask
from tests.systemd import machine
from tests.systemd.machine import (
    RUN,
    STATE,
    anytimed,
    call,
    committed,
    journal,
    show,
    status,
    steps_told,
    trained,
    until,
)

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
    (store / "anytimed.demo.control-token").write_text("a token of the test\n")
    encrypted = Path("/etc/credstore.encrypted")
    encrypted.mkdir(mode=0o700, exist_ok=True)
    Path("/root/hf-token").write_text("another token\n")
    call("systemd-creds", "encrypt", "--name=hf-token", "/root/hf-token", str(encrypted / "anytimed.demo.hf-token"))
    dropin("anytimed@demo.service", "encrypted", "LoadCredentialEncrypted=hf-token:anytimed.demo.hf-token")
    Path("/etc/anytimed").mkdir()
    Path("/etc/anytimed/failure.env").write_text("ANYTIMED_ON_FAILURE=systemd-cat -t told\n")
    return {"version": call("systemctl", "--version").stdout.splitlines()[0]}


def dropin(unit: str, name: str, *lines: str) -> None:
    folder = Path(f"/etc/systemd/system/{unit}.d")
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.conf").write_text("[Service]\n" + "\n".join(lines) + "\n")
    call("systemctl", "daemon-reload")


def installed() -> dict[str, Any]:
    """install-service --now returns once the first start is READY."""
    told = anytimed("install-service", "demo", "--config", "/root/demo.toml", "--now")
    right_after = show(DEMO)
    again = anytimed("install-service", "demo", "--config", "/root/demo.toml")
    at = trained(15)
    return {
        "told": told,
        "again": again,
        "right_after": right_after,
        "modes": {str(p): oct(p.stat().st_mode & 0o777) for p in (CONFIG, CONFIG.with_suffix(".env"), STATE, RUN)},
        "loss": at["loss"],
        "sandbox": json.loads((STATE / "sandbox.json").read_text()),
    }


def stopped_and_resumed() -> dict[str, Any]:
    """A stop leaves a commit of the last step; the next start is `activating` until it stands there again."""
    call("systemctl", "stop", DEMO)
    after = show(DEMO)
    at = committed()
    began = time.time()
    call("systemctl", "start", "--no-block", DEMO)
    seen: list[str] = []
    while (state := show(DEMO)["ActiveState"]) != "active" and len(seen) < 2000:
        seen.append(state)
        time.sleep(0.02)
    status_text = until(lambda: show(DEMO)["StatusText"], "a status")
    lines = [one for one in journal("-u", DEMO) if one["time"] >= began]
    trained(at + 6)
    return {
        "after": after,
        "committed": at,
        "seen": seen,
        "resumed": steps_told(DEMO, "resumed step ", began),
        "order": [one["text"] for one in lines if "resumed step" in one["text"] or one["text"].startswith("Started ")],
        "status_text": status_text,
        "later_text": until(lambda: (t := show(DEMO)["StatusText"]) != status_text and t, "another status"),
        "systemctl_status": call("systemctl", "status", "--no-pager", DEMO).stdout,
    }


def reloads() -> dict[str, Any]:
    """A good one is applied; a bad one is named in the journal, nothing of it is applied, and the training goes on."""
    pid, good = show(DEMO)["MainPID"], CONFIG.read_text()
    CONFIG.write_text(good.replace("every_steps = 5\n", "every_steps = 4\n"))
    call("systemctl", "reload", DEMO)
    applied = until(lambda: status()["reload"], "the reload")
    began = time.time()
    CONFIG.write_text(CONFIG.read_text().replace("every_steps = 10", "every_steps = 9\nkep = 2"))
    call("systemctl", "reload", DEMO)
    refused = until(lambda: (r := status()["reload"]) and r["error"] and r, "the refusal")
    named = until(lambda: [one["text"] for one in journal("-u", DEMO, "-p", "info") if "kep" in one["text"]], "a line")
    CONFIG.write_text(good)
    trained(status()["step"] + 12)
    return {
        "applied": applied,
        "refused": refused,
        "named": named,
        "same_process": show(DEMO)["MainPID"] == pid,
        "commits_since": steps_told(DEMO, "committed step ", began),
    }


def hit(how: Callable[[str], None], unhit: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Something happens to the main process: when it is restarted, from which commit, and what systemd said."""
    call("systemctl", "reset-failed", DEMO, expect=None)
    trained(committed() + 3)
    before, began, at = show(DEMO), time.time(), committed()
    how(before["MainPID"])
    gone = until(lambda: show(DEMO)["MainPID"] != before["MainPID"] and time.time(), "its end", 30)
    unhit()
    resumed = until(lambda: steps_told(DEMO, "resumed step ", began), "a new start")
    on = trained(resumed[0] + 3)
    told = [one["text"] for one in journal("_PID=1", "-u", DEMO) if one["time"] >= began]
    return {
        "committed": at,
        "resumed": resumed,
        "now": on["step"],
        "gone_after_s": gone - began,
        "restarts": int(show(DEMO)["NRestarts"]) - int(before["NRestarts"]),
        "told": told,
    }


def killed() -> dict[str, Any]:
    return hit(lambda pid: call("kill", "-KILL", pid) and None)


def stopped_by_sigstop() -> dict[str, Any]:
    """Its next start takes the name of a user from a drop-in, so that another unit can be the same user (`refused`)."""
    dropin("anytimed@demo.service", "user", "User=anytimed-shared")
    return hit(lambda pid: call("kill", "-STOP", pid) and None)


def stuck() -> dict[str, Any]:
    """The main thread hangs in a step; the other threads (socket, uploads) live on."""
    flag = STATE / "stuck"
    answers: list[Any] = []

    def stick(pid: str) -> None:
        flag.touch()
        time.sleep(1.5)
        answers.append(status()["state"])

    return {**hit(stick, flag.unlink), "answered_while_stuck": answers}


def refused() -> dict[str, Any]:
    """A second instance on the same run: the same user, the same folder."""
    folder = ("StateDirectory=", "StateDirectory=anytimed/demo", "WorkingDirectory=/var/lib/anytimed/demo")
    start = ("User=anytimed-shared", "ExecStart=", f"ExecStart={machine.PROGRAM} run {CONFIG}")
    dropin("anytimed@twin.service", "run", *folder, *start)
    trained(1)
    pid = show(DEMO)["MainPID"]
    call("systemctl", "start", "anytimed@twin", expect=None)
    until(lambda: show("anytimed@twin")["ActiveState"] == "failed", "the refusal")
    time.sleep(1)
    trained(status()["step"] + 5)
    return {
        "twin": show("anytimed@twin"),
        "told": [one["text"] for one in journal("-u", "anytimed@twin")],
        "demo_untouched": show(DEMO)["MainPID"] == pid,
    }


def bad_configuration() -> dict[str, Any]:
    """Written by hand, past install-service's checks. What tells of the failure is started."""
    Path("/etc/anytimed/bad.toml").write_text(TOML.replace("[training]", "").replace("batch_size", "bach_size"))
    call("systemctl", "start", "anytimed@bad", expect=None)
    until(lambda: show("anytimed@bad")["ActiveState"] == "failed", "the end")
    failure = "anytimed-failure@anytimed@bad"
    until(lambda: any("Finished" in one["text"] for one in journal("-u", failure)), "what tells of it")
    time.sleep(1)
    return {
        "unit": show("anytimed@bad"),
        "told": [one["text"] for one in journal("-u", "anytimed@bad")],
        "failure": journal("-u", failure),
        "command": [one["text"] for one in journal("-t", "told")],
    }


def start_limit() -> dict[str, Any]:
    """A failure that a restart might help, again and again: exit 1 at every start."""
    Path("/etc/anytimed/limit.toml").write_text(
        TOML.replace('"state/run"', '"/proc/none"').replace("slow_model:SlowLlama", "llama")
    )
    call("systemctl", "start", "anytimed@limit", expect=None)
    until(lambda: any("too quickly" in one["text"] for one in journal("-u", "anytimed@limit")), "the limit", 60)
    failure = "anytimed-failure@anytimed@limit"
    until(lambda: any("Finished" in one["text"] for one in journal("-u", failure)), "what tells of it")
    return {
        "unit": show("anytimed@limit"),
        "starts": sum("Main process exited" in one["text"] for one in journal("-u", "anytimed@limit")),
        "told": [one["text"] for one in journal("-u", failure)],
    }


def consumer() -> dict[str, Any]:
    """A consumer behind a web server, whose command tells each change, and a unit that root restarts at each."""
    trained(1)
    web = subprocess.Popen(
        [sys.executable, "-m", "http.server", "8000", "--bind", "127.0.0.1"],
        cwd=STATE / "state/published",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    units = Path("/etc/systemd/system")
    (units / "serve.service").write_text(
        "[Service]\nUser=nobody\nExecStart=/bin/sh -c 'readlink /var/lib/anytimed-pull/up/current; "
        "head -c 8 /var/lib/anytimed-pull/up/current/model.safetensors | wc -c; exec sleep infinity'\n"
    )
    (units / "serve-new.path").write_text(
        "[Path]\nPathChanged=/var/lib/anytimed-pull/up/changes\n[Install]\nWantedBy=multi-user.target\n"
    )
    (units / "serve-new.service").write_text("[Service]\nType=oneshot\nExecStart=systemctl restart serve.service\n")
    try:
        told = anytimed(
            "install-service", "up", "--pull", "http://127.0.0.1:8000", "--now",
            "--exec", "/opt/checkout/tests/systemd/changed {id}",
        )  # fmt: skip
        unit = show("anytimed-pull@up")
        call("systemctl", "start", "serve.service", "serve-new.path")
        folder = Path("/var/lib/anytimed-pull/up")
        first = (folder / "current").readlink().name
        call("systemctl", "stop", "anytimed-pull@up")
        exported = ask(RUN / "control.sock", "POST", "/export")
        call("systemctl", "start", "anytimed-pull@up")
        until(lambda: (folder / "current").readlink().name != first, "the next checkpoint")
        until(lambda: len((folder / "changes").read_text().splitlines()) >= 2, "the command after it")
        served = until(
            lambda: (lines := [one["text"] for one in journal("-u", "serve", "_COMM=readlink")])[1:] and lines,
            "a restart",
        )
        return {
            "told": told,
            "unit": unit,
            "first": first,
            "exported": exported,
            "changes": (folder / "changes").read_text().splitlines(),
            "served": served,
            "read": [one["text"] for one in journal("-u", "serve", "_COMM=wc")],
            "owner": (folder / "current").resolve().owner(),
            "removed": anytimed("uninstall-service", "up", "--pull", "--purge", "--yes"),
            "left": [str(path) for path in Path("/etc").rglob("*anytimed-pull*")]
            + [str(p) for p in [folder] if p.exists()],
        }
    finally:
        web.kill()


def stopped_during_a_commit() -> dict[str, Any]:
    """Two stops, each while a commit that was asked for is being written."""
    found = []
    for _ in range(2):
        call("systemctl", "start", DEMO)
        trained(1)
        at = status()["step"]
        asked = threading.Thread(target=suppressed, args=(lambda: ask(RUN / "control.sock", "POST", "/commit"),))
        asked.start()
        writing = until(
            lambda: [path.name for path in (RUN / "commits").glob(".tmp-*")], "a commit being written", 60, 0.001
        )
        call("systemctl", "stop", DEMO)
        asked.join()
        said = [one["text"] for one in journal("-u", DEMO, "-n", "40") if one["text"].startswith("Committed step")]
        left = [path.name for path in (RUN / "commits").glob(".*")]
        found.append(
            {"at": at, "writing": writing, "unit": show(DEMO), "said": said[-1], "newest": committed(), "left": left}
        )
    verified = json.loads(anytimed("verify", str(RUN), "--json"))
    call("systemctl", "start", "--no-block", DEMO)
    return {"stops": found, "verified": verified["good"], "checked": [one["what"] for one in verified["checked"]]}


def suppressed(ask: Callable[[], object]) -> None:
    with suppress(OSError, AnytimedError):  # the daemon that was asked stops
        ask()


def removed() -> dict[str, Any]:
    """Without --purge what was trained stays; the units go with the last service that needs them."""
    stays = anytimed("uninstall-service", "demo")
    template = Path("/etc/systemd/system/anytimed@.service").exists()
    newest = committed()
    unit = show(DEMO)
    for name in ("bad", "limit"):
        Path(f"/etc/anytimed/{name}.toml").unlink()
    anytimed("install-service", "demo", "--config", "/root/demo.toml")
    gone = anytimed("uninstall-service", "demo", "--purge", "--yes")
    return {
        "stays": stays,
        "unit": unit,
        "template": template,
        "newest": newest,
        "gone": gone,
        "left": [
            str(p) for folder in ("/etc/systemd/system", "/etc/anytimed") for p in Path(folder).rglob("*anytimed*")
        ]
        + [
            str(p)
            for p in (STATE, Path("/var/lib/anytimed/demo"), Path("/var/cache/private/anytimed/demo"))
            if p.exists()
        ],
    }


def of_a_user() -> dict[str, Any]:
    """A service of a user's own, under a manager of hers: --user needs neither root nor another's help."""
    call("useradd", "--create-home", "ada")
    home, library = Path("/home/ada"), "LD_LIBRARY_PATH=/opt/python/lib"
    Path("/etc/systemd/system/ada.service").write_text(
        "[Service]\nType=notify\nUser=ada\nDelegate=yes\nRuntimeDirectory=ada\nRuntimeDirectoryMode=0700\n"
        "Environment=XDG_RUNTIME_DIR=/run/ada\nExecStart=/lib/systemd/systemd --user\n"
    )
    call("systemctl", "daemon-reload")
    call("systemctl", "start", "ada")
    ada = ("runuser", "-u", "ada", "--", "env", "XDG_RUNTIME_DIR=/run/ada", "HOME=/home/ada", library)
    call(*ada, "mkdir", "-p", f"{home}/.config/systemd/user/anytimed@.service.d")
    extra = 'Environment="ANYTIMED_ALLOW_ADAPTERS=slow_model:SlowLlama" PYTHONPATH=/opt/checkout/tests/systemd'
    for path, text in (
        (f"{home}/.config/systemd/user/anytimed@.service.d/test.conf", f"[Service]\n{extra} {library}\n"),
        (f"{home}/mine.toml", TOML),
    ):
        subprocess.run([*ada, "tee", path], input=text, text=True, check=True, stdout=subprocess.DEVNULL)
    told = call(*ada, machine.PROGRAM, "install-service", "mine", "--config", f"{home}/mine.toml", "--user", "--now")
    control = (*ada, "systemctl", "--user")
    state = home / ".local/state/anytimed/mine"
    unit = show("anytimed@mine", *control)
    text = until(
        lambda: (t := show("anytimed@mine", *control)["StatusText"]) and "step 0 " not in t and t, "a step", 60, 0.5
    )
    gone = call(*ada, machine.PROGRAM, "uninstall-service", "mine", "--user")
    return {
        "told": told.stdout,
        "unit": unit,
        "text": text,
        "owner": state.owner(),
        "mode": oct(state.stat().st_mode & 0o777),
        "after": show("anytimed@mine", *control),
        "gone": gone.stdout,
        "left": [str(path.relative_to(home)) for path in home.rglob("*mine*")],
        "commits": [path.name for path in (state / "state/run/commits").iterdir()],
    }


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
