"""Safetensors files: the library reads ours, byte for byte what it would have written, and damage shows."""

from __future__ import annotations

import ctypes
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from anytimed.contracts import CorruptError, HostTensor
from anytimed.storage import durable, tensors
from tests.storage.material import flip, tensor

MIXED = {
    "b.weight": tensor(np.arange(12).reshape(3, 4)),
    "a.weight": tensor(np.arange(6).reshape(2, 3), "BF16"),
    "z.bytes": tensor([1, 2, 3], "U8"),
    "count": tensor(7, "I64"),
    "half": tensor([0.5], "F16"),
    "empty": tensor(np.zeros((0, 4))),
    "mask": tensor([True, False, True], "BOOL"),
    "double": tensor([1.0, -2.0], "F64"),
    "é": tensor([1], "I32"),
}


def as_library_writes(named: dict[str, HostTensor], metadata: dict[str, str]) -> bytes:
    kinds = {"F32": "float32", "BF16": "bfloat16", "U8": "uint8", "I64": "int64", "F16": "float16", "BOOL": "bool",
             "F64": "float64", "I32": "int32"}  # fmt: skip
    buffers = {name: ctypes.create_string_buffer(bytes(t.data), max(1, t.data.nbytes)) for name, t in named.items()}
    specs: dict[str, Any] = {
        name: safetensors.TensorSpec(
            dtype=kinds[t.dtype], shape=list(t.shape), data_ptr=ctypes.addressof(buffers[name]), data_len=t.data.nbytes
        )
        for name, t in named.items()
    }
    return safetensors.serialize(specs, metadata or None)


def test_bytes_equal_the_librarys(tmp_path: Path) -> None:
    # One key: the library writes several in the order of its hash map, ours are sorted.
    size, sha256 = tensors.write(tmp_path / "f", MIXED, {"title": 'ü "quoted"'})
    data = (tmp_path / "f").read_bytes()
    assert data == as_library_writes(MIXED, {"title": 'ü "quoted"'})
    assert (size, sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_the_library_reads_values_and_metadata(tmp_path: Path) -> None:
    tensors.write(tmp_path / "f", MIXED, {"format": "pt"})
    with safe_open(tmp_path / "f", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(MIXED)
    kept = {name: t for name, t in MIXED.items() if t.dtype != "BF16"}  # numpy has no bfloat16
    tensors.write(tmp_path / "g", kept, {})
    loaded = load_file(tmp_path / "g")
    np.testing.assert_array_equal(loaded["b.weight"], np.arange(12, dtype=np.float32).reshape(3, 4))
    assert loaded["count"] == 7 and loaded["empty"].shape == (0, 4)


def test_a_tensor_of_several_chunks_keeps_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "CHUNK_BYTES", 1000)
    values = np.random.default_rng(0).standard_normal((123, 7)).astype(np.float32)
    size, sha256 = tensors.write(tmp_path / "f", {"w": tensor(values)}, {})
    assert durable.digest_of(tmp_path / "f") == (size, sha256)
    np.testing.assert_array_equal(load_file(tmp_path / "f")["w"], values)


def test_every_tensor_is_aligned_to_its_type(tmp_path: Path) -> None:
    tensors.write(tmp_path / "f", MIXED, {})
    header = tensors.read_header(tmp_path / "f")
    assert header.data_start % 8 == 0
    for place in header.tensors.values():
        assert place.start % max(1, tensors.size_bytes(place.dtype, (1,))) == 0


def test_read_header_says_what_was_written(tmp_path: Path) -> None:
    tensors.write(tmp_path / "f", MIXED, {"format": "pt"})
    header = tensors.read_header(tmp_path / "f")
    assert {n: (p.dtype, p.shape) for n, p in header.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in MIXED.items()
    }
    assert header.metadata == {"format": "pt"}


def test_never_over_an_existing_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        tensors.write(tmp_path / "f", MIXED, {})
    assert (tmp_path / "f").read_bytes() == b"mine"


def test_bytes_that_do_not_fit_the_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"w: 4 bytes given, F32 \(2,\) has 8"):
        tensors.write(tmp_path / "f", {"w": HostTensor("F32", (2,), memoryview(b"1234"))}, {})
    with pytest.raises(ValueError, match="'F7' cannot be stored"):
        tensors.write(tmp_path / "f", {"w": HostTensor("F7", (2,), memoryview(b"1234"))}, {})
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("damage", ["truncated", "longer", "length", "no json", "gap", "too long a header"])
def test_read_header_refuses_what_is_damaged(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "f"
    tensors.write(path, MIXED, {})
    data = path.read_bytes()
    match damage:
        case "truncated":
            path.write_bytes(data[:-1])
        case "longer":
            path.write_bytes(data + b"x")
        case "length":
            flip(path, 6)
        case "no json":
            flip(path, 8)
        case "gap":
            path.write_bytes(data.replace(b'"data_offsets":[0,', b'"data_offsets":[1,'))
        case "too long a header":
            with pytest.raises(CorruptError, match="header of"):
                tensors.read_header(path, max_bytes=100)
            return
    with pytest.raises(CorruptError, match=str(path)):
        tensors.read_header(path)


@pytest.mark.parametrize("dtype", ["F32", "F64", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_finds_the_first(dtype: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "CHUNK_BYTES", 64)  # several chunks in a small tensor
    values = np.zeros((10, 10))
    assert tensors.non_finite(tensor(values, dtype)) is None
    values[7, 3] = values[9, 9] = value
    assert tensors.non_finite(tensor(values, dtype)) == 73


def test_the_largest_numbers_are_finite_and_so_are_integers() -> None:
    assert tensors.non_finite(tensor([np.finfo(np.float32).max, np.finfo(np.float32).tiny, -0.0])) is None
    assert tensors.non_finite(tensor([3.38e38], "BF16")) is None
    assert tensors.non_finite(tensor([-1], "I64")) is None  # all bits are ones
    assert tensors.non_finite(tensor(np.zeros((0, 3)))) is None


@given(st.dictionaries(st.text(max_size=8), st.sampled_from(sorted(MIXED)), max_size=6))
def test_any_names_survive(tmp_path_factory: pytest.TempPathFactory, names: dict[str, str]) -> None:
    named = {name: MIXED[like] for name, like in names.items() if name != "__metadata__" and name.isprintable()}
    path = tmp_path_factory.mktemp("names") / "f"
    tensors.write(path, named, {})
    assert path.read_bytes() == as_library_writes(named, {})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert set(json.loads(path.read_bytes()[8 : 8 + length])) == set(named)
