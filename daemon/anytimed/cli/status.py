"""`anytimed status`: from the running daemon, else from what the last one left."""

from __future__ import annotations

import json
import sys
import time

from anytimed.cli.app import AsJson, Run, app, out, say
from anytimed.cli.running import last_status, run_directory
from anytimed.contracts import AnytimedError


@app.command()
def status(where: Run, as_json: AsJson = False) -> None:
    """Show how a run is doing; from status.json when no daemon runs."""
    from anytimed.service.console import ago, table
    from anytimed.service.control import ask

    folder = run_directory(where)
    try:
        found = ask(folder / "control.sock", "GET", "/status", timeout_s=5)
    except OSError:
        found = last_status(folder)
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    try:
        rows = table(found, time.time())
        since = ago(time.time() - found["time"])
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise AnytimedError(f"{folder}: what it says is no status of this version: {error!r}") from error
    if found["state"].startswith("not running"):
        say(f"No daemon runs; this is what it said {since} ago.")
    out.print(rows)
