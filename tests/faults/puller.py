"""A process that pulls, for faults that stop it: `python -m tests.faults.puller URL TO [CHECKPOINT]`.

In the environment: OPTIONS, storage options as JSON; RANGE_BYTES, how much is asked for at a time; KILL_AT: it kills
itself once so many bytes are done. With `-` as URL it takes lines "URL TO [CHECKPOINT]" from standard input and answers
each with a line, so that many rounds need one start. Before its first pull it removes a folder called `begin-here` that
is not there: in a trace of its system calls, what comes after that belongs to the pull.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

from anytimed.contracts import AnytimedError
from anytimed.storage import ranges
from anytimed.storage.pull import pull


def once(url: str, to: str, checkpoint: str | None = None) -> str:
    kill_at = int(os.environ.get("KILL_AT", "-1"))

    def progress(done: int, total: int) -> None:
        if 0 <= kill_at <= done:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        pulled = pull(
            url,
            to,
            checkpoint=checkpoint,
            storage_options=json.loads(os.environ.get("OPTIONS", "{}")),
            progress=progress,
        )
    except AnytimedError as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")
    return pulled.manifest.id


def main() -> int:
    ranges.RANGE_BYTES = int(os.environ.get("RANGE_BYTES", ranges.RANGE_BYTES))
    with contextlib.suppress(FileNotFoundError):
        Path("begin-here").rmdir()
    if sys.argv[1] != "-":
        told = once(*sys.argv[1:])
        print(told)
        return int(":" in told)
    print("ready", flush=True)
    for line in sys.stdin:
        print(once(*line.split()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
