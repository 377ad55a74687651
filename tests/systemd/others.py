"""Scenarios of other services: those that no restart helps, a consumer, one of a user's own; and the removal."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from anytimed.service.control import ask
from tests.systemd import machine
from tests.systemd.machine import (
    CONFIG,
    DEMO,
    RUN,
    STATE,
    TOML,
    anytimed,
    call,
    committed,
    dropin,
    journal,
    show,
    status,
    trained,
    until,
)


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
        folder = Path("/var/lib/anytimed-pull/up")
        call("systemctl", "stop", "anytimed-pull@up")  # what is in place stays while the server starts
        first = (folder / "current").readlink().name
        call("systemctl", "start", "serve.service", "serve-new.path")
        until(lambda: journal("-u", "serve", "_COMM=readlink"), "the server")
        exported = ask(RUN / "control.sock", "POST", "/export")
        call("systemctl", "start", "anytimed-pull@up")
        until(lambda: (folder / "current").readlink().name != first, "the next checkpoint")
        until(lambda: len((folder / "changes").read_text().splitlines()) >= 2, "the command after it")
        served = until(
            lambda: len(set(lines := [one["text"] for one in journal("-u", "serve", "_COMM=readlink")])) > 1 and lines,
            "a restart",
        )
        return {
            "told": told,
            "unit": unit,
            "first": first,
            "exported": exported,
            "served": served,
            "newest": (folder / "current").readlink().name,
            "changes": (folder / "changes").read_text().splitlines(),
            "read": [one["text"] for one in journal("-u", "serve", "_COMM=wc")],
            "owner": (folder / "current").resolve().owner(),
            "removed": anytimed("uninstall-service", "up", "--pull", "--purge", "--yes"),
            "left": [str(path) for path in Path("/etc").rglob("*anytimed-pull*")]
            + [str(p) for p in [folder] if p.exists()],
        }
    finally:
        web.kill()


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
