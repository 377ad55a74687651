"""What a sender offers: the body of a request, taken apart and checked before anything is stored.

JSON Lines: an object a line with its document in "text", and an "id" if the sender numbers its records; other fields
are left out. Plain text: the body is the document. A request is taken as a whole or not at all, so the first mistake
declines it, by its line.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from anytimed.contracts import AnytimedError
from anytimed.data.inbox_lines import text_json

ID_CHARACTERS = 255
_LINE_OVERHEAD_BYTES = 96


class Declined(AnytimedError):
    """Nothing of a request was taken. status: HTTP's; again_s: when to try again; line: of the body, from 1."""

    def __init__(self, status: int, why: str, *, again_s: int | None = None, line: int | None = None) -> None:
        super().__init__(why)
        self.status, self.again_s, self.line = status, again_s, line


@dataclass(frozen=True, slots=True)
class Offered:
    """One record; `text` as `inbox_lines.text_json` has it."""

    id: str
    text: bytes

    def digest(self) -> bytes:
        return hashlib.blake2b(self.text, digest_size=8).digest()


@dataclass(frozen=True, slots=True)
class Offer:
    """A request's records. size: bytes of their texts; key: the request's idempotency key, or ""."""

    records: tuple[Offered, ...]
    size: int
    key: str = ""

    def digest(self) -> bytes:
        """Of all that was offered, by which the same request is known again."""
        digest = hashlib.blake2b(digest_size=8)
        for record in self.records:
            digest.update(b"%d %d " % (len(record.id.encode()), len(record.text)) + record.id.encode() + record.text)
        return digest.digest()

    @property
    def stored_bytes(self) -> int:
        """About what it takes in the inbox."""
        return sum(len(record.text) + len(record.id) + _LINE_OVERHEAD_BYTES for record in self.records)


def plain(body: bytes, key: str, max_record_bytes: int) -> Offer:
    """A body that is one document. Raises Declined."""
    if len(body) > max_record_bytes:
        raise Declined(413, f"the record has {len(body)} bytes, the most is max_record_bytes = {max_record_bytes}")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise Declined(400, f"the record is not UTF-8: {error}", line=1) from None
    if not text:
        raise Declined(400, "the body is empty, expected a record")
    return Offer((Offered("", text_json(text)),), len(body), key)


def json_lines(body: bytes, key: str, max_record_bytes: int) -> Offer:
    """A body with a record a line; blank lines count for nothing. Raises Declined."""
    records, size = [], 0
    for number, line in enumerate(body.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            id, text = _told(line)
            content = text.encode()
            if len(content) > max_record_bytes:
                raise ValueError(f"{len(content)} bytes, the most is max_record_bytes = {max_record_bytes}")
            records.append(Offered(id, text_json(text)))
        except (ValueError, RecursionError) as error:
            raise Declined(400, f"line {number}: {_reason(error)}", line=number) from None
        size += len(content)
    if not records:
        raise Declined(400, 'no record in the body, expected lines such as {"text": "a document"}')
    return Offer(tuple(records), size, key)


def usable(id: str) -> str:
    """An id or a key as it is. Raises ValueError on one that is none."""
    if not 0 < len(id) <= ID_CHARACTERS or not id.isprintable():
        raise ValueError(f"an id has 1 to {ID_CHARACTERS} printable characters, found {id[:80]!r}")
    return id


def _told(line: bytes) -> tuple[str, str]:
    value: Any = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError(f"found {type(value).__name__}, expected an object")
    if "text" not in value:
        raise ValueError(f"no field 'text', found {sorted(value)}"[:300])
    text, id = value["text"], value.get("id", "")
    if not isinstance(text, str) or not text:
        raise ValueError(f"field 'text' is {'empty' if text == '' else type(text).__name__}, expected text")
    if "id" in value and not isinstance(id, str):
        raise ValueError(f"field 'id' is {type(id).__name__}, expected text")
    return (usable(id) if "id" in value else ""), text


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "the text has half a surrogate pair, which is no character"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error}"
    return f"not JSON: {error}" if isinstance(error, json.JSONDecodeError | RecursionError) else str(error)
