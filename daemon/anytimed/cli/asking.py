"""`anytimed export`, `commit`, `reload`, `pause`, `resume`: what is asked of a running daemon, and waited for."""

from __future__ import annotations

from anytimed.cli.app import Run, app, myself, say
from anytimed.cli.running import asked


@app.command()
def export(where: Run) -> None:
    """Ask the running daemon to publish x now, and wait until it is there."""
    answer = asked(where, "/export", "exporting")
    say(f"Published {answer['checkpoint']} (step {answer['step']})")
    say(f"Pull:  {myself()} pull {answer['url']} --to DIR")


@app.command()
def commit(where: Run) -> None:
    """Ask the running daemon to write its resumable state now, and wait until it is durable."""
    answer = asked(where, "/commit", "committing")
    say(f"Committed step {answer['step']}: {answer['path']}")


@app.command()
def reload(where: Run) -> None:
    """Ask the running daemon to take its configuration file anew: all of the change, or none of it and the reason."""
    answer = asked(where, "/reload", "reloading")
    say(f"Reloaded {answer['config']}: {', '.join(answer['changed']) or 'nothing in it has changed'}")


@app.command()
def pause(where: Run) -> None:
    """Ask the running daemon to take no more steps; what was trained is committed. A restart goes on by itself."""
    answer = asked(where, "/pause", "pausing")
    say(f"{answer['state'].capitalize()} at step {answer['step']}. Go on:  {myself()} resume {where}")


@app.command()
def resume(where: Run) -> None:
    """Ask the running daemon to go on after a pause."""
    answer = asked(where, "/resume", "resuming")
    say(f"{answer['state'].capitalize()} at step {answer['step']}")
