"""What is stored as JSON: read as if a stranger had written it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anytimed.contracts import CorruptError, Evaluation
from anytimed.storage.manifest import CheckpointId, CommitManifest, FileEntry, Manifest, NewerFormat, Pointer, base_name
from tests.storage.material import evaluation

SHA = "0123456789abcdef" * 4


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "id": "00002-000003-0000000004",
        "run_id": "r",
        "term": 2,
        "seq": 3,
        "step": 4,
        "tokens": 5,
        "created": "2027-01-15T08:00:00+00:00",
        "created_s": 1_800_000_000.25,
        "files": [{"name": "model.safetensors", "size": 10, "sha256": SHA}],
        "optimizer": {"name": "amuse", "learning_rate": 0.1},
        "evaluation": evaluation(3.0),
        "config_digest": SHA,
        "parent": None,
        "interventions": [{"kind": "skip", "step": 3}],
        "lineage": {"books": {"records": 7}},
        "flags": [],
    }
    return Manifest(**{**fields, **changes})


def commit_manifest() -> CommitManifest:
    files = [FileEntry(name="state.json", size=1, sha256=SHA)]
    return CommitManifest(run_id="r", seq=2, term=1, step=3, parent=1, created="t", files=files)


def changed(**changes: Any) -> bytes:
    return json.dumps({**json.loads(manifest().to_bytes()), **changes}).encode()


def test_round_trip() -> None:
    whole = manifest(parent="00001-000001-0000000001")
    again = Manifest.from_bytes(whole.to_bytes(), "here")
    assert again == whole and isinstance(again.evaluation, Evaluation)
    assert again.order == (2, 3) and again.total_bytes == 10
    pointer = Pointer.to(whole, whole.to_bytes())
    assert Pointer.from_bytes(pointer.to_bytes(), "here") == pointer and pointer.order == (2, 3)
    assert Manifest.from_bytes(changed(evaluation=None), "here").evaluation is None


def test_minor_additions_are_passed_over() -> None:
    told = json.loads(manifest().to_bytes())
    told["evaluation"]["perplexity"] = 20.0
    told["files"][0]["mime"] = "x"
    assert Manifest.from_bytes(json.dumps({**told, "new": 1}).encode(), "here") == manifest()


def test_a_newer_format_says_what_to_do() -> None:
    with pytest.raises(NewerFormat, match=r"here: .*format 2, .* up to 1.*pip install -U anytimed"):
        Manifest.from_bytes(changed(format_version=2, files="of another form"), "here")
    with pytest.raises(NewerFormat):
        Pointer.from_bytes(b'{"format_version": 9}', "here")


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "..",
        ".",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "a\0",
        "",
        ".hidden",
        "-rf",
        "a\n",
        "C:x",
        "x" * 201,
        "manifest.json",
        "Manifest.JSON",
        "é",
    ],
)
def test_hostile_names_are_refused(name: str) -> None:
    entry = {"name": name, "size": 1, "sha256": SHA}
    with pytest.raises(CorruptError, match=r"^here: no valid checkpoint manifest: "):
        Manifest.from_bytes(changed(files=[entry]), "here")


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []},
        {"files": [{"name": "a", "size": 1, "sha256": SHA}] * 2},
        {"files": [{"name": "a", "size": 1, "sha256": SHA}, {"name": "A", "size": 1, "sha256": SHA}]},
        {"files": [{"name": "a", "size": -1, "sha256": SHA}]},
        {"files": [{"name": "a", "size": 2**60, "sha256": SHA}]},
        {"files": [{"name": "a", "size": 1.5, "sha256": SHA}]},
        {"files": [{"name": "a", "size": "1", "sha256": SHA}]},
        {"files": [{"name": "a", "size": 1, "sha256": SHA.upper()}]},
        {"files": [{"name": "a", "size": 1, "sha256": SHA + "\n"}]},
        {"files": [{"name": f"f{i}", "size": 1, "sha256": SHA} for i in range(10_001)]},
        {"id": "00002-000003-0000000005"},
        {"id": "../../etc"},
        {"term": 2**70, "id": "x"},
        {"parent": "../x"},
        {"step": True},
        {"format_version": 0},
        {"format_version": "1"},
        {"evaluation": {"step": 1}},
        {"tokens": None},
    ],
    ids=str,
)
def test_what_does_not_fit_is_corrupt(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptError, match=r"^here: "):
        Manifest.from_bytes(changed(**changes), "here")


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"{", b"\xff", b"[" * 200_000, b'{"format_version": NaN}', b"1e999"]
)
def test_garbage_is_corrupt(data: bytes) -> None:
    for form in (Manifest, Pointer, CommitManifest):
        with pytest.raises(CorruptError, match=r"^here: "):
            form.from_bytes(data, "here")


def test_a_number_that_json_cannot_say_becomes_null() -> None:
    told = manifest(interventions=[{"kind": "skip", "loss": float("nan")}], optimizer={"beta": float("inf")})
    again = Manifest.from_bytes(told.to_bytes(), "here")
    assert again.interventions == [{"kind": "skip", "loss": None}] and again.optimizer == {"beta": None}
    with pytest.raises(ValueError, match="finite"):
        manifest(created_s=float("inf"))


@given(st.binary(max_size=60), st.integers(0, 2000), st.integers(0, 60))
def test_no_damage_is_anything_but_corrupt(junk: bytes, at: int, cut: int) -> None:
    data = manifest().to_bytes()
    at %= len(data)
    try:
        read = Manifest.from_bytes(data[:at] + junk + data[at + cut :], "here")
    except (CorruptError, NewerFormat):
        return
    assert str(CheckpointId.parse(read.id)) == read.id and all(base_name(f.name) == f.name for f in read.files)


def test_every_flipped_bit_of_a_commits_manifest_shows() -> None:
    whole = commit_manifest()
    data = whole.to_bytes()
    assert CommitManifest.from_bytes(data, "here") == whole
    for at in range(len(data) - 1):  # the last is the line's end, which says nothing
        for bit in range(8):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            with pytest.raises(CorruptError, match=r"^here: "):
                CommitManifest.from_bytes(bytes(damaged), "here")


def test_a_commits_manifest_of_a_newer_format_is_no_damage() -> None:
    newer = commit_manifest().model_copy(update={"format_version": 2})
    with pytest.raises(NewerFormat, match="pip install -U anytimed"):
        CommitManifest.from_bytes(newer.to_bytes(), "here")


@given(st.integers(0, 10**9 - 1), st.integers(0, 10**12 - 1), st.integers(0, 10**15 - 1))
def test_ids_round_trip(term: int, seq: int, step: int) -> None:
    ident = CheckpointId(term, seq, step)
    assert CheckpointId.parse(str(ident)) == ident and base_name(str(ident)) == str(ident)


@given(st.text(max_size=30) | st.from_regex(r"\d{4,7}-\d{5,8}-\d{9,12}\s?"))
def test_an_id_has_one_spelling(text: str) -> None:
    try:
        ident = CheckpointId.parse(text)
    except ValueError:
        return
    assert str(ident) == text and text.isascii()
