"""Faults 41 and 44: what a manifest may say and what may lie in wait in the consumer's folder, and nothing is touched
outside of it; a manifest, a pointer or a folder of a newer anytimed is said to be one, and what is in place stays."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anytimed.contracts import AnytimedError, ConfigError, CorruptError
from anytimed.storage.manifest import NewerFormat
from anytimed.storage.pull import latest, list_checkpoints
from tests.faultlog import Injected
from tests.faults.pull_world import World, leftovers
from tests.faults.reader import Reader
from tests.storage.material import tree

EVIL = b"evil"
SHA = hashlib.sha256(EVIL).hexdigest()
NAMES = [
    "../x", "../../current/x", "../.lock", "/tmp/anytimed-evil", "//x", "a/b", "a/../../x", "..", ".", "", ".hidden",
    "..\\x", "C:\\x", "a\\b", "a\0b", "\0", "current\n", "\n", "-rf", "manifest.json", "MANIFEST.JSON", "~", "$HOME",
    "a b", "%2e%2e/x", "é", "\u202egpj.exe", "x" * 300, "con:stream",
]  # fmt: skip


def entry(name: str) -> dict[str, Any]:
    return {"name": name, "size": len(EVIL), "sha256": SHA}


def publish_manifest(world: World, changes: dict[str, Any]) -> None:
    """The newest manifest as a stranger would have written it, with a pointer that fits."""
    data = json.dumps({**json.loads(world.second.data), **changes}).encode()
    world.site.store.replace(f"checkpoints/{world.second.id}/manifest.json", data)
    pointer = json.loads(world.site.store.read("latest.json", 1 << 20))
    pointer["manifest_sha256"] = hashlib.sha256(data).hexdigest()
    world.site.store.replace("latest.json", json.dumps(pointer).encode())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, str(tmp_path / "published"))


@pytest.mark.fault(41)
@pytest.mark.parametrize("name", NAMES, ids=[ascii(name)[:20] for name in NAMES])
def test_a_hostile_name_is_never_created(world: World, tmp_path: Path, injected: Injected, name: str) -> None:
    to = world.fresh(tmp_path / "to")
    before = tree(tmp_path / "to")
    publish_manifest(world, {"files": [entry(name)]})
    with Reader(to):
        pulled = world.pull(to)
    assert (pulled.manifest, pulled.fell_back) == (world.first.manifest, True)
    with pytest.raises(CorruptError, match="no valid checkpoint manifest"):
        world.pull(to, checkpoint=world.second.id)
    assert tree(to) == before and not Path("/tmp/anytimed-evil").exists()
    injected(41, f"name {ascii(name)[:40]}")


@pytest.mark.fault(41)
@pytest.mark.parametrize("names", [["a", "a"], ["a.json", "A.JSON"], ["straße", "STRASSE"], ["ok", "../x"]])
def test_two_files_never_share_a_name(world: World, tmp_path: Path, injected: Injected, names: list[str]) -> None:
    to = world.fresh(tmp_path / "to")
    publish_manifest(world, {"files": [entry(name) for name in names]})
    assert world.pull(to).fell_back and leftovers(to) == []
    injected(41, f"names {names}")


def _partial(to: Path, world: World) -> Path:
    digest = hashlib.sha256(world.second.data).hexdigest()[:16]
    return to / "versions" / f".partial-{world.second.id}-{digest}.0"


def _in_partial(plant: Callable[[Path, Path], None]) -> Callable[[World, Path, Path], None]:
    def at(world: World, to: Path, outside: Path) -> None:
        folder = _partial(to, world)
        folder.mkdir()
        plant(folder / "model.safetensors", outside)

    return at


PLANTED: dict[str, Callable[[World, Path, Path], None]] = {
    "a file of the partial is a link": _in_partial(lambda path, outside: path.symlink_to(outside / "secret")),
    "… a link to nothing": _in_partial(lambda path, outside: path.symlink_to(outside / "made")),
    "… a second name of a file": _in_partial(lambda path, outside: os.link(outside / "secret", path)),
    "… a pipe": _in_partial(lambda path, outside: os.mkfifo(path)),
    "… a folder": _in_partial(lambda path, outside: path.mkdir()),
    "… the manifest a link": _in_partial(
        lambda path, outside: (path.parent / "manifest.json").symlink_to(outside / "secret")
    ),
    "… a file that no manifest names": _in_partial(lambda path, outside: (path.parent / "extra.py").write_bytes(EVIL)),
    "… a file that is too long": _in_partial(lambda path, outside: path.write_bytes(bytes(10**6)) and None),
    "the partial is a link": lambda world, to, outside: _partial(to, world).symlink_to(outside),
    "the partial is a file": lambda world, to, outside: _partial(to, world).write_bytes(EVIL) and None,
    "another's partial is a link": lambda world, to, outside: (to / "versions" / ".partial-x").symlink_to(outside),
    "the version is a link": lambda world, to, outside: (to / "versions" / world.second.id).symlink_to(outside),
    "… a link to nothing ": lambda world, to, outside: (to / "versions" / world.second.id).symlink_to(outside / "made"),
    "… a file ": lambda world, to, outside: (to / "versions" / world.second.id).write_bytes(EVIL) and None,
    "the new link is a link": lambda world, to, outside: (to / ".tmp-current").symlink_to(outside),
}


@pytest.mark.fault(41)
@pytest.mark.parametrize("where", PLANTED)
def test_a_planted_link_is_not_followed(world: World, tmp_path: Path, injected: Injected, where: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"untouched")
    to = world.fresh(tmp_path / "to")
    PLANTED[where](world, to, outside)
    with Reader(to):
        pulled = world.pull(to)
    assert (pulled.manifest, pulled.fell_back) == (world.second.manifest, False)
    assert tree(outside) == {"secret": b"untouched"}
    assert not pulled.path.is_symlink() and tree(pulled.path) == tree(world.second.path)
    assert all(path.is_file() and not path.is_symlink() for path in pulled.path.iterdir())
    assert leftovers(to) == []
    injected(41, where)


@pytest.mark.fault(41)
def test_a_lock_that_is_a_link_is_refused(world: World, tmp_path: Path, injected: Injected) -> None:
    to = world.fresh(tmp_path / "to")
    (to / ".lock").unlink()
    (to / ".lock").symlink_to(tmp_path / "made")
    with pytest.raises(AnytimedError, match=r"\.lock"):
        world.pull(to)
    assert not (tmp_path / "made").exists()
    injected(41, "the lock is a link")


@pytest.mark.fault(41)
def test_a_folder_in_the_place_of_current_is_left_alone(world: World, tmp_path: Path, injected: Injected) -> None:
    to = world.fresh(tmp_path / "to")
    (to / "current").unlink()
    (to / "current").mkdir()
    with pytest.raises(ConfigError, match="not a symlink"):
        world.pull(to)
    assert list((to / "current").iterdir()) == []
    injected(41, "current is a folder")


@pytest.mark.fault(44)
def test_a_newer_manifest_is_said_to_be_one(world: World, tmp_path: Path, injected: Injected) -> None:
    to = world.fresh(tmp_path / "to")
    before = tree(to)
    for version in (2, 3, 10**6):
        publish_manifest(world, {"format_version": version, "files": "in another form"})
        for ask in (
            lambda: world.pull(to),
            lambda: world.pull(to, checkpoint=world.second.id),
            lambda: latest(world.url),
            lambda: list_checkpoints(world.url),
        ):
            with Reader(to), pytest.raises(NewerFormat, match=f"format {version}.*pip install -U anytimed") as caught:
                ask()
            assert caught.value.exit_code == 3
        assert tree(to) == before
        injected(44, f"manifest of format {version}")


@pytest.mark.fault(44)
def test_a_newer_pointer_is_said_to_be_one(world: World, tmp_path: Path, injected: Injected) -> None:
    to = world.fresh(tmp_path / "to")
    before = tree(to)
    for name, checkpoint in (("latest.json", None), ("best.json", "best")):
        pointer = json.loads(world.site.store.read(name, 1 << 20))
        world.site.store.replace(name, json.dumps({**pointer, "format_version": 2}).encode())
        with Reader(to), pytest.raises(NewerFormat, match=r"format 2.*pip install -U anytimed"):
            world.pull(to, checkpoint=checkpoint)
        assert tree(to) == before
        injected(44, f"{name} of format 2")
