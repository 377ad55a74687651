"""Building and publishing: what is refused, in which order things appear, what a crash leaves, what retention takes."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from anytimed.contracts import Refused
from anytimed.storage import tensors
from anytimed.storage.exports import ExportFailed, ExportRefused, Publisher, Spool
from anytimed.storage.manifest import Manifest, Pointer
from anytimed.storage.store import Store, StoreError
from tests.storage import faults
from tests.storage.material import Clock, Site, acquired, content, evaluation, flip, tensor, tree


@pytest.fixture
def site(tmp_path: Path, url: str) -> Site:
    return Site(tmp_path, url)


@pytest.fixture
def local_site(tmp_path: Path, local_url: str) -> Site:
    return Site(tmp_path, local_url)


# --- the spool --------------------------------------------------------------------------------------------------------


def test_an_export_is_a_hugging_face_folder(local_site: Site) -> None:
    item = local_site.spool.build(content(3, title="Tiny"))
    assert item.id == "00001-000001-0000000003" and item.path == local_site.run.spool / item.id
    own = {"manifest.json", "manifest.sha256"}  # the latter stays in the spool
    assert {f.name for f in item.manifest.files} | own == {p.name for p in item.path.iterdir()}
    bits = tensors.read_header(item.path / "model.safetensors")
    assert bits.metadata == {"format": "pt"} and bits.tensors["model.norm.weight"].dtype == "BF16"
    assert json.loads((item.path / "config.json").read_text())["model_type"] == "llama"
    card = (item.path / "README.md").read_text()
    for said in ("# Tiny", item.id, "step 3", "300 tokens", "3.0000", "anytimed pull", "from_pretrained", "| books |"):
        assert said in card
    told = Manifest.from_bytes(item.data, "here")
    assert told == item.manifest and told.evaluation == evaluation(3.0, step=3)
    assert (told.tokens, told.optimizer["name"], told.run_id) == (300, "sf_normuon", local_site.run.run_id)


def test_large_weights_are_sharded_as_hugging_face_does(tmp_path: Path) -> None:
    named = {f"layer.{i}": tensor(np.full(100, i)) for i in range(7)}  # 400 bytes each
    run = acquired(tmp_path / "run")
    item = Spool(run, max_shard_bytes=1000).build(content(1, tensors=named))
    shards = sorted(p.name for p in item.path.glob("*.safetensors"))
    assert shards == [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
    index = json.loads((item.path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2800}
    for name, shard in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(item.path / shard)[name], np.full(100, int(name[-1]), np.float32))
    assert len(index["weight_map"]) == 7


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_weights_that_are_not_finite_are_refused_by_name(local_site: Site, dtype: str) -> None:
    values = np.ones((4, 4))
    values[2, 1] = np.nan
    with pytest.raises(
        ExportRefused, match=rf"step 5: x is not finite: model.w {dtype} \(4, 4\), first at flat index 9"
    ):
        local_site.spool.build(content(5, tensors={"model.w": tensor(values, dtype)}))
    assert list(local_site.run.spool.iterdir()) == []


def test_an_evaluation_that_is_not_finite_is_flagged_not_published(local_site: Site) -> None:
    told = local_site.spool.build(content(1, loss_x=float("nan"), flags=["replay is not exact"])).manifest
    assert told.evaluation is None and told.flags == ["replay is not exact", "evaluation not finite"]


@pytest.mark.parametrize("files", [{"../x": b""}, {"manifest.json": b""}, {"a": b"", "A": b""}])
def test_files_that_no_pull_would_take_are_not_built(local_site: Site, files: dict[str, bytes]) -> None:
    with pytest.raises((ExportRefused, ExportFailed)):
        local_site.spool.build(content(1, files=files))
    assert list(local_site.run.spool.iterdir()) == [] and not (local_site.run.path / "x").exists()


def test_a_failing_disk_leaves_no_half_export(local_site: Site) -> None:
    with faults.at_call(0, faults.error(0)) as counted:
        local_site.spool.discard(local_site.spool.build(content(1)))
    for n in range(1, counted.calls + 1):
        with faults.at_call(n, faults.error(errno.ENOSPC)):
            try:
                local_site.spool.build(content(1))
            except ExportFailed as error:
                assert "No space left" in str(error)
        for item in local_site.spool.pending():
            assert tree(item.path).keys() == {f.name for f in item.manifest.files} | {"manifest.json"}
            local_site.spool.discard(item)
    local_site.run.release()
    local_site.run.acquire()
    assert list(local_site.run.spool.iterdir()) == []


def test_the_spool_survives_a_restart_in_order(local_site: Site) -> None:
    built = [local_site.spool.build(content(step)) for step in (30, 20)]
    local_site.run.release()
    local_site.run.acquire()
    (local_site.run.spool / "a person's").mkdir()
    spool = Spool(local_site.run)
    built.append(spool.build(content(10)))
    assert [item.id for item in spool.pending()] == [item.id for item in built]
    assert [item.manifest.order for item in built] == [(1, 1), (1, 2), (2, 1)]
    spool.discard(built[0])
    spool.discard(built[0])
    assert [item.id for item in spool.pending()] == [item.id for item in built[1:]]


def test_a_spooled_export_that_was_damaged_is_dropped(local_site: Site) -> None:
    first, second = (local_site.spool.build(content(step)) for step in (1, 2))
    flip(first.path / "model.safetensors", -1)
    assert [item.id for item in Spool(local_site.run).pending()] == [second.id]
    assert not first.path.exists()


# --- publishing -------------------------------------------------------------------------------------------------------


def test_published_is_what_was_built(site: Site) -> None:
    item = site.spool.build(content(4))
    told: list[tuple[int, int]] = []
    site.publisher.publish(item, lambda done, total: told.append((done, total)))
    assert told[-1] == (item.manifest.total_bytes, item.manifest.total_bytes) and told == sorted(told)
    prefix = f"checkpoints/{item.id}"
    for name, data in tree(item.path).items():
        assert site.store.read(f"{prefix}/{name}", 1 << 20) == data
    latest = Pointer.from_bytes(site.store.read("latest.json", 1 << 20), "here")
    assert latest == Pointer.to(item.manifest, item.data)
    assert (latest.id, latest.step, latest.tokens, latest.evaluation) == (item.id, 4, 400, evaluation(3.0, step=4))
    before = site.store.list()
    site.publisher.publish(item)  # again, as after a lost answer
    Publisher(site.store).publish(item)
    assert site.store.list() == before


def test_a_local_store_takes_the_files_without_a_copy(local_site: Site) -> None:
    item = local_site.spool.build(content(1))
    local_site.publisher.publish(item)
    published = Path(local_site.url) / "checkpoints" / item.id / "model.safetensors"
    assert published.samefile(item.path / "model.safetensors")


def test_killed_before_any_request_readers_see_the_old_or_the_new(tmp_path: Path, url: str) -> None:
    site = Site(tmp_path, url)
    old = site.publish(1)
    verbs = ("put_file", "create", "swap", "replace", "read_versioned", "download", "delete", "list")
    n = 0
    finished = False
    while not finished:
        n += 1
        item = site.spool.build(content(n + 1, loss_x=3.0 - n / 100))
        with faults.cut_at(n, verbs):
            try:
                Publisher(site.store, clock=site.clock).publish(item)
                finished = True
            except faults.Cut:
                pass
        assert site.pointed() in (old.id, item.id)
        if site.store.exists(f"checkpoints/{item.id}/manifest.json"):  # committed: all of it is there
            for entry in item.manifest.files:
                assert len(site.store.read(f"checkpoints/{item.id}/{entry.name}", 1 << 20)) == entry.size
            Publisher(site.store, clock=site.clock).repair()
            assert site.pointed() == item.id
        else:
            Publisher(site.store, clock=site.clock).repair()
            assert site.pointed() == old.id
        Publisher(site.store, clock=site.clock).publish(item)  # the next start does it again from the spool
        assert site.pointed() == site.pointed("best.json") == item.id
        old = item
    assert n > 2 * len(item.manifest.files) + 4


def test_the_manifest_comes_last_and_only_while_the_prefix_is_ours(site: Site) -> None:
    item = site.spool.build(content(1))

    asked = 0

    def lost() -> None:
        nonlocal asked
        asked += 1
        if asked == 1:  # before anything was sent; once more right before the commit point
            return
        present = {key.rsplit("/")[-1] for key in site.store.list(f"checkpoints/{item.id}")}
        assert present == {f.name for f in item.manifest.files}
        raise Refused("another writer")

    with pytest.raises(Refused, match="another writer"):
        site.publisher.publish(item, check=lost)
    assert not site.store.exists(f"checkpoints/{item.id}/manifest.json") and not site.store.exists("latest.json")


def test_two_runs_on_one_prefix_the_second_is_refused_and_harms_nothing(tmp_path: Path, url: str) -> None:
    first, second = Site(tmp_path / "a", url), Site(tmp_path / "b", url)
    item = first.publish(1)
    stored = {key: first.store.read(key, 1 << 20) for key in first.store.list()}
    with pytest.raises(Refused, match=f"other bytes under our id {item.id}") as caught:
        second.publish(1, tensors={"w": tensor([2.0])})
    assert caught.value.exit_code == 3
    assert {key: first.store.read(key, 1 << 20) for key in first.store.list()} == stored


def test_a_manifest_that_appears_during_the_upload_is_a_fence(site: Site) -> None:
    item = site.spool.build(content(1))
    key = f"checkpoints/{item.id}/manifest.json"
    theirs = item.data.replace(site.run.run_id.encode(), b"another run")
    with pytest.raises(Refused, match="another writer published other bytes"):
        site.publisher.publish(item, check=lambda: site.store.replace(key, theirs))
    assert site.store.read(key, 1 << 20) == theirs and not site.store.exists("latest.json")


def test_a_manifest_that_is_nobody_s_is_written_again(site: Site) -> None:
    item = site.spool.build(content(1))
    key = f"checkpoints/{item.id}/manifest.json"
    site.store.replace(key, b"\0" + item.data[1:])
    with pytest.raises(StoreError, match="holds other bytes than were sent"):
        site.publisher.publish(item)
    site.publisher.publish(item)
    assert site.store.read(key, 1 << 20) == item.data and site.pointed() == item.id


def test_an_answer_lost_at_every_put_is_healed_by_doing_it_again(tmp_path: Path) -> None:
    site = Site(tmp_path, f"objects://{tmp_path.name}/p", {"lose_answers": True}, deadline_s=0.5)
    item = site.spool.build(content(1))
    for _ in range(2 * len(item.manifest.files)):
        try:
            site.publisher.publish(item)
            break
        except StoreError:
            site.store = Store(site.url)  # the connection is better now
            site.publisher = Publisher(site.store, clock=site.clock)
    assert site.pointed() == item.id


def test_latest_never_moves_back(site: Site) -> None:
    late = site.spool.build(content(10))
    early = site.spool.build(content(20))
    site.publisher.publish(early)
    site.publisher.publish(late)  # (1, 1) after (1, 2): a spool emptied in another order
    assert site.pointed() == early.id
    site.run.release()
    site.run.acquire()
    after = Spool(site.run, clock=site.clock).build(content(5))  # a rollback: lower step, higher term
    site.publisher.publish(after)
    assert site.pointed() == after.id == "00002-000001-0000000005"


def test_best_is_the_lowest_loss_on_the_same_holdout(site: Site) -> None:
    best = []
    for step, loss, holdout in [
        (1, 3.0, "a"),
        (2, 2.5, "a"),
        (3, 2.7, "a"),
        (4, 2.9, "b"),
        (5, None, "b"),
        (6, 2.8, "b"),
    ]:
        told = None if loss is None else evaluation(loss, holdout=holdout * 64)
        site.publish(step, evaluation=told)
        best.append(int(site.pointed("best.json").split("-")[2]))
    assert best == [1, 2, 2, 4, 4, 6]


@pytest.mark.parametrize(
    "latest", [None, b"", b"{garbled", b'{"format_version": 1, "id": "../../x"}', "dangling", "behind"]
)
def test_repair_points_latest_at_the_highest_manifest(site: Site, latest: bytes | str | None) -> None:
    first, second = site.publish(1), site.publish(2)
    match latest:
        case None:
            site.store.delete("latest.json")
        case "dangling":
            ghost = second.manifest.model_copy(update={"id": "00009-000009-0000000009"})
            site.store.replace("latest.json", Pointer.to(ghost, b"x").to_bytes())
        case "behind":
            site.store.replace("latest.json", Pointer.to(first.manifest, first.data).to_bytes())
        case bytes():
            site.store.replace("latest.json", latest)
    Publisher(site.store).repair()
    assert Pointer.from_bytes(site.store.read("latest.json", 1 << 20), "here") == Pointer.to(
        second.manifest, second.data
    )


def test_repair_passes_over_a_manifest_that_cannot_be_read(site: Site) -> None:
    first = site.publish(1)
    second = site.publish(2)
    site.store.delete("latest.json")
    site.store.replace(f"checkpoints/{second.id}/manifest.json", b"{")
    Publisher(site.store).repair()
    assert site.pointed() == first.id


def test_repair_of_an_empty_prefix_does_nothing(site: Site) -> None:
    site.publisher.repair()
    assert site.store.list() == [] and site.publisher.latest_term() == 0


def test_latest_term_counts_unfinished_uploads_too(site: Site) -> None:
    site.publish(1)
    assert site.publisher.latest_term() == 1
    site.store.replace("checkpoints/00007-000001-0000000001/model.safetensors", b"half")
    site.store.replace("checkpoints/someone-elses/file", b"")
    assert site.publisher.latest_term() == 7


# --- retention --------------------------------------------------------------------------------------------------------


def ids(site: Site, name: str) -> list[int]:
    return sorted(int(k.split("/")[1][-3:]) for k in site.store.list() if k.endswith(f"/{name}"))


def test_manifests_go_first_and_data_after_the_grace(site: Site) -> None:
    for step in range(1, 6):
        site.publish(step, loss_x=2.0 + step)
        site.clock.now_s += 10_000
    gone = site.publisher.retain(keep=2, grace_s=600)
    assert [int(i[-3:]) for i in gone] == [2, 3]  # 1 is the best
    assert ids(site, "manifest.json") == [1, 4, 5] and ids(site, "model.safetensors") == [1, 2, 3, 4, 5]
    site.clock.now_s += 599
    assert site.publisher.retain(keep=2, grace_s=600) == []
    assert ids(site, "model.safetensors") == [1, 2, 3, 4, 5]
    site.clock.now_s += 1
    site.publisher.retain(keep=2, grace_s=600)
    assert ids(site, "model.safetensors") == ids(site, "manifest.json") == [1, 4, 5]
    assert not [k for k in site.store.list() if "retired" in k]


def test_a_wall_clock_that_jumps_ends_no_pull(site: Site) -> None:
    """The grace is counted by the writer's own clock since it saw the manifest gone; a restart counts anew."""
    own = Clock(0.0)
    for step in (1, 2):
        site.publish(step, loss_x=None)
    site.clock.now_s += 10_000
    publisher = Publisher(site.store, clock=site.clock, monotonic=own)
    publisher.retain(keep=1, longest_pull_s=0, grace_s=600)
    for jump_s in (864_000, -7200, -864_000):
        site.clock.now_s += jump_s
        publisher.retain(keep=1, longest_pull_s=0, grace_s=600)
        assert ids(site, "model.safetensors") == [1, 2]
    restarted = Publisher(site.store, clock=site.clock, monotonic=own)
    for passed_s, there in ((0, [1, 2]), (599, [1, 2]), (1, [2])):
        own.now_s += passed_s
        restarted.retain(keep=1, longest_pull_s=0, grace_s=600)
        assert ids(site, "model.safetensors") == there


