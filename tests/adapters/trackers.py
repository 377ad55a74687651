"""Reading back what trackers have on the disk, by the trackers' own formats."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from anytimed.contracts import Json

Line = dict[int, float]
"""A figure by its step, or by tokens."""


def tensorboard(folder: Path) -> dict[str, Line]:
    """What TensorBoard shows of a run's folder: a line for every figure."""
    loaded = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    loaded.Reload()
    found: dict[str, Line] = {}
    for name in loaded.Tags()["scalars"]:
        entries = loaded.Scalars(name)
        steps = [entry.step for entry in entries]
        assert steps == sorted(set(steps)), f"{name} goes back: {steps}"
        found[name] = {entry.step: entry.value for entry in entries}
    return found


def tensorboard_texts(folder: Path) -> list[str]:
    loaded = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    loaded.Reload()
    return [
        text.decode()
        for name in loaded.Tags()["tensors"]
        for entry in loaded.Tensors(name)
        for text in entry.tensor_proto.string_val
    ]


def wandb_lives(folder: Path) -> list[list[Any]]:
    """The records of every offline run in W&B's folder, oldest first; a file is LevelDB's log of W&B's own messages."""
    lives = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        lives.append([])
        for data in _frames(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            lives[-1].append(record)
    return lives


def history(records: list[Any]) -> list[Json]:
    """What was logged, in order, without W&B's own figures."""
    rows = (record.history.item for record in records if record.WhichOneof("record_type") == "history")
    told = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in told]


_HEADER, _BLOCK, _OPENING = struct.Struct("<IHB"), 32768, b":W&B"
_FULL, _LAST = 1, 4


def _frames(content: bytes) -> Iterator[bytes]:
    at, part = 7, b""
    assert not content or content.startswith(_OPENING)
    while at + _HEADER.size <= len(content):
        if (room := _BLOCK - at % _BLOCK) < _HEADER.size:
            at += room
            continue
        _, length, kind = _HEADER.unpack_from(content, at)
        part += content[at + _HEADER.size : at + _HEADER.size + length]
        at += _HEADER.size + length
        if kind in (_FULL, _LAST):
            yield part
            part = b""


def told(path: Path) -> list[Json]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def in_force(records: list[Json], kind: str) -> list[Json]:
    """Those of a kind that none told later supersedes, by step."""
    kept: list[Json] = []
    for record in records:
        if record["kind"] != kind:
            continue
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    return kept
