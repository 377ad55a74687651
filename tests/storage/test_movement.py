"""How far weights moved, against NumPy on whole arrays; and what manifests tell of two checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anytimed.contracts import ConfigError, CorruptError, HostTensor, SourceLosses
from anytimed.storage import movement, tensors
from anytimed.storage.changes import ancestry, changes, differing
from anytimed.storage.located import describe, locate, published_at, split
from anytimed.storage.movement import Differs, Moved, grouped, moved, natural, together
from anytimed.storage.pull import pull
from tests.storage.material import Site, evaluation, tensor


def written(folder: Path, named: dict[str, HostTensor], *, shards: int = 1) -> Path:
    """A folder with the tensors in one file or several."""
    folder.mkdir(parents=True)
    names = sorted(named)
    for i in range(shards):
        name = "model.safetensors" if shards == 1 else f"part{i}.safetensors"
        tensors.write(folder / name, {n: named[n] for n in names[i::shards]}, {})
    return folder


def by_name(a: Path, b: Path) -> dict[str, Moved | Differs]:
    return {found.name: found for found in moved(a, b)}


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    kinds=st.lists(st.sampled_from(["F32", "F64", "F16", "BF16", "I64", "I32", "U8"]), min_size=2, max_size=2),
    size=st.integers(1, 50),
    chunk=st.integers(1, 60),
)
def test_norms_and_angle_are_numpys(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kinds: list[str], size: int, chunk: int
) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    draw = np.random.default_rng(seed)
    sides: list[Any] = []
    folder = tmp_path_factory.mktemp("moved")
    for side, kind in zip("ab", kinds, strict=True):
        # Small whole numbers are exact in every type; bfloat16 has eight bits of them.
        values = draw.integers(0, 128, size).astype(np.float64)
        sides.append(values)
        written(folder / side, {"w": tensor(values, kind)})
    before, movement._CHUNK = movement._CHUNK, chunk
    try:
        found = by_name(folder / "a", folder / "b")["w"]
    finally:
        movement._CHUNK = before
    a, b = sides
    assert isinstance(found, Moved) and found.numbers == size
    assert found.norm_a == pytest.approx(np.linalg.norm(a)) and found.norm_b == pytest.approx(np.linalg.norm(b))
    if np.linalg.norm(a):
        assert found.change == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a))
        if np.linalg.norm(b):
            assert found.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_bfloat16_is_read_as_what_it_is(tmp_path: Path) -> None:
    a = written(tmp_path / "a", {"w": tensor([1.5, -2.0, 0.0078125], "BF16")})
    b = written(tmp_path / "b", {"w": tensor([1.5, -2.0, 0.0078125], "F32")})
    found = by_name(a, b)["w"]
    assert isinstance(found, Moved) and found.norm_change == 0 and found.change == 0.0 and found.cosine == 1.0
    assert found.norm_a == math.sqrt(1.5**2 + 4 + 0.0078125**2)


def test_what_is_not_finite_is_told_as_such(tmp_path: Path) -> None:
    a = written(tmp_path / "a", {"w": tensor([1.0, 2.0])})
    b = written(tmp_path / "b", {"w": tensor([float("nan"), 2.0])})
    found = by_name(a, b)["w"]
    assert isinstance(found, Moved) and found.cosine is None
    assert found.to_json() == {
        "name": "w", "norm_a": 5**0.5, "norm_b": None, "change": None, "cosine": None, "numbers": 2
    }  # fmt: skip


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    a = written(
        tmp_path / "a",
        {"gone": tensor([1.0]), "w": tensor(np.zeros((2, 3))), "same": tensor([2.0]), "zero": tensor([0.0])},
        shards=2,
    )
    b = written(
        tmp_path / "b",
        {"new": tensor([1.0]), "w": tensor(np.zeros((3, 2))), "same": tensor([2.0]), "zero": tensor([1.0])},
    )
    found = by_name(a, b)
    assert found["gone"] == Differs("gone", "F32 [1]", None) and found["new"] == Differs("new", None, "F32 [1]")
    assert found["w"] == Differs("w", "F32 [2, 3]", "F32 [3, 2]")
    zero = found["zero"]
    assert isinstance(zero, Moved) and zero.change is None and zero.cosine is None and zero.norm_change == 1
    told: list[tuple[int, int]] = []
    list(moved(a, b, lambda done, total: told.append((done, total))))
    assert told == sorted(told) and told[-1][0] == told[-1][1] == 4 * (3 + 6 + 3 + 6)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no \.safetensors file"):
        list(moved(a, tmp_path / "empty"))
    (b / "model.safetensors").write_bytes((b / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CorruptError):
        list(moved(a, b))


def test_tensors_are_grouped_by_layer_in_their_order() -> None:
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up.weight" for i in (0, 9, 10)), "lm_head.weight"]
    names += ["model.layers.0.norm.weight", "transformer.h.3.attn.weight"]
    each = [Moved(name, 3.0, 4.0, 1.0, 2.0, 5) for name in sorted(names, key=natural)]
    groups = grouped(each)
    assert list(groups) == [
        "lm_head", "model.embed_tokens", "model.layers.0", "model.layers.9", "model.layers.10", "transformer.h.3"
    ]  # fmt: skip
    both = together("x", groups["model.layers.0"])
    assert (both.norm_a, both.norm_b, both.numbers) == (pytest.approx(3 * 2**0.5), pytest.approx(4 * 2**0.5), 10)
    assert both.change == pytest.approx(1 / 3) and both.cosine == pytest.approx(2 / 12)


# --- manifests --------------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "writer", str(tmp_path / "published"))


def test_what_changed_between_two_manifests(site: Site) -> None:
    def span(records: int, weight: float) -> dict[str, Any]:
        return {"url": "data", "records": records, "tokens": 10 * records, "held_out": 1, "rule": {"weight": weight}}

    a = site.publish(
        10, lineage={"books": span(5, 1.0), "old": span(2, 1.0)}, interventions=[{"kind": "skip"}]
    ).manifest
    site.clock.now_s += 90
    b = site.publish(
        30,
        loss_x=2.5,
        lineage={"books": span(9, 0.5), "web": span(3, 1.0)},
        interventions=[{"kind": "skip"}, {"kind": "rollback", "step": 20}],
        flags=["careful"],
        config_digest="d" * 64,
        optimizer={"name": "sf_normuon", "learning_rate": 0.01},
        parent=a.id,
    ).manifest
    found = changes(a, b)
    assert (found["step"], found["tokens"], found["seconds"], found["same_run"]) == (20, 2000, 90.0, True)
    assert found["config_changed"] and found["optimizer"] == {"learning_rate": [0.02, 0.01]}
    books = found["lineage"]["books"]
    assert (books["in"], books["records"], books["tokens"], books["held_out"]) == ("both", 4, 40, 0)
    assert books["changed"] == {"rule.weight": [1.0, 0.5]}
    assert found["lineage"]["web"]["in"] == "b" and found["lineage"]["web"]["records"] == 3
    assert found["lineage"]["old"]["in"] == "a"
    assert found["interventions"] == [{"kind": "rollback", "step": 20}]
    assert found["flags"] == {"new": ["careful"], "gone": []}
    assert found["files"].keys() == {"README.md", "model.safetensors"}
    assert found["evaluation"]["comparable"] and found["evaluation"]["loss_x"] == [3.0, 2.5]
    assert ancestry(a, b, []) == {"chain": [b.id, a.id], "whole": True}


def test_losses_are_compared_on_the_same_hold_out_only(site: Site) -> None:
    a = site.publish(1, evaluation=evaluation(3.0, holdout="a" * 64)).manifest
    b = site.publish(2, evaluation=evaluation(2.0, holdout="b" * 64)).manifest
    c = site.publish(3, evaluation=None).manifest
    assert not changes(a, b)["evaluation"]["comparable"] and "by_source" not in changes(a, b)["evaluation"]
    assert changes(a, c)["evaluation"]["loss_x"] == [3.0, None] and changes(c, c)["evaluation"] is None
    losses = {"books": SourceLosses(10, 1.0, 2.0, 3.0)}
    d = a.model_copy(update={"evaluation": a.evaluation and type(a.evaluation)(1, "a" * 64, 5, 2.5, 0.0, 0.0, losses)})
    assert changes(a, d)["evaluation"]["by_source"] == {"books": [None, 1.0]}


def test_the_line_of_parents(site: Site) -> None:
    items = [site.publish(1).manifest]
    for step in (2, 3, 4):
        items.append(site.publish(step, parent=items[-1].id).manifest)
    a, b, c, d = items
    assert ancestry(a, d, items) == {"chain": [d.id, c.id, b.id, a.id], "whole": True}
    assert ancestry(a, d, [d, b]) == {"chain": [d.id, c.id], "whole": False}
    assert ancestry(d, a, items) == {"chain": [a.id], "whole": False}
    assert ancestry(a, a, []) == {"chain": [a.id], "whole": True}
    assert not ancestry(a.model_copy(update={"run_id": "other"}), d, items)["whole"]
    looped = [m.model_copy(update={"parent": d.id}) if m is b else m for m in items]
    assert ancestry(a, d, looped)["chain"] == [d.id, c.id, b.id]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(json_values, json_values)
def test_leaves_differ_if_and_only_if_the_values_do(a: Any, b: Any) -> None:
    # A key that is null and one that is not there read the same.
    assert differing(a, a) == {}
    assert {path: pair[::-1] for path, pair in differing(a, b).items()} == differing(b, a)
    assert all(one != other for one, other in differing(a, b).values())


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model", ("model", None)),
        ("s3://bucket/x@best", ("s3://bucket/x", "best")),
        ("https://me:pw@host/x", ("https://me:pw@host/x", None)),
        ("https://me:pw@host/x@00001-000002-0000000003", ("https://me:pw@host/x", "00001-000002-0000000003")),
        ("folder@home", ("folder@home", None)),
        ("@best", ("@best", None)),
        ("x@00001-2-3", ("x@00001-2-3", None)),
    ],
)
def test_names_are_split_at_an_id_only(name: str, parts: tuple[str, str | None]) -> None:
    assert split(name) == parts


def test_a_name_leads_to_a_folder(tmp_path: Path, site: Site) -> None:
    first, second = site.publish(1, loss_x=1.0), site.publish(2)
    to = tmp_path / "model"
    for item in (first, second):
        pull(site.url, to, checkpoint=item.id)
    for name, item in (
        (site.url, second), (f"{site.url}@{first.id}", first), (f"{site.url}@best", first),
        (str(to), second), (f"{to}@{first.id}", first), (str(to / "versions" / first.id), first),
        (str(to / "current"), second),
    ):  # fmt: skip
        scratch = tmp_path / "scratch" / str(len(name)) / item.id
        found = locate(name, scratch)
        assert found.manifest == item.manifest == describe(name)
        assert found.folder.name == item.id and (found.folder / "model.safetensors").is_file()
        assert scratch.exists() == (published_at(name) is not None) == (not name.startswith(str(to)))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text("{}")
    assert locate(str(tmp_path / "theirs"), tmp_path / "no").manifest is None
    with pytest.raises(ConfigError, match=r"no manifest\.json"):
        describe(str(tmp_path / "theirs"))
