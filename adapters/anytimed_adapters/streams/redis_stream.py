"""A Redis Stream (Redis 7 or later, Valkey) as a source: a document for every entry of one key.

A span is [id before it, last id, number of messages before it, number up to its end]. The numbers are Redis' own
count of everything that was ever added; with them it is known how many messages were removed, and so whether one was
that has not been read: by a trim, or by hand from the front. What is deleted elsewhere in a span is passed over.

Entries and the state of the stream are read in one transaction, a batch at a time; no connection is held in a place.
With every commit the consumer group is set to the place before which nothing is needed any more, for those who watch
the lag (XINFO GROUPS); with `trim`, entries before it are removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import environ
from typing import Any

import redis
from pydantic import Field
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from anytimed.contracts import ConfigError, Json, Refused
from anytimed.urls import credentials, keep_secret, without_credentials
from anytimed_adapters.streams.broker import BrokerStream, Entry
from anytimed_adapters.streams.messages import MessageSettings

_BATCH = 128
_PASSWORD = "REDISCLI_AUTH"
_LAST = (1 << 64) - 1


class RedisStream(BrokerStream):
    """A `Stream`, acknowledged, over the entries of one Redis Stream."""

    passing_settings = BrokerStream.passing_settings | {"group", "trim"}

    class Settings(MessageSettings):
        """Where the stream is, and what becomes of what was read."""

        url: str = Field(
            description='The server: "redis://host:6379/0", "rediss://…" with TLS, "unix:///path". User and password '
            f"may stand in it; else the password is taken from {_PASSWORD} in the environment, where that is set.",
            repr=False,
        )
        key: str = Field(min_length=1, description="The stream's key.")
        field: str = Field(default="text", description="The field of an entry that holds the message.")
        group: str = Field(
            default="anytimed",
            min_length=1,
            description="The consumer group that tells how far this run has come; each run needs one of its own.",
        )
        trim: bool = Field(
            default=False,
            description="Remove entries that no commit needs any more, for all readers of the stream.",
        )
        storage_options: dict[str, Any] = Field(
            default_factory=dict, repr=False, description="Passed to redis-py: username, password, ssl_ca_certs."
        )

    def __init__(self, settings: Settings, name: str) -> None:
        options = dict(settings.storage_options)
        secrets = credentials(settings.url, options)
        if password := environ.get(_PASSWORD):
            secrets.append(password)
            keep_secret([password])
            if "password" not in options and "@" not in settings.url:
                options["password"] = password
        super().__init__(settings, name, secrets)
        self._settings = settings
        self._what = self._told(f"{without_credentials(settings.url)} key {settings.key!r}")
        self._acknowledged = ""
        half = settings.timeout_s / 2  # to connect, and to answer
        ours = {"socket_timeout": half, "socket_connect_timeout": half, "retry": Retry(NoBackoff(), 0)}
        try:
            self._client = redis.Redis.from_url(settings.url, **{**options, **ours})
            self._client.connection_pool.connection_class(**self._client.connection_pool.connection_kwargs)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"source {name!r}: url or storage_options cannot be used: {self._told(str(error))}. Expected "
                '"redis://host:6379/0", "rediss://…" or "unix:///path", and options that redis-py knows'
            ) from None

    # --- Stream -------------------------------------------------------------------------------------------------------

    def discover(self) -> list[Entry]:
        info = self._require_same_log()
        added = int(info["entries-added"])
        removed = added - int(info["length"])
        if not self._spans:
            if not info["first-entry"]:
                return []
            return [[_before(_text(info["first-entry"][0])), _text(info["last-generated-id"]), removed, added]]
        _, stop, _, end = self._spans[-1]
        self._require_held(info, stop, end)
        return [[stop, _text(info["last-generated-id"]), end, added]] if added > end else []

    def acknowledge(self, place: Json) -> None:
        """Set the group to the last message before `place`; with `trim`, remove those before that one."""
        index, offset = int(place["entry"]), place["offset"]
        last = offset if offset is not None else self._spans[index - 1][1] if index else None
        if last is None or last == self._acknowledged:
            return
        key, group = self._settings.key, self._settings.group
        read = self._spans[index][2] + place["read"] if offset is not None else self._spans[index - 1][3]
        with self._answering():
            try:
                self._client.xgroup_setid(key, group, last, entries_read=read)
            except ResponseError as error:
                if not str(error).startswith("NOGROUP"):
                    raise
                self._client.xgroup_create(key, group, last, entries_read=read)
            if self._settings.trim:
                # The last message read stays: while it is held, it is certain that none after it was trimmed.
                self._client.xtrim(key, minid=last, approximate=False)
        self._acknowledged = last

    # --- the stream ---------------------------------------------------------------------------------------------------

    def _size(self, entry: Entry) -> int:
        return int(entry[3]) - int(entry[2])

    def _messages(self, entry: Entry, offset: Any, read: int) -> Iterator[tuple[bytes | None, Any]]:
        start, stop, first, _ = entry
        at = start if offset is None else offset
        field = self._settings.field.encode()
        while at != stop:
            entries = self._range(at, stop, first + read)
            for identity, fields in entries:
                at, read = identity, read + 1
                yield fields.get(field), at
            if len(entries) < _BATCH:
                return

    def _range(self, after: str, stop: str, read: int) -> list[tuple[str, dict[bytes, bytes]]]:
        """Up to a batch of entries, after it is certain that none before them was removed unread."""
        with self._answering(), self._client.pipeline(transaction=True) as both:
            both.xinfo_stream(self._settings.key)
            both.xrange(self._settings.key, f"({after}", stop, count=_BATCH)
            info, entries = both.execute()
        self._require(info)
        self._require_held(info, after, read)
        return [(_text(identity), fields) for identity, fields in entries]

    def _require_same_log(self) -> Json:
        with self._answering():
            info: Json = self._client.xinfo_stream(self._settings.key)
        self._require(info)
        return info

    def _require(self, info: Json) -> None:
        if "entries-added" not in info:
            raise Refused(
                f"source {self._name!r}: the server does not count what was added to a stream, so that expired "
                "messages could not be told from read ones: expected Redis 7 or later, or Valkey"
            )
        if self._spans:
            _, stop, _, end = self._spans[-1]
            added, newest = int(info["entries-added"]), _text(info["last-generated-id"])
            if added < end or _number(newest) < _number(stop):
                expected = f"at least {end} messages, the newest {stop} or later"
                raise self._replaced(self._what, expected, f"{added} messages, the newest {newest}")

    def _require_held(self, info: Json, after: str, read: int) -> None:
        """Raise Refused where more messages were removed than were `read`, and there is room for them between `after`
        and the oldest that is held."""
        removed = int(info["entries-added"]) - int(info["length"])
        if removed <= read:
            return
        oldest = _text(info["first-entry"][0]) if info["first-entry"] else None
        if oldest is None or _number(oldest) > _number(after) + 1:
            raise self._expired(
                self._what, f"the entry after {after}", f"{oldest or 'none'} ({removed - read} messages are gone)"
            )

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except (RedisError, OSError) as error:
            raise self._unavailable(f"{self._what} cannot be read", error) from None


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _number(identity: str) -> int:
    """An id, milliseconds-sequence, as one number in the order of ids."""
    milliseconds, _, sequence = identity.partition("-")
    return (int(milliseconds) << 64) + int(sequence or 0)


def _before(identity: str) -> str:
    number = _number(identity) - 1
    return f"{number >> 64}-{number & _LAST}"
