"""The process that runs one contender: reads on standard input how many batches to take, says when it begins, takes
them, and writes how long it took. Frozen between its turns, so that its workers neither disturb the others nor fill
their queues for free.

    python -m throughput.turns CONTENDER KIND WORKERS THREADS CORPUS SCRATCH
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from throughput.corpus import BATCH_SIZE, SEQUENCE_LENGTH
from throughput.field import CONTENDERS
from throughput.peers import Setting

WARM_UP_BATCHES = 8


class Turns:
    """One contender, reopened where a pass over the documents ends."""

    def __init__(
        self, key: str, kind: str, setting: Setting, corpus: Path, scratch: Path, tell: Callable[[str], None]
    ) -> None:
        self._open = lambda: CONTENDERS[key].open(kind)(corpus, kind, setting, scratch)
        self._scratch, self._tell = scratch, tell
        self._batches: Iterator[Any] | None = None

    def take(self, count: int) -> dict[str, Any]:
        """Seconds for `count` batches in a row of one pass."""
        for _ in range(2):
            if self._batches is None:
                self._start()
            self._tell("began")
            began = time.perf_counter()
            if self._took(count):
                seconds = time.perf_counter() - began
                return {"seconds": seconds, "tokens": count * BATCH_SIZE * SEQUENCE_LENGTH}
            self._batches = None
        raise SystemExit(f"a whole pass has less than {count} batches; make the corpus larger")

    def _start(self) -> None:
        gc.collect()
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True)
        self._batches = self._open()
        for _ in range(WARM_UP_BATCHES):
            batch = next(self._batches)
            assert tuple(batch.shape) == (BATCH_SIZE, SEQUENCE_LENGTH + 1), batch.shape
            assert "int32" in str(batch.dtype), batch.dtype
            assert int(batch.min()) >= 0, "tokens below 0"

    def _took(self, count: int) -> bool:
        assert self._batches is not None
        return all(next(self._batches, None) is not None for _ in range(count))


def main() -> None:
    key, kind, workers, threads, corpus, scratch = sys.argv[1:]
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads == "1" else "false"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def tell(text: str) -> None:
        answers.write(f"{text}\n")
        answers.flush()

    turns = Turns(key, kind, Setting(int(workers), threads == "1"), Path(corpus), Path(scratch), tell)
    for line in sys.stdin:
        tell(json.dumps(turns.take(int(line))))


if __name__ == "__main__":
    main()
