"""Which ids and idempotency keys an inbox has stored: what is sent again with one is not stored again.

They stand in the lines of the inbox itself, so they are durable with the records and forgotten with them; memory holds
the newest few.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, MutableMapping
from itertools import islice

from anytimed.contracts import Json
from anytimed.data.inbox_lines import Head, head_of
from anytimed.data.inbox_log import Gone, InboxLog
from anytimed.service.offer import Declined, Offer, Offered

Known = MutableMapping[bytes, bytes]
"""Digest of an id or a key to the digest of what came with it."""


def recalled(log: InboxLog, most: int) -> dict[bytes, bytes]:
    """The newest `most` that the log keeps, oldest first. A damaged line has none: whoever reads it refuses it. Raises
    OSError."""
    known: dict[bytes, bytes] = {}
    for span in log.spans(0):
        with contextlib.suppress(Gone):
            for line in log.lines(span.start, span.stop):
                with contextlib.suppress(ValueError, LookupError, TypeError):
                    known.update(_in_line(head_of(line)))
        forget(known, most)
    return known


def forget(known: dict[bytes, bytes], most: int) -> None:
    """Keep the newest `most`."""
    for name in list(islice(known, max(0, len(known) - most))):
        del known[name]


def request_of(offer: Offer) -> Json | None:
    """What the last line of a request says of its key; None where it has none."""
    return {"key": offer.key, "digest": offer.digest().hex()} if offer.key else None


def unknown(offer: Offer, known: Known) -> tuple[Offered, ...]:
    """The records of an offer that are to be stored; what is new is added to `known`. Raises Declined where an id or
    the key stands for something else already, and adds nothing then."""
    new: dict[bytes, bytes] = {}
    if offer.key:
        name = _name(b"key", offer.key)
        if (before := known.get(name)) is not None:
            if before != offer.digest():
                raise Declined(422, f"Idempotency-Key {offer.key!r} was used for a request with another body")
            return ()
        new[name] = offer.digest()
    fresh = []
    for number, record in enumerate(offer.records, 1):
        name = _name(b"id", record.id)
        before = known.get(name, new.get(name)) if record.id else None
        if before is None:
            fresh.append(record)
            if record.id:
                new[name] = record.digest()
        elif before != record.digest():
            raise Declined(422, f"record {number}: id {record.id!r} stands for another text already")
    known.update(new)
    return tuple(fresh)


def _in_line(head: Head) -> Iterator[tuple[bytes, bytes]]:
    if head.id:
        yield _name(b"id", head.id), Offered(head.id, head.text_json).digest()
    if head.request:
        yield _name(b"key", head.request["key"]), bytes.fromhex(head.request["digest"])


def _name(kind: bytes, text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16, person=kind).digest()
