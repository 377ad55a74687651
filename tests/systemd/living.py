"""Scenarios of one daemon: installed, stopped and resumed, reloaded, killed, hung, stopped while it commits."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from anytimed.contracts import AnytimedError
from anytimed.service.control import ask
from tests.systemd.machine import (
    CONFIG,
    DEMO,
    RUN,
    STATE,
    anytimed,
    call,
    committed,
    dropin,
    journal,
    show,
    status,
    steps_told,
    trained,
    until,
)


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


def stuck() -> dict[str, Any]:
    """The main thread hangs in a step; the other threads (socket, uploads) live on."""
    flag = STATE / "stuck"
    answers: list[Any] = []

    def stick(pid: str) -> None:
        flag.touch()
        time.sleep(1.5)
        answers.append(status()["state"])

    return {**hit(stick, flag.unlink), "answered_while_stuck": answers}


def stopped_by_sigstop() -> dict[str, Any]:
    """Its next start takes the name of a user from a drop-in, so that another unit can be the same user (`refused`)."""
    dropin("anytimed@demo.service", "user", "User=anytimed-shared")
    return hit(lambda pid: call("kill", "-STOP", pid) and None)


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
