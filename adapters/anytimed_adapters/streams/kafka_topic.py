"""A Kafka topic as a source: a document for every message, partition by partition.

A span is [partition, first offset, offset after the last, log]. Spans have a bounded number of offsets and their
partitions take turns, so that a long backlog is read from all of them. `log` tells the cluster and the topic's name. A
topic that was deleted and made again is told by its end, as long as it has fewer messages than were found before.

A partition is assigned and sought, never subscribed to: no group is joined, nothing rebalances, and there is no offset
that the client would choose by itself (`auto.offset.reset = error`). Only committed messages are read. Offsets that
hold no message (compacted, deleted, marks of transactions) are passed over once the partition is known to go beyond.
With every commit the group's offsets are set to the place before which nothing is needed any more, for those who watch
the lag; Kafka deletes by its own retention.

librdkafka's admin client is not used: it ends the process by an assertion when its requests time out (its issue 4605).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, zip_longest
from os import environ
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from pydantic import Field

from anytimed.contracts import ConfigError, Json
from anytimed.urls import credentials, keep_secret
from anytimed_adapters.streams.broker import BrokerStream, Entry, fingerprint
from anytimed_adapters.streams.messages import MessageSettings

_BATCH = 512
_QUEUE_KILOBYTES = 4096
"""Fetched ahead, at least one message; what is left of it when another partition takes its turn was fetched in vain."""
_ENVIRONMENT = {"sasl.username": "KAFKA_SASL_USERNAME", "sasl.password": "KAFKA_SASL_PASSWORD"}


class KafkaTopic(BrokerStream):
    """A `Stream`, acknowledged, over the partitions of one topic."""

    passing_settings = BrokerStream.passing_settings | {"servers", "group", "span_offsets"}

    class Settings(MessageSettings):
        """Where the topic is, and in what portions it is read."""

        servers: str = Field(min_length=1, description='Brokers to ask first: "host:9092,other:9092".')
        topic: str = Field(min_length=1, description="The topic; all of its partitions are read.")
        group: str = Field(
            default="anytimed",
            min_length=1,
            description="The consumer group that tells how far this run has come; each run needs one of its own.",
        )
        span_offsets: int = Field(
            default=16384,
            gt=0,
            description="The most offsets that are read of one partition before it is another's turn.",
        )
        storage_options: dict[str, Any] = Field(
            default_factory=dict,
            repr=False,
            description="Passed to librdkafka: security.protocol, sasl.mechanisms, ssl.ca.location. User and password "
            "are taken from KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD in the environment where they are not here.",
        )

    def __init__(self, settings: Settings, name: str) -> None:
        options = {key: environ[variable] for key, variable in _ENVIRONMENT.items() if variable in environ}
        keep_secret(value for key, value in options.items() if key == "sasl.password")
        options |= settings.storage_options
        super().__init__(settings, name, credentials("", options))
        self._settings = settings
        self._what = f"topic {settings.topic!r} at {settings.servers}"
        common: dict[str, Any] = {
            "bootstrap.servers": settings.servers,
            "client.id": "anytimed",
            "log_level": 0,  # what goes wrong is said by the exceptions, without credentials
            "socket.timeout.ms": max(1000, int(settings.timeout_s * 1000)),
            "reconnect.backoff.max.ms": 2000,
            "allow.auto.create.topics": False,
        }
        reading: dict[str, Any] = {
            "group.id": settings.group,
            "enable.auto.commit": False,
            "auto.offset.reset": "error",
            "enable.partition.eof": True,
            "isolation.level": "read_committed",
            "queued.max.messages.kbytes": _QUEUE_KILOBYTES,
            "fetch.wait.max.ms": 100,
        }
        if taken := sorted(options.keys() & (common | reading).keys()):
            raise ConfigError(
                f"source {name!r}: storage_options: {', '.join(taken)} are set by anytimed; take them out"
            )
        self._last_error = ""
        try:
            self._consumer = Consumer({**options, **common, **reading, "error_cb": self._note})
            # Brokers answer the requests of a connection in turn: behind a fetch that waits, each would wait as well.
            self._asking = Consumer({**options, **common, **reading, "on_commit": self._answer})
        except (KafkaException, TypeError, ValueError) as error:
            raise ConfigError(
                f"source {name!r}: servers or storage_options cannot be used: {self._told(str(error))}. Expected "
                '"host:9092,…" and properties that librdkafka knows'
            ) from None
        self._known: dict[int, int] = {}  # partition: offset up to which spans were adopted
        self._stands: tuple[int, int] | None = None  # partition and offset of what the consumer gives next
        self._ahead: deque[Message] = deque()
        self._assigned = False
        self._passed: tuple[int, dict[int, int]] = (0, {})  # spans before the acknowledged place, and where they ended
        self._acknowledged: dict[int, int] = {}
        self._answered: tuple[KafkaError | None, dict[int, int]] | None = None  # to the last commit, and which it was

    # --- Stream -------------------------------------------------------------------------------------------------------

    def discover(self) -> list[Entry]:
        until = self._deadline()
        partitions, log = self._describe(until)
        held = self._offsets(partitions, until)
        turns = []
        for partition, (oldest, newest) in sorted(held.items()):
            start = self._require_held(partition, self._known.get(partition, oldest), oldest, newest)
            stops = [*range(start + self._settings.span_offsets, newest, self._settings.span_offsets), newest]
            starts = [start, *stops[:-1]]
            turns.append([[partition, a, b, log] for a, b in zip(starts, stops, strict=True) if b > a])
        return [entry for entry in chain.from_iterable(zip_longest(*turns)) if entry is not None]

    def adopt(self, entries: Any) -> None:
        super().adopt(entries)
        for partition, _, stop, _ in entries:
            self._known[partition] = stop

    def acknowledge(self, place: Json) -> None:
        """Set the group's offsets to `place`, in every partition that was read before it."""
        index, offset = int(place["entry"]), place["offset"]
        passed, ended = self._passed
        for partition, _, stop, _ in self._spans[passed:index]:
            ended[partition] = stop
        self._passed = (index, ended)
        reached = dict(ended)
        if offset is not None:
            reached[self._spans[index][0]] = offset
        if changed := {p: at for p, at in reached.items() if self._acknowledged.get(p) != at}:
            self._commit(changed)
            self._acknowledged |= changed

    # --- messages -----------------------------------------------------------------------------------------------------

    def _size(self, entry: Entry) -> int:
        return int(entry[2]) - int(entry[1])

    def _messages(self, entry: Entry, offset: Any, read: int) -> Iterator[tuple[bytes | None, Any]]:
        partition, start, stop, _ = entry
        at = int(start if offset is None else offset)
        while at < stop:
            message = self._next(partition, at, stop)
            if message is None:
                return
            reached = message.offset()
            assert reached is not None
            at = reached + 1
            yield message.value(), at

    def _next(self, partition: int, at: int, stop: int) -> Message | None:
        """The first message at `at` or behind it; None where there is none before `stop`."""
        if self._stands != (partition, at):
            self._seek(partition, at)
        until = self._deadline()
        while True:
            while not self._ahead:
                self._ahead.extend(self._poll(partition, at, stop, until))
            message = self._ahead.popleft()
            offset = message.offset()
            error = message.error()
            if error is None and offset is not None and offset < at:
                continue  # fetched before this offset was asked for
            if error is None and offset is not None and offset < stop:
                self._stands = (partition, offset + 1)
                return message
            if error is not None and error.code() != KafkaError._PARTITION_EOF:
                self._raise(error, partition, at)
            if offset is not None and offset >= stop:
                self._ahead.appendleft(message)  # it tells the next span of this partition as much
                self._stands = (partition, stop)
                return None
            # else: an end that the partition has grown beyond since

    def _poll(self, partition: int, at: int, stop: int, until: float) -> list[Message]:
        """At least one message or event, as many as have come. Raises StreamUnavailable after the timeout."""
        self._last_error = ""
        with self._answering("cannot be read"):
            first = self._consumer.poll(_left(until))
            if first is not None:
                more = self._consumer.consume(min(_BATCH, stop - at), timeout=0)
                # one of another partition came before it was assigned; -1: of the client
                return [m for m in (first, *more) if m.partition() in (partition, -1, None)]
        self._stands = None
        why = self._last_error or f"no message came within {self._settings.timeout_s} s"
        raise self._unavailable(f"{self._what} partition {partition} offset {at} cannot be read", why)

    def _seek(self, partition: int, at: int) -> None:
        """Let the consumer stand at an offset that is certain to be held."""
        self._stands = None
        self._ahead.clear()
        until = self._deadline()
        self._describe(until)
        oldest, newest = self._offsets([partition], until)[partition]
        self._require_held(partition, at, oldest, newest)
        with self._answering("cannot be read"):
            if not self._assigned:  # it finds the leaders sooner when asked for them than by itself
                self._consumer.list_topics(self._settings.topic, timeout=_left(until))
                self._assigned = True
            self._consumer.assign([TopicPartition(self._settings.topic, partition, at)])
        self._stands = (partition, at)

    def _raise(self, error: KafkaError, partition: int, at: int) -> None:
        self._stands = None
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            oldest, newest = self._offsets([partition], self._deadline())[partition]
            self._require_held(partition, at, oldest, newest)
        raise self._unavailable(f"{self._what} partition {partition} offset {at} cannot be read", error.str())

    # --- the topic ----------------------------------------------------------------------------------------------------

    def _require_same_log(self) -> None:
        self._describe(self._deadline())

    def _describe(self, until: float) -> tuple[list[int], str]:
        """The topic's partitions and which log it is. Raises Refused where it is another than the adopted spans'."""
        topic = self._settings.topic
        with self._answering("cannot be described"):
            metadata = self._asking.list_topics(topic, timeout=_left(until))
            described = metadata.topics[topic]
            if described.error is not None:
                raise KafkaException(described.error)
        log = fingerprint(metadata.cluster_id, topic)
        if self._spans and log != self._spans[-1][3]:
            raise self._replaced(self._what, f"cluster and topic {self._spans[-1][3]}", log)
        return sorted(described.partitions), log

    def _offsets(self, partitions: list[int], until: float) -> dict[int, tuple[int, int]]:
        """Per partition the oldest offset held and the one after the newest committed message."""
        held = {}
        with self._answering("does not tell its offsets"):
            for partition in partitions:
                wanted = TopicPartition(self._settings.topic, partition)
                if (found := self._asking.get_watermark_offsets(wanted, timeout=_left(until))) is None:
                    raise TimeoutError(f"partition {partition}: no answer")
                held[partition] = found
        return held

    def _require_held(self, partition: int, at: int, oldest: int, newest: int) -> int:
        """The offset `at`, where the partition goes on from it. Raises Refused."""
        if at < oldest:
            gone = f"{oldest} ({oldest - at} offsets are gone)"
            raise self._expired(f"{self._what} partition {partition}", f"offset {at}", gone)
        known = max(at, self._known.get(partition, 0))
        if newest < known:
            expected = f"at least offset {known}"
            raise self._replaced(f"{self._what} partition {partition}", expected, f"{newest}, where it ends")
        return at

    # --- asking -------------------------------------------------------------------------------------------------------

    def _note(self, error: KafkaError) -> None:
        self._last_error = error.str()

    def _commit(self, offsets: dict[int, int]) -> None:
        """Set the group's offsets."""
        until = self._deadline()
        wanted = [TopicPartition(self._settings.topic, partition, at) for partition, at in sorted(offsets.items())]
        with self._answering("cannot be acknowledged"):
            self._answered = None
            self._asking.commit(offsets=wanted, asynchronous=True)
            while self._answered is None or self._answered[1] != offsets:  # of an earlier one, given up
                if time.monotonic() > until:
                    raise TimeoutError(f"group {self._settings.group!r}: no answer within {self._settings.timeout_s} s")
                self._asking.poll(0.05)  # nothing is assigned to it: it only calls back
            if self._answered[0] is not None:
                raise KafkaException(self._answered[0])

    def _answer(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        """Called by the client, within `poll`, when a commit was answered."""
        failed = [partition.error for partition in partitions if partition.error is not None]
        self._answered = (error or next(iter(failed), None), {p.partition: p.offset for p in partitions})

    def _deadline(self) -> float:
        return time.monotonic() + self._settings.timeout_s

    @contextmanager
    def _answering(self, what: str) -> Iterator[None]:
        try:
            yield
        except (KafkaException, TimeoutError) as error:
            self._stands = None
            inner = error.args[0] if error.args else None
            why = inner.str() if isinstance(inner, KafkaError) else error
            raise self._unavailable(f"{self._what} {what}", why) from None


def _left(until: float) -> float:
    return max(0.1, until - time.monotonic())
