"""Whether two runs ended the same: bit for bit, and every record once.

In order: `compare` looks at the newest commit of both (every tensor, then every key of the state), at their journals
(what was decided about the data, and what was skipped), and at whatever both published of one step. The first
difference of each kind is told with its place and both values. What a run cannot have in common with another stays
out: its folder, and the terms that its restarts counted up. Reads bytes, imports no torch.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anytimed.contracts import AnytimedError, Json
from anytimed.storage.commits import Commit, Commits
from anytimed.storage.durable import CHUNK_BYTES
from anytimed.storage.pull import list_checkpoints
from anytimed.storage.run_directory import RunDirectory
from anytimed.storage.tensors import Header, read_header

OF_THE_PLACE = ("config_digest", "parent_checkpoint")
"""Keys of a commit's state that say where a run lies and publishes."""

DATA = "data"

_NUMBERS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "U64": "<u8", "I32": "<i4", "U32": "<u4",
    "I16": "<i2", "U16": "<u2", "I8": "<i1", "U8": "<u1", "BOOL": "<u1",
}  # fmt: skip


@dataclass(slots=True)
class Sameness:
    """What `compare` found. `differences`: one line each, the first of its kind; empty where the runs are equal.

    `tensors`: how many were compared, by what they are (x, z, momentum, …). `block`, `sequences`: where the stream
    stands, from 0; `sources`: both runs' counts by source, before that block. `data_changed`: what only one of them
    found. `exports`: how many weights had a partner of the same step."""

    step: int = 0
    tensors: dict[str, int] = field(default_factory=dict)
    block: int = 0
    sequences: int = 0
    sources: tuple[Json, Json] = field(default_factory=lambda: ({}, {}))
    differences: list[str] = field(default_factory=list)
    data_changed: str | None = None
    exports: int = 0

    @property
    def equal(self) -> bool:
        return not self.differences


def compare(names: tuple[str, str], runs: tuple[Path, Path], published: tuple[Path, Path]) -> Sameness:
    """Compare two run directories that nobody writes to, and what they published. Raises AnytimedError where one has
    no commit, Refused where none of its commits verifies."""
    one, other = (_newest(run) for run in runs)
    found = Sameness(step=one.manifest.step)
    if one.manifest.step != other.manifest.step:
        found.differences.append(f"last step: {one.manifest.step} {names[0]}, {other.manifest.step} {names[1]}")
    found.tensors, tensors = _tensors(names, one, other)
    found.differences += tensors
    states = [{key: value for key, value in commit.state.items() if key not in OF_THE_PLACE} for commit in (one, other)]
    keys = list(_unequal("", *states))
    if keys:
        key, *values = keys[0]
        more = f" (and {len(keys) - 1} more keys)" if len(keys) > 1 else ""
        found.differences.append(f"{key}: {_short(values[0])} {names[0]}, {_short(values[1])} {names[1]}{more}")
    found.block, found.sequences = states[0]["position"]["block"], states[0]["position"]["index"]
    found.sources = tuple(state["position"]["sources"] for state in states)
    found.data_changed, journals = _journals(names, runs, min(s["position"]["journal_length"] for s in states))
    found.differences += journals
    found.exports, exports = _exports(names, published)
    found.differences += exports
    return found


def _newest(run: Path) -> Commit:
    commit = Commits(RunDirectory(run)).newest()
    if commit is None:
        raise AnytimedError(f"{run}: no commit; nothing to compare")
    return commit


# --- tensors ----------------------------------------------------------------------------------------------------------


def _tensors(names: tuple[str, str], one: Commit, other: Commit) -> tuple[dict[str, int], list[str]]:
    """How many tensors there are by kind; the first that differs, and how many do."""
    places = [_places(commit) for commit in (one, other)]
    kinds: dict[str, int] = defaultdict(int)
    told = []
    for name in sorted(places[0].keys() | places[1].keys(), key=_order):
        kinds[name.partition(".")[0]] += 1
        missing = [who for who, found in zip(names, places, strict=True) if name not in found]
        if missing:
            told.append(f"{name} is missing {missing[0]}")
        elif difference := _tensor(name, names, places[0][name], places[1][name]):
            told.append(difference)
    more = [f"{len(told)} of {sum(kinds.values())} tensors differ"] if len(told) > 1 else []
    return dict(kinds), told[:1] + more


def _order(name: str) -> tuple[bool, str]:
    """x first: it is what gets served."""
    return not name.startswith("x."), name


def _places(commit: Commit) -> dict[str, tuple[Path, Header]]:
    found = {}
    for file in commit.tensor_files:
        header = read_header(file)
        found.update(dict.fromkeys(header.tensors, (file, header)))
    return found


