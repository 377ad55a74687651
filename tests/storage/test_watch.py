"""Following a published prefix: what is given out and what never is, what a look costs, what goes wrong meanwhile."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import anytimed
from anytimed.contracts import AnytimedError, ConfigError, Refused
from anytimed.storage import watch as watching
from anytimed.storage.manifest import CheckpointId
from anytimed.storage.store import MissingKey
from anytimed.storage.target import Target
from anytimed.storage.watch import Checkpoint, Watcher
from tests.faults import servers
from tests.storage.material import Site, flip, tree
from tests.storage.web_server import WebServer


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "writer", str(tmp_path / "published"))


def versions(to: Path) -> list[int]:
    """The steps of the versions that lie in a consumer's folder."""
    return sorted(CheckpointId.parse(p.name).step for p in (to / "versions").iterdir() if p.name[0] != ".")


def test_the_newest_comes_first_then_each_newer_one(tmp_path: Path, url: str) -> None:
    site = Site(tmp_path / "writer", url)
    for step in (1, 2):
        site.publish(step)
    given = []
    for checkpoint in anytimed.watch(url, every_s=0.02, timeout_s=0.5):
        given.append((checkpoint.step, checkpoint.tokens, checkpoint.path))
        if checkpoint.step < 4:
            site.publish(checkpoint.step + 1)
    assert given == [(2, 200, None), (3, 300, None), (4, 400, None)]


def test_each_is_in_place_before_it_is_given_and_old_versions_go(tmp_path: Path, site: Site) -> None:
    to, stop = tmp_path / "model", threading.Event()
    item = site.publish(1)
    given: list[Checkpoint] = []
    for checkpoint in anytimed.watch(site.url, to=to, every_s=0.02, keep=2, stop=stop):
        assert checkpoint.path == to / "versions" / checkpoint.id
        assert (to / "current").resolve() == checkpoint.path.resolve()
        assert tree(checkpoint.path).keys() == {f.name for f in checkpoint.manifest.files} | {"manifest.json"}
        given.append(checkpoint)
        if checkpoint.step == 4:
            stop.set()
        else:
            site.publish(checkpoint.step + 1)
    assert [c.step for c in given] == [1, 2, 3, 4] and given[0].id == item.id
    assert versions(to) == [3, 4]


def test_a_look_that_finds_nothing_new_is_one_small_request(tmp_path: Path, site: Site) -> None:
    site.publish(1)
    asked: list[str] = []
    with WebServer(tmp_path / "published") as web:
        web.before = asked.append
        for to in (None, tmp_path / "model"):
            watcher = Watcher(web.url, to=to)
            first = watcher.look()
            assert first is not None and first.step == 1
            asked.clear()
            assert [watcher.look() for _ in range(5)] == [None] * 5
            assert asked == ["/latest.json"] * 5
        site.publish(2)
        asked.clear()
        found = watcher.look()
        assert found is not None and found.step == 2
        files = [f"/checkpoints/{found.id}/{f.name}" for f in found.manifest.files]
        # The change costs the pointer three times and the manifest twice, and each file once.
        assert sorted(set(asked)) == sorted({"/latest.json", f"/checkpoints/{found.id}/manifest.json", *files})
        assert [asked.count(file) for file in files] == [1] * len(files) and len(asked) <= len(files) + 5


def test_on_s3_a_look_is_one_get_too(tmp_path: Path) -> None:
    with servers.rclone(tmp_path) as server:
        site = Site(tmp_path / "writer", f"s3://{servers.BUCKET}/published", server.options())
        site.publish(1)
        watcher = Watcher(site.url, storage_options=site.options)
        assert watcher.look() is not None
        fs = watcher._store._place.fs  # type: ignore[union-attr]
        plainly, asked = fs._call_s3, []

        async def counted(method: str, *arguments: Any, **named: Any) -> Any:
            asked.append((method, named.get("Key")))
            return await plainly(method, *arguments, **named)

        fs._call_s3 = counted
        assert [watcher.look() for _ in range(3)] == [None] * 3
        assert asked == [("get_object", "published/latest.json")] * 3
        site.publish(2)
        found = watcher.look()
        assert found is not None and found.step == 2


