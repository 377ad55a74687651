"""`anytimed data`: where the sources stand, and what is read next."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from anytimed.cli.app import Allowed, AsJson, ConfigFile, app, err, out
from anytimed.cli.running import daemon_status


@app.command()
def data(
    path: ConfigFile,
    peek: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Show the next N samples instead, as the model will see them."),
    ] = None,
    as_json: AsJson = False,
    allow_adapter: Allowed = None,
) -> None:
    """Show where each source stands, or the samples that come next. Only looks: changes nothing, needs no lock."""
    from anytimed import registry
    from anytimed.config import load
    from anytimed.service import data_view
    from anytimed.service.assembly import parts_of
    from anytimed.service.data_report import daemon_of, report
    from anytimed.service.peek import peek as peeked
    from anytimed.service.run_on_disk import read_run

    registry.allow(allow_adapter or ())
    config = load(path)
    with err.status("looking"):
        parts, folder = parts_of(config), Path(config.run.directory)
        status = daemon_status(folder)  # before the commit: what is read later is at least as new
        run = read_run(folder)
        if peek is None:
            found = report(parts, run, status)
        else:
            items = list(peeked(parts, run, peek))
    if peek is None:
        if as_json:
            sys.stdout.write(json.dumps(found.to_json()) + "\n")
        else:
            out.print(*data_view.report_lines(found, time.time()), sep="\n")
        return
    head = data_view.Head(run.told(), daemon_of(status), config.data.mask_documents)
    if as_json:
        sys.stdout.write(json.dumps(data_view.samples_json(head, items, parts.tokenizer)) + "\n")
    else:
        for line in data_view.sample_lines(head, items, parts.tokenizer, out, time.time()):
            out.print(line)
