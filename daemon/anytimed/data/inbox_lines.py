"""The lines of an inbox: one record each, readable for people.

{"n", "left", "id", "synced", "request", "text", "crc"}: `n` numbers the records from 0; `left` is how many of its
request follow it, so that a request that a crash has torn is seen to be none; `id` is the sender's, if it gave one. The
last line of a request (`left` = 0) also says which bytes of the inbox were durable before it was written (`synced`),
which tells damage from what a crash left, and what its key was, if it had one (`request`). `crc` is the CRC-32 of the
line before it. The text stands last, so that a line's head can be read without it.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass

from anytimed.contracts import Json

_TEXT = b',"text":'
_CRC = b',"crc":'


@dataclass(frozen=True, slots=True)
class Head:
    """All of a line but the text. `text_json`: the text as the line has it, JSON in UTF-8."""

    n: int
    left: int
    id: str
    synced: int
    request: Json | None
    text_json: bytes


def text_json(text: str) -> bytes:
    """A text as a line holds it. Raises UnicodeEncodeError on half a surrogate pair, which is no character."""
    return json.dumps(text, ensure_ascii=False).encode()


def made(n: int, left: int, text: bytes, *, id: str = "", synced: int = 0, request: Json | None = None) -> bytes:
    """The line of a record; `text` from `text_json`."""
    head: Json = {"n": n, "left": left}
    if id:
        head["id"] = id
    if not left:
        head["synced"] = synced
    if request:
        head["request"] = request
    body = json.dumps(head, separators=(",", ":")).encode()[:-1] + _TEXT + text
    return body + _CRC + b"%d}\n" % zlib.crc32(body)


def head_of(line: bytes) -> Head:
    """Raises ValueError where the line is not as it was written."""
    body, _, crc = line.rpartition(_CRC)
    if not line.endswith(b"}\n") or crc != b"%d}\n" % zlib.crc32(body):
        raise ValueError("its checksum is another one")
    told, _, text = body.partition(_TEXT)  # within a JSON text a quote has a backslash before it
    head = json.loads(told + b"}")
    return Head(head["n"], head["left"], head.get("id", ""), head.get("synced", 0), head.get("request"), text)


def text_of(line: bytes) -> str:
    """The text of a line. Raises ValueError where it is not as it was written."""
    text: str = json.loads(head_of(line).text_json)
    return text
