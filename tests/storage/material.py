"""What the storage tests are made of: runs, snapshots and exports of a few kilobytes, and ways to damage files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anytimed.contracts import Evaluation, HostTensor, Snapshot
from anytimed.storage.exports import ExportContent, Publisher, Spool, SpoolItem
from anytimed.storage.run_directory import RunDirectory
from anytimed.storage.store import Store

HOLDOUT = "a" * 64


def tensor(values: Any, dtype: str = "F32") -> HostTensor:
    """A HostTensor of any array; BF16 keeps the upper half of float32, as the hardware does."""
    array = np.asarray(values)
    if dtype == "BF16":
        bits = (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype("<u2")
        return HostTensor(dtype, array.shape, memoryview(bits.tobytes()))
    kinds = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}
    return HostTensor(dtype, array.shape, np.ascontiguousarray(array, kinds[dtype]).data)


def weights(step: int) -> dict[str, HostTensor]:
    """Tensors whose every value says of which step they are."""
    return {
        "x.layer.weight": tensor(np.full((8, 16), step)),
        "z.layer.weight": tensor(np.full((8, 16), step), "BF16"),
        "counter": tensor(step, "I64"),
        "rng": tensor([step % 251] * 5, "U8"),
    }


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, weights(step), {"step": step, "window": [step, 0.5]})


def acquired(path: Path, **options: Any) -> RunDirectory:
    run = RunDirectory(path, **options)
    run.acquire()
    return run


def evaluation(loss_x: float, *, holdout: str = HOLDOUT, step: int = 1) -> Evaluation:
    return Evaluation(step, holdout, 1000, loss_x, loss_x + 0.1, loss_x + 0.2)


def content(step: int, *, loss_x: float | None = 3.0, **changes: Any) -> ExportContent:
    fields: dict[str, Any] = {
        "step": step,
        "tokens": step * 100,
        "tensors": {
            "model.embed.weight": tensor(np.full((16, 8), step)),
            "model.norm.weight": tensor([step] * 8, "BF16"),
        },
        "config": {"model_type": "llama", "hidden_size": 8},
        "files": {"tokenizer.json": b'{"version": "1.0"}', "tokenizer_config.json": b"{}"},
        "optimizer": {"name": "sf_normuon", "learning_rate": 0.02},
        "evaluation": None if loss_x is None else evaluation(loss_x, step=step),
        "config_digest": "c" * 64,
        "lineage": {"books": {"records": step}},
    }
    return ExportContent(**{**fields, **changes})


class Clock:
    """A wall clock that a test moves."""

    def __init__(self, now_s: float = 1_800_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class Site:
    """A run that publishes somewhere: the writer's side in one object."""

    def __init__(
        self, folder: Path, url: str, options: Mapping[str, Any] | None = None, *, deadline_s: float = 60.0
    ) -> None:
        self.clock = Clock()
        self.url = url
        self.options = dict(options or {})
        self.run = acquired(folder / "run", clock=self.clock)
        self.spool = Spool(self.run, clock=self.clock)
        self.store = Store(url, self.options, deadline_s=deadline_s)
        self.publisher = Publisher(self.store, clock=self.clock, monotonic=self.clock)

    def publish(self, step: int, **changes: Any) -> SpoolItem:
        item = self.spool.build(content(step, **changes))
        self.publisher.publish(item)
        self.spool.discard(item)
        return item

    def pointed(self, name: str = "latest.json") -> str:
        return str(json.loads(self.store.read(name, 1 << 20))["id"])


def flip(path: Path, at: int) -> None:
    """Turn one bit of a file's byte `at` (negative: from the end), in place."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a folder, but the seal that only the spool has."""
    files = (p for p in sorted(path.rglob("*")) if p.is_file() and p.name != "manifest.sha256")
    return {str(p.relative_to(path)): p.read_bytes() for p in files}
