"""Kafka, on librdkafka's mock brokers: the contract of a stream, then what Kafka can do to it.

The mock brokers cannot compact, nor write the marks of transactions: messages are taken out between them and the
stream there, as a client sees it of a real broker."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, Message, TopicPartition
from confluent_kafka.admin import AdminClient

from anytimed.contracts import ConfigError, Record, Refused, Rejected, StreamUnavailable
from anytimed.testing.streams import texts
from anytimed_adapters.streams.kafka_topic import KafkaTopic
from tests.adapters.broker_contract import BrokerContract, keeps_no_process, read_through, refuses_to_hang
from tests.adapters.brokers import KafkaCluster, KafkaProcess


@pytest.fixture(scope="module")
def shared() -> KafkaCluster:
    return KafkaCluster()


def over(cluster: KafkaCluster | KafkaProcess, topic: str, **more: Any) -> KafkaTopic:
    return KafkaTopic(
        KafkaTopic.Settings.model_validate({"servers": cluster.servers, "topic": topic, "timeout_s": 30, **more}), "fed"
    )


def produced(cluster: KafkaCluster, values: Sequence[str | bytes | None], partition: int = 0, topic: str = "") -> str:
    """A topic, new where none is given, with these messages."""
    topic = topic or f"topic-{uuid.uuid4().hex}"
    cluster.produce(topic, [v.encode() if isinstance(v, str) else v for v in values], partition)
    return topic


class TestKafkaTopic(BrokerContract):
    span_offsets = 16384

    @pytest.fixture(autouse=True)
    def _cluster(self, shared: KafkaCluster) -> None:
        self.cluster = shared

    def name(self, folder: Path) -> str:
        return str(folder).strip("/").replace("/", "-")

    def stream(self, folder: Path) -> KafkaTopic:
        return over(self.cluster, self.name(folder), span_offsets=self.span_offsets)

    def append(self, folder: Path, name: str, texts: Sequence[str]) -> None:
        produced(self.cluster, texts, topic=self.name(folder))

    def expire(self, folder: Path) -> None:
        fill(self.cluster, self.name(folder))

    def replace(self, folder: Path) -> KafkaTopic:
        self.cluster = KafkaCluster()
        self.append(folder, "a", ["another document"])
        return self.stream(folder)


class TestKafkaTopicInShortSpans(TestKafkaTopic):
    """The same adapter again, where spans end all the time."""

    cases = 50
    span_offsets = 2


def fill(cluster: KafkaCluster, topic: str, count: int = 6) -> None:
    """The mock brokers keep 5 MiB of a partition."""
    for _ in range(count):
        cluster.produce(topic, [b"x" * 950_000])


# --- partitions -------------------------------------------------------------------------------------------------------


def test_partitions_take_turns_and_each_goes_on_where_it_stood(shared: KafkaCluster) -> None:
    topic = produced(shared, [])
    for partition, count in ((0, 25), (2, 7), (3, 12)):
        produced(shared, [f"{partition}/{i}" for i in range(count)], partition, topic)
    stream = over(shared, topic, span_offsets=10)
    entries = stream.discover()
    assert [entry[:3] for entry in entries] == [
        [0, 0, 10], [2, 0, 7], [3, 0, 10], [0, 10, 20], [3, 10, 12], [0, 20, 25]
    ]  # fmt: skip
    stream.adopt(entries)
    items = list(stream.read(None))
    expected = [f"{p}/{i}" for p, start, stop, _ in entries for i in range(start, stop)]
    assert texts(items) == expected
    for cut in range(0, len(items), 7):
        resumed = over(shared, topic)
        resumed.adopt(entries)
        assert list(resumed.read(items[cut][1])) == items[cut + 1 :]

    produced(shared, ["1/0"], 1, topic)
    produced(shared, ["2/7"], 2, topic)
    assert [entry[:3] for entry in stream.discover()] == [[1, 0, 1], [2, 7, 8]]


def test_the_group_is_told_every_partition_that_was_read(shared: KafkaCluster) -> None:
    topic = produced(shared, [f"0/{i}" for i in range(5)])
    produced(shared, [f"1/{i}" for i in range(4)], 1, topic)
    stream = over(shared, topic, group="run", span_offsets=3)
    stream.adopt(entries := stream.discover())  # 0: 0-3, 1: 0-3, 0: 3-5, 1: 3-4
    places = [place for _, place in stream.read(None)]

    admin = AdminClient({"bootstrap.servers": shared.servers})

    def committed() -> list[int]:
        wanted = [TopicPartition(topic, p) for p in (0, 1)]
        asked = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions("run", wanted)])
        return [p.offset for p in asked["run"].result(10).topic_partitions]

    stream.acknowledge(places[1])  # two messages of the first span
    assert committed() == [2, -1001]
    stream.acknowledge(places[4])  # the first span, one message of the second
    assert committed() == [3, 1]
    again = over(shared, topic, group="run", span_offsets=3)
    again.adopt(entries)
    again.acknowledge(places[-1])
    assert committed() == [5, 4]


# --- what is held -----------------------------------------------------------------------------------------------------


def test_retention_is_refused_only_where_it_took_what_was_unread(shared: KafkaCluster) -> None:
    def document(i: int) -> bytes:
        return f"{i:03d}".encode() * 100_000  # 300 kB: 17 of them are held

    topic = produced(shared, [])
    for i in range(5):  # each for itself, for what comes at once goes at once
        produced(shared, [document(i)], topic=topic)
    stream = over(shared, topic)
    stream.adopt(entries := stream.discover())
    places = [place for _, place in stream.read(None)]
    oldest, end = shared.held(topic)
    while oldest < 3:
        produced(shared, [document(end)], topic=topic)
        oldest, end = shared.held(topic)
    for read in range(1, 6):
        resumed = over(shared, topic)
        resumed.adopt(entries)
        if read < oldest:
            with pytest.raises(
                Refused, match=rf"expired: .* partition 0 wants offset {read}, the broker's oldest is 3 \({3 - read} of"
            ):
                list(resumed.read(places[read - 1]))
        else:
            assert len(texts(list(resumed.read(places[read - 1])))) == 5 - read

    # The same for messages that were never adopted.
    while oldest < 6:
        assert stream.discover()[0][1:3] == [5, end]
        produced(shared, [document(end)], topic=topic)
        oldest, end = shared.held(topic)
    with pytest.raises(Refused, match=r"expired: .* wants offset 5, the broker's oldest is 6 \(1 offsets are gone"):
        stream.discover()


def test_messages_that_expire_while_they_are_read_are_refused(shared: KafkaCluster) -> None:
    topic = produced(shared, ["one", "two", "three"])
    stream = over(shared, topic)
    stream.adopt(stream.discover())
    reading = stream.read(None)
    next(reading)
    # As where the client had not fetched ahead: it asks for an offset that is gone by then.
    partition, at = stream._stands or (0, 0)
    stream._ahead.clear()
    fill(shared, topic)
    stream._consumer.assign([TopicPartition(topic, partition, at)])
    with pytest.raises(Refused, match=r"expired: .* partition 0 wants offset 1, "):
        next(reading)


class Holes:
    """A consumer of a partition from which some offsets were compacted."""

    def __init__(self, consumer: Any, gone: set[int]) -> None:
        self._consumer, self._gone = consumer, gone

    def __getattr__(self, name: str) -> Any:
        return getattr(self._consumer, name)

    def poll(self, timeout: float) -> Message | None:
        while (message := self._consumer.poll(timeout)) is not None and self._is_gone(message):
            pass
        return message

    def consume(self, count: int, timeout: float) -> list[Message]:
        return [message for message in self._consumer.consume(count, timeout) if not self._is_gone(message)]

    def _is_gone(self, message: Message) -> bool:
        return message.error() is None and message.offset() in self._gone


@pytest.mark.parametrize("gone", [{0}, {3, 4}, {9, 10, 11}, {18, 19}, set(range(10, 20)), set(range(20))])
def test_offsets_without_a_message_are_passed_over(shared: KafkaCluster, gone: set[int]) -> None:
    topic = produced(shared, [f"document {i}" for i in range(20)])

    def stream() -> KafkaTopic:
        stream = over(shared, topic, span_offsets=10)
        stream._consumer = Holes(stream._consumer, gone)  # type: ignore[assignment]
        return stream

    first = stream()
    first.adopt(entries := first.discover())
    items = list(first.read(None))
    assert texts(items) == [f"document {i}" for i in range(20) if i not in gone]
    for cut in range(len(items)):
        resumed = stream()
        resumed.adopt(entries)
        assert list(resumed.read(items[cut][1])) == items[cut + 1 :]


def test_a_span_beyond_the_end_of_its_partition_is_refused(shared: KafkaCluster) -> None:
    topic = produced(shared, ["one", "two"])
    stream = over(shared, topic)
    ((partition, start, _, log),) = stream.discover()
    stream.adopt([[partition, start, 9, log]])
    with pytest.raises(Refused, match="not the one that was read: expected at least offset 9, found 2, where it ends"):
        stream.discover()
    with pytest.raises(Refused, match="not the one that was read"):
        next(iter(stream.read(None)))


# --- records ----------------------------------------------------------------------------------------------------------


def test_messages_as_json_and_as_text(shared: KafkaCluster) -> None:
    topic = produced(shared, ['{"body": "one"}', "nonsense", b'{"body": "\xff"}', "x" * 2000, "", None])

    def read(**more: Any) -> list[Record | Rejected]:
        stream = over(shared, topic, max_record_bytes=1000, **more)
        stream.adopt(stream.discover())
        return [item for item, _ in stream.read(None) if isinstance(item, Record | Rejected)]

    as_json = read(format="json", text_field="body")
    assert [item.text for item in as_json if isinstance(item, Record)] == ["one", "\ufffd"]
    assert [type(item) for item in read(encoding_errors="reject")] == [*[Record] * 2, *[Rejected] * 4]


# --- the brokers ------------------------------------------------------------------------------------------------------


def test_brokers_that_hang_or_are_killed_are_left_in_time() -> None:
    cluster = KafkaProcess("hanging", 2000)
    try:
        stream = over(cluster, "hanging", timeout_s=1, span_offsets=500)
        stream.adopt(stream.discover())
        reading = stream.read(None)
        items = [next(reading) for _ in range(700)]
        cluster.pause()
        with pytest.raises(StreamUnavailable):
            items += reading
        said = refuses_to_hang(stream, items[-1][1], within_s=3)
        assert "topic 'hanging' at 127.0.0.1" in said and "It is tried again" in said
        cluster.resume()
        items += read_through(stream, items[-1][1])
        assert texts(items) == [f"document {i}" for i in range(2000)]
        cluster.kill()
        refuses_to_hang(stream, items[0][1], within_s=3)
    finally:
        cluster.kill()


def test_no_thread_keeps_the_process() -> None:
    cluster = KafkaProcess("ending", 2)
    where = {"servers": cluster.servers, "topic": "ending"}
    keeps_no_process(KafkaTopic(KafkaTopic.Settings(**where), "fed"), where, "document 0", cluster.kill)


def test_user_and_password_are_never_told(shared: KafkaCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"sasl.username": "somebody", "sasl.password": "battery-staple"}
    options = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanisms": "PLAIN"}
    stream = over(shared, "k", timeout_s=1, storage_options={**options, **secrets})
    with pytest.raises(StreamUnavailable) as error:  # the mock brokers speak no SASL
        stream.discover()
    shown = KafkaTopic.Settings.model_validate({"servers": "a:1", "topic": "t", "storage_options": secrets})
    for secret in secrets.values():
        assert secret not in f"{error.value} {shown!r} {shown}"
    with pytest.raises(ConfigError):  # PLAIN needs a user
        over(shared, "k", storage_options=options)
    monkeypatch.setenv("KAFKA_SASL_USERNAME", "somebody")
    monkeypatch.setenv("KAFKA_SASL_PASSWORD", "battery-staple")
    over(shared, "k", storage_options=options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"no.such.property": 1}, "No such configuration property"),
        ({"auto.offset.reset": "latest"}, "auto.offset.reset are set by anytimed"),
        ({"enable.auto.commit": True, "group.id": "x"}, "enable.auto.commit, group.id are set by"),
    ],
)
def test_settings_that_cannot_be_used_are_a_mistake_in_the_config(
    shared: KafkaCluster, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=f"source 'fed': .*{said}"):
        over(shared, "k", storage_options=options)
