"""`anytimed pull`: the newest checkpoint, verified, into a folder; with --follow, for ever."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from anytimed.cli.app import AsJson, Url, app, err, out, say
from anytimed.cli.progress import pulling
from anytimed.contracts import ConfigError


@app.command()
def pull(
    url: Url,
    to: Annotated[Path, typer.Option(help="Folder to pull into; its `current` is the newest pulled checkpoint.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="A certain checkpoint, as `anytimed list` names it, or best.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on: pull each newer checkpoint when it comes.")] = False,
    every: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0.1, help="With --follow: between two looks at latest.json; 30."),
    ] = None,
    command: Annotated[
        str | None,
        typer.Option(
            "--exec",
            metavar="CMD",
            help="With --follow: run this after each change, without a shell; {path}, {id} and {step} are replaced, "
            "and ANYTIMED_CHECKPOINT, _PATH, _STEP, _TOKENS, _RUN_ID, _PREVIOUS say the same. Tried again until it "
            "succeeds or a newer checkpoint is there.",
        ),
    ] = None,
    exec_timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0.1, help="What CMD may take before it is ended; 600.")
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(
            min=0, help="Versions that stay in the folder, 0 for all; all, with --follow 3. What CMD last loaded stays."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch the newest checkpoint, verified, and switch `DIR/current` to it. A pull that was cut is gone on with."""
    if not follow:
        named = {"--every": every, "--exec": command, "--exec-timeout": exec_timeout}
        if given := [name for name, value in named.items() if value is not None]:
            raise ConfigError(f"{', '.join(given)}: without --follow there is one pull, and nothing after it")
        _once(url, to, checkpoint, keep, as_json)
        return
    if as_json:
        raise ConfigError("--json: with --follow there is no end; --exec and anytimed.watch tell of each checkpoint")
    if checkpoint is not None:
        raise ConfigError("--checkpoint: with --follow it is always the newest; leave one of the two out")
    if exec_timeout is not None and command is None:
        raise ConfigError("--exec-timeout: there is no --exec")
    _for_ever(url, to, every, command, exec_timeout, keep)


def _once(url: str, to: Path, checkpoint: str | None, keep: int | None, as_json: bool) -> None:
    from anytimed.storage.pull import pull as fetch
    from anytimed.storage.target import Target

    try:
        with pulling() as progress:
            pulled = fetch(url, to, checkpoint=checkpoint, progress=progress)
    except KeyboardInterrupt:
        err.print(
            f"Stopped. The next pull into {to} goes on from there.", markup=False, highlight=False, soft_wrap=True
        )
        raise typer.Exit(130) from None
    if keep:
        Target(to).retain(keep)
    manifest = pulled.manifest
    if as_json:
        figures = {"id": manifest.id, "step": manifest.step, "tokens": manifest.tokens, "run_id": manifest.run_id}
        places = {"path": str(pulled.path), "current": str(to / "current"), "fell_back": pulled.fell_back}
        sys.stdout.write(json.dumps(figures | places) + "\n")
    else:
        say(f"{manifest.id}: step {manifest.step:,}, {manifest.tokens:,} tokens")
        say(f"{to / 'current'}")
    if pulled.fell_back:
        err.print(f"The newest checkpoint was damaged; {manifest.id} is the newest good one.", markup=False)
        raise typer.Exit(4)


def _for_ever(
    url: str, to: Path, every: float | None, line: str | None, exec_timeout: float | None, keep: int | None
) -> None:
    from anytimed.service.after_pull import Command
    from anytimed.service.console import configure_logging
    from anytimed.service.following import Follower
    from anytimed.service.systemd import Systemd
    from anytimed.storage.watch import KEEP

    configure_logging(out)
    follower = Follower(
        url,
        to,
        every_s=30.0 if every is None else every,
        keep=KEEP if keep is None else keep or None,
        command=None if line is None else Command(line, 600.0 if exec_timeout is None else exec_timeout),
        systemd=Systemd(),
    )
    follower.run()
