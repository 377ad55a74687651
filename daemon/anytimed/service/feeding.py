"""Sends files to an inbox of the daemon: what `anytimed feed` does.

In order: files become records, as lines of JSON; lines are packed into requests of bounded size, each with a key of its
own; a request is sent until it is answered. While the inbox is full, it is sent again after a while; where the
connection was lost and a daemon answers again in time, the key makes sure that nothing is stored twice.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal
from urllib.parse import quote

from anytimed.contracts import AnytimedError, ConfigError, Json
from anytimed.service.control import ANSWER_BYTES, UnixConnection
from anytimed.storage.strangers import parse

REQUEST_BYTES, REQUEST_RECORDS = 1 << 20, 10_000
LINE_BYTES = 64 << 20
AWAY_S = 30.0
"""How long a daemon that answered before is waited for: a restart takes seconds."""
SLOWEST_AGAIN_S = 10.0
_TIMEOUT_S = 120.0

Form = Literal["auto", "jsonl", "text"]


@dataclass(slots=True)
class Fed:
    """What was acknowledged so far. repeated: of the records, those that the inbox had before; size: bytes read."""

    records: int = 0
    repeated: int = 0
    size: int = 0

    def told(self) -> str:
        again = f", {self.repeated:,} of them had been stored before" if self.repeated else ""
        return f"{self.records:,} records were taken{again}"


@dataclass(frozen=True, slots=True)
class Line:
    """One record as a line of JSON; where it stands, and how many bytes of the file it took."""

    data: bytes
    where: str
    size: int


class _Away(Exception):
    """The connection was lost before an answer."""


def records_of(paths: Iterable[Path], form: Form) -> Iterator[Line]:
    """The records of files, one file after the other; `-` is standard input. Raises as `lines_of`, OSError."""
    for path in paths:
        if str(path) == "-":
            yield from lines_of(sys.stdin.buffer, "standard input", form)
        else:
            with path.open("rb") as file:
                yield from lines_of(file, str(path), form)


def lines_of(file: BinaryIO, name: str, form: Form) -> Iterator[Line]:
    """The records of a file: its lines (jsonl), or the whole of it (text). Raises AnytimedError naming what is none."""
    if form == "auto":
        form = "jsonl" if Path(name).suffix.lower() in (".jsonl", ".ndjson") else "text"
    if form == "jsonl":
        number = 0
        while line := file.readline(LINE_BYTES):
            number += 1
            if len(line) == LINE_BYTES and not line.endswith(b"\n"):
                raise AnytimedError(f"{name}: line {number} is longer than {LINE_BYTES} bytes")
            if line.strip():
                yield Line(line.rstrip(b"\r\n"), f"{name}, line {number}", len(line))
        return
    content = file.read(LINE_BYTES)
    if len(content) == LINE_BYTES:
        raise AnytimedError(f"{name}: longer than {LINE_BYTES} bytes, which is no record; expected a document a file")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise AnytimedError(f"{name}: not UTF-8: {error}") from None
    yield Line(json.dumps({"text": text}, ensure_ascii=False).encode(), name, len(content))


def packed(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """Requests of at most REQUEST_BYTES and REQUEST_RECORDS, but at least one record."""
    request: list[Line] = []
    size = 0
    for line in lines:
        if request and (size + len(line.data) > REQUEST_BYTES or len(request) >= REQUEST_RECORDS):
            yield request
            request, size = [], 0
        request.append(line)
        size += len(line.data) + 1
    if request:
        yield request


class Feeder:
    """Sends to the inbox `source` (None: the only one) of the daemon whose socket is at `path`. `waiting` is told why
    nothing goes on, and None when it does."""

    def __init__(self, path: Path, source: str | None, waiting: Callable[[str | None], None]) -> None:
        self._path, self._waiting = path, waiting
        self._route = "/records" + (f"?source={quote(source, safe='')}" if source is not None else "")
        self._connection: UnixConnection | None = None
        self._keys, self._sent = secrets.token_hex(8), 0
        self._met = False
        self.fed = Fed()

    def send(self, lines: list[Line]) -> None:
        """One request, until it is acknowledged. Raises AnytimedError where no daemon answers, or it declines."""
        body = b"\n".join(line.data for line in lines)
        self._sent += 1
        key = f"feed-{self._keys}-{self._sent}"
        pause, give_up = 0.1, time.monotonic() + AWAY_S
        while True:
            try:
                status, again_s, answer = self._ask(body, key)
            except _Away as error:
                if not self._met:
                    raise _no_daemon(self._path) from None
                if time.monotonic() > give_up:
                    raise AnytimedError(f"{self._path}: no daemon answers any more ({error})") from None
                told = "the daemon does not answer"
            else:
                if status == 200:
                    break
                if status == 413 and len(lines) > 1:  # the inbox takes shorter ones only
                    for part in (lines[: len(lines) // 2], lines[len(lines) // 2 :]):
                        self.send(part)
                    return
                told = str(answer.get("error", f"the daemon answered {status}"))
                if again_s is None or (status != 429 and time.monotonic() > give_up):
                    raise _declined(status, told, answer, lines)
                if status == 429:
                    give_up = time.monotonic() + AWAY_S
                pause = max(pause, again_s)
            self._waiting(told)
            time.sleep(pause)
            pause = min(2 * pause, SLOWEST_AGAIN_S)
        self._waiting(None)
        self.fed.records += int(answer["records"])
        self.fed.repeated += int(answer["repeated"])
        self.fed.size += sum(line.size for line in lines)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # --- within ---

    def _ask(self, body: bytes, key: str) -> tuple[int, float | None, Json]:
        """Status, when to try again, and the answer. Raises _Away."""
        headers = {"Content-Type": "application/jsonl", "Idempotency-Key": key}
        used = self._connection is not None
        try:
            if self._connection is None:
                self._connection = UnixConnection(self._path, _TIMEOUT_S)
                self._connection.connect()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have answered before the end
                self._connection.request("POST", self._route, body, headers)
            response = self._connection.getresponse()
            data = response.read(ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            if used:  # it had been idle for long, perhaps
                return self._ask(body, key)
            raise _Away(repr(error)) from error
        if response.will_close:
            self.close()
        self._met = True
        answer = parse(data, str(self._path))
        if not isinstance(answer, dict):
            raise AnytimedError(f"{self._path}: answers {type(answer).__name__}, expected a JSON object")
        again = response.headers.get("Retry-After", "")
        return response.status, float(again) if again.isascii() and again.isdigit() else None, answer


def _no_daemon(path: Path) -> AnytimedError:
    return AnytimedError(
        f"no daemon answers in {path.parent}; the inbox is written by the one that runs: start it with "
        "`anytimed run CONFIG`"
    )


def _declined(status: int, told: str, answer: Json, lines: list[Line]) -> AnytimedError:
    """The daemon's word, with the place in the file in place of the line of the request."""
    number = answer.get("line")
    if isinstance(number, int) and 0 < number <= len(lines):
        told = f"{lines[number - 1].where}: {told.removeprefix(f'line {number}: ')}"
    return (ConfigError if status in (400, 404) and number is None else AnytimedError)(told)
