"""A NATS JetStream stream as a source: a document for every message, by its sequence number.

A span is [first sequence, sequence after the last, log]; `log` tells when the stream was made, for one that was deleted
and made again has other messages at the same numbers.

Messages are asked for by their number, many at once, and no consumer is made: what a consumer forgets at a restart, and
which of its messages come again, is nothing that a position could depend on. It works alike for the retention policies
`limits` and `workqueue`; `interest` is refused, for it drops what no consumer waits for. Where a stream allows direct
access, any of its servers may answer; that there is no message is taken from the leader only. Numbers that hold no
message (deleted, or replaced by the stream's limit per subject) are passed over.

With `on_commit = "purge"` every commit removes the messages before which nothing is needed any more, as the
acknowledgement of a work queue does.

The client is asyncio's: its loop runs in one thread for all sources, which ends with the process.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine, Iterator
from functools import cache
from os import environ
from typing import Any, Literal, TypeVar

import nats
import nats.errors
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import RawStreamMsg, RetentionPolicy, StreamInfo
from nats.js.errors import NotFoundError
from pydantic import Field

from anytimed.contracts import ConfigError, Json, Refused
from anytimed.urls import credentials, keep_secret, without_credentials
from anytimed_adapters.streams.broker import BrokerStream, Entry, fingerprint
from anytimed_adapters.streams.messages import MessageSettings

_BATCH = 64
_ENVIRONMENT = {
    "user": "NATS_USER",
    "password": "NATS_PASSWORD",
    "token": "NATS_TOKEN",
    "user_credentials": "NATS_CREDS",
}
_TRIES = {"max_reconnect_attempts": 1, "reconnect_time_wait": 0.1}
"""Of one connection; whoever asks next tries again."""
_OURS = {"servers", "allow_reconnect", "connect_timeout", "error_cb", "name", *_TRIES}

T = TypeVar("T")


class JetStream(BrokerStream):
    """A `Stream`, acknowledged, over the messages of one JetStream stream."""

    passing_settings = BrokerStream.passing_settings | {"on_commit"}

    class Settings(MessageSettings):
        """Where the stream is, and what becomes of what was read."""

        url: str = Field(
            description='Servers: "nats://host:4222,nats://other:4222", "tls://…". User and password or a token may '
            "stand in it; else they are taken from NATS_USER and NATS_PASSWORD, NATS_TOKEN or NATS_CREDS (a file) in "
            "the environment, where those are set.",
            repr=False,
        )
        stream: str = Field(min_length=1, pattern=r"^[^\s.*>/\\]+$", description="The stream's name; all its subjects.")
        on_commit: Literal["keep", "purge"] = Field(
            default="keep",
            description="What becomes of messages that no commit needs any more: kept, or removed for all readers.",
        )
        storage_options: dict[str, Any] = Field(
            default_factory=dict,
            repr=False,
            description="Passed to nats-py's connect: user, password, token, user_credentials (a file), nkeys_seed.",
        )

    def __init__(self, settings: Settings, name: str) -> None:
        options = dict(settings.storage_options)
        if taken := sorted(options.keys() & _OURS):
            raise ConfigError(
                f"source {name!r}: storage_options: {', '.join(taken)} are set by anytimed; take them out"
            )
        servers = [url.strip() for url in settings.url.split(",") if url.strip()]
        if not options and not any("@" in url for url in servers):
            options = {key: environ[variable] for key, variable in _ENVIRONMENT.items() if variable in environ}
            keep_secret(value for key, value in options.items() if key != "user_credentials")
        secrets = [secret for url in servers for secret in credentials(url, options)]
        super().__init__(settings, name, secrets)
        if not servers or not all("://" in url for url in servers):
            raise ConfigError(f'source {name!r}: url = {self._told(settings.url)!r}, expected "nats://host:4222"')
        self._settings = settings
        self._what = self._told(f"stream {settings.stream!r} at {', '.join(map(without_credentials, servers))}")
        self._options: dict[str, Any] = {
            **options,
            **_TRIES,
            "servers": servers,
            "allow_reconnect": False,
            "name": "anytimed",
        }
        self._last_error: Exception | None = None
        self._client: Client | None = None
        self._direct = False
        self._purged = 0

    # --- Stream -------------------------------------------------------------------------------------------------------

    def discover(self) -> list[Entry]:
        info = self._require_same_log()
        first, stop = _numbers(info)
        start = self._spans[-1][1] if self._spans else first
        if first > start:
            raise self._gone(start, first)
        return [[start, stop, _log(info)]] if stop > start else []

    def acknowledge(self, place: Json) -> None:
        """With `purge`, remove the messages before `place`."""
        index, offset = int(place["entry"]), place["offset"]
        first = offset if offset is not None else self._spans[index - 1][1] if index else 0
        if self._settings.on_commit == "purge" and first > self._purged:
            self._ask(self._purge(first))
            self._purged = first

    # --- messages -----------------------------------------------------------------------------------------------------

    def _size(self, entry: Entry) -> int:
        return int(entry[1]) - int(entry[0])

    def _messages(self, entry: Entry, offset: Any, read: int) -> Iterator[tuple[bytes | None, Any]]:
        start, stop, _ = entry
        at = int(start if offset is None else offset)
        while at < stop:
            found = self._ask(self._get(at, min(at + _BATCH, stop)))
            if any(message is None for message in found):
                # Asked after the messages: had one expired in between, the stream begins behind it.
                first, _ = _numbers(self._require_same_log())
                missing = at + found.index(None)
                if first > missing:
                    raise self._gone(missing, first)
            for message in found:
                at += 1
                if message is not None:
                    yield message.data or b"", at
            if found[-1] is None and at < stop:
                at = self._ask(self._after_hole(at, stop))

    async def _get(self, start: int, stop: int) -> list[RawStreamMsg | None]:
        stream = await self._connected()
        asked = [self._get_one(stream, number) for number in range(start, stop)]
        return list(await asyncio.gather(*asked))

    async def _get_one(self, stream: JetStreamContext, number: int) -> RawStreamMsg | None:
        """The message; None where the leader says that there is none."""
        name = self._settings.stream
        if self._direct:
            try:
                found = await stream.get_msg(name, seq=number, direct=True)
                if found.seq == number:
                    return found
            except (NotFoundError, nats.errors.NoRespondersError):
                pass  # of a server that has not got it yet; or direct access is no longer allowed
        try:
            return await stream.get_msg(name, seq=number)
        except NotFoundError as error:
            if error.err_code != _NO_MESSAGE:
                raise
            return None

    async def _after_hole(self, at: int, stop: int) -> int:
        """The number of the next message from `at` on, or `stop` if that is sooner: a hole may be millions wide."""
        stream = await self._connected()
        try:
            found = await stream.get_msg(self._settings.stream, seq=at, subject=">", next=True)
        except NotFoundError as error:
            if error.err_code != _NO_MESSAGE:
                raise
            return stop
        assert found.seq is not None
        return min(stop, found.seq)

    # --- the stream ---------------------------------------------------------------------------------------------------

    def _require_same_log(self) -> StreamInfo:
        info = self._ask(self._info())
        if info.config.retention == RetentionPolicy.INTEREST:
            raise Refused(
                f"source {self._name!r}: {self._what} has the retention policy interest, which drops messages before "
                "they are read; expected limits or workqueue: change the stream, or make one that sources it"
            )
        if self._spans:
            _, stop, log = self._spans[-1]
            if _log(info) != log:
                raise self._replaced(self._what, f"the stream {log}", f"{_log(info)}, made at {info.created}")
            if _numbers(info)[1] < stop:
                raise self._replaced(self._what, f"messages up to {stop - 1}", f"the newest is {info.state.last_seq}")
        return info

    def _gone(self, wanted: int, first: int) -> Refused:
        return self._expired(self._what, f"message {wanted}", f"{first} ({first - wanted} messages are gone)")

    async def _info(self) -> StreamInfo:
        info = await (await self._connected()).stream_info(self._settings.stream)
        self._direct = bool(info.config.allow_direct)
        return info

    async def _purge(self, first: int) -> None:
        await (await self._connected()).purge_stream(self._settings.stream, seq=first)

    # --- asking -------------------------------------------------------------------------------------------------------

    def _ask(self, question: Coroutine[Any, Any, T]) -> T:
        """The answer of the loop's thread, within the timeout. After a failure the next question connects anew."""
        timeout = self._settings.timeout_s
        asked = asyncio.run_coroutine_threadsafe(asyncio.wait_for(question, timeout), _loop())
        try:
            return asked.result(timeout + 1)
        except (nats.errors.Error, OSError, TimeoutError) as error:
            asked.cancel()
            self._drop()
            why = self._last_error if isinstance(error, nats.errors.NoServersError) else None
            raise self._unavailable(f"{self._what} cannot be read", why or error) from None

    async def _connected(self) -> JetStreamContext:
        if self._client is None or not self._client.is_connected:
            half = self._settings.timeout_s / 2
            self._client = await nats.connect(**self._options, connect_timeout=max(1, int(half)), error_cb=self._note)
            weakref.finalize(self, _close, self._client).atexit = False
            info = await self._client.jetstream(timeout=half).stream_info(self._settings.stream)
            self._direct = bool(info.config.allow_direct)
        return self._client.jetstream(timeout=self._settings.timeout_s)

    async def _note(self, error: Exception) -> None:
        self._last_error = error

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            _close(client)


_NO_MESSAGE = 10037


def _numbers(info: StreamInfo) -> tuple[int, int]:
    """The first number held and the one after the last."""
    return info.state.first_seq, info.state.last_seq + 1


def _log(info: StreamInfo) -> str:
    return fingerprint(info.config.name, info.created)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="anytimed-nats", daemon=True).start()
    return loop


def _close(client: Client) -> None:
    asyncio.run_coroutine_threadsafe(client.close(), _loop())
