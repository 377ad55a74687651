"""`anytimed logs`: the journal's lines of a run that systemd has started."""

from __future__ import annotations

import os
import shutil
from typing import Annotated

import typer

from anytimed.cli.app import AsJson, Run, app
from anytimed.cli.running import daemon_status, last_status, run_directory
from anytimed.contracts import AnytimedError


@app.command()
def logs(
    where: Run,
    count: Annotated[int, typer.Option("--lines", "-n", min=0, help="The newest so many.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the log lines of a run that is a systemd service (journalctl does)."""
    folder = run_directory(where)
    unit = (daemon_status(folder) or last_status(folder)).get("unit")
    if not unit:
        raise AnytimedError(
            f"{folder}: systemd has not started its daemon, so its lines went where it was started. What happened to "
            "the run: `anytimed events RUN`; as a service: `anytimed install-service`"
        )
    if shutil.which("journalctl") is None:
        raise AnytimedError("journalctl is missing: it comes with systemd")
    of = "--user-unit" if unit["user"] else "--unit"
    form = "json" if as_json else "short-iso"
    command = ["journalctl", of, str(unit["name"]), "--lines", str(count), "--output", form, "--no-pager"]
    os.execvp(command[0], [*command, "--follow"] if follow else command)
