"""`anytimed check`: everything about a configuration that can be found out without training."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from anytimed.cli.app import Allowed, ConfigFile, app, out, plain
from anytimed.cli.running import asked
from anytimed.contracts import ConfigError


@app.command()
def check(
    path: ConfigFile,
    against: Annotated[
        Path | None, typer.Option(metavar="RUN", help="A running daemon: what would a reload make of this file?")
    ] = None,
    allow_adapter: Allowed = None,
) -> None:
    """Validate everything that can be validated without training."""
    from anytimed import registry
    from anytimed.config import load
    from anytimed.service.check import check as findings
    from anytimed.service.check import reload as reload_findings

    registry.allow(allow_adapter or ())
    table = Table("", "what", "found", box=None, padding=(0, 2, 0, 0))
    good, config = True, load(path)
    foreseen = None if against is None else asked(against, "/foresee", "asking the daemon", config.to_json())
    for finding in chain(findings(config), reload_findings(foreseen)):
        good = good and finding.good
        table.add_row("[green]ok[/]" if finding.good else "[red]no[/]", finding.what, plain(finding.told))
    out.print(table)
    if not good:
        raise ConfigError(f"{path}: not everything is in order; see the lines marked no")
