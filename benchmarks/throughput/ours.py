"""Our own pipeline: adapter, tokenizer and settings from a configuration, as the daemon assembles them, read by the
daemon's reader; with every batch its position as JSON, which is what a commit would store.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anytimed.config import Config
from anytimed.contracts import Batch, Position
from anytimed.data.pipeline import Dry
from anytimed.data.reader import Reader
from anytimed.service.assembly import parts_of, pipeline_of
from anytimed.storage.journal import Journal
from throughput.corpus import BATCH_SIZE, END, SEQUENCE_LENGTH
from throughput.peers import Setting

BLOCK_SEQUENCES = 1024
"""Shuffled together; a turn is a whole number of blocks, for reading and handing out a block take turns too."""

_SOURCES: dict[str, dict[str, Any]] = {
    "jsonl": {"type": "jsonl", "url": "{folder}/*.jsonl"},
    "zst": {"type": "jsonl", "url": "{folder}/*.jsonl.zst"},
    "parquet": {"type": "parquet", "url": "{folder}/*.parquet", "text_field": "text"},
    "bin": {"type": "tokens", "url": "{folder}/*.bin", "dtype": "uint16"},
}


def config_of(corpus: Path, kind: str, scratch: Path, workers: int) -> Config:
    """A run in `scratch` on the set `kind`; the model is there because a configuration has one."""
    source = {k: v.format(folder=corpus / kind) if k == "url" else v for k, v in _SOURCES[kind].items()}
    return Config.model_validate(
        {
            "run": {"directory": str(scratch / "run"), "seed": 1},
            "model": {
                "type": "llama",
                "hidden_size": 64,
                "layers": 1,
                "heads": 1,
                "intermediate_size": 64,
                "context_length": SEQUENCE_LENGTH,
            },
            "tokenizer": {"type": "huggingface", "path": str(corpus / "tokenizer.json"), "end_token": END},
            "data": {
                "sequence_length": SEQUENCE_LENGTH,
                "batch_size": BATCH_SIZE,
                "shuffle_block_sequences": BLOCK_SEQUENCES,
                "tokenizer_workers": workers,
            },
            "sources": {"library": source},
            "optimizer": {"type": "sf_normuon", "lr": 0.04},
            "exports": {"url": str(scratch / "published")},
        }
    )


def ours(corpus: Path, kind: str, setting: Setting, scratch: Path) -> Iterator[Any]:
    """One pass; the reader is closed when the iterator is."""
    config = config_of(corpus, kind, scratch, setting.workers)
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "journal.jsonl").unlink(missing_ok=True)
    journal = Journal(scratch / "journal.jsonl")
    pipeline = pipeline_of(parts_of(config), journal, lambda source, place, rejected: None, scratch / "journal.fold")
    pipeline.restore(Position())
    reader = Reader(pipeline, config.data.prefetch_batches)
    pipeline.poll()
    reader.start()
    try:
        while not isinstance(batch := reader.get(600.0), Dry):
            assert isinstance(batch, Batch), "the reader gave nothing for ten minutes"
            batch.position.to_json()
            yield batch.tokens
    finally:
        reader.close()
        journal.close()
