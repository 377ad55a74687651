"""Redis Streams, on a real redis-server: the contract of a stream, then what Redis can do to it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from anytimed.contracts import ConfigError, Record, Refused, Rejected, StreamUnavailable
from anytimed.testing.streams import texts
from anytimed_adapters.streams.redis_stream import RedisStream
from tests.adapters.broker_contract import BrokerContract, answers_again, read_through, refuses_to_hang
from tests.adapters.brokers import RedisServer


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """One of the test's own, to be stopped."""
    server = RedisServer(tmp_path / "redis")
    yield server
    server.kill()


def over(server: RedisServer, key: str, **more: Any) -> RedisStream:
    return RedisStream(
        RedisStream.Settings.model_validate({"url": server.url, "key": key, "timeout_s": 30, **more}), "fed"
    )


def add(server: RedisServer, key: str, values: Sequence[str | bytes], field: str = "text") -> list[bytes]:
    with server.client() as client, client.pipeline() as all_of_them:
        for value in values:
            all_of_them.xadd(key, {field: value})
        return all_of_them.execute()


class TestRedisStream(BrokerContract):
    trim = False

    @pytest.fixture(autouse=True)
    def _server(self, shared: RedisServer) -> None:
        self.server = shared

    def stream(self, folder: Path) -> RedisStream:
        return over(self.server, str(folder), trim=self.trim)

    def append(self, folder: Path, name: str, texts: Sequence[str]) -> None:
        add(self.server, str(folder), texts)

    def expire(self, folder: Path) -> None:
        with self.server.client() as client:
            client.xtrim(str(folder), maxlen=0, approximate=False)

    def replace(self, folder: Path) -> RedisStream:
        with self.server.client() as client:
            client.delete(str(folder))
        add(self.server, str(folder), ["another document"])
        return self.stream(folder)


class TestTrimmedRedisStream(TestRedisStream):
    trim = True


# --- what is held -----------------------------------------------------------------------------------------------------


def test_a_limit_of_length_is_refused_only_where_it_took_what_was_unread(shared: RedisServer) -> None:
    ids = add(shared, "limited", [f"document {i}" for i in range(10)])
    stream = over(shared, "limited")
    stream.adopt(entries := stream.discover())
    places = [place for _, place in stream.read(None)]
    with shared.client() as client:
        client.xtrim("limited", minid=ids[6], approximate=False)
    for read in range(1, 11):
        resumed = over(shared, "limited")
        resumed.adopt(entries)
        if read < 6:
            with pytest.raises(
                Refused, match=rf"expired: .*oldest is {ids[6].decode()} \({6 - read} messages are gone"
            ):
                list(resumed.read(places[read - 1]))
        else:
            assert len(texts(list(resumed.read(places[read - 1])))) == 10 - read

    # The same for messages that were never adopted.
    add(shared, "limited", ["one more", "and another"])
    with shared.client() as client:
        client.xtrim("limited", maxlen=2, approximate=False)
        assert len(stream.discover()) == 1
        client.xtrim("limited", maxlen=1, approximate=False)
    with pytest.raises(Refused, match=r"expired: .* \(1 messages are gone"):
        stream.discover()


def test_what_was_deleted_inside_is_passed_over_in_every_order_of_deletion(shared: RedisServer) -> None:
    ids = add(shared, "holes", [f"document {i}" for i in range(300)])
    gone = {3, *range(100, 240), 299}
    stream = over(shared, "holes")
    with shared.client() as client:
        client.xdel("holes", *(ids[i] for i in gone if i != 3))
        stream.adopt(entries := stream.discover())
        client.xdel("holes", ids[3])  # after it was adopted
    items = list(stream.read(None))
    assert texts(items) == [f"document {i}" for i in range(300) if i not in gone]
    for cut in (0, 2, 90, 120, len(items) - 2):
        resumed = over(shared, "holes")
        resumed.adopt(entries)
        assert list(resumed.read(items[cut][1])) == items[cut + 1 :]


def test_nothing_is_found_in_a_stream_of_which_all_was_deleted(shared: RedisServer) -> None:
    ids = add(shared, "emptied", ["one", "two"])
    with shared.client() as client:
        client.xdel("emptied", *ids)
    stream = over(shared, "emptied")
    assert stream.discover() == []
    add(shared, "emptied", ["three"])
    stream.adopt(stream.discover())
    assert texts(list(stream.read(None))) == ["three"]


def test_the_group_tells_the_lag_and_trimming_is_asked_for(shared: RedisServer) -> None:
    add(shared, "grouped", [f"document {i}" for i in range(5)])
    for trim, held in ((False, 5), (True, 3)):
        stream = over(shared, "grouped", group="run", trim=trim)
        stream.adopt(stream.discover())
        place = [place for _, place in stream.read(None)][2]
        stream.acknowledge(place)
        with shared.client() as client:
            (group,) = client.xinfo_groups("grouped")
            assert group["name"] == b"run"
            assert group["last-delivered-id"].decode() == place["offset"]
            assert (group["entries-read"], group["lag"]) == (3, 2)
            assert client.xlen("grouped") == held


# --- records ----------------------------------------------------------------------------------------------------------


