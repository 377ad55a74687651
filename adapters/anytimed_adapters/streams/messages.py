"""A broker's message as a record: what Kafka, JetStream and Redis Streams share of settings and decoding.

A message is one document, either its text or a JSON object with a field that holds the text. A message that is
neither is rejected with a reason and passed over; its digest is of its bytes as they came.
"""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from anytimed.contracts import Record, Rejected

_SHOWN_CHARACTERS = 300
"""Of an object's keys, which may be as long as the message."""


class MessageSettings(BaseModel):
    """What a message holds, and how long the broker is waited for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["text", "json"] = Field(
        default="text", description="A message is the document itself, or a JSON object with the document in a field."
    )
    text_field: str = Field(default="text", description="With format = json: the object's field with the document.")
    max_record_bytes: int = Field(default=16 << 20, gt=0, description="Longer messages are set aside in quarantine.")
    encoding_errors: Literal["replace", "reject"] = Field(
        default="replace",
        description="What is not UTF-8: replaced by U+FFFD, or the message is set aside in quarantine.",
    )
    timeout_s: float = Field(
        default=5.0, gt=0, le=60, description="The longest wait for an answer of the broker; then it is tried again."
    )


def document(value: bytes | None, settings: MessageSettings) -> Record | Rejected:
    """The record of a message. None: a message without a value, such as Kafka's mark of a deletion."""
    content = value or b""
    digest = sha256(content).hexdigest()
    if not content:
        return Rejected("the message has no value, expected text" if value is None else "the message is empty", digest)
    if len(content) > settings.max_record_bytes:
        return Rejected(f"{len(content)} bytes, the most is max_record_bytes = {settings.max_record_bytes}", digest)
    try:
        text = content.decode("utf-8", "strict" if settings.encoding_errors == "reject" else "replace")
    except UnicodeDecodeError as error:
        return Rejected(f"the message is not UTF-8: {error}", digest)
    if settings.format == "text":
        return _record(text, settings, digest)
    return _of_object(text, settings, digest)


def _of_object(text: str, settings: MessageSettings, digest: str) -> Record | Rejected:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Rejected(f"the message is not JSON: {error}", digest)
    if not isinstance(value, dict):
        return Rejected(f"the message is {type(value).__name__}, expected a JSON object", digest)
    if settings.text_field not in value:
        return Rejected(f"no field {settings.text_field!r}, found {sorted(value)}"[:_SHOWN_CHARACTERS], digest)
    inner = value[settings.text_field]
    if not isinstance(inner, str) or not inner:
        told = "empty" if inner == "" else type(inner).__name__
        return Rejected(f"field {settings.text_field!r} is {told}, expected text", digest)
    return _record(inner, settings, digest)


def _record(text: str, settings: MessageSettings, digest: str) -> Record | Rejected:
    """Its digest is of the text in UTF-8, so that equal texts are equal in any source."""
    try:
        content = text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell
        if settings.encoding_errors == "reject":
            return Rejected(f"the text is not Unicode: {error}", digest)
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        content = text.encode()
    return Record(text, sha256(content).hexdigest())
