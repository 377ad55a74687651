"""Real brokers for tests, each a process of its own on a free port of this machine: `NatsServer`, `RedisServer`, and
`KafkaCluster`, librdkafka's mock brokers, which live in the process that makes them and forget everything with it.

`kill` is SIGKILL; `start` again finds the same store on the same port."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import nats
import redis
from confluent_kafka import Consumer, Producer, TopicPartition
from nats.js import JetStreamContext


class Server:
    """A broker's process. `command` with a port and a folder for its store."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.options = options
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def command(self) -> list[str]:
        raise NotImplementedError

    def answers(self, connection: socket.socket) -> bool:
        raise NotImplementedError

    def start(self) -> None:
        """Start it, on the port that it had before; returns when it answers."""
        for _ in range(5):
            self.port = self.port or free_port()
            with (self.folder / "log").open("ab") as log:
                self._process = subprocess.Popen(self.command(), stdout=log, stderr=log, cwd=self.folder)
            until = time.monotonic() + 20
            while self._process.poll() is None and time.monotonic() < until:
                try:
                    with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                        connection.settimeout(1)
                        if self.answers(connection):
                            return
                except OSError:
                    pass
                time.sleep(0.02)
            self.kill()
            if self._has_store():
                break
            self.port = 0  # somebody took it in between
        raise AssertionError(f"it does not start: {(self.folder / 'log').read_text()[-2000:]}")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def pause(self) -> None:
        """Make it answer nothing, with its connections open."""
        assert self._process is not None
        stop(self._process)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _has_store(self) -> bool:
        return any(path.name != "log" for path in self.folder.iterdir())


class RedisServer(Server):
    """redis-server whose every write is on disk before it is answered."""

    def command(self) -> list[str]:
        program = shutil.which("redis-server")
        assert program, "redis-server is not installed: apt-get install redis-server"
        durable = ("--appendonly", "yes", "--appendfsync", "always", "--save", "")
        where = ("--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder), "--daemonize", "no")
        return [program, *where, *durable, *self.options]

    def answers(self, connection: socket.socket) -> bool:
        connection.sendall(b"PING\r\n")
        return connection.recv(100).startswith((b"+PONG", b"-NOAUTH"))

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)


class NatsServer(Server):
    """nats-server with JetStream, its store in files."""

    def command(self) -> list[str]:
        program = Path(sys.executable).with_name("nats-server")
        return [
            str(program), "-js", "-sd", str(self.folder), "-a", "127.0.0.1", "-p", str(self.port), *self.options
        ]  # fmt: skip

    def answers(self, connection: socket.socket) -> bool:
        return connection.recv(5) == b"INFO "

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"


class NatsClient:
    """A client of a NatsServer for code that is not asyncio's."""

    def __init__(self, url: str, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = self.wait(nats.connect(url, **options))
        self.stream: JetStreamContext = self._client.jetstream(timeout=30)

    def wait(self, question: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(question)

    def publish(self, subject: str, values: Sequence[bytes]) -> None:
        async def all_of_them() -> None:
            # They are sent in this order, and each is answered when it is stored.
            await asyncio.gather(*[self.stream.publish(subject, value) for value in values])

        self.wait(all_of_them())

    def close(self) -> None:
        self.wait(self._client.close())
        self._loop.close()


class KafkaCluster:
    """Brokers that live in the client that made them. A topic comes to be with `partitions` when it is first used."""

    def __init__(self, brokers: int = 1, partitions: int = 1) -> None:
        self._producer = Producer(
            {
                "bootstrap.servers": "127.0.0.1:1",
                "test.mock.num.brokers": brokers,
                "topic.metadata.refresh.interval.ms": 1000,
                "linger.ms": 0,
                "log_level": 0,
            }
        )
        metadata = self._producer.list_topics(timeout=10)
        self.servers = ",".join(f"{broker.host}:{broker.port}" for broker in metadata.brokers.values())

    def produce(self, topic: str, values: Sequence[bytes | None], partition: int = 0) -> None:
        failed: list[object] = []
        for value in values:
            self._producer.produce(
                topic, value, partition=partition, on_delivery=lambda error, _: failed.append(error) if error else None
            )
        assert self._producer.flush(20) == 0
        assert not failed, failed

    def held(self, topic: str, partition: int = 0) -> tuple[int, int]:
        """The oldest offset that is held, and the one after the newest."""
        asking = Consumer({"bootstrap.servers": self.servers, "group.id": "held", "log_level": 0})
        found = asking.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)
        assert found is not None
        return found


def stop(process: subprocess.Popen[Any]) -> None:
    """SIGSTOP; returns when none of its threads runs any more."""
    process.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{process.pid}/task")
    while any((task / "stat").read_text().rpartition(")")[2].split()[0] != "T" for task in tasks.iterdir()):
        time.sleep(0.001)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class KafkaProcess:
    """A KafkaCluster in a process of its own, which can be stopped; its topic holds "document 0" to `count` - 1, 500 of
    them in partition 0, 500 in partition 1, and so on in turns."""

    def __init__(self, topic: str, count: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.adapters.brokers", topic, str(count)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert self._process.stdout is not None
        self.servers = self._process.stdout.readline().strip()
        assert self.servers

    def pause(self) -> None:
        stop(self._process)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def _serve(topic: str, count: int) -> None:
    cluster = KafkaCluster()
    for start in range(0, count, 500):
        documents = [f"document {i}".encode() for i in range(start, min(count, start + 500))]
        cluster.produce(topic, documents, start // 500 % 2)
    print(cluster.servers, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
