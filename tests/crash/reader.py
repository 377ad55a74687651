"""A consumer that never stops: polls latest.json and pulls, over and over, and checks what it got by itself.

`python -m tests.crash.reader URL FOLDER` goes on until its standard input is closed, then says how often it pulled;
for every other checkpoint it writes a line with the step and the digest of the weights. It ends with an error as soon
as it sees something incomplete, mixed or older than what it saw before."""

from __future__ import annotations

import hashlib
import json
import select
import sys
from pathlib import Path

from anytimed.storage.manifest import CheckpointId
from anytimed.storage.pull import latest, pull
from anytimed.storage.store import MissingKey

Order = tuple[int, int]


def read_for_ever(url: str, to: Path) -> None:
    pointed, pulled = (0, 0), (0, 0)
    polls = 0
    while not select.select([sys.stdin], [], [], 0.02)[0]:
        try:
            newest = latest(url)
            assert newest.order >= pointed, f"latest.json went back from {pointed} to {newest.id}"
            pointed = newest.order
            got = pull(url, to)
        except MissingKey:
            assert pointed == (0, 0), f"nothing is published, and {pointed} was"
            continue
        polls += 1
        assert not got.fell_back, f"{got.manifest.id} in place of a damaged one"
        assert got.manifest.order >= max(pointed, pulled), f"{got.manifest.id} after {pulled}, latest was {pointed}"
        if got.manifest.order > pulled:
            print(got.manifest.step, whole(to / "current"), flush=True)
        pulled = got.manifest.order
    print("polls", polls, flush=True)


def whole(folder: Path) -> str:
    """The digest of the weights in a pulled folder whose every file is what its manifest says."""
    told = json.loads((folder / "manifest.json").read_bytes())
    assert str(CheckpointId(told["term"], told["seq"], told["step"])) == told["id"]
    assert {entry["name"] for entry in told["files"]} | {"manifest.json"} == {p.name for p in folder.iterdir()}
    digests = {
        entry["name"]: hashlib.sha256((folder / entry["name"]).read_bytes()).hexdigest() for entry in told["files"]
    }
    assert digests == {entry["name"]: entry["sha256"] for entry in told["files"]}, f"{told['id']} is torn"
    return digests["model.safetensors"]


if __name__ == "__main__":
    read_for_ever(sys.argv[1], Path(sys.argv[2]))
