"""`anytimed events`: what happened to a run, and what happens."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from anytimed.cli.app import AsJson, Run, app, err, out
from anytimed.cli.running import run_directory
from anytimed.contracts import Json

STYLES = {
    "degraded": "yellow", "recovered": "green", "rollback": "red", "jump": "red", "skipped": "yellow",
    "spike": "yellow", "forget": "cyan", "state": "bold", "started": "bold",
}  # fmt: skip


@app.command()
def events(
    where: Run,
    count: Annotated[
        int, typer.Option("--lines", "-n", min=0, help="Of those that happened, the newest so many.")
    ] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what happens, over restarts too.")] = False,
    kinds: Annotated[
        list[str] | None, typer.Option("--only", metavar="WHAT", help="commit, export, forget, …; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what happened: commits, exports, reloads, interventions, troubles; needs no running daemon."""
    from anytimed.service.listening import events_on_disk

    folder, wanted = run_directory(where), set(kinds or ())
    known = list(events_on_disk(folder / "metrics.jsonl"))
    for event in deque((event for event in known if not wanted or event["what"] in wanted), maxlen=count):
        _show(event, as_json=as_json)
    if not follow:
        return
    try:
        for event in _following(folder, known[-1]["id"] if known else ""):
            if not wanted or event["what"] in wanted:
                _show(event, as_json=as_json)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _following(folder: Path, last: str) -> Iterator[Json]:
    """Every event after that with the id `last`, as it comes."""
    from anytimed.service.bulletin import order
    from anytimed.service.listening import again, events_on_disk, messages

    def listen() -> Iterator[Json]:
        nonlocal last
        # What happened while nobody listened stands in the file.
        for event in events_on_disk(folder / "metrics.jsonl"):
            if order(event["id"]) > order(last):
                last = event["id"]
                yield event
        for _, event in messages(folder / "control.sock", ("event",), last):
            if order(event["id"]) > order(last):
                last = event["id"]
                yield event

    return again(lambda text: err.print(text, markup=False, highlight=False, soft_wrap=True), listen)


def _show(event: Json, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()
        return
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    what = str(event["what"])
    out.print(
        Text.assemble((when, "dim"), f"  step {event['step']:>9,}  ", (f"{what:<11}", STYLES.get(what, "")),
                      " ", str(event["told"])), soft_wrap=True,
    )  # fmt: skip
