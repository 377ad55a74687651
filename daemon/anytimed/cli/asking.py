"""What is asked of a running daemon, and waited for: `export`, `commit`, `reload`, `pause`, `resume`, `stop`."""

from __future__ import annotations

import time

from anytimed.cli.app import Run, app, err, myself, say
from anytimed.cli.running import asked, daemon_status, last_status, run_directory
from anytimed.contracts import AnytimedError

LAST_WORDS_S = 10.0


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


@app.command()
def stop(where: Run) -> None:
    """Ask the running daemon to commit, finish its uploads and end, and wait until it has."""
    folder = run_directory(where)
    asked(where, "/stop", "asking it to stop")
    with err.status("stopping: it commits, and finishes its uploads"):
        while daemon_status(folder) is not None:
            time.sleep(0.2)
        until = time.monotonic() + LAST_WORDS_S
        while "stopped" not in (left := last_status(folder))["state"] and time.monotonic() < until:
            time.sleep(0.1)  # the socket goes before the last status is written
    commit = left["commit"]
    say(f"Stopped at step {left['step']}" + (f"; committed in {commit['path']}" if commit else ""))
    if commit is None or commit["step"] != left["step"]:
        raise AnytimedError(f"{folder}: its last step is not committed: {'; '.join(left['degraded']) or 'see its log'}")