def test_it_never_goes_back_and_refuses_another_run(tmp_path: Path, site: Site) -> None:
    first, second = site.publish(1), site.publish(2)
    watcher = Watcher(site.url)
    assert (found := watcher.look()) is not None and found.id == second.id
    kept = site.store.read("latest.json", 1 << 20)
    site.store.delete("latest.json")
    site.store.delete(f"checkpoints/{second.id}/manifest.json")
    assert watcher.look() is None and watcher.problem is None
    site.store.replace("latest.json", kept)  # names what is gone: the older one is all there is
    assert watcher.look() is None and watcher.problem is None
    shutil.rmtree(tmp_path / "published")
    other = Site(tmp_path / "other", site.url)
    assert (item := other.publish(7)).id != second.id and item.manifest.order == first.manifest.order
    with pytest.raises(Refused, match=r"another run publishes here\. Start again"):
        watcher.look()


def test_it_waits_while_nothing_is_published(tmp_path: Path, site: Site) -> None:
    for to in (None, tmp_path / "model"):
        watcher = Watcher(site.url, to=to)
        assert watcher.look() is None and watcher.waiting and watcher.problem is None
    site.publish(1)
    assert (found := watcher.look()) is not None and found.step == 1 and not watcher.waiting


def test_an_outage_is_told_once_slows_the_looks_down_and_ends(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watching, "WAITING_S", 0.2)
    caplog.set_level("INFO", "anytimed")
    site.publish(1)
    down = threading.Event()

    def before(_path: str) -> None:
        if down.is_set():
            raise ConnectionAbortedError

    told: list[AnytimedError] = []
    with WebServer(tmp_path / "published") as web:
        web.before = before
        stop = threading.Event()
        watched = anytimed.watch(web.url, every_s=0.05, on_error=told.append, stop=stop)
        assert next(watched).step == 1
        down.set()
        site.publish(2)
        threading.Timer(2.0, down.clear).start()
        assert next(watched).step == 2
    assert len(told) >= 2 and all(web.url in str(error) for error in told)
    lines = [r.getMessage() for r in caplog.records if r.name == watching.__name__]
    assert [("tried again" in line, "well again" in line) for line in lines] == [(True, False), (False, True)]


