"""`anytimed pull`: the newest checkpoint, verified, into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anytimed.cli.app import Url, app, err, say
from anytimed.cli.progress import pulling


@app.command()
def pull(
    url: Url,
    to: Annotated[Path, typer.Option(help="Folder to pull into; its `current` is the newest pulled checkpoint.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="A certain checkpoint, as `anytimed list` names it, or best.")
    ] = None,
) -> None:
    """Fetch the newest checkpoint, verified, and switch `DIR/current` to it. A pull that was cut is gone on with."""
    from anytimed.storage.pull import pull as fetch

    try:
        with pulling() as progress:
            pulled = fetch(url, to, checkpoint=checkpoint, progress=progress)
    except KeyboardInterrupt:
        err.print(
            f"Stopped. The next pull into {to} goes on from there.", markup=False, highlight=False, soft_wrap=True
        )
        raise typer.Exit(130) from None
    manifest = pulled.manifest
    say(f"{manifest.id}: step {manifest.step:,}, {manifest.tokens:,} tokens")
    say(f"{to / 'current'}")
    if pulled.fell_back:
        err.print(f"The newest checkpoint was damaged; {manifest.id} is the newest good one.", markup=False)
        raise typer.Exit(4)
