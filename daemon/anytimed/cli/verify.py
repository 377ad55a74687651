"""`anytimed verify`: every byte that is kept, compared with its digest."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from anytimed.cli.app import AsJson, app, out, plain, say
from anytimed.cli.progress import progress
from anytimed.cli.running import run_directory
from anytimed.contracts import AnytimedError, ConfigError


@app.command()
def verify(
    where: Annotated[
        str, typer.Argument(metavar="RUN_OR_URL", help="Run directory, its configuration, published prefix or mirror.")
    ],
    as_json: AsJson = False,
) -> None:
    """Read everything again and compare every digest; 1 where something is not what was written."""
    from anytimed.service.console import size

    with progress("reading") as show:
        checked = list(_verified(where, show))
    problems = [problem for one in checked for problem in one.problems]
    if as_json:
        told = {"good": not problems, "checked": [one.to_json() for one in checked]}
        sys.stdout.write(json.dumps(told) + "\n")
    else:
        table = Table("", "what", "size", box=None, padding=(0, 2, 0, 0))
        table.add_column("where", overflow="fold")
        for one in checked:
            told_where = plain(f"{one.where}\n{one.note}" if one.note else one.where)
            table.add_row("[red]no[/]" if one.problems else "[green]ok[/]", one.what, size(one.size), told_where)
        out.print(table)
        for problem in problems:
            say(f"{problem.path}: expected {problem.expected}, found {problem.found}")
    if problems:
        raise AnytimedError(f"{where}: {len(problems)} of what was read is not what was written; nothing was changed")


def _verified(where: str, progress: Callable[[int, int], None]) -> Iterator[Any]:
    """What `verify` looks at: a run directory; that and the mirror of a configuration; what lies at a URL."""
    from anytimed.storage.pull import WAITING_S
    from anytimed.storage.store import Store
    from anytimed.storage.verify import kind_of, verify_mirror, verify_published, verify_run

    path = Path(where)
    if path.is_file():
        from anytimed.config import load

        config = load(path)
        yield from verify_run(run_directory(path), progress)
        if config.commits.mirror_url is not None:
            options = config.commits.mirror_storage_options
            yield from verify_mirror(Store(config.commits.mirror_url, options, deadline_s=WAITING_S), progress)
        return
    if (path / "OWNER").exists() or (path / "LOCK").exists():
        yield from verify_run(path, progress)
        return
    store = Store(where, deadline_s=WAITING_S)
    kind = kind_of(store)
    if not kind:
        raise ConfigError(
            f"{store.url}: nothing to verify; expected a run directory, its configuration, a published prefix, or a "
            "mirror"
        )
    yield from (verify_mirror if kind == "mirror" else verify_published)(store, progress)
