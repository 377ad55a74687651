"""NATS JetStream, on a real nats-server: the contract of a stream, then what JetStream can do to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from anytimed.contracts import ConfigError, Record, Refused, Rejected, StreamUnavailable
from anytimed.testing.streams import texts
from anytimed_adapters.streams.jetstream import JetStream
from tests.adapters.broker_contract import (
    BrokerContract,
    answers_again,
    keeps_no_process,
    read_through,
    refuses_to_hang,
)
from tests.adapters.brokers import NatsClient, NatsServer


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def client(shared: NatsServer) -> Iterator[NatsClient]:
    client = NatsClient(shared.url)
    yield client
    client.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    """One of the test's own, to be stopped."""
    server = NatsServer(tmp_path / "nats")
    yield server
    server.kill()


def over(server: NatsServer, stream: str, **more: Any) -> JetStream:
    return JetStream(
        JetStream.Settings.model_validate({"url": server.url, "stream": stream, "timeout_s": 30, **more}), "fed"
    )


def made(client: NatsClient, name: str, values: Sequence[str | bytes] = (), **more: Any) -> str:
    """A stream of this name with these messages."""
    client.wait(client.stream.add_stream(name=name, subjects=[f"{name}.>"], **more))
    client.publish(f"{name}.documents", [v.encode() if isinstance(v, str) else v for v in values])
    return name


class TestJetStream(BrokerContract):
    more: dict[str, Any] = {"allow_direct": False}  # noqa: RUF012
    on_commit = "keep"

    @pytest.fixture(autouse=True)
    def _server(self, shared: NatsServer, client: NatsClient) -> None:
        self.server, self.client = shared, client
        self.names: set[str] = set()

    def name(self, folder: Path) -> str:
        return str(folder).strip("/").replace("/", "-")

    def stream(self, folder: Path) -> JetStream:
        return over(self.server, self.name(folder), on_commit=self.on_commit)

    def append(self, folder: Path, name: str, texts: Sequence[str]) -> None:
        if (stream := self.name(folder)) not in self.names:
            self.names.add(made(self.client, stream, **self.more))
        self.client.publish(f"{stream}.{name}", [text.encode() for text in texts])

    def expire(self, folder: Path) -> None:
        self.client.wait(self.client.stream.purge_stream(self.name(folder)))

    def replace(self, folder: Path) -> JetStream:
        self.client.wait(self.client.stream.delete_stream(self.name(folder)))
        self.names.discard(self.name(folder))
        self.append(folder, "a", ["another document"])
        return self.stream(folder)


class TestJetStreamWithDirectAccess(TestJetStream):
    more = {"allow_direct": True}  # noqa: RUF012


class TestWorkQueue(TestJetStream):
    """Messages are removed as soon as no commit needs them."""

    more = {"retention": "workqueue"}  # noqa: RUF012
    on_commit = "purge"


# --- what is held -----------------------------------------------------------------------------------------------------


def test_a_limit_is_refused_only_where_it_took_what_was_unread(shared: NatsServer, client: NatsClient) -> None:
    made(client, "limited", [f"document {i}" for i in range(10)], max_msgs=10)
    stream = over(shared, "limited")
    stream.adopt(entries := stream.discover())
    places = [place for _, place in stream.read(None)]
    client.publish("limited.more", [b"x"] * 6)  # of the first ten, four stay
    for read in range(1, 11):
        resumed = over(shared, "limited")
        resumed.adopt(entries)
        if read < 6:
            with pytest.raises(Refused, match=rf"expired: .*'limited'.* wants message {read + 1}, .*oldest is 7 \("):
                list(resumed.read(places[read - 1]))
        else:
            assert len(texts(list(resumed.read(places[read - 1])))) == 10 - read
    client.publish("limited.more", [b"x"] * 4)
    assert stream.discover()[0][:2] == [11, 21]
    client.publish("limited.more", [b"x"])
    with pytest.raises(Refused, match=r"expired: .* wants message 11, the broker's oldest is 12 \(1 messages are gone"):
        stream.discover()


