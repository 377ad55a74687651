"""Safetensors files, written as a stream and digested on the way.

`write` lays the tensors out as the safetensors library does (widest type first, then by name, so that every tensor
stays aligned in a memory map), makes the header, and then hands each tensor's bytes, chunk by chunk, to the hash and
to the disk; the file is new (O_EXCL) and fsynced when it returns. `read_header` checks a file's header against its
size. `non_finite` looks for NaN and Inf by the bits, which works for bfloat16 too, for which numpy has no type.

Format: https://huggingface.co/docs/safetensors (8 bytes length, JSON header padded with spaces to 8 bytes, data).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anytimed.contracts import CorruptError, HostTensor

from .durable import CHUNK_BYTES, write_all

MAX_HEADER_BYTES = 64 << 20
_MOST_DIMENSIONS = 64
"""As many as torch's tensors can have; without a limit, the product of a million sizes would take hours."""


@dataclass(frozen=True, slots=True)
class _Dtype:
    rank: int
    """The library sorts by this, descending."""
    bits: int
    exponent: int | None = None
    """Floats: the bits that are all ones in NaN and Inf only (in F8_E4M3: in NaN only, it has no Inf)."""
    word: str = ""
    """The unsigned numpy type that `exponent` applies to."""


_DTYPES = {
    "BOOL": _Dtype(0, 8),
    "U8": _Dtype(1, 8),
    "I8": _Dtype(2, 8),
    "F8_E5M2": _Dtype(3, 8, 0x7C, "<u1"),
    "F8_E4M3": _Dtype(4, 8, 0x7F, "<u1"),
    "I16": _Dtype(5, 16),
    "U16": _Dtype(6, 16),
    "F16": _Dtype(7, 16, 0x7C00, "<u2"),
    "BF16": _Dtype(8, 16, 0x7F80, "<u2"),
    "I32": _Dtype(9, 32),
    "U32": _Dtype(10, 32),
    "F32": _Dtype(11, 32, 0x7F800000, "<u4"),
    "C64": _Dtype(12, 64, 0x7F800000, "<u4"),
    "F64": _Dtype(13, 64, 0x7FF0000000000000, "<u8"),
    "I64": _Dtype(14, 64),
    "U64": _Dtype(15, 64),
}


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor lies in the file: bytes [start, end), counted from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says about itself. `data_start` is the file offset at which the tensors' bytes begin."""

    tensors: Mapping[str, TensorPlace]
    metadata: Mapping[str, str]
    data_start: int


def size_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. Raises ValueError on a type that safetensors files of ours do not hold."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} cannot be stored; known are {', '.join(_DTYPES)}")
    return math.prod(shape) * _DTYPES[dtype].bits // 8


def in_file_order(tensors: Mapping[str, HostTensor]) -> list[str]:
    """Names in the order of their bytes in the file: widest type first, then by name, as the library writes them."""
    return sorted(tensors, key=lambda name: (-_DTYPES[tensors[name].dtype].rank, name))


def write(path: Path, tensors: Mapping[str, HostTensor], metadata: Mapping[str, str]) -> tuple[int, str]:
    """Write a new file, fsynced; its size in bytes and its SHA-256 (hex), computed from memory.

    Raises ValueError where a tensor's bytes do not fit its shape, FileExistsError, or OSError; the caller then throws
    the file away, and never writes to it again.
    """
    if "__metadata__" in tensors:
        raise ValueError("a tensor cannot be called __metadata__: the format keeps that name for itself")
    for name, tensor in tensors.items():
        expected = size_bytes(tensor.dtype, tensor.shape)
        if tensor.data.nbytes != expected:
            raise ValueError(
                f"tensor {name}: {tensor.data.nbytes} bytes given, {tensor.dtype} {tensor.shape} has {expected}"
            )
    digest = hashlib.sha256()
    size = 0
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for chunk in _chunks(tensors, metadata):
            digest.update(chunk)
            write_all(file, chunk)
            size += chunk.nbytes
        os.fsync(file)
    finally:
        os.close(file)
    return size, digest.hexdigest()


def read_header(path: Path, max_bytes: int = MAX_HEADER_BYTES) -> Header:
    """The header of a file, checked: tensors must cover the data without a gap, and the data must end where the file
    does.

    Raises CorruptError naming what does not fit; OSError.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        data_bytes = os.fstat(file.fileno()).st_size - 8 - length
        if not 2 <= length <= max_bytes or data_bytes < 0:
            raise CorruptError(f"{path}: header of {length} bytes; expected 2 to {max_bytes}, and within the file")
        raw = file.read(length)
    try:
        told = json.loads(raw, object_pairs_hook=_once)
        metadata = {key: _text(value) for key, value in told.pop("__metadata__", {}).items()}
        tensors = {name: _place(t) for name, t in told.items()}
        at = 0
        for name, place in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            if place.start != at or place.end - place.start != size_bytes(place.dtype, place.shape):
                raise ValueError(f"tensor {name} lies at {place.start} to {place.end}, expected to start at {at}")
            at = place.end
        if at != data_bytes:
            raise ValueError(f"{data_bytes} bytes of data, the header describes {at}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptError(f"{path}: not a whole safetensors file: {str(error)[:300]}") from error
    return Header(tensors, metadata, 8 + length)


def non_finite(tensor: HostTensor) -> int | None:
    """The index of the first NaN or Inf in the flattened tensor, or None. Integers are finite."""
    kind = _DTYPES[tensor.dtype]
    if kind.exponent is None or not tensor.data.nbytes:
        return None
    words: NDArray[np.unsignedinteger] = np.frombuffer(tensor.data, dtype=kind.word)
    mask = words.dtype.type(kind.exponent)
    step = CHUNK_BYTES // words.itemsize
    for start in range(0, words.size, step):
        exponents = words[start : start + step] & mask
        if exponents.max() == mask:
            return (start + int(np.argmax(exponents == mask))) * words.itemsize * 8 // kind.bits
    return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which every key stands once: of two, each reader would take the one it likes."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in the header")
    return found


def _place(told: Mapping[str, Any]) -> TensorPlace:
    """A tensor's entry. Raises ValueError, KeyError, TypeError on what the format does not allow."""
    shape, offsets = told["shape"], told["data_offsets"]
    if len(told) != 3 or len(shape) > _MOST_DIMENSIONS or len(offsets) != 2:
        raise ValueError(
            f"a tensor has dtype, 2 offsets and at most {_MOST_DIMENSIONS} dimensions; found {sorted(told)}, "
            f"{len(shape)} dimensions, {len(offsets)} offsets"
        )
    for number in (*shape, *offsets):
        if type(number) is not int or not 0 <= number < 2**63:
            raise ValueError(f"sizes and offsets are whole numbers from 0 to 2^63 - 1; found {str(number)[:40]}")
    return TensorPlace(_text(told["dtype"]), tuple(shape), *offsets)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, found {type(value).__name__}")
    return value


def _chunks(tensors: Mapping[str, HostTensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """The file's bytes, in order."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    order = in_file_order(tensors)
    at = 0
    for name in order:
        end = at + tensors[name].data.nbytes
        header[name] = {"dtype": tensors[name].dtype, "shape": list(tensors[name].shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in order:
        if tensors[name].data.nbytes:  # an empty memoryview cannot be cast
            data = tensors[name].data.cast("B")
            for start in range(0, data.nbytes, CHUNK_BYTES):
                yield data[start : start + CHUNK_BYTES]
