"""`python -m tests.service.restored FOLDER`: restores that are killed.

On an empty machine, and on one whose commits and journal are all damaged, a start is killed at every system call of its
restore in turn; after each, the next start has to restore. Says how many calls there were.
"""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

from tests.service.test_origin import Machine, step_of
from tests.storage.material import flip
from tests.storage.victim import killed_at


def main(folder: Path) -> None:
    logging.disable(logging.CRITICAL)
    url = str(folder / "mirror")
    first = Machine(folder / "first", url)
    first.start()
    for step in (1, 2):
        first.commit(step)
    first.run.release()
    damaged = folder / "damaged"
    shutil.copytree(first.run.path, damaged)
    for commit in (damaged / "commits").iterdir():
        flip(commit / "state.json", 3)
    flip(damaged / "journal.jsonl", 10)
    calls = 0
    for kind in ("empty", "damaged"):
        n, finished = 0, False
        while not finished:
            n += 1
            place = folder / f"{kind}-{n}"
            if kind == "damaged":
                shutil.copytree(damaged, place)
            finished = killed_at(n, Machine(place, url).start)
            new = Machine(place, url)
            found = new.start()
            assert step_of(found) == 2, (kind, n, found)
            assert found.journal.length("data") == 2, (kind, n)
            assert not list(place.rglob(".tmp-*")), (kind, n)
            new.run.release()
            shutil.rmtree(place)
        calls += n - 1
    print("killed at", calls)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