@pytest.mark.parametrize("direct", [False, True])
def test_what_was_deleted_inside_is_passed_over(shared: NatsServer, client: NatsClient, direct: bool) -> None:
    name = made(client, f"holes-{direct}", [f"document {i}" for i in range(400)], allow_direct=direct)
    gone = {3, *range(100, 340), 399}
    for i in sorted(gone):
        client.wait(client.stream.delete_msg(name, i + 1))
    stream = over(shared, name)
    stream.adopt(entries := stream.discover())
    items = list(stream.read(None))
    assert texts(items) == [f"document {i}" for i in range(400) if i not in gone]
    for cut in (0, 2, 90, 120, len(items) - 2):
        resumed = over(shared, name)
        resumed.adopt(entries)
        assert list(resumed.read(items[cut][1])) == items[cut + 1 :]


def test_a_hole_of_millions_is_passed_over_at_once(shared: NatsServer, client: NatsClient) -> None:
    name = made(client, "wide", ["the first"], max_msgs_per_subject=1)
    for _ in range(40):
        client.publish("wide.noise", [b"-"] * 500)
    stream = over(shared, name)
    stream.adopt(stream.discover())
    asked = []
    ask = stream._ask
    stream._ask = lambda question: (asked.append(1), ask(question))[1]  # type: ignore[method-assign]
    assert texts(list(stream.read(None))) == ["the first", "-"]
    assert len(asked) < 10


def test_a_stream_by_interest_is_refused(shared: NatsServer, client: NatsClient) -> None:
    made(client, "interesting", retention="interest")
    with pytest.raises(Refused, match="retention policy interest, which drops messages"):
        over(shared, "interesting").discover()


@pytest.mark.parametrize(("on_commit", "held"), [("keep", 5), ("purge", 2)])
def test_what_no_commit_needs_is_removed_where_that_is_asked_for(
    shared: NatsServer, client: NatsClient, on_commit: str, held: int
) -> None:
    name = made(client, f"done-{on_commit}", [f"document {i}" for i in range(5)])
    stream = over(shared, name, on_commit=on_commit)
    stream.adopt(stream.discover())
    places = [place for _, place in stream.read(None)]
    for place in places[:3]:
        stream.acknowledge(place)
    assert client.wait(client.stream.stream_info(name)).state.messages == held
    assert len(texts(list(stream.read(places[2])))) == 2


# --- records ----------------------------------------------------------------------------------------------------------


def test_messages_as_json_and_as_text(shared: NatsServer, client: NatsClient) -> None:
    made(client, "formats", ['{"body": "one"}', "nonsense", b'{"body": "\xff"}', "x" * 2000, ""])

    def read(**more: Any) -> list[Record | Rejected]:
        stream = over(shared, "formats", max_record_bytes=1000, **more)
        stream.adopt(stream.discover())
        return [item for item, _ in stream.read(None) if isinstance(item, Record | Rejected)]

    as_json = read(format="json", text_field="body")
    assert [item.text for item in as_json if isinstance(item, Record)] == ["one", "\ufffd"]
    assert [type(item) for item in read(encoding_errors="reject")] == [*[Record] * 2, *[Rejected] * 3]


def test_headers_do_not_change_what_a_message_holds(shared: NatsServer, client: NatsClient) -> None:
    """Direct access answers with the message's own headers: one may look like the answer that there is none."""
    made(client, "headed", allow_direct=True)
    for headers in ({"Status": "404"}, {"Nats-Sequence": "77"}, {"Nats-Subject": "elsewhere"}):
        client.wait(client.stream.publish("headed.a", b"", headers=headers))
        client.wait(client.stream.publish("headed.a", str(headers).encode(), headers=headers))
    stream = over(shared, "headed")
    stream.adopt(stream.discover())
    items = [item for item, _ in stream.read(None)]
    assert [type(item) for item in items[:-1]] == [Rejected, Record] * 3
    assert texts([(item, {}) for item in items]) == [
        str(headers) for headers in ({"Status": "404"}, {"Nats-Sequence": "77"}, {"Nats-Subject": "elsewhere"})
    ]


# --- the server -------------------------------------------------------------------------------------------------------


