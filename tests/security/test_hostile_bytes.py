"""Any bytes where a stored form is expected: one of our named errors, in bounded memory and time, or the form."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anytimed.contracts import AnytimedError, CorruptError, Refused
from anytimed.storage import strangers, tensors
from anytimed.storage.journal import Journal
from anytimed.storage.lease import LeaseFile
from anytimed.storage.manifest import CommitManifest, Manifest, NewerFormat, Pointer
from anytimed.storage.mirror_manifest import MirrorManifest
from anytimed.storage.run_directory import RunDirectory
from tests.security.measured import measured
from tests.storage.test_manifest import manifest

MIB = 1 << 20
MANIFEST = manifest()

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
DEEP = b"[" * 200_000 + b"]" * 200_000
DEEP_OBJECT = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
HUGE_NUMBER = b'{"format_version": 1' + b"0" * 100_000 + b"}"
GIANT_TEXT = b'{"id": "' + b"x" * (4 * MIB) + b'"}'
BOMBS = {
    "deep lists": DEEP,
    "deep objects": DEEP_OBJECT,
    "a number of 100,000 digits": HUGE_NUMBER,
    "a number that is no number": b'{"step": 1e999, "seq": -1e999}',
    "a text of 4 MiB": GIANT_TEXT,
    "half a surrogate": b'{"run_id": "\\ud800"}',
    "not UTF-8": b'{"run_id": "\xff\xfe"}',
    "zeros": b"\0" * 1000,
    "nothing": b"",
    "a list": b"[]",
    "null": b"null",
}


def fields() -> st.SearchStrategy[dict[str, Any]]:
    """A good manifest with any JSON in place of any of its fields."""
    return st.dictionaries(st.sampled_from(sorted(MANIFEST.model_dump())), JSON, min_size=1, max_size=3)


FORMS = [Manifest, Pointer, CommitManifest, LeaseFile, MirrorManifest]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@given(data=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_form_or_corrupt(form: type[Manifest], data: bytes) -> None:
    try:
        form.from_bytes(data, "here")
    except (CorruptError, NewerFormat) as error:
        assert str(error).startswith("here")


@given(changes=fields())
def test_any_field_of_a_manifest_may_be_anything(changes: dict[str, Any]) -> None:
    data = json.dumps({**json.loads(MANIFEST.to_bytes()), **changes}).encode()
    try:
        found = Manifest.from_bytes(data, "here")
    except (CorruptError, NewerFormat) as error:
        assert str(error).startswith("here") and len(str(error)) < 2000
    else:
        assert all("/" not in entry.name and not entry.name.startswith(".") for entry in found.files)


@given(value=st.dictionaries(st.text(max_size=12), JSON, max_size=5))
def test_a_forged_commit_manifest_has_the_right_digest_and_is_corrupt_all_the_same(value: dict[str, Any]) -> None:
    """The digest in it keeps accidents out, not forgers."""
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return
    told = {**value, "digest": hashlib.sha256(text.encode()).hexdigest()}
    with pytest.raises((CorruptError, NewerFormat), match="here"):
        CommitManifest.from_bytes(json.dumps(told).encode(), "here")


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_json_bombs(form: type[Manifest], bomb: str) -> None:
    with pytest.raises((CorruptError, NewerFormat)) as caught:
        form.from_bytes(BOMBS[bomb], "here")
    assert len(str(caught.value)) < 2000, "the error is no bomb itself"


@pytest.mark.parametrize("bomb", BOMBS)
def test_json_bombs_in_files(tmp_path: Path, bomb: str) -> None:
    """config.json, state.json, an index, status.json, OWNER: all are read this way."""
    (tmp_path / "f").write_bytes(BOMBS[bomb])
    try:
        assert isinstance(strangers.read_json(tmp_path / "f", 8 * MIB), dict)
    except CorruptError as error:
        assert str(tmp_path / "f") in str(error) and len(str(error)) < 1000
    with pytest.raises(CorruptError, match="more than 10 bytes"):
        (tmp_path / "f").write_bytes(BOMBS[bomb] + b" " * 11)
        strangers.read_json(tmp_path / "f", 10)


@pytest.mark.parametrize("bomb", BOMBS)
def test_json_bombs_as_owner_and_journal(tmp_path: Path, bomb: str) -> None:
    (tmp_path / "OWNER").write_bytes(BOMBS[bomb])
    assert RunDirectory(tmp_path).owner() is None
    path = tmp_path / "journal.jsonl"
    path.write_bytes(BOMBS[bomb].replace(b"\0", b" ") + b"\n")
    with pytest.raises(Refused, match=r"journal\.jsonl line 1") as caught:
        Journal(path)
    assert len(str(caught.value)) < 2000


@given(data=st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode() + b"\n"))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_journal_loads_or_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(data)
    try:
        Journal(path).close()
    except Refused as error:
        assert "line" in str(error)


# --- safetensors headers ----------------------------------------------------------------------------------------------


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape: Any = (1,), offsets: Any = (0, 4), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


LYING = {
    "length beyond the file": safetensors({"a": entry()}, b"1234", length=1 << 40),
    "length of 2^64 - 1": safetensors({"a": entry()}, b"1234", length=2**64 - 1),
    "length 0": safetensors(b"", b"1234"),
    "shorter than its length": b"\1\2",
    "empty": b"",
    "no object": safetensors([1, 2]),
    "deep": safetensors(DEEP),
    "deep objects": safetensors(DEEP_OBJECT),
    "overlapping": safetensors({"a": entry(), "b": entry(offsets=[0, 4])}, b"1234"),
    "backward": safetensors({"a": entry(offsets=[4, 0])}, b"1234"),
    "a gap": safetensors({"a": entry(offsets=[4, 8])}, b"12345678"),
    "beyond the data": safetensors({"a": entry(offsets=[0, 400], shape=[100])}, b"1234"),
    "data that nobody describes": safetensors({"a": entry()}, b"1234 and more"),
    "negative sizes whose product fits": safetensors({"a": entry(shape=[-1, -1])}, b"1234"),
    "negative offsets": safetensors({"a": entry(offsets=[-4, 0])}, b""),
    "a product of 2^64": safetensors({"a": entry(shape=[2**32, 2**32], offsets=[0, 0])}),
    "a size of 2^64": safetensors({"a": entry(shape=[2**64], offsets=[0, 0])}),
    "a size of 5,000 digits": safetensors(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'),
    "a size that is a float": safetensors({"a": entry(shape=[1.0])}, b"1234"),
    "a size that is a text": safetensors({"a": entry(shape=["1"])}, b"1234"),
    "a size that is true": safetensors({"a": entry(shape=[True])}, b"1234"),
    "a shape that is a text": safetensors({"a": entry(shape="1")}, b"1234"),
    "a hundred dimensions": safetensors({"a": entry(shape=[1] * 100)}, b"1234"),
    "three offsets": safetensors({"a": entry(offsets=[0, 4, 4])}, b"1234"),
    "unknown dtype": safetensors({"a": entry(dtype="F7")}, b"1234"),
    "a dtype that is a list": safetensors({"a": entry(dtype=["F32"])}, b"1234"),
    "a key more": safetensors({"a": entry(then="what")}, b"1234"),
    "a key less": safetensors({"a": {"dtype": "F32", "shape": [1]}}, b"1234"),
    "a tensor that is a list": safetensors({"a": [1]}, b"1234"),
    "two tensors of one name": safetensors(
        f'{{"a":{json.dumps(entry())},"a":{json.dumps(entry(offsets=[4, 8]))}}}'.encode(), b"12345678"
    ),
    "two shapes of one tensor": safetensors(
        b'{"a":{"dtype":"F32","shape":[1],"shape":[2],"data_offsets":[0,4]}}', b"1234"
    ),
    "metadata that is no text": safetensors({"__metadata__": {"a": {"b": 1}}, "a": entry()}, b"1234"),
    "metadata that is a list": safetensors({"__metadata__": [], "a": entry()}, b"1234"),
    "NaN as a size": safetensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"1234"),
}


@pytest.mark.parametrize("lie", LYING)
def test_a_lying_header_is_refused(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(LYING[lie])
    with pytest.raises(CorruptError, match=r"model\.safetensors") as caught:
        tensors.read_header(path)
    assert len(str(caught.value)) < 1000


def test_the_lies_are_lies_and_the_truth_is_read(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(safetensors({"__metadata__": {"k": "v"}, "a": entry(), "b": entry([0, 5], [4, 4])}, b"1234"))
    found = tensors.read_header(path)
    assert found.tensors["b"].shape == (0, 5) and found.metadata == {"k": "v"}


@given(header=st.binary(max_size=200) | JSON.map(lambda v: json.dumps(v).encode()), data=st.binary(max_size=16))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_header_is_read_or_corrupt(tmp_path: Path, header: bytes, data: bytes) -> None:
    path = tmp_path / "f"
    path.write_bytes(safetensors(header, data))
    try:
        found = tensors.read_header(path)
    except CorruptError:
        return
    assert sum(place.end - place.start for place in found.tensors.values()) == len(data)


@given(
    told=st.dictionaries(
        st.text(max_size=4),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "U8", "I64"]) | JSON,
                "shape": st.lists(st.integers(), max_size=4) | JSON,
                "data_offsets": st.lists(st.integers(-9, 99), min_size=2, max_size=2) | JSON,
            }
        ),
        max_size=3,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_entries_are_read_or_corrupt(tmp_path: Path, told: dict[str, Any]) -> None:
    path = tmp_path / "f"
    path.write_bytes(safetensors(told, bytes(8)))
    try:
        tensors.read_header(path)
    except CorruptError:
        return


def densest_header(path: str) -> None:
    """As long as allowed, of the JSON that takes most memory for its length."""
    content = b'{"a":[' + b"[]," * ((strangers.HEADER_BYTES - 20) // 3) + b"[]]}"
    Path(path).write_bytes(safetensors(content))
    strangers.check_folder(Path(path).parent, ["model.safetensors"])


def million_dimensions(path: str) -> None:
    sizes = b",".join([b"9223372036854775807"] * 400_000)
    Path(path).write_bytes(safetensors(b'{"a":{"dtype":"F32","shape":[' + sizes + b'],"data_offsets":[0,4]}}', b"1234"))
    strangers.check_folder(Path(path).parent, ["model.safetensors"])


def sparse_header(path: str) -> None:
    """A file of 1 TiB that takes no space, with a header of all of it."""
    with Path(path).open("wb") as file:
        file.write(struct.pack("<Q", (1 << 40) - 8))
        file.truncate(1 << 40)
    strangers.check_folder(Path(path).parent, ["model.safetensors"])


@pytest.mark.parametrize(
    "attack", [densest_header, million_dimensions, sparse_header], ids=lambda attack: attack.__name__
)
def test_a_header_costs_little(tmp_path: Path, attack: Any) -> None:
    cost = measured(attack, str(tmp_path / "model.safetensors"), timeout_s=60)
    assert cost.said.startswith("CorruptError"), cost
    assert cost.grew_bytes < 300 * MIB, cost


def giant_manifest(folder: str) -> None:
    """A manifest of 1 GiB that takes no space, in a local prefix."""
    from anytimed.storage.pull import pull

    ident = "00001-000001-0000000001"
    where = Path(folder) / "checkpoints" / ident
    where.mkdir(parents=True)
    with (where / "manifest.json").open("wb") as file:
        file.truncate(1 << 30)
    pull(folder, Path(folder) / "model")


def giant_pointer(folder: str) -> None:
    from anytimed.storage.pull import latest

    with (Path(folder) / "latest.json").open("wb") as file:
        file.truncate(1 << 30)
    latest(folder)


@pytest.mark.parametrize("attack", [giant_manifest, giant_pointer], ids=lambda attack: attack.__name__)
def test_giant_objects_are_not_read(tmp_path: Path, attack: Any) -> None:
    cost = measured(attack, str(tmp_path))
    assert cost.said.startswith(("CorruptError", "MissingKey")), cost
    assert cost.grew_bytes < 64 * MIB, cost


def test_every_error_is_one_of_ours() -> None:
    assert issubclass(CorruptError, AnytimedError) and issubclass(NewerFormat, AnytimedError)
