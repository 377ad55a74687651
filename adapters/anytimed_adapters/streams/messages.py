"""A broker's message as a record: what Kafka, JetStream and Redis Streams share of settings and decoding.

A message is one document, either its text or a JSON object with a field that holds the text. A message that is
neither is rejected with a reason and passed over; its digest is of its bytes as they came.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from anytimed.contracts import Record, Rejected
from anytimed_adapters.streams.json_text import DEEPEST
from anytimed_adapters.streams.records import Errors, of_bytes, of_object, sha256, too_long

_EMPTY = sha256(b"")


class MessageSettings(BaseModel):
    """What a message holds, and how long the broker is waited for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["text", "json"] = Field(
        default="text", description="A message is the document itself, or a JSON object with the document in a field."
    )
    text_field: str = Field(default="text", description="With format = json: the object's field with the document.")
    max_record_bytes: int = Field(default=16 << 20, gt=0, description="Longer messages are set aside in quarantine.")
    max_nesting: int = Field(
        default=100, gt=0, le=DEEPEST, description="With format = json: deeper messages are set aside in quarantine."
    )
    encoding_errors: Errors = Field(
        default="replace",
        description="What is not UTF-8: replaced by U+FFFD, or the message is set aside in quarantine.",
    )
    timeout_s: float = Field(
        default=5.0, gt=0, le=60, description="The longest wait for an answer of the broker; then it is tried again."
    )


def document(value: bytes | None, settings: MessageSettings) -> Record | Rejected:
    """The record of a message. None: a message without a value, such as Kafka's mark of a deletion."""
    if not value:
        return Rejected("the message has no value, expected text" if value is None else "the message is empty", _EMPTY)
    if len(value) > settings.max_record_bytes:
        return too_long(len(value), settings.max_record_bytes, sha256(value))
    if settings.format == "text":
        return of_bytes(value, settings.encoding_errors, "the message")
    return of_object(value, settings.text_field, settings.max_nesting, settings.encoding_errors, "the message")
