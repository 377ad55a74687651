"""`anytimed top`: a running daemon, live."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import typer
from rich.live import Live

from anytimed.cli.app import AsJson, Run, app, err, out
from anytimed.cli.running import daemon_status, run_directory
from anytimed.contracts import AnytimedError, Json


@app.command()
def top(where: Run, as_json: AsJson = False) -> None:
    """Watch a running daemon: figures, sources, events. Off a terminal one picture; --json: a status a line, live."""
    from anytimed.service.overview import Overview

    folder = run_directory(where)
    try:
        if as_json:
            for kind, data in _said(folder):
                if kind == "status":
                    sys.stdout.write(json.dumps(data) + "\n")
                    sys.stdout.flush()
            return
        overview = Overview()
        if not out.is_terminal:
            status = daemon_status(folder)
            if status is None:
                raise AnytimedError(f"no daemon answers in {folder}; `anytimed status` shows what the last one said")
            overview.seed(_history(folder))
            overview.hear("status", status)
            out.print(overview.shown(out.width, time.time()))
            return
        with Live(console=out, screen=True, auto_refresh=False) as live:
            for kind, data in _said(folder):
                if kind == "began":
                    with suppress(AnytimedError, OSError):
                        overview.seed(_history(folder))
                else:
                    overview.hear(kind, data)
                if kind in ("status", "event"):
                    live.update(overview.shown(out.width, time.time()), refresh=True)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _said(folder: Path) -> Iterator[tuple[str, Json]]:
    """What the daemon says, over restarts; "began" each time that it answers anew."""
    from anytimed.service.bulletin import KINDS
    from anytimed.service.listening import again, messages

    def listen() -> Iterator[Json]:
        began = False
        for kind, data in messages(folder / "control.sock", KINDS):
            if not began:
                began = True
                yield {"kind": "began", "data": {}}
            yield {"kind": kind, "data": data}

    for item in again(lambda text: err.print(text, markup=False, highlight=False, soft_wrap=True), listen):
        yield item["kind"], item["data"]


def _history(folder: Path) -> Json:
    from anytimed.service.control import ask
    from anytimed.service.overview import POINTS

    return ask(folder / "control.sock", "GET", f"/history?points={POINTS}", timeout_s=10)
