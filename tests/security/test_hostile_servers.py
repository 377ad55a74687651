"""A web server that lies costs an error: memory stays bounded whatever it sends, measured against a real one."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from anytimed.contracts import Finished, Record, StreamUnavailable
from anytimed.storage.pull import pull
from anytimed.storage.store import Store
from anytimed_adapters.streams.jsonl import JsonLines
from anytimed_adapters.streams.text import TextFiles
from tests.security.hostile_server import MIB, serving
from tests.security.measured import measured
from tests.storage.material import Site

LIES = ["gzip", "deflate", "endless", "overlong", "short"]
BOUND = 200 * MIB
"""An answer may take 64 MiB, and once more while it grows; the bombs have 1 GiB."""


def read(url: str) -> str:
    return hashlib.sha256(Store(url, deadline_s=30.0).read("latest.json", 1 << 20)).hexdigest()


def download(url: str, size: int) -> str:
    got = hashlib.sha256()
    for chunk in Store(url, deadline_s=30.0).download("model.safetensors", size):
        got.update(chunk)
    return got.hexdigest()


def pulled(url: str, to: str) -> str:
    return pull(url, to).manifest.id


def listed(url: str) -> str:
    return str(Store(url, deadline_s=30.0).list())


def text(url: str) -> str:
    return _stream(TextFiles(TextFiles.Settings(url=url), "web"))


def lines(url: str) -> str:
    return _stream(JsonLines(JsonLines.Settings(url=url), "web"))


def _stream(stream: Any) -> str:
    stream.adopt(stream.discover())
    return str([item.text for item, _ in stream.read(None) if isinstance(item, Record)])


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path, str(tmp_path / "published"))
    site.publish(1)
    return site


def test_the_server_without_lies_serves(site: Site, tmp_path: Path) -> None:
    """The same functions against the same server: what the lies below change is the lie alone."""
    (tmp_path / "published" / "a.txt").write_text("read me")
    (tmp_path / "published" / "a.jsonl").write_text('{"text": "read me"}\n')
    content = (tmp_path / "published" / "latest.json").read_bytes()
    with serving(tmp_path / "published") as (url, _):
        assert read(f"{url}/honest") == hashlib.sha256(content).hexdigest()
        assert pulled(f"{url}/honest", str(tmp_path / "model")) == "00001-000001-0000000001"
        assert text(f"{url}/honest/a.txt") == lines(f"{url}/honest/a.jsonl") == "['read me']"
    found = json.loads((tmp_path / "model" / "current" / "manifest.json").read_bytes())
    assert found["step"] == 1


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("attack", [read, pulled], ids=lambda attack: attack.__name__)
def test_a_published_prefix_that_lies(site: Site, tmp_path: Path, attack: Any, lie: str) -> None:
    with serving(tmp_path / "published") as (url, asked):
        arguments = [str(tmp_path / "model")] if attack is pulled else []
        cost = measured(attack, f"{url}/{lie}", *arguments)
    assert asked, "it was asked"
    assert cost.said.startswith(("StoreError", "CorruptError", "MissingKey")), cost
    assert cost.grew_bytes < BOUND, cost
    assert not (tmp_path / "model" / "current").exists()


@pytest.mark.parametrize("lie", LIES)
def test_a_weights_file_that_lies(tmp_path: Path, lie: str) -> None:
    content = bytes(range(256)) * 4096
    (tmp_path / "model.safetensors").write_bytes(content)
    with serving(tmp_path) as (url, _):
        cost = measured(download, f"{url}/{lie}", len(content))
    assert cost.said.startswith("StoreError") or hashlib.sha256(content).hexdigest() not in cost.said or lie == "short"
    assert cost.grew_bytes < BOUND, cost


def test_a_listing_without_end(tmp_path: Path) -> None:
    with serving(tmp_path) as (url, _):
        cost = measured(listed, f"{url}/page/checkpoints")
    assert cost.said == "[]" or cost.said.startswith("StoreError"), cost  # fsspec passes over a page that fails
    assert cost.grew_bytes < BOUND, cost


@pytest.mark.parametrize("lie", ["gzip", "deflate", "endless", "overlong"])
@pytest.mark.parametrize("attack", [text, lines], ids=lambda attack: attack.__name__)
def test_a_source_that_lies(tmp_path: Path, attack: Any, lie: str) -> None:
    (tmp_path / "a.txt").write_text('{"text": "read me"}\n')
    with serving(tmp_path) as (url, _):
        cost = measured(attack, f"{url}/{lie}/a.txt")
    assert cost.said.startswith(("StreamUnavailable", "Refused")), cost
    assert cost.grew_bytes < BOUND, cost


def test_a_signed_url_is_read_and_its_signature_is_no_part_of_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("read me")
    with serving(tmp_path) as (url, asked):
        stream = TextFiles(TextFiles.Settings(url=f"{url}/honest/a.txt?X-Amz-Signature=planted-1"), "web")
        entries = stream.discover()
        stream.adopt(entries)
        items = [item for item, _ in stream.read(None)]
        again = TextFiles(TextFiles.Settings(url=f"{url}/honest/a.txt?X-Amz-Signature=another-2"), "web")
        again.adopt(entries)
        assert again.discover() == [], "signed anew it is the same file"
        again.verify({0: items[1].digest if isinstance(items[1], Finished) else ""})
    assert isinstance(items[0], Record) and items[0].text == "read me"
    assert "planted-1" not in json.dumps(entries)
    assert all("Signature=planted-1" in path or "Signature=another-2" in path for path in asked), asked


def test_errors_of_a_web_source_hide_what_its_url_carries(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("read me")
    with serving(tmp_path) as (url, _):
        signed = url.replace("http://", "http://ada:planted-password@") + "/denied/a.txt?token=planted-token"
        stream = TextFiles(TextFiles.Settings(url=signed), "web")
        with pytest.raises(StreamUnavailable, match="is not there") as listing:
            stream.discover()
        stream.adopt([["a.txt", 0, 4, ""]])
        with pytest.raises(StreamUnavailable, match="403") as reading:
            list(stream.read(None))
    proof = base64.b64encode(b"ada:planted-password").decode()  # which the server repeats in its answer
    for caught in (listing, reading):
        told = f"{caught.value!r} {caught.value.__cause__!r}"
        assert "a.txt" in told and "planted" not in told and proof not in told
