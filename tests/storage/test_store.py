"""A store, local and remote: whole objects, create-only, keys that stay inside, errors without credentials."""

from __future__ import annotations

import os
import posixpath
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fsspec import AbstractFileSystem, register_implementation
from fsspec.asyn import AsyncFileSystem
from hypothesis import example, given
from hypothesis import strategies as st

from anytimed.contracts import ConfigError, CorruptError
from anytimed.storage import folder, remote
from anytimed.storage.durable import write_durably
from anytimed.storage.store import MissingKey, Store, StoreError, check_key
from tests.storage import faults
from tests.storage.material import tree
from tests.storage.object_store import ObjectStore


def test_what_was_put_is_read_listed_and_deleted(url: str, tmp_path: Path) -> None:
    store = Store(url)
    assert store.list() == [] and not store.exists("a/b.json")
    store.replace("a/b.json", b"one")
    (tmp_path / "file").write_bytes(b"x" * 100)
    store.put_file(tmp_path / "file", "a/c/d.bin")
    assert store.read("a/b.json", 10) == b"one"
    assert store.list() == ["a/b.json", "a/c/d.bin"] and store.list("a/c") == ["a/c/d.bin"]
    assert b"".join(store.download("a/c/d.bin", 100)) == b"x" * 100
    store.replace("a/b.json", b"two")
    assert store.read("a/b.json", 3) == b"two"
    store.delete("a/b.json")
    store.delete("a/b.json")
    assert not store.exists("a/b.json") and store.exists("a/c/d.bin")
    with pytest.raises(MissingKey, match=r"a/b.json: not there"):
        store.read("a/b.json", 10)
    with pytest.raises(MissingKey):
        list(store.download("a/b.json", 10))


def test_put_file_replaces_what_a_crash_left(url: str, tmp_path: Path) -> None:
    store = Store(url)
    for data in (b"half", b"the whole"):
        (tmp_path / "file").unlink(missing_ok=True)
        (tmp_path / "file").write_bytes(data)
        store.put_file(tmp_path / "file", "w")
        store.put_file(tmp_path / "file", "w")  # again: two names of one file must not confuse a rename
    assert store.read("w", 100) == b"the whole" and store.list() == ["w"]


def test_create_is_for_the_first_only(url: str) -> None:
    store = Store(url)
    assert store.create("x/m.json", b"first")
    assert not store.create("x/m.json", b"other")
    assert store.read("x/m.json", 100) == b"first"


