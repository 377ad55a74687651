"""A consumer's pull: the newest, verified, in one step; what goes wrong meanwhile, and what a stranger may send."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from anytimed.contracts import AnytimedError, ConfigError, CorruptError, Refused
from anytimed.storage.exports import Publisher, SpoolItem
from anytimed.storage.manifest import CheckpointId, NewerFormat
from anytimed.storage.pull import latest, list_checkpoints, pull
from anytimed.storage.store import MissingKey
from anytimed.storage.target import exchange
from tests.storage.material import Site, content, flip, tensor, tree


@pytest.fixture
def site(tmp_path: Path, url: str) -> Site:
    return Site(tmp_path / "writer", url)


@pytest.fixture
def to(tmp_path: Path) -> Path:
    return tmp_path / "model"


def damage(site: Site, item: SpoolItem, name: str) -> bytes:
    """Turn a bit of a published file; the good bytes."""
    key = f"checkpoints/{item.id}/{name}"
    good = site.store.read(key, 1 << 20)
    site.store.replace(key, good[:-1] + bytes([good[-1] ^ 1]))
    return good


def current(to: Path) -> str:
    return (to / "current").readlink().name


def clean(to: Path) -> bool:
    """Nothing half done is left."""
    return not left(to)


def left(to: Path) -> list[Path]:
    """What is half done."""
    return [p for p in to.rglob(".*") if p.name != ".lock"]


def test_the_newest_comes_whole_and_current_leads_to_it(site: Site, to: Path) -> None:
    site.publish(1)
    item = site.spool.build(content(2))
    site.publisher.publish(item)
    told: list[tuple[int, int]] = []
    pulled = pull(site.url, to, progress=lambda done, total: told.append((done, total)))
    assert (pulled.path, pulled.manifest, pulled.fell_back) == (to / "versions" / item.id, item.manifest, False)
    assert tree(pulled.path) == tree(item.path) and current(to) == item.id and clean(to)
    assert told == sorted(told) and told[-1] == (item.manifest.total_bytes,) * 2
    with safe_open(to / "current" / "model.safetensors", framework="numpy") as file:
        assert (file.get_tensor("model.embed.weight") == 2).all()


def test_already_there_downloads_nothing(site: Site, to: Path) -> None:
    item = site.publish(1)
    first = pull(site.url, to)
    before = {p: p.stat().st_mtime_ns for p in to.rglob("*") if p.is_file()}
    for entry in item.manifest.files:
        site.store.delete(f"checkpoints/{item.id}/{entry.name}")
    assert pull(site.url, to) == first
    assert {p: p.stat().st_mtime_ns for p in to.rglob("*") if p.is_file()} == before


def test_a_damaged_copy_in_place_is_replaced(site: Site, to: Path) -> None:
    site.publish(1)
    pulled = pull(site.url, to)
    good = tree(pulled.path)
    flip(pulled.path / "model.safetensors", -1)
    assert pull(site.url, to) == pulled and tree(pulled.path) == good and clean(to)


def test_each_version_stays_beside_the_next(site: Site, to: Path) -> None:
    for step in (1, 2):
        site.publish(step)
        pull(site.url, to)
    assert sorted(p.name[-1] for p in (to / "versions").iterdir()) == ["1", "2"] and current(to)[-1] == "2"


def test_by_id_best_and_latest(site: Site, to: Path) -> None:
    items = [site.publish(step, loss_x=loss) for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5))]
    assert latest(site.url) == items[2].manifest
    assert list_checkpoints(site.url) == [i.manifest for i in reversed(items)]
    assert pull(site.url, to).manifest == items[2].manifest
    assert pull(site.url, to, checkpoint="best").manifest == items[1].manifest
    assert pull(site.url, to, checkpoint=items[0].id).manifest == items[0].manifest and current(to) == items[0].id
    assert pull(site.url, to).manifest == items[2].manifest
    with pytest.raises(ConfigError, match="no checkpoint id"):
        pull(site.url, to, checkpoint="../x")
    with pytest.raises(MissingKey):
        pull(site.url, to, checkpoint="00009-000001-0000000001")


def test_nothing_published_says_so(site: Site, to: Path) -> None:
    for ask in (lambda: pull(site.url, to), lambda: latest(site.url), lambda: pull(site.url, to, checkpoint="best")):
        with pytest.raises(MissingKey, match="no "):
            ask()
    assert list_checkpoints(site.url) == [] and not to.exists()


@pytest.mark.parametrize("broken", [None, b"", b"{garbled", "dangling"])
def test_without_a_good_latest_the_manifests_decide(site: Site, to: Path, broken: bytes | str | None) -> None:
    site.publish(1)
    item = site.publish(2)
    if isinstance(broken, bytes):
        site.store.replace("latest.json", broken)
    elif broken:
        told = json.loads(site.store.read("latest.json", 1 << 20))
        site.store.replace("latest.json", json.dumps({**told, "id": "00009-000009-0000000009"}).encode())
    else:
        site.store.delete("latest.json")
    pulled = pull(site.url, to)
    assert (pulled.manifest, pulled.fell_back) == (item.manifest, False)
    assert latest(site.url) == item.manifest


# --- wrong bytes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md", "manifest.json"])
def test_the_newest_is_bad_the_one_before_is_taken_and_said(site: Site, to: Path, name: str) -> None:
    good = site.publish(1)
    bad = site.publish(2)
    damage(site, bad, name)
    pulled = pull(site.url, to)
    assert (pulled.manifest, pulled.fell_back) == (good.manifest, True)
    assert current(to) == good.id and clean(to) and not (to / "versions" / bad.id).exists()
    with pytest.raises(CorruptError, match=bad.id):
        pull(site.url, to, checkpoint=bad.id) if name != "manifest.json" else latest(site.url)


def test_two_bad_ones_the_third_is_taken(site: Site, to: Path) -> None:
    items = [site.publish(step) for step in (1, 2, 3)]
    for item in items[1:]:
        damage(site, item, "model.safetensors")
    assert pull(site.url, to).manifest == items[0].manifest


@pytest.mark.parametrize("fault", ["truncated", "missing"])
def test_a_file_cut_or_lost_is_as_bad_as_a_wrong_one(site: Site, to: Path, fault: str) -> None:
    good, bad = site.publish(1), site.publish(2)
    key = f"checkpoints/{bad.id}/model.safetensors"
    if fault == "missing":
        site.store.delete(key)
    else:
        site.store.replace(key, site.store.read(key, 1 << 20)[:-1])
    pulled = pull(site.url, to)
    assert (pulled.manifest, pulled.fell_back) == (good.manifest, True)


def test_one_bad_transfer_is_tried_again(site: Site, to: Path) -> None:
    site.publish(1)
    item = site.publish(2)
    good = damage(site, item, "model.safetensors")

    def heal(done: int, total: int) -> None:
        site.store.replace(f"checkpoints/{item.id}/model.safetensors", good)

    pulled = pull(site.url, to, progress=heal)
    assert (pulled.manifest, pulled.fell_back) == (item.manifest, False) and clean(to)


def test_all_bad_is_an_error_and_nothing_is_put_in_place(site: Site, to: Path) -> None:
    for step in (1, 2):
        damage(site, site.publish(step), "model.safetensors")
    with pytest.raises(CorruptError, match=r"no good checkpoint to be had.*0000000002.*0000000001"):
        pull(site.url, to)
    assert not (to / "current").is_symlink() and list((to / "versions").iterdir()) == []


def test_all_bad_keeps_the_good_one_in_place(site: Site, to: Path) -> None:
    first = site.publish(1)
    pull(site.url, to)
    damage(site, site.publish(2), "model.safetensors")
    for name in ("model.safetensors", "manifest.json"):
        damage(site, first, name)
    pulled = pull(site.url, to)
    assert (pulled.manifest, pulled.fell_back) == (first.manifest, True) and current(to) == first.id


def test_falling_back_never_goes_below_what_is_in_place(site: Site, to: Path) -> None:
    items = [site.publish(1), site.publish(2)]
    pull(site.url, to)
    damage(site, site.publish(3), "model.safetensors")
    damage(site, items[1], "model.safetensors")  # the published copy of what is in place here
    pulled = pull(site.url, to)
    assert (pulled.manifest, pulled.fell_back) == (items[1].manifest, True) and current(to) == items[1].id


def test_an_older_latest_changes_nothing_unasked(site: Site, to: Path) -> None:
    first = site.publish(1)
    old = site.store.read("latest.json", 1 << 20)
    second = site.publish(2)
    pull(site.url, to)
    site.store.replace("latest.json", old)
    pulled = pull(site.url, to)
    assert (pulled.manifest, pulled.fell_back) == (second.manifest, False) and current(to) == second.id
    assert pull(site.url, to, checkpoint=first.id).manifest == first.manifest and current(to) == first.id


def test_another_runs_older_checkpoint_is_refused_unasked(tmp_path: Path, to: Path) -> None:
    ours, theirs = Site(tmp_path / "a", str(tmp_path / "pa")), Site(tmp_path / "b", str(tmp_path / "pb"))
    ours.publish(1)
    item = theirs.publish(1, tensors={"w": tensor([9.0])})  # the same id
    mine = pull(ours.url, to)
    with pytest.raises(Refused, match="pull into another folder"):
        pull(theirs.url, to)
    assert tree(mine.path) == tree(to / "current")
    pulled = pull(theirs.url, to, checkpoint=item.id)
    assert pulled.manifest.run_id == theirs.run.run_id and clean(to)
    assert load_file(to / "current" / "model.safetensors")["w"][0] == 9


# --- meanwhile --------------------------------------------------------------------------------------------------------


def test_retired_during_the_pull_the_next_one_is_taken(site: Site, to: Path) -> None:
    site.publish(1, loss_x=None)
    site.clock.now_s += 10_000
    done_once: list[SpoolItem] = []

    def meanwhile(done: int, total: int) -> None:
        if not done_once:
            done_once.append(site.publish(2, loss_x=None))
            for _ in range(2):  # the manifest, then the data, without any grace
                site.publisher.retain(keep=1, longest_pull_s=0, grace_s=0)

    pulled = pull(site.url, to, progress=meanwhile)
    assert (pulled.manifest, pulled.fell_back) == (done_once[0].manifest, False)
    assert [p.name for p in (to / "versions").iterdir()] == [done_once[0].id]


def test_a_prefix_that_moves_faster_than_the_pull_ends_in_an_error(site: Site, to: Path) -> None:
    site.publish(1, loss_x=None)

    def meanwhile(done: int, total: int) -> None:
        site.clock.now_s += 10_000
        site.publish(len(seen) + 2, loss_x=None)
        seen.append(done)
        for _ in range(2):
            site.publisher.retain(keep=1, longest_pull_s=0, grace_s=0)

    seen: list[int] = []
    with pytest.raises(AnytimedError):
        pull(site.url, to, progress=meanwhile)
    assert len(seen) <= 12 and not (to / "current").is_symlink() and clean(to)  # bounded


def test_many_pulls_at_once(site: Site, to: Path) -> None:
    site.publish(1)
    item = site.publish(2)
    barrier = threading.Barrier(4)
    results: list[Any] = []

    def go() -> None:
        barrier.wait()
        results.append(pull(site.url, to))

    threads = [threading.Thread(target=go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.manifest.id for r in results] == [item.id] * 4 and clean(to)
    assert [p.name for p in (to / "versions").iterdir()] == [item.id] and current(to) == item.id


def test_what_killed_pulls_left_of_others_is_removed_by_the_next(site: Site, to: Path) -> None:
    site.publish(1)
    for name in (".tmp-00001-000001-0000000001-abcd", ".partial-00009-000001-0000000001-0123456789abcdef.0"):
        (to / "versions" / name).mkdir(parents=True)
        (to / "versions" / name / "model.safetensors").write_bytes(b"half")
    (to / "versions" / ".partial-file").write_bytes(b"")
    (to / ".tmp-current").symlink_to("versions/none")
    pull(site.url, to)
    assert clean(to)


def test_a_running_pulls_folder_is_left_alone(site: Site, to: Path) -> None:
    site.publish(1)
    inner: list[tuple[Path, int]] = []

    def another(done: int, total: int) -> None:
        if not inner:
            path = pull(site.url, to).path
            inner.append((path, path.stat().st_ino))

    path = pull(site.url, to, progress=another).path
    assert [(path, path.stat().st_ino)] == inner and clean(to)  # the quicker one's folder: a reader may have it open


def test_a_slow_pull_does_not_flip_back_what_a_quicker_one_flipped(site: Site, to: Path) -> None:
    first = site.publish(1)
    newer: list[str] = []

    def another(done: int, total: int) -> None:
        if not newer:
            newer.append(site.publish(2).id)
            pull(site.url, to)

    assert pull(site.url, to, progress=another).manifest == first.manifest
    assert current(to) == newer[0]


def test_a_full_disk_is_said_and_leaves_what_was(site: Site, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = site.publish(1)
    pull(site.url, to)
    site.publish(2)
    for free in (0, 1 << 40):
        with monkeypatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda path, free=free: type("Usage", (), {"free": free}))
            patch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(AnytimedError, match=r"bytes free|No space left") as caught:
                pull(site.url, to)
        assert not isinstance(caught.value, CorruptError) and current(to) == first.id and clean(to)


# --- cut, and gone on with --------------------------------------------------------------------------------------------


class Cut(BaseException):
    """As a SIGINT: nothing catches it."""


def cut_at(n: int) -> Any:
    """A progress callback that ends the pull at its n-th call, from 0."""
    calls: list[int] = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) > n:
            raise Cut

    return progress


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anytimed.storage.ranges.RANGE_BYTES", 100)


@pytest.mark.usefixtures("small_ranges")
def test_a_pull_cut_anywhere_goes_on_from_there(site: Site, to: Path) -> None:
    old = site.publish(1)
    pull(site.url, to)
    item = site.spool.build(content(2))
    site.publisher.publish(item)
    chunks: list[int] = []
    pull(site.url, to.with_name("whole"), progress=lambda done, total: chunks.append(done))
    assert len(chunks) > 10 and chunks[0] == 0
    for n, had in enumerate(chunks):
        with pytest.raises(Cut):
            pull(site.url, to, progress=cut_at(n))
        assert current(to) == old.id and len(left(to)) == (had > 0)
        told: list[int] = []
        with pytest.raises(Cut):
            pull(site.url, to, progress=lambda done, total, told=told: (told.append(done), cut_at(0)(done, total)))  # type: ignore[misc, arg-type]
        assert told == [had]
        shutil.rmtree(to / "versions" / left(to)[0].name) if had else None
    for n in range(1, len(chunks)):  # the same folder, further each time: one range a pull
        with pytest.raises(Cut):
            pull(site.url, to, progress=cut_at(1))
        assert sum(p.stat().st_size for p in left(to)[0].iterdir()) == chunks[n]
    assert pull(site.url, to).manifest == item.manifest and tree(to / "current") == tree(item.path) and clean(to)


@pytest.mark.usefixtures("small_ranges")
def test_only_the_damaged_file_of_what_was_left_is_fetched_anew(site: Site, to: Path) -> None:
    item = site.publish(1)
    total = item.manifest.total_bytes

    def at_the_end(done: int, total: int) -> None:
        if done == total:
            raise Cut

    for entry in item.manifest.files:
        with pytest.raises(Cut):
            pull(site.url, to, progress=at_the_end)
        flip(left(to)[0] / entry.name, entry.size // 2)
        told: list[int] = []
        pulled = pull(site.url, to, progress=lambda done, total, told=told: told.append(done))  # type: ignore[misc]
        assert (pulled.manifest, pulled.fell_back) == (item.manifest, False) and clean(to)
        assert told[:2] == [total, total - entry.size] and told[-1] == total
        shutil.rmtree(to)


@pytest.mark.usefixtures("small_ranges")
def test_what_is_left_belongs_to_one_manifest(tmp_path: Path, to: Path) -> None:
    ours, theirs = Site(tmp_path / "a", str(tmp_path / "pa")), Site(tmp_path / "b", str(tmp_path / "pb"))
    ours.publish(1)
    item = theirs.publish(1)  # the same id, the same bytes but for the manifest
    with pytest.raises(Cut):
        pull(ours.url, to, progress=cut_at(3))
    (folder,) = left(to)
    told: list[int] = []
    assert pull(theirs.url, to, progress=lambda done, total: told.append(done)).manifest == item.manifest
    assert told[0] == 0 and not folder.exists()


@pytest.mark.usefixtures("small_ranges")
def test_what_nobody_holds_goes_what_somebody_holds_stays(site: Site, to: Path) -> None:
    first = site.publish(1)
    with pytest.raises(Cut):
        pull(site.url, to, progress=cut_at(3))
    (folder,) = left(to)
    site.publish(2)

    def another(done: int, total: int) -> None:
        if done == total:
            assert folder.exists()  # held by the pull around this one
            pull(site.url, to)
            assert folder.exists()

    assert pull(site.url, to, checkpoint=first.id, progress=another).manifest == first.manifest
    assert clean(to)
    with pytest.raises(Cut):
        pull(site.url, to, checkpoint=site.publish(3).id, progress=cut_at(3))
    assert len(left(to)) == 1
    pull(site.url, to, checkpoint=first.id)
    assert clean(to)


@pytest.mark.usefixtures("small_ranges")
def test_free_space_is_asked_for_what_is_missing(site: Site, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = site.publish(1)
    with pytest.raises(Cut):
        pull(site.url, to, progress=cut_at(4))
    had = sum(p.stat().st_size for p in left(to)[0].iterdir())
    missing = item.manifest.total_bytes - had
    free = [missing - 1]
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free[0]}))
    with pytest.raises(AnytimedError, match=f"{missing - 1} bytes free, {missing} of .* are missing"):
        pull(site.url, to)
    assert sum(p.stat().st_size for p in left(to)[0].iterdir()) == had  # kept
    free[0] = missing
    assert pull(site.url, to).manifest == item.manifest


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
@pytest.mark.usefixtures("small_ranges")
def test_after_a_failure_of_the_disk_nothing_is_gone_on_with(
    site: Site, to: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    item = site.publish(1)
    with pytest.raises(Cut):
        pull(site.url, to, progress=cut_at(3))

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with pytest.raises(AnytimedError, match=os.strerror(number)):
            pull(site.url, to)
    assert clean(to)
    assert pull(site.url, to).manifest == item.manifest


def test_a_damaged_copy_gives_way_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for native in (True, False):
        one.mkdir()
        (one / "new").touch()
        other.mkdir()
        (other / "old").touch()
        with monkeypatch.context() as patch:
            if native:
                patch.setattr(Path, "rename", None)  # not needed
            else:
                patch.setattr(ctypes, "CDLL", lambda *_, **__: object())
            exchange(one, other)
        assert (one / "old").exists() and (other / "new").exists()
        for path in (one, other):
            shutil.rmtree(path)


# --- strangers --------------------------------------------------------------------------------------------------------


def publish_hostile(site: Site, changes: dict[str, Any]) -> str:
    """A manifest as an attacker would write it, consistent with latest.json."""
    item = site.spool.build(content(5))
    site.publisher.publish(item)
    told = {**json.loads(item.data), **changes}
    data = json.dumps(told).encode()
    key = f"checkpoints/{item.id}/manifest.json"
    site.store.replace(key, data)
    pointer = json.loads(site.store.read("latest.json", 1 << 20))
    pointer["manifest_sha256"] = hashlib.sha256(data).hexdigest()
    site.store.replace("latest.json", json.dumps(pointer).encode())
    return item.id


SHA = hashlib.sha256(b"evil").hexdigest()
HOSTILE_NAMES = [
    "../x",
    "../../current/x",
    "/tmp/evil",
    "a\0b",
    "..\\x",
    "a/b",
    ".lock",
    "manifest.json",
    "",
    "current\n",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_never_touch_the_disk(site: Site, to: Path, tmp_path: Path, name: str) -> None:
    good = site.publish(1)
    pull(site.url, to)
    before = tree(tmp_path / "model")
    bad = publish_hostile(site, {"files": [{"name": name, "size": 4, "sha256": SHA}]})
    pulled = pull(site.url, to)
    assert (pulled.manifest, pulled.fell_back) == (good.manifest, True)
    assert tree(tmp_path / "model") == before and not (to / "versions" / bad).exists()
    with pytest.raises(CorruptError, match="no valid checkpoint manifest"):
        pull(site.url, to, checkpoint=bad)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": [{"name": "a", "size": 4, "sha256": SHA}] * 2},
        {"files": [{"name": f"f{i}", "size": 0, "sha256": SHA} for i in range(10_001)]},
        {"id": "00001-000001-0000000001"},
        {"id": "../../../etc"},
    ],
    ids=["duplicate", "too many", "another id", "a path as id"],
)
def test_hostile_manifests_are_passed_over(site: Site, to: Path, changes: dict[str, Any]) -> None:
    good = site.publish(1)
    publish_hostile(site, changes)
    pulled = pull(site.url, to)
    assert (pulled.manifest, pulled.fell_back) == (good.manifest, True)


def test_a_hostile_size_is_capped(site: Site, to: Path) -> None:
    publish_hostile(site, {"files": [{"name": "a", "size": 2**49, "sha256": SHA}]})
    with pytest.raises(CorruptError, match="allowed are"):
        pull(site.url, to)
    site.publish(6)
    with pytest.raises(CorruptError, match="allowed are 10"):
        pull(site.url, to, max_bytes=10)
    assert not to.exists()


def test_a_newer_format_is_not_passed_over_in_silence(site: Site, to: Path) -> None:
    site.publish(1)
    publish_hostile(site, {"format_version": 2})
    with pytest.raises(NewerFormat, match="pip install -U anytimed"):
        pull(site.url, to)
    assert not (to / "current").is_symlink()


def test_a_pointer_out_of_the_prefix_is_not_followed(site: Site, to: Path) -> None:
    item = site.publish(1)
    pointer = json.loads(site.store.read("latest.json", 1 << 20))
    site.store.replace("latest.json", json.dumps({**pointer, "id": "../../secrets"}).encode())
    assert pull(site.url, to).manifest.id == item.id


def test_a_folder_called_current_is_not_replaced(site: Site, to: Path) -> None:
    site.publish(1)
    (to / "current").mkdir(parents=True)
    with pytest.raises(ConfigError, match="not a symlink"):
        pull(site.url, to)
    assert (to / "current").is_dir()


def test_a_plain_folder_and_a_file_url_are_the_same(tmp_path: Path, to: Path) -> None:
    site = Site(tmp_path / "w", f"file://{tmp_path}/published")
    item = site.publish(1)
    Publisher(site.store).repair()
    assert pull(str(tmp_path / "published"), to).manifest.id == item.id
    assert CheckpointId.parse(item.id) == (1, 1, 1)


def test_needs_no_torch_and_nothing_of_the_writers_side() -> None:
    heavy = ("torch", "transformers", "s3fs", "anytimed.storage.spool")
    code = f"import sys, anytimed.storage.pull; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"