def _tensor(name: str, names: tuple[str, str], one: tuple[Path, Header], other: tuple[Path, Header]) -> str | None:
    places = [header.tensors[name] for _, header in (one, other)]
    kinds = [f"{place.dtype} {list(place.shape)}" for place in places]
    if kinds[0] != kinds[1]:
        return f"{name}: {kinds[0]} {names[0]}, {kinds[1]} {names[1]}"
    size = places[0].end - places[0].start
    elements = int(np.prod(places[0].shape, dtype=np.int64)) if places[0].shape else 1
    width = max(1, size // max(elements, 1))
    unequal, first = 0, ""
    chunks = [
        _chunks(file, header.data_start + place.start, size)
        for (file, header), place in zip((one, other), places, strict=True)
    ]
    at = 0
    for ours, theirs in zip(*chunks, strict=True):
        if ours != theirs:
            rows = [np.frombuffer(chunk, np.uint8).reshape(-1, width) for chunk in (ours, theirs)]
            where = np.flatnonzero((rows[0] != rows[1]).any(axis=1))
            if not first:
                values = [_value(places[0].dtype, row[where[0]].tobytes()) for row in rows]
                first = f"first at flat index {at + int(where[0])}: {values[0]} {names[0]}, {values[1]} {names[1]}"
            unequal += where.size
        at += len(ours) // width
    return f"{name} {kinds[0]}: {first}; {unequal:,} of {elements:,} elements differ" if unequal else None


def _chunks(path: Path, start: int, size: int) -> Iterator[bytes]:
    """The bytes, in pieces that hold whole elements."""
    with path.open("rb") as file:
        file.seek(start)
        while size:
            chunk = file.read(min(CHUNK_BYTES, size))
            size -= len(chunk)
            yield chunk


def _value(dtype: str, data: bytes) -> str:
    """One element as a number that tells it from its neighbours; its bytes where numpy has no such type."""
    if dtype == "BF16":
        data, dtype = b"\0\0" + data, "F32"
    if dtype in _NUMBERS:
        return repr(np.frombuffer(data, _NUMBERS[dtype])[0].item())
    return f"0x{data[::-1].hex()}"


# --- state, journal, exports ------------------------------------------------------------------------------------------


def _unequal(key: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """Every leaf that differs, as `learner.clocks.0.step`, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted(one.keys() | other.keys()):
            yield from _unequal(f"{key}.{name}" if key else name, one.get(name), other.get(name))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from _unequal(f"{key}.{index}", *pair)
    elif one != other:
        yield key, one, other


def _journals(names: tuple[str, str], runs: tuple[Path, Path], in_effect: int) -> tuple[str | None, list[str]]:
    """Whether the runs found other data, and the first decision that differs.

    Of the data's decisions the first `in_effect` count: either run may have read further ahead than it trained."""
    scopes = [_entries(run) for run in runs]
    told = []
    for scope in sorted(scopes[0].keys() | scopes[1].keys()):
        ours, theirs = (entries[scope][: in_effect if scope == DATA else None] for entries in scopes)
        at = next((index for index, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        if at is not None:
            what = f"{_short(ours[at])} {names[0]}, {_short(theirs[at])} {names[1]}"
            told.append(f"journal, {scope} entry {at + 1}: {what}")
        elif len(ours) != len(theirs):
            told.append(f"journal: {len(ours)} {scope} entries {names[0]}, {len(theirs)} {names[1]}")
    return _found_other(names, scopes[0][DATA], scopes[1][DATA]), told


def _found_other(names: tuple[str, str], ours: list[Json], theirs: list[Json]) -> str | None:
    """What of the data only one of the runs discovered."""
    found = [
        {(e["source"], _short(entry)) for e in entries if e["kind"] == "discovered" for entry in e["entries"]}
        for entries in (ours, theirs)
    ]
    for who, only in ((names[0], found[0] - found[1]), (names[1], found[1] - found[0])):
        if only:
            source, entry = min(only)
            return f"source {source}: {len(only)} entries were found only {who}, as {entry}"
    return None


def _entries(run: Path) -> dict[str, list[Json]]:
    scopes: dict[str, list[Json]] = defaultdict(list)
    for line in (run / "journal.jsonl").read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        scopes[told["scope"]].append(told["entry"])
    return scopes


def _exports(names: tuple[str, str], published: tuple[Path, Path]) -> tuple[int, list[str]]:
    """Weights published of one step, by whichever run and however often, are the same bytes."""
    by_step: dict[int, dict[tuple[str, ...], str]] = defaultdict(dict)
    compared = 0
    for who, prefix in zip(names, published, strict=True):
        for manifest in list_checkpoints(str(prefix)) if prefix.is_dir() else []:
            digests = tuple(entry.sha256 for entry in manifest.files if entry.name.endswith(".safetensors"))
            compared += bool(by_step[manifest.step])
            by_step[manifest.step].setdefault(digests, f"{manifest.id} {who}")
    torn = [
        f"step {step}: {' and '.join(found.values())} have other weights"
        for step, found in by_step.items()
        if len(found) > 1
    ]
    return compared, torn[:1]


def _short(value: Any, most: int = 200) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[:most]}…"
