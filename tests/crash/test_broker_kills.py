"""Fault 18 on brokers: SIGKILL at random moments while messages come in, the broker killed too where it keeps what it
was given; and an audit of what was trained on that asks neither the pipeline nor its counters.

What came when depends on the clock and stands in the journal, so the undisturbed run is one that is given the killed
run's journal."""

from __future__ import annotations

import random
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anytimed.contracts import Json
from tests import tiny
from tests.adapters.brokers import KafkaCluster, NatsClient, NatsServer, RedisServer, Server
from tests.crash import audited
from tests.crash.lives import killed, stopped_when_dry, until_it_commits, until_it_trains
from tests.crash.test_bit_for_bit import status_of
from tests.crash.test_random_kills import BATCH, LENGTH, audit, held_out, write_records
from tests.faultlog import FULL, Injected

KILLS = 20 if FULL else 4
FED = 12
"""Records that come in during a life of the daemon: some 40 steps of training."""


class Broker(ABC):
    """A broker to which records are fed, and the source that reads it."""

    adapter: str
    table: Json
    server: Server | None = None

    @abstractmethod
    def feed(self, contents: list[bytes]) -> None: ...

    def close(self) -> None:
        if self.server is not None:
            self.server.kill()


class Redis(Broker):
    adapter = "anytimed_adapters.streams.redis_stream:RedisStream"

    def __init__(self, folder: Path) -> None:
        self.server = RedisServer(folder)
        self.table = {"url": self.server.url, "key": "documents"}

    def feed(self, contents: list[bytes]) -> None:
        assert isinstance(self.server, RedisServer)
        with self.server.client() as client:
            for content in contents:
                client.xadd("documents", {"text": content})


class Nats(Broker):
    adapter = "anytimed_adapters.streams.jetstream:JetStream"

    def __init__(self, folder: Path) -> None:
        self.server = NatsServer(folder)
        self.table = {"url": self.server.url, "stream": "documents"}
        client = NatsClient(self.server.url)
        client.wait(client.stream.add_stream(name="documents", subjects=["documents.>"], allow_direct=True))
        client.close()

    def feed(self, contents: list[bytes]) -> None:
        assert isinstance(self.server, NatsServer)
        client = NatsClient(self.server.url)
        client.publish("documents.new", contents)
        client.close()


class Kafka(Broker):
    adapter = "anytimed_adapters.streams.kafka_topic:KafkaTopic"

    def __init__(self, folder: Path) -> None:
        self.cluster = KafkaCluster()
        self.table = {"servers": self.cluster.servers, "topic": "documents", "url": None}

    def feed(self, contents: list[bytes]) -> None:
        self.cluster.produce("documents", contents)


@pytest.fixture(params=[Redis, Nats, Kafka])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    made: Broker = request.param(tmp_path / "broker")
    yield made
    made.close()


def configured(folder: Path, broker: Broker) -> Path:
    folder.mkdir()
    source: dict[str, Any] = {"type": broker.adapter, "timeout_s": 1, **broker.table}
    return tiny.config(
        folder,
        model={"type": "audited"},
        commits={"every_steps": 4},
        exports={"every_steps": 9, "keep": 1000},
        **{"sources.main": source},
    )


@pytest.mark.fault(18)
@pytest.mark.timeout(3600)
def test_killed_at_random_each_message_is_trained_on_once(tmp_path: Path, broker: Broker, injected: Injected) -> None:
    contents = write_records(tmp_path / "data", FED * (KILLS + 2))
    fresh = iter(contents)

    def feed(count: int) -> None:
        broker.feed([next(fresh) for _ in range(count)])

    environment = audited.installed(tmp_path / "plugin")
    lived, told = tmp_path / "lived", tmp_path / "told"
    config, allow = configured(lived, broker), ("--allow-adapter", broker.adapter)
    draw = random.Random(broker.adapter)
    feed(FED)
    for kill in range(KILLS):
        feed(FED // 2)
        process = tiny.start("run", config, *allow, **environment)
        try:
            until_it_trains(lived, process)
            until_it_commits(lived, process)
            feed(FED // 2)
            time.sleep(draw.uniform(0.0, 0.6))
            if broker.server is not None and kill % 4 == 1:
                broker.server.kill()
                time.sleep(draw.uniform(0.0, 0.6))
                assert process.poll() is None, process.communicate()[0]
                if kill % 8 == 1:  # else the daemon dies before the broker is there again
                    broker.server.start()
                    time.sleep(draw.uniform(0.0, 0.6))
        finally:
            killed(process)
        if broker.server is not None and kill % 8 == 5:
            broker.server.start()
        injected(18, f"{type(broker).__name__}: kill {kill}, step {status_of(lived).get('step')}")
    feed(FED)
    process = tiny.start("run", config, *allow, **environment)
    stopped_when_dry(process)

    steps = int(tiny.newest_commit(lived).name.rpartition("-")[2])
    undisturbed = configured(told, broker)
    (told / "run").mkdir(mode=0o700)
    shutil.copy(lived / "run" / "journal.jsonl", told / "run")
    tiny.run("run", undisturbed, *allow, "--steps", str(steps), timeout_s=600, **environment)
    tiny.assert_same_state(tiny.newest_commit(lived), tiny.newest_commit(told))

    *lives, line = audited.trained_on(tmp_path / "plugin", BATCH, LENGTH)
    audit([line, *lives], contents, steps)
    read = tiny.state_of(tiny.newest_commit(lived))[1]["position"]["sources"]["main"]
    assert read["records"] + read["held_out"] > len(contents) - 2 * FED
    first = contents[: read["records"] + read["held_out"]]
    assert read["held_out"] == sum(map(held_out, first))
    assert read["rejected"] == 0