def test_the_young_stay_for_those_who_are_pulling_them(site: Site) -> None:
    for step in range(1, 5):
        site.publish(step, loss_x=None)
        site.clock.now_s += 100
    assert [int(i[-3:]) for i in site.publisher.retain(keep=1, longest_pull_s=250)] == [1, 2]


def test_what_never_got_a_manifest_goes_after_the_grace(site: Site) -> None:
    site.publish(1)
    half = "checkpoints/00001-000009-0000000009/model.safetensors"
    site.store.replace(half, b"half an upload")
    site.store.replace("checkpoints/someone-elses/file", b"")
    for wait_s, there in ((0, True), (599, True), (1, False)):
        site.clock.now_s += wait_s
        site.publisher.retain(keep=1, grace_s=600)
        assert site.store.exists(half) is there
    assert site.store.exists("checkpoints/someone-elses/file")
    assert ids(site, "manifest.json") == [1] and not [k for k in site.store.list() if "retired" in k]


def test_an_upload_taken_up_again_is_not_swept(site: Site) -> None:
    item = site.spool.build(content(1))
    site.store.put_file(item.path / "model.safetensors", f"checkpoints/{item.id}/model.safetensors")
    site.publisher.retain(keep=1, grace_s=600)
    site.publisher.publish(item)
    site.clock.now_s += 10_000
    site.publisher.retain(keep=1, grace_s=600)
    assert ids(site, "manifest.json") == ids(site, "model.safetensors") == [1]
    assert not [k for k in site.store.list() if "retired" in k]


