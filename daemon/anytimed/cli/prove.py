"""`anytimed prove`: whether a configuration resumes bit for bit, tried with SIGKILLs."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from anytimed.cli.app import Allowed, AsJson, ConfigFile, app, err, say
from anytimed.cli.progress import counted


@app.command()
def prove(
    path: ConfigFile,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each of the two runs.")] = 60,
    kills: Annotated[int, typer.Option(min=0, help="How often one of them is killed.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the moments to kill at.")] = 0,
    keep: Annotated[Path | None, typer.Option(help="New folder for both runs, kept afterwards.")] = None,
    as_json: AsJson = False,
    allow_adapter: Allowed = None,
) -> None:
    """Run a configuration undisturbed and with random SIGKILLs, and say whether both end bit for bit equal."""
    from anytimed import registry
    from anytimed.config import load
    from anytimed.service.prove import planned, scratch_folder, verdict
    from anytimed.service.prove import prove as proved

    registry.allow(allow_adapter or ())
    os.environ["ANYTIMED_ALLOW_ADAPTERS"] = " ".join(registry.allowed())  # for the runs, which are processes
    config = load(path)
    plan = planned(config, steps=steps, kills=kills, seed=seed)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no process of ours is left behind
    for line in (*plan.notes, *(f"Need not end equal: {why}" for why in plan.inexact)):
        err.print(line, markup=False, highlight=False, soft_wrap=True)
    with scratch_folder(keep) as scratch, counted("steps") as tell:
        proof = proved(config, plan, scratch, tell)
        if not proof.found.equal:
            (scratch / "KEEP").touch()
    if as_json:
        sys.stdout.write(json.dumps({**proof.to_json(), "inexact": plan.inexact, "notes": plan.notes}) + "\n")
    else:
        for line in verdict(proof, plan):
            say(line)
    if not proof.found.equal or keep is not None:
        err.print(f"Both runs and their logs are in {scratch}", markup=False, highlight=False, soft_wrap=True)
    if not proof.found.equal:
        raise typer.Exit(1)


# --- what the commands share ------------------------------------------------------------------------------------------
