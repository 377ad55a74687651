"""The process that faults of the local state are injected into: `python -m tests.faults.state_process`.

It imports storage once, then reads commands, one JSON array a line: `["fork", action, folder, told]`
forks a child that waits at a gate, and answers its pid, so that strace can be attached; `["go", pid]` opens the gate,
waits for the child's end, and answers how it ended. The child does the action in the folder and writes what it
promises, line by line, into the file `told`: "committed 7" once that commit has been acknowledged, "failed ..." where
it was told that something was not done. `["here", ...]` does the action in this process itself: what it acquires, its
forked children share.

No torch is imported, so that a child is forked and traced within milliseconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from anytimed.contracts import AnytimedError
from anytimed.storage.commits import Commits
from anytimed.storage.durable import write_all
from anytimed.storage.journal import Journal
from anytimed.storage.pull import pull
from anytimed.storage.run_directory import RunDirectory
from anytimed.storage.spool import Spool
from tests.storage.material import content, snapshot

Say = Callable[[str], None]

GATE = signal.SIGUSR1

_SPACIOUS = 1 << 50
"""What the disk is said to have free: the fault has to be met by the write, not by the look at the disk before it."""


def acquired(folder: Path) -> RunDirectory:
    run = RunDirectory(folder)
    run.acquire()
    return run


def _commits(run: RunDirectory) -> Commits:
    return Commits(run, free_bytes=lambda path: _SPACIOUS)


def _newest(commits: Commits) -> int:
    newest = commits.newest()
    return newest.manifest.step if newest else 0


def commit(folder: Path, say: Say) -> None:
    """A start, a commit, the retention after it."""
    with acquired(folder) as run:
        say(f"acquired {run.term}")
        commits = _commits(run)
        step = _newest(commits) + 1
        commits.write(snapshot(step))
        say(f"committed {step}")
        commits.retain(2)


def commit_twice(folder: Path, say: Say) -> None:
    """A start and two commits; the first may fail, and training goes on to the second."""
    with acquired(folder) as run:
        commits = _commits(run)
        last = _newest(commits)
        for step in (last + 1, last + 2):
            try:
                commits.write(snapshot(step))
                say(f"committed {step}")
            except AnytimedError as error:
                say(f"failed {step} {type(error).__name__}: {error.__cause__ or error}")
        try:
            commits.retain(2)
        except (AnytimedError, OSError) as error:  # as the daemon does: it is tried again after the next commit
            say(f"untidied 0 {error}")


def start(folder: Path, say: Say) -> None:
    """What a start reads: nothing is written after the term."""
    with acquired(folder) as run:
        say(f"found {_newest(_commits(run))}")


def retain(folder: Path, say: Say) -> None:
    with acquired(folder) as run:
        kept = _commits(run).retain(2)
        say(f"kept {[c.manifest.step for c in kept]}")


def append(folder: Path, say: Say) -> None:
    """Three decisions; one that cannot be written is decided again."""
    journal = Journal(folder / "journal.jsonl")
    say(f"appended {journal.length('data')}")  # what was read takes effect again
    for _ in range(3):
        number = journal.length("data") + 1
        try:
            journal.append("data", {"number": number, "files": ["a.txt"] * 3})
            say(f"appended {number}")
        except AnytimedError as error:
            say(f"failed {number} {error}")
    journal.close()


def spool(folder: Path, say: Say) -> None:
    with acquired(folder) as run:
        waiting = Spool(run)
        waiting.pending()
        waiting.build(content(run.term))
        say(f"spooled {run.term}")


def fetch(folder: Path, say: Say) -> None:
    """Pull the newest of what is published beside the folder's own filesystem."""
    pulled = pull((folder / "url").read_text(), folder / "to")
    say(f"pulled {pulled.manifest.seq}")


def save(folder: Path, say: Say) -> None:
    """A commit in a run that the parent has acquired."""
    commits = _commits(HELD[0])
    step = _newest(commits) + 1
    commits.write(snapshot(step))
    say(f"committed {step}")


def tidy(folder: Path, say: Say) -> None:
    """The retention after a commit, in a run that the parent has acquired."""
    say(f"kept {[c.manifest.step for c in _commits(HELD[0]).retain(2)]}")


def hold(folder: Path, say: Say) -> None:
    """Acquire, and stay the owner."""
    HELD.append(acquired(folder))


def release(folder: Path, say: Say) -> None:
    HELD.pop().release()


HELD: list[RunDirectory] = []
"""The run between `hold` and `release`."""

ACTIONS = {
    action.__name__: action
    for action in (commit, commit_twice, start, retain, append, spool, fetch, save, tidy, hold, release)
}


def child(action: str, folder: str, told: int) -> None:
    """The forked process. Until the gate opens it makes no call about a file, so whenever strace is attached, the
    first that it counts is the action's own."""
    signal.sigwait([GATE])
    try:
        ACTIONS[action](Path(folder), lambda text: write_all(told, memoryview(f"{text}\n".encode())))
    except (AnytimedError, OSError, MemoryError) as error:
        os.write(told, f"ended {type(error).__name__}: {error}\n".encode())
        os._exit(2)
    except BaseException:  # noqa: BLE001 - a forked child must not return into the parent's loop
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [GATE])
    for line in sys.stdin:
        match json.loads(line):
            case ["fork", str(action), str(folder), str(path)]:
                told = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                answer = os.fork()
                if answer == 0:
                    child(action, folder, told)
                os.close(told)
            case ["go", int(pid)]:
                os.kill(pid, GATE)
                answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            case ["here", str(action), str(folder)]:
                ACTIONS[action](Path(folder), lambda text: None)
                answer = 0
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
