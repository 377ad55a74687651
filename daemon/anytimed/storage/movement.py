"""How far weights moved between two checkpoints, tensor by tensor, without torch.

`moved` goes through the tensors of two folders by name and reads both a few megabytes at a time, so that memory does
not depend on their size. Sums of squares and products are float64, whatever the tensors are stored as (bfloat16 too,
for which numpy has no type). `grouped` adds up what belongs to one layer. A change is relative: ||B - A|| / ||A||.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from anytimed.contracts import ConfigError, CorruptError, Json

from .strangers import HEADER_BYTES, weight_files
from .tensors import TensorPlace, read_header

_CHUNK = 1 << 20
"""Numbers that are compared at a time: 8 MB each as float64."""
_PLAIN = {
    "BOOL": "u1", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4",
    "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
}  # fmt: skip
_LAYER = re.compile(r"^(.*?\b(?:layers|blocks|block|h)\.\d+)\.")


@dataclass(frozen=True, slots=True)
class Moved:
    """A tensor, or a group of them, in both checkpoints. norm_a, norm_b, norm_change: of A, of B, of B - A, Frobenius;
    dot: their inner product; numbers: how many there are."""

    name: str
    norm_a: float
    norm_b: float
    norm_change: float
    dot: float
    numbers: int

    @property
    def change(self) -> float | None:
        """||B - A|| / ||A||; None where A is zero and B is not."""
        if self.norm_change == 0:
            return 0.0
        return self.norm_change / self.norm_a if self.norm_a else None

    @property
    def cosine(self) -> float | None:
        """Of the angle between A and B; None where one of them is zero, or not finite."""
        both = self.norm_a * self.norm_b
        return max(-1.0, min(1.0, self.dot / both)) if both and math.isfinite(both) else None

    def to_json(self) -> Json:
        told = {"norm_a": self.norm_a, "norm_b": self.norm_b, "change": self.change, "cosine": self.cosine}
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in told.items()}
        return {"name": self.name, **finite, "numbers": self.numbers}


@dataclass(frozen=True, slots=True)
class Differs:
    """A tensor that cannot be compared: in one checkpoint only, or of another shape, or of a type that is not read.
    a, b: dtype and shape, None where it is not there."""

    name: str
    a: str | None
    b: str | None

    def to_json(self) -> Json:
        return {"name": self.name, "a": self.a, "b": self.b}


def moved(a: Path, b: Path, progress: Callable[[int, int], None] | None = None) -> Iterator[Moved | Differs]:
    """Every tensor of the folders `a` and `b`, in the order of the numbers in their names. `progress(done, total)` in
    bytes. A dtype alone is no difference in shape: values are compared. Raises CorruptError, ConfigError."""
    with ExitStack() as files:
        tensors_a, tensors_b = _places(a, files), _places(b, files)
        total = sum(place.end - place.start for side in (tensors_a, tensors_b) for _, _, place in side.values())
        done = 0
        for name in sorted(tensors_a.keys() | tensors_b.keys(), key=natural):
            ours, theirs = tensors_a.get(name), tensors_b.get(name)
            yield _compared(name, ours, theirs)
            done += sum(at[2].end - at[2].start for at in (ours, theirs) if at is not None)
            if progress is not None:
                progress(done, total)


def grouped(tensors: Iterable[Moved]) -> dict[str, list[Moved]]:
    """Tensors by layer: what stands under one number is one group, anything else a group of its own."""
    groups: dict[str, list[Moved]] = {}
    for tensor in tensors:
        found = _LAYER.match(tensor.name)
        groups.setdefault(found[1] if found else tensor.name.removesuffix(".weight"), []).append(tensor)
    return groups


def together(name: str, tensors: Iterable[Moved]) -> Moved:
    """Tensors as if they were one."""
    each = list(tensors)
    return Moved(
        name,
        math.hypot(*(t.norm_a for t in each)),
        math.hypot(*(t.norm_b for t in each)),
        math.hypot(*(t.norm_change for t in each)),
        math.fsum(t.dot for t in each),
        sum(t.numbers for t in each),
    )


def natural(name: str) -> list[tuple[int, int | str]]:
    """A key that sorts layer 10 after layer 9."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


# --- within -----------------------------------------------------------------------------------------------------------

_Place = tuple[BinaryIO, int, TensorPlace]
"""An open file, where its data begins, and where in them the tensor lies."""


def _places(folder: Path, files: ExitStack) -> Mapping[str, _Place]:
    paths = weight_files(folder)
    if not paths:
        raise ConfigError(f"{folder}: no .safetensors file")
    found: dict[str, _Place] = {}
    for path in paths:
        header = read_header(path, HEADER_BYTES)
        file = files.enter_context(path.open("rb"))
        for name, place in header.tensors.items():
            if name in found:
                raise CorruptError(f"{path}: tensor {name} is in another file too; expected every tensor once")
            found[name] = (file, header.data_start, place)
    return found


def _compared(name: str, a: _Place | None, b: _Place | None) -> Moved | Differs:
    told = [None if at is None else f"{at[2].dtype} {list(at[2].shape)}" for at in (a, b)]
    if a is None or b is None or a[2].shape != b[2].shape or not {a[2].dtype, b[2].dtype} <= {*_PLAIN, "BF16"}:
        return Differs(name, *told)
    squares = np.zeros(4)
    for ours, theirs in zip(_values(a), _values(b), strict=True):
        change = theirs - ours
        with np.errstate(over="ignore", invalid="ignore"):
            squares += [ours @ ours, theirs @ theirs, change @ change, ours @ theirs]
    of_a, of_b, of_change = (math.sqrt(square) for square in squares[:3])
    return Moved(name, of_a, of_b, of_change, float(squares[3]), math.prod(a[2].shape))


def _values(at: _Place) -> Iterator[NDArray[np.float64]]:
    """A tensor's numbers, some at a time."""
    file, data_start, place = at
    size = 2 if place.dtype == "BF16" else np.dtype(_PLAIN[place.dtype]).itemsize
    position, end = data_start + place.start, data_start + place.end
    while position < end:
        file.seek(position)
        data = file.read(min(_CHUNK * size, end - position))
        if not data:
            raise CorruptError(f"{file.name}: it became shorter while it was read")
        position += len(data)
        if place.dtype == "BF16":  # the upper half of a float32
            bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
            yield bits.view(np.float32).astype(np.float64)
        else:
            yield np.frombuffer(data, _PLAIN[place.dtype]).astype(np.float64)