def test_messages_as_json_and_as_text(shared: RedisServer) -> None:
    values = ['{"body": "one"}', "nonsense", "[1]", '{"other": 1}', '{"body": 2}', b'{"body": "\xff"}', "x" * 2000]
    add(shared, "json", values, field="data")
    add(shared, "json", ["in another field"], field="other")

    def read(**more: Any) -> list[Record | Rejected]:
        stream = over(shared, "json", field="data", max_record_bytes=1000, **more)
        stream.adopt(stream.discover())
        return [item for item, _ in stream.read(None) if isinstance(item, Record | Rejected)]

    as_json = read(format="json", text_field="body")
    assert [item.text for item in as_json if isinstance(item, Record)] == ["one", "\ufffd"]
    reasons = [item.reason for item in as_json if isinstance(item, Rejected)]
    for reason, said in zip(
        reasons,
        ("not JSON", "list, expected an object", "no field 'body'", "is int, expected", "2000 bytes", "no value"),
        strict=True,
    ):
        assert said in reason
    as_text = read(encoding_errors="reject")
    assert [type(item) for item in as_text] == [*[Record] * 5, *[Rejected] * 3]
    assert "not UTF-8" in as_text[5].reason


# --- the server -------------------------------------------------------------------------------------------------------


def test_killed_in_the_middle_of_reading_it_goes_on_at_the_same_record(server: RedisServer) -> None:
    documents = [f"document {i}" for i in range(1000)]
    add(server, "durable", documents)
    stream = over(server, "durable", timeout_s=5)
    stream.adopt(stream.discover())
    reading = stream.read(None)
    items = [next(reading) for _ in range(300)]  # two batches, and some of a third
    server.kill()
    with pytest.raises(StreamUnavailable):
        items += reading
    place = items[-1][1]
    said = refuses_to_hang(stream, place, within_s=6)
    assert "durable" in said and "It is tried again" in said
    server.start()
    items += read_through(stream, place)
    assert texts(items) == documents
    add(server, "durable", ["one more"])
    stream.adopt(stream.discover())
    assert texts(read_through(stream, items[-1][1])) == ["one more"]


def test_a_server_that_hangs_is_left_in_time(server: RedisServer) -> None:
    add(server, "hanging", ["one", "two"])
    stream = over(server, "hanging", timeout_s=1)
    stream.adopt(stream.discover())
    _, place = next(iter(stream.read(None)))
    server.pause()
    refuses_to_hang(stream, place, within_s=2)
    server.resume()
    assert texts(read_through(stream, None)) == ["one", "two"]


def test_a_key_that_is_not_there_yet_is_waited_for(server: RedisServer) -> None:
    stream = over(server, "later")
    with pytest.raises(StreamUnavailable, match=r"'later' cannot be read: .*no such key"):
        stream.discover()
    add(server, "later", ["here"])
    assert len(answers_again(stream)) == 1
    with server.client() as client:
        client.set("other", "not a stream")
    with pytest.raises(StreamUnavailable, match="WRONGTYPE"):
        over(server, "other").discover()


def test_the_password_is_taken_from_url_options_or_environment_and_never_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = RedisServer(tmp_path, "--requirepass", "correct-horse")
    try:
        bare = f"redis://127.0.0.1:{server.port}/0"
        given = f"redis://:correct-horse@127.0.0.1:{server.port}/0"
        with pytest.raises(StreamUnavailable, match=r"[Aa]uth"):
            over(server, "k", url=bare).discover()
        with pytest.raises(StreamUnavailable, match="no such key"):
            over(server, "k", url=given).discover()
        with pytest.raises(StreamUnavailable, match="no such key"):
            over(server, "k", url=bare, storage_options={"password": "correct-horse"}).discover()
        monkeypatch.setenv("REDISCLI_AUTH", "correct-horse")
        with pytest.raises(StreamUnavailable, match="no such key"):
            over(server, "k", url=bare).discover()
        wrong = f"redis://somebody:battery-staple@127.0.0.1:{server.port}/0"
        with pytest.raises(StreamUnavailable) as error:
            over(server, "k", url=wrong).discover()
        assert "AuthenticationError: invalid" in str(error.value)
        for secret in ("correct-horse", "battery-staple", "somebody"):
            assert secret not in str(error.value)
        shown = RedisStream.Settings.model_validate(
            {"url": given, "key": "k", "storage_options": {"password": "correct-horse"}}
        )
        assert "correct-horse" not in f"{shown!r} {shown}"
    finally:
        server.kill()


@pytest.mark.parametrize("settings", [{"url": "http://host"}, {"storage_options": {"no_such_option": 1}}])
def test_settings_that_cannot_be_used_are_a_mistake_in_the_config(
    shared: RedisServer, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="source 'fed': url or storage_options cannot be used"):
        over(shared, "k", **settings)


def test_a_place_is_json_of_constant_size(shared: RedisServer) -> None:
    add(shared, "sized", ["a document"] * 1000)
    stream = over(shared, "sized")
    stream.adopt(stream.discover())
    sizes = [len(json.dumps(place)) for _, place in stream.read(None)]
    assert max(sizes) - min(sizes[:1000]) <= 6
