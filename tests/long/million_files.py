"""What a start costs with a million files already read, beside the bare listing: `python -m tests.long.million_files`.

Files are made in a folder of a thousand folders (`--keep DIR` keeps them for another time). Then, a number of times:
the bare os.scandir and stat of all of them; adopting their rows; verify and the first discover, which share one
listing; a discover with nothing new. Prints seconds of processor time, so that a busy machine counts less, one JSON
line a round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from anytimed_adapters.streams.jsonl import JsonLines

FILES, A_FOLDER = 1_000_000, 1000
ROUNDS = 5


def make(base: Path, files: int) -> None:
    for number in range(files // A_FOLDER):
        folder = base / f"{number:04}"
        if folder.exists():
            continue
        folder.mkdir(parents=True)
        for i in range(A_FOLDER):
            handle = os.open(folder / f"part-{i:05}.jsonl", os.O_CREAT | os.O_WRONLY)
            os.write(handle, b'{"text": "one"}\n')
            os.close(handle)


def bare(base: Path) -> int:
    found = 0
    for folder in os.scandir(base):
        with os.scandir(folder) as entries:
            for entry in entries:
                found += entry.stat().st_size > 0
    return found


def measure(base: Path, journalled: str, digest: str) -> dict[str, float]:
    def timed(work: Any) -> float:
        begin = time.process_time()
        work()
        return round(time.process_time() - begin, 3)

    rows = json.loads(journalled)  # as the journal gives them: this is its cost, not ours
    finished = dict.fromkeys(range(len(rows)), digest)
    told = {"bare": timed(lambda: bare(base))}
    stream = JsonLines(JsonLines.Settings(url=f"{base}/**/*.jsonl"), "lines")
    told["adopt"] = timed(lambda: stream.adopt(rows))
    told["verify_with_listing"] = timed(lambda: stream.verify(finished))
    told["first_discover"] = timed(lambda: _nothing(stream))
    told["start_over_bare"] = round(
        told["adopt"] + told["verify_with_listing"] + told["first_discover"] - told["bare"], 3
    )
    told["listing"] = timed(stream._store.list)
    told["later_discover"] = timed(lambda: _nothing(stream))
    return told


def _nothing(stream: JsonLines) -> None:
    assert stream.discover() == []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--files", type=int, default=FILES)
    told = parser.parse_args()
    base = told.keep or Path(tempfile.mkdtemp())
    try:
        make(base, told.files)
        stream = JsonLines(JsonLines.Settings(url=f"{base}/**/*.jsonl"), "lines")
        begin = time.process_time()
        rows = stream.discover()
        print(json.dumps({"files": len(rows), "first_discover_of_all": round(time.process_time() - begin, 3)}))
        journalled = json.dumps(rows)
        del stream, rows
        for _ in range(ROUNDS):
            print(json.dumps(measure(base, journalled, "0" * 64)))
            sys.stdout.flush()
    finally:
        if not told.keep:
            shutil.rmtree(base)


if __name__ == "__main__":
    main()
