"""`anytimed run`: the daemon in the foreground, as systemd starts it too."""

from __future__ import annotations

import faulthandler
import signal
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from anytimed.cli.app import Allowed, ConfigFile, app, myself, out, say
from anytimed.urls import without_credentials


@app.command()
def run(
    path: ConfigFile,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Stop once the run has this many steps (demos, tests).")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; the old run is moved aside.")] = False,
    allow_adapter: Allowed = None,
) -> None:
    """Train until told to stop. Every start goes on from the newest commit."""
    from anytimed import registry
    from anytimed.config import load
    from anytimed.service.access import control_token
    from anytimed.service.console import View, configure_logging
    from anytimed.service.requests import Mailbox
    from anytimed.service.signals import posted_to
    from anytimed.service.systemd import Systemd
    from anytimed.storage.run_directory import RunDirectory

    configure_logging(out)
    faulthandler.register(signal.SIGQUIT, chain=True)  # of a hang: where every thread stands, and then the end
    registry.allow(allow_adapter or ())
    config, token, mailbox, systemd = load(path), control_token(), Mailbox(), Systemd()
    with posted_to(mailbox), RunDirectory(Path(config.run.directory)) as directory:
        if not fresh:
            directory.acquire()  # before torch is imported: a second daemon is refused at once
        from anytimed.service.loop import Daemon
        from anytimed.service.recovery import recover

        session = recover(config, directory, fresh=fresh, tell=systemd.phase)
        with View(out, f"anytimed {path}") as view:
            daemon = Daemon(session, mailbox, view, steps=steps, systemd=systemd, token=token)
            daemon.run()
    status = daemon.status()
    with suppress(OSError):  # the terminal may be gone by now
        if status["commit"]:
            say(f"Committed step {status['commit']['step']} in {status['commit']['path']}")
        say(f"Go on:  {myself()} run {path}")
        say(f"Pull:   {myself()} pull {_anywhere(config.exports.url)} --to DIR")


def _anywhere(url: str) -> str:
    """The published prefix as it can be typed in any folder, without credentials."""
    return without_credentials(url) if "://" in url else str(Path(url).absolute())