def test_a_manifest_that_cannot_be_read_is_left_alone(site: Site) -> None:
    for step in range(1, 4):
        site.publish(step, loss_x=None)
        site.clock.now_s += 10_000
    key = f"checkpoints/{'00001-000001-0000000001'}/manifest.json"
    site.store.replace(key, site.store.read(key, 1 << 20).replace(b'"format_version": 1', b'"format_version": 2'))
    Publisher(site.store, clock=site.clock).retain(keep=1, grace_s=0)
    Publisher(site.store, clock=site.clock).retain(keep=1, grace_s=0)
    assert ids(site, "manifest.json") == ids(site, "model.safetensors") == [1, 3]


def test_retention_cut_anywhere_goes_on_later(tmp_path: Path, url: str) -> None:
    site = Site(tmp_path, url)
    for step in range(1, 4):
        site.publish(step, loss_x=None)
        site.clock.now_s += 10_000
    cuts = 0
    for n in range(1, 60):
        with faults.cut_at(n, ("replace", "delete", "read")):
            try:
                Publisher(site.store, clock=site.clock).retain(keep=1, grace_s=0)
            except faults.Cut:
                cuts += 1
        manifests, data = ids(site, "manifest.json"), ids(site, "model.safetensors")
        assert set(manifests) <= set(data) and 3 in manifests and site.pointed()[-1] == "3"
        site.clock.now_s += 1
    assert cuts > 3 and ids(site, "model.safetensors") == [3]
    assert not [k for k in site.store.list() if "retired" in k]
