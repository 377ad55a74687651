"""A process that holds a lock and has workers at work, to be killed: `python -m tests.data.killed_parent FOLDER`. Says
the ids of its workers once they are at work."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path

from anytimed.config import AdapterTable
from anytimed.data.encoding import Rebuild
from anytimed.data.worker_pool import WorkerPool


def main(folder: Path) -> None:
    with (folder / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.set_inheritable(lock.fileno(), True)  # as a library may do
        rebuild = Rebuild(AdapterTable.model_validate({"type": "huggingface", "path": "."}), "config.toml", folder)
        pool = WorkerPool(rebuild.build(), 2, rebuild)
        for pending in [pool.submit(["a text", "another"]) for _ in range(2)]:
            pending.result()
        for _ in range(2):
            pool.submit(["all is one word " * (1 << 20)])  # of seconds
        print(*pool.pids, flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