def test_killed_in_the_middle_of_reading_it_goes_on_at_the_same_record(server: NatsServer) -> None:
    documents = [f"document {i}" for i in range(1000)]
    client = NatsClient(server.url)
    made(client, "durable", documents)
    client.close()
    stream = over(server, "durable", timeout_s=5)
    stream.adopt(stream.discover())
    reading = stream.read(None)
    items = [next(reading) for _ in range(300)]
    server.kill()
    with pytest.raises(StreamUnavailable):
        items += reading
    place = items[-1][1]
    said = refuses_to_hang(over_at(stream), place, within_s=7)
    assert "durable" in said and "It is tried again" in said
    server.start()
    items += read_through(stream, place)
    assert texts(items) == documents
    client = NatsClient(server.url)
    client.publish("durable.more", [b"one more"])
    client.close()
    stream.adopt(stream.discover())
    assert texts(read_through(stream, items[-1][1])) == ["one more"]


def over_at(stream: JetStream) -> JetStream:
    """The same stream where every place is acknowledged by asking the server."""
    stream._settings = stream._settings.model_copy(update={"on_commit": "purge"})
    return stream


def test_a_server_that_hangs_is_left_in_time(server: NatsServer) -> None:
    client = NatsClient(server.url)
    made(client, "hanging", [f"{i}" for i in range(200)])
    client.close()
    stream = over(server, "hanging", timeout_s=1, on_commit="purge")
    stream.adopt(stream.discover())
    _, place = next(iter(stream.read(None)))
    server.pause()
    refuses_to_hang(stream, place, within_s=3)
    server.resume()
    assert len(texts(read_through(stream, None))) == 200


def test_a_stream_that_is_not_there_yet_is_waited_for(server: NatsServer) -> None:
    stream = over(server, "later")
    with pytest.raises(StreamUnavailable, match=r"'later' at nats://127.0.0.1:.*stream not found"):
        stream.discover()
    client = NatsClient(server.url)
    made(client, "later", ["here"])
    client.close()
    assert len(answers_again(stream)) == 1


def test_the_password_is_taken_from_url_options_or_environment_and_never_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = NatsServer(tmp_path, "--user", "reader", "--pass", "correct-horse")
    try:
        bare = f"nats://127.0.0.1:{server.port}"
        given = f"nats://reader:correct-horse@127.0.0.1:{server.port}"
        with pytest.raises(StreamUnavailable, match="Authorization"):
            over(server, "k", url=bare).discover()
        with pytest.raises(StreamUnavailable, match="stream not found"):
            over(server, "k", url=given).discover()
        with pytest.raises(StreamUnavailable, match="stream not found"):
            over(server, "k", url=bare, storage_options={"user": "reader", "password": "correct-horse"}).discover()
        monkeypatch.setenv("NATS_USER", "reader")
        monkeypatch.setenv("NATS_PASSWORD", "correct-horse")
        with pytest.raises(StreamUnavailable, match="stream not found"):
            over(server, "k", url=bare).discover()
        with pytest.raises(StreamUnavailable) as error:
            over(server, "k", url=f"nats://somebody:battery-staple@127.0.0.1:{server.port}").discover()
        for secret in ("correct-horse", "battery-staple", "somebody"):
            assert secret not in str(error.value)
        shown = JetStream.Settings.model_validate(
            {"url": given, "stream": "k", "storage_options": {"password": "correct-horse"}}
        )
        assert "correct-horse" not in f"{shown!r} {shown}"
    finally:
        server.kill()


@pytest.mark.parametrize("settings", [{"url": "host:4222"}, {"storage_options": {"servers": "x"}}, {"url": ""}])
def test_settings_that_cannot_be_used_are_a_mistake_in_the_config(shared: NatsServer, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="source 'fed': "):
        over(shared, "k", **settings)


def test_no_thread_keeps_the_process(server: NatsServer) -> None:
    client = NatsClient(server.url)
    made(client, "ending", ["one", "two"])
    client.close()
    keeps_no_process(over(server, "ending"), {"url": server.url, "stream": "ending"}, "one", server.kill)
