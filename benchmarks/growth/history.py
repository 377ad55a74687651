"""A run that has read many shards: the files, and what the daemon's own pipeline leaves behind when it has read them.

In order: `configured` writes the configuration of a tiny run; `write_shards` its files; `read_all` has the pipeline
read every one once, with a real journal and its fold file, as a daemon does between its commits, and keeps the
position that a commit would hold; `position_of` gives it back; `write_new` puts files there that the run has not seen.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from anytimed.config import Config, load
from anytimed.contracts import Batch, Holdout, Json, Position, Rejected
from anytimed.data.pipeline import Pipeline
from anytimed.service.assembly import Parts, parts_of, pipeline_of
from anytimed.storage.durable import make_folders
from anytimed.storage.journal import Journal
from anytimed.storage.run_directory import RunDirectory

A_FOLDER = 1_000
"""Files in a folder, at most."""
BATCHES_A_COMMIT = 5_000
"""So often what took effect is folded, as after a daemon's commits."""
NEW_FILES, NEW_BYTES = 1_200, 16 << 10
"""What comes after the history: the same for every length of it."""

_CONFIG = """
[run]
directory = {run}
seed = 7
threads = 1
device = "cpu"
[model]
type = "llama"
hidden_size = 64
layers = 2
heads = 2
intermediate_size = 128
[tokenizer]
type = "bytes"
[data]
sequence_length = 64
batch_size = 4
shuffle_block_sequences = 1024
[data.holdout]
fraction = 0.01
max_tokens = 16384
record_tokens = 4096
[sources.main]
type = "text"
url = {url}
[optimizer]
type = "sf_normuon"
lr = 0.03
aux_lr = 0.02
warmup_steps = 10
[exports]
url = {published}
"""


def configured(folder: Path) -> Path:
    """The configuration of the run in `folder`."""
    folder.mkdir(parents=True)
    path = folder / "config.toml"
    places = {
        "run": folder / "run",
        "url": f"{folder}/data/**/*.txt",
        "published": folder / "published",
    }
    path.write_text(_CONFIG.format(**{name: json.dumps(str(place)) for name, place in places.items()}))
    return path


def write_shards(folder: Path, count: int) -> int:
    """`count` files of 64 to 200 bytes, at most 1,000 in a folder and 100 folders in one; bytes in all."""
    draw, written = random.Random(count), 0
    noise = draw.randbytes(1 << 16).hex().encode()
    for i in range(count):
        if i % A_FOLDER == 0:
            number = i // A_FOLDER
            inside = f"{folder}/data/old/{number // 100:03d}/{number % 100:02d}"
            Path(inside).mkdir(parents=True)
        size, at = draw.randrange(64, 201), draw.randrange(0, len(noise) - 200)
        content = b"%09d " % i + noise[at : at + size - 10]
        written += len(content)
        file = os.open(f"{inside}/{i:09d}.txt", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(file, content)
        os.close(file)
    return written


def write_new(folder: Path) -> None:
    """New shards, the same whatever was read before."""
    draw = random.Random("new")
    inside = folder / "data" / "new"
    inside.mkdir(parents=True)
    for i in range(NEW_FILES):
        (inside / f"{i:05d}.txt").write_bytes(b"%05d " % i + draw.randbytes(NEW_BYTES // 2).hex().encode())


def quarantine(source: str, place: Json, rejected: Rejected) -> None:
    raise AssertionError(f"no record here is bad: {source} {place} {rejected.reason}")


def opened(path: Path) -> tuple[Config, Parts, RunDirectory]:
    config = load(path)
    return config, parts_of(config), RunDirectory(Path(config.run.directory))


def read_all(path: Path) -> Json:
    """Read every shard that is there, once, and keep where that ends."""
    _, parts, run = opened(path)
    make_folders(run.path)
    journal = Journal(run.journal)
    pipeline = pipeline_of(parts, journal, quarantine, run.fold)
    pipeline.restore(Position())
    began, last, count = time.perf_counter(), None, 0
    for batch in batches(pipeline):
        last, count = batch, count + 1
        if count % BATCHES_A_COMMIT == 0:
            pipeline.acknowledge(batch.position.to_json())
    assert last is not None, "too few shards for a batch"
    position = last.position
    pipeline.acknowledge(position.to_json())
    pipeline.close()
    journal.close()
    flat, index = position.holdout.to_arrays()
    np.save(path.parent / "holdout.npy", flat, allow_pickle=False)
    told = position.to_json()
    (path.parent / "position.json").write_text(json.dumps({"position": told, "holdout": index}))
    at: dict[str, Any] = told["sources"]["main"]
    return {
        "read_s": round(time.perf_counter() - began, 1),
        "batches": count,
        "records": at["records"] + at["held_out"],
        "tokens": at["tokens"],
        "position_bytes": len(json.dumps(told)),
        "journal_bytes": run.journal.stat().st_size,
        "fold_bytes": run.fold.stat().st_size if run.fold.exists() else 0,
    }


def batches(pipeline: Pipeline) -> Iterator[Batch]:
    """Until a poll finds nothing and nothing can be done about it; a block at the end is cut short."""
    while True:
        outcome = pipeline.next_batch()
        if isinstance(outcome, Batch):
            yield outcome
        elif not pipeline.poll() and pipeline.stands:
            if isinstance(outcome := pipeline.next_batch(), Batch):
                yield outcome
                continue
            return


def position_of(path: Path) -> Position:
    """Where `read_all` ended."""
    told = json.loads((path.parent / "position.json").read_bytes())
    weights = {name: float(rule["weight"]) for name, rule in told["position"]["mixture"].items()}
    flat = np.load(path.parent / "holdout.npy", allow_pickle=False)
    return Position.from_json(told["position"], Holdout.from_arrays(flat, told["holdout"], weights))
