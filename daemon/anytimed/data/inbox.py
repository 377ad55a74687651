"""The inbox: a stream of what applications send, kept in the run directory until no commit needs it.

The daemon appends what arrives on its socket (`service.intake`); this is the side that reads. An entry is a span of
whole requests of one segment, all of it durable; a place is the number of a byte, which stays what it is however many
segments were deleted. What a place or a journal entry needs and is not there any more is refused by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from anytimed.contracts import Finished, Json, Record, Refused, Rejected, StreamUnavailable
from anytimed.data import inbox_log
from anytimed.data.inbox_lines import text_of
from anytimed.data.inbox_log import Gone, InboxLog, Span

_REMEDY = "Restore the folder from a copy, or start over with --fresh"


class Inbox:
    """A `Stream`, `Acknowledging` and `KeepsFiles`. `use_folder` comes first."""

    class Settings(BaseModel):
        """What is accepted, and how much of it is kept. All of it may change while it runs."""

        model_config = ConfigDict(frozen=True, extra="forbid")

        max_record_bytes: int = Field(default=16 << 20, gt=0, description="a longer record is refused")
        max_request_bytes: int = Field(default=32 << 20, gt=0, description="a longer request is refused")
        max_bytes: int = Field(
            default=1 << 30, gt=0, description="while so much waits to be read, senders are told to try again later"
        )
        segment_bytes: int = Field(default=64 << 20, gt=0, description="a file of the inbox is deleted as a whole")
        keep_bytes: int = Field(
            default=64 << 20,
            ge=0,
            description="of what no commit needs any more, kept so that what is sent again is recognised",
        )
        remembered_ids: int = Field(
            default=100_000, ge=0, description="ids and idempotency keys, the newest ones, that are recognised"
        )

        @model_validator(mode="after")
        def _fitting(self) -> Inbox.Settings:
            if not self.max_record_bytes <= self.max_request_bytes <= self.max_bytes:
                raise ValueError("expected max_record_bytes <= max_request_bytes <= max_bytes")
            return self

    passing_settings = tuple(Settings.model_fields)

    def __init__(self, settings: Settings, name: str) -> None:
        self.settings = settings
        self._name = name
        self._opened: InboxLog | None = None
        self._spans: list[Span] = []
        self._ends: list[int] = [0]  # bytes adopted up to and including a span; one longer than the spans

    def use_folder(self, folder: Path) -> None:
        try:
            self._opened = inbox_log.of(folder)
        except OSError as error:
            raise StreamUnavailable(f"source {self._name!r}: {folder} cannot be read: {error.strerror}") from error

    @property
    def _log(self) -> InboxLog:
        assert self._opened is not None, "use_folder comes first"
        return self._opened

    # --- Stream -------------------------------------------------------------------------------------------------------

    def discover(self) -> list[Json]:
        """Spans of requests that came in: {"start", "stop", "record" after it}. Raises Refused on a damaged segment."""
        if self._log.damage:
            raise Refused(f"source {self._name!r}: {self._log.damage}. {_REMEDY}")
        after = self._spans[-1].stop if self._spans else 0
        return [{"start": s.start, "stop": s.stop, "record": s.record} for s in self._log.spans(after)]

    def adopt(self, entries: Sequence[Json]) -> None:
        for entry in entries:
            span = Span(**entry)
            self._spans.append(span)
            self._ends.append(self._ends[-1] + span.stop - span.start)
            self._log.reach(span.stop, span.record)

    def read(self, place: Json | None) -> Iterator[tuple[Record | Rejected | Finished, Json]]:
        """Items after `place`: {"entry", "byte", "digest" of the entry's bytes before it}."""
        index, at, digest = (place["entry"], place["byte"], place["digest"]) if place else (0, 0, "")
        self._log.took(at)
        while index < len(self._spans):
            with _answering(self._name):
                yield from self._read_span(index, at, digest)
            index, at, digest = index + 1, 0, ""

    def verify(self, finished: Mapping[int, str]) -> None:
        """Hash again what is kept of these; what was deleted is fine."""
        first = self._log.first
        for index in sorted(finished):
            span = self._spans[index]
            if span.start < first:
                continue
            found = hashlib.sha256()
            with _answering(self._name):
                try:
                    for chunk in self._log.chunks(span.start, span.stop):
                        found.update(chunk)
                except Gone:
                    continue
                except Refused as error:
                    raise Refused(f"source {self._name!r}: {error}. {_REMEDY}") from None
            if found.hexdigest() != finished[index]:
                raise self._changed(span.start, span.stop)

    def lag(self, place: Json | None) -> int:
        """Bytes adopted and not yet read, after `place`."""
        if place is None:
            return self._ends[-1]
        index = int(place["entry"])
        if index >= len(self._spans):
            return 0
        into = max(0, int(place["byte"]) - self._spans[index].start)
        return self._ends[-1] - self._ends[index] - into

    # --- Acknowledging ------------------------------------------------------------------------------------------------

    def acknowledge(self, place: Json) -> None:
        """Delete the segments that end `keep_bytes` before `place`, or earlier."""
        try:
            self._log.forget(int(place["byte"]) - self.settings.keep_bytes)
        except OSError as error:
            raise StreamUnavailable(f"source {self._name!r}: not deleted: {error}") from error

    # --- within -------------------------------------------------------------------------------------------------------

    def _read_span(self, index: int, at: int, prefix: str) -> Iterator[tuple[Record | Finished, Json]]:
        span, digest = self._spans[index], hashlib.sha256()
        at = max(at, span.start)
        after = {"entry": index + 1, "byte": span.stop, "digest": ""}
        try:
            if at > span.start:
                for chunk in self._log.chunks(span.start, at):
                    digest.update(chunk)
                if digest.hexdigest() != prefix:
                    raise self._changed(span.start, at)
            for line in self._log.lines(at, span.stop):
                try:
                    text = text_of(line)
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise self._changed(at, at + len(line)) from None
                digest.update(line)
                at += len(line)
                self._log.took(at)
                content = hashlib.sha256(text.encode()).hexdigest()
                yield Record(text, content), {"entry": index, "byte": at, "digest": digest.hexdigest()}
        except Gone:
            if at < span.stop:
                raise Refused(
                    f"source {self._name!r}: reading goes on at byte {at} of the inbox, and {self._log.folder} keeps "
                    f"what comes after byte {self._log.first} only. {_REMEDY}"
                ) from None
            yield Finished(index, prefix), after  # read to its last byte before it was deleted: nothing is missing
            return
        yield Finished(index, digest.hexdigest()), after

    def _changed(self, start: int, stop: int) -> Refused:
        return Refused(
            f"source {self._name!r}: bytes {start} to {stop} of the inbox in {self._log.folder} are not what was "
            f"written there. {_REMEDY}"
        )


@contextmanager
def _answering(name: str) -> Iterator[None]:
    """What the disk refuses is asked again later."""
    try:
        yield
    except OSError as error:
        raise StreamUnavailable(f"source {name!r}: {error}") from error