def test_of_many_that_create_one_wins(local_url: str) -> None:
    store = Store(local_url)
    barrier = threading.Barrier(8)
    won: list[bytes] = []

    def create(data: bytes) -> None:
        barrier.wait()
        if store.create("m.json", data):
            won.append(data)

    threads = [threading.Thread(target=create, args=(b"%d" % i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and store.read("m.json", 10) == won[0]
    assert list(tree(Path(local_url))) == ["m.json"]


def test_a_store_that_ignores_conditions_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("objects://ignores", {"ignore_conditions": True})
    assert store.create("m", b"ours")
    # Another writer's put lands between our put and our look.
    real = ObjectStore._pipe_file

    async def overtaken(self: ObjectStore, path: str, value: bytes, **options: object) -> None:
        await real(self, path, value)
        await real(self, path, b"theirs")

    monkeypatch.setattr(ObjectStore, "_pipe_file", overtaken)
    assert not store.create("n", b"ours")


def test_a_lost_answer_is_a_success_when_the_bytes_stand_there(tmp_path: Path) -> None:
    store = Store(f"objects://{tmp_path.name}", {"lose_answers": True}, deadline_s=0.5)
    assert store.create("m", b"ours")
    with pytest.raises(StoreError, match="connection reset"):
        store.replace("n", b"ours")


def test_longer_than_allowed_is_corrupt(url: str) -> None:
    store = Store(url)
    store.replace("m", b"12345")
    assert store.read("m", 5) == b"12345"
    with pytest.raises(CorruptError, match="5 bytes, expected 4 at most"):
        store.read("m", 4)


def test_download_in_pieces_and_of_a_short_object(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_DOWNLOAD_BYTES", 10)
    monkeypatch.setattr(folder, "CHUNK_BYTES", 10)
    store = Store(url)
    data = bytes(range(25))
    store.replace("m", data)
    assert [len(c) for c in store.download("m", 25)] == [10, 10, 5]
    assert b"".join(store.download("m", 25)) == data
    assert b"".join(store.download("m", 30)) == data
    assert b"".join(store.download("m", 20)) == data[:20]
    assert list(store.download("m", 0)) == []


class Tree(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Two folders, of which one cannot be listed; it lists trees in fsspec's own way."""

    protocol = "tree"

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[dict[str, Any]]:
        path = str(self._strip_protocol(path))
        listed = {
            "top": [("top/good", "directory"), ("top/bad", "directory"), ("top/gone", "directory")],
            "top/good": [("top/good", "directory"), ("top/good/a.json", "file")],
        }
        if path == "top/bad":
            raise OSError("connection reset by peer")
        if path not in listed:
            raise FileNotFoundError(path)
        return [{"name": name, "type": kind, "size": 1} for name, kind in listed[path]]


class AsyncTree(AsyncFileSystem):  # type: ignore[misc]
    protocol = "asynctree"

    async def _ls(self, path: str, detail: bool = True, **_: Any) -> list[dict[str, Any]]:
        return Tree().ls(path)


@pytest.mark.parametrize("kind", [Tree, AsyncTree])
def test_a_folder_that_cannot_be_listed_is_an_error_and_not_empty(kind: Any) -> None:
    register_implementation(kind.protocol, kind, clobber=True)
    store = Store(f"{kind.protocol}://top", deadline_s=0.3)
    assert store.list("good") == ["good/a.json"] and store.list("nothing") == []
    for prefix in ("", "bad"):
        with pytest.raises(StoreError, match="connection reset"):
            store.list(prefix)
    assert "top/good/a.json" in kind().find("top"), "fsspec's own way passes over it"


def test_a_web_server_that_is_gone_is_an_error_and_not_empty() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        store = Store(f"http://127.0.0.1:{held.getsockname()[1]}/prefix", deadline_s=0.3)
        with pytest.raises(StoreError, match="Cannot connect"):
            store.list("checkpoints")


def test_a_store_that_never_answers_meets_our_deadline(tmp_path: Path) -> None:
    store = Store(f"objects://{tmp_path.name}", {"hang": True}, deadline_s=0.2)
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"m: no answer within the deadline of 0\.2 s"):
        store.replace("m", b"x")
    assert time.monotonic() - began < 5  # the call itself would take an hour
    with pytest.raises(StoreError):  # not "no": fsspec's own exists would say that there is none
        store.exists("m")
    assert not ObjectStore.objects.get(f"{tmp_path.name}/m")  # cancelled, it cannot arrive late


def test_credentials_never_appear(tmp_path: Path) -> None:
    store = Store(
        "objects://user:pass%40word@host/bucket",
        {
            "denied": True,
            "secret": "hunter2-hunter2",
            "client": {"token": "tok-123456"},
            "endpoint_url": "http://minio:9000",
        },
        deadline_s=0.5,
    )
    with pytest.raises(StoreError) as caught:
        store.replace("m", b"x")
    told = f"{caught.value} {caught.value!r} {store!r} {store.url} {caught.value.__cause__!r}"
    for secret in ("pass%40word", "pass@word", "hunter2", "tok-123456", "user"):
        assert secret not in told
    assert "403" in told and "http://minio:9000" in told and "host/bucket/m" in told
    with pytest.raises(ConfigError) as unknown:
        Store("nosuch://key:topsecret@host/x?sig=abcdef")
    assert "topsecret" not in str(unknown.value) and "abcdef" not in str(unknown.value)


def test_chained_and_unknown_urls_say_what_is_expected() -> None:
    with pytest.raises(ConfigError, match="chained"):
        Store("simplecache::memory://x")
    with pytest.raises(ConfigError, match=r"nosuch.*anytimed\[s3\]"):
        Store("nosuch://x")


@pytest.mark.parametrize(
    "key", ["..", "a/../b", "/a", "a//b", "a\\b", "a\0b", "a/", "", ".hidden", "a/.tmp-x", "a\n", "é", "-rf"]
)
def test_keys_that_could_leave_the_prefix_are_refused(key: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "inside"))
    for use in (lambda: store.replace(key, b""), lambda: store.read(key, 1), lambda: store.delete(key)):
        with pytest.raises(ValueError, match="is no key"):
            use()
    assert list(tmp_path.iterdir()) == []


@given(st.text(st.sampled_from("ab./\\\0-_~% \n\u2024é"), max_size=12) | st.text(max_size=20))
@example("a\n")
@example("a/..")
def test_a_key_that_passes_stays_below_the_prefix(key: str) -> None:
    try:
        check_key(key)
    except ValueError:
        return
    assert posixpath.normpath(f"/root/{key}") == f"/root/{key}" and key.isascii() and key.isprintable()


def test_foreign_names_are_not_listed(local_url: str) -> None:
    Path(local_url).mkdir()
    (Path(local_url) / "a b").write_bytes(b"")
    (Path(local_url) / ".tmp-m-1").write_bytes(b"")
    store = Store(local_url)
    store.replace("m", b"")
    assert store.list() == ["m"]


def test_sweep_removes_old_temporaries_only(local_url: str) -> None:
    store = Store(local_url)
    store.replace("a/m", b"")
    left = Path(local_url) / "a" / ".tmp-m-12"
    left.write_bytes(b"half")
    store.sweep(60, left.stat().st_ctime + 59)
    assert left.exists()
    store.sweep(60, left.stat().st_ctime + 61)
    assert not left.exists() and store.exists("a/m")


def test_a_url_of_a_local_folder_is_the_folder(tmp_path: Path) -> None:
    Store(f"file://{tmp_path}/p").replace("m", b"1")
    assert Store(str(tmp_path / "p")).read("m", 1) == b"1"


def test_a_local_put_copies_where_it_cannot_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_file_system(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_file_system)
    (tmp_path / "file").write_bytes(b"data")
    Store(str(tmp_path / "p")).put_file(tmp_path / "file", "w")
    assert tree(tmp_path / "p") == {"w": b"data"}


def test_write_durably_leaves_the_old_or_the_new_at_every_failure(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with faults.at_call(0, faults.error(5)) as counted:
        write_durably(path, b"old")
    assert counted.calls >= 5  # open, write, fsync, rename, and the folder: open, fsync
    for n in range(1, counted.calls + 1):
        with faults.at_call(n, faults.error(28)):
            try:
                write_durably(path, b"new")
            except OSError:
                assert path.read_bytes() in (b"old", b"new")
            else:
                assert path.read_bytes() == b"new"  # only the clearing up failed
        with faults.at_call(0, faults.error(5)):
            write_durably(path, b"old")
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".tmp-")] == ["f"]
