"""`anytimed feed`: records for an inbox of a running daemon."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from anytimed.cli.app import Run, app, err, say
from anytimed.cli.progress import feeding
from anytimed.cli.running import run_directory
from anytimed.contracts import AnytimedError


class FeedForm(StrEnum):
    """How `feed` reads a file."""

    AUTO, JSONL, TEXT = "auto", "jsonl", "text"


@app.command()
def feed(
    where: Run,
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="Files to send; - or none: standard input.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="The inbox to send to; needed where there are several.")] = None,
    form: Annotated[
        FeedForm,
        typer.Option("--format", help="jsonl: a record a line; text: a record a file; auto: by the file's name."),
    ] = FeedForm.AUTO,
) -> None:
    """Send records to an inbox of the running daemon; what is acknowledged is durable, and trained on once."""
    from anytimed.service.feeding import Feeder, packed, records_of

    folder, fed_from = run_directory(where), paths or [Path("-")]
    known = all(path.is_file() for path in fed_from)
    total = sum(path.stat().st_size for path in fed_from) if known else None
    with feeding() as (show, waiting):
        feeder = Feeder(folder / "control.sock", source, waiting)
        try:
            for request in packed(records_of(fed_from, form.value)):
                feeder.send(request)
                show(feeder.fed.size, total)
        except KeyboardInterrupt:
            err.print(f"Stopped: {feeder.fed.told()}", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(130) from None
        except (AnytimedError, OSError):
            err.print(feeder.fed.told(), markup=False, highlight=False, soft_wrap=True)
            raise
        finally:
            feeder.close()
    say(feeder.fed.told())
