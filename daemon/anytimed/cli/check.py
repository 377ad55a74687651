"""`anytimed check`: everything about a configuration that can be found out without training."""

from __future__ import annotations

import json
import sys
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from anytimed.cli.app import Allowed, AsJson, ConfigFile, app, out, plain
from anytimed.cli.running import asked
from anytimed.contracts import ConfigError, Json


@app.command()
def check(
    path: ConfigFile,
    against: Annotated[
        Path | None, typer.Option(metavar="RUN", help="A running daemon: what would a reload make of this file?")
    ] = None,
    as_json: AsJson = False,
    allow_adapter: Allowed = None,
) -> None:
    """Validate everything that can be validated without training."""
    from anytimed import registry
    from anytimed.config import load
    from anytimed.service.check import check as findings
    from anytimed.service.check import reload as reload_findings

    registry.allow(allow_adapter or ())
    table = Table("", "what", "found", box=None, padding=(0, 2, 0, 0))
    found: list[Json] = []
    good, config = True, load(path)
    foreseen = None if against is None else asked(against, "/foresee", "asking the daemon", config.to_json())
    for finding in chain(findings(config), reload_findings(foreseen)):
        good = good and finding.good
        found.append({"what": finding.what, "good": finding.good, "found": finding.told})
        table.add_row("[green]ok[/]" if finding.good else "[red]no[/]", finding.what, plain(finding.told))
    if as_json:
        sys.stdout.write(json.dumps({"good": good, "findings": found}) + "\n")
    else:
        out.print(table)
    if not good:
        raise ConfigError(f"{path}: not everything is in order; see the lines marked no")