def test_the_pauses_grow_and_stay_bounded(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.publish(1)
    watcher = Watcher(site.url, every_s=2.0)
    assert watcher.look() is not None and 1.8 <= watcher.pause_s() <= 2.2
    monkeypatch.setattr(watcher._store, "read", lambda *_: (_ for _ in ()).throw(AnytimedError("down")))
    pauses = []
    for _ in range(60):
        assert watcher.look() is None
        pauses.append(watcher.pause_s())
    assert 2.0 <= pauses[0] <= 4.0 and 4.0 <= pauses[1] <= 8.0
    assert all(60.0 <= pause <= watching.LONGEST_PAUSE_S for pause in pauses[6:])
    slow = Watcher(site.url, every_s=900.0)
    slow._failures = 9
    assert 450.0 <= slow.pause_s() <= 900.0


def test_what_is_in_place_is_given_while_the_store_is_down_at_the_start(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "WAITING_S", 0.2)
    to = tmp_path / "model"
    item = site.publish(1)
    anytimed.pull(site.url, to)
    with WebServer(tmp_path / "published") as web:
        closed = web.url
    watcher = Watcher(closed, to=to)
    assert (found := watcher.look()) is not None and found.id == item.id and watcher.problem is not None
    assert watcher.look() is None
    flip(to / "versions" / item.id / "model.safetensors", -1)
    assert Watcher(closed, to=to).look() is None


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_a_damaged_newest_is_passed_over_tried_seldom_and_the_next_one_taken(
    tmp_path: Path, site: Site, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "model"
    good = site.publish(1)
    watcher = Watcher(site.url, to=to)
    assert (found := watcher.look()) is not None and found.id == good.id
    bad = site.publish(2)
    flip(tmp_path / "published/checkpoints" / bad.id / name, -3)
    read: list[str] = []
    plainly = watcher._store.read

    def counted(key: str, most: int) -> bytes:
        read.append(key)
        return plainly(key, most)

    monkeypatch.setattr(watcher._store, "read", counted)
    assert watcher.look() is None and (to / "current").readlink().name == good.id
    read.clear()
    assert [watcher.look() for _ in range(3)] == [None] * 3 and read == ["latest.json"] * 3
    assert watching._DAMAGED_AGAIN_S <= watcher._damaged_pause_s <= watching._DAMAGED_SELDOM_S
    # Mended, as after a bad copy: it is taken at a later look, though latest.json is what it was.
    flip(tmp_path / "published/checkpoints" / bad.id / name, -3)
    watcher._damaged_again_at = time.monotonic()
    assert (found := watcher.look()) is not None and found.id == bad.id and not found.fell_back
    assert watcher._damaged_pause_s == 0
    # Damaged from the start: the one before is the first that is given.
    flip(tmp_path / "published/checkpoints" / bad.id / name, -3)
    assert (found := Watcher(site.url, to=tmp_path / "another").look()) is not None and found.id == good.id
    third = site.publish(3)
    assert (found := watcher.look()) is not None and found.id == third.id


def test_stop_ends_a_pull_and_the_next_one_goes_on(tmp_path: Path, site: Site) -> None:
    item = site.publish(1)
    to, stop = tmp_path / "model", threading.Event()
    with WebServer(tmp_path / "published") as web:

        def before(path: str) -> None:
            if path.endswith("tokenizer.json"):
                stop.set()

        web.before = before
        assert list(anytimed.watch(web.url, to=to, stop=stop)) == []
        assert not (to / "current").exists() and list((to / "versions").glob(".partial-*"))
        web.before, web.asked = lambda _: None, []
        assert next(iter(anytimed.watch(web.url, to=to))).id == item.id
        assert "model.safetensors" not in {name for name, _, _ in web.asked}


def test_bad_usage_is_said_at_once(tmp_path: Path) -> None:
    for call in (
        lambda: anytimed.watch("nosuch://bucket"),
        lambda: anytimed.watch(str(tmp_path), every_s=0),
        lambda: anytimed.watch(str(tmp_path), to=tmp_path, keep=0),
    ):
        with pytest.raises(ConfigError):
            call()


# --- what stays in the folder -----------------------------------------------------------------------------------------


def test_what_is_kept(tmp_path: Path, site: Site) -> None:
    to = tmp_path / "model"
    items = [site.publish(step) for step in range(1, 7)]
    assert Target(to).retain(1) == []
    for item in items:
        anytimed.pull(site.url, to, checkpoint=item.id)
    anytimed.pull(site.url, to, checkpoint=items[1].id)  # an older one in place
    (to / "versions" / "mine").mkdir()
    (to / "versions" / f".tmp-{items[0].id}" / "left").mkdir(parents=True)
    assert Target(to).retain(2, {items[2].id}) == [items[3].id, items[0].id]
    (to / "versions" / "mine").rmdir()
    assert versions(to) == [2, 3, 5, 6] and not [p for p in to.rglob(".*") if p.name != ".lock"]
    assert (to / "current").resolve().is_dir()


def test_current_never_leads_to_what_was_just_removed(tmp_path: Path, site: Site) -> None:
    items = [site.publish(step) for step in (1, 2)]
    to = tmp_path / "model"
    for item in reversed(items):
        anytimed.pull(site.url, to, checkpoint=item.id)
    target = Target(to)
    shutil.rmtree(target.version(items[1].manifest))  # by somebody's retention, between its install and the flip
    with pytest.raises(MissingKey, match="removed meanwhile"):
        target._flip(items[1].manifest, asked=False)
    assert (to / "current").readlink().name == items[0].id


def test_watching_beside_a_writer_gives_only_whole_ones_in_order(tmp_path: Path, site: Site) -> None:
    def write() -> None:
        for step in range(1, 26):
            site.publish(step)

    writer = threading.Thread(target=write)
    writer.start()
    given, open_files = [], []
    for checkpoint in anytimed.watch(site.url, to=tmp_path / "model", every_s=0.01, timeout_s=2.0, keep=2):
        assert checkpoint.path is not None
        open_files.append(len(list(Path("/proc/self/fd").iterdir())))
        assert b"\0" in tree(checkpoint.path)["model.safetensors"]
        given.append(checkpoint.step)
    writer.join()
    assert max(open_files) <= open_files[0] + 8  # the writer's own come and go
    assert given[-1] == 25 and all(a < b for a, b in itertools.pairwise(given)) and len(given) > 1
