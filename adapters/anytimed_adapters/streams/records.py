"""Bytes and texts as records: what is the same whatever file or broker they come from.

A text is UTF-8; what is not is replaced or rejected, as the source says (`encoding_errors`). The digest of a record is
SHA-256 over its text in UTF-8, so that equal texts are equal in any source; of a rejected one, over its bytes as they
came.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from anytimed.contracts import Record, Rejected
from anytimed_adapters.streams.json_text import field_of

Errors = Literal["replace", "reject"]
"""What becomes of a record that is not UTF-8: U+FFFD in place of what is not, or rejected."""


def sha256(content: bytes | bytearray | memoryview) -> str:
    """In hex."""
    return hashlib.sha256(content).hexdigest()


def sha256_of_tokens(tokens: NDArray[np.integer[Any]]) -> str:
    """Of a record of tokens: over the name of their type and their bytes. tokens: shape (n,), n > 0, in one piece."""
    digest = hashlib.sha256(tokens.dtype.name.encode())
    digest.update(tokens.data.cast("B"))
    return digest.hexdigest()


def of_text(text: str, errors: Errors) -> Record | Rejected:
    """A record of a text, in which JSON may have spelled half a surrogate pair."""
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        if errors == "reject":
            return Rejected(f"the text is not Unicode: {error}", sha256(text.encode("utf-8", "surrogatepass")))
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        content = text.encode()
    return Record(text, sha256(content))


def of_bytes(content: bytes | bytearray | memoryview, errors: Errors, what: str) -> Record | Rejected:
    """A record of UTF-8. what: opens the reason if it is none, as in "the row"."""
    try:
        return Record(str(content, "utf-8"), sha256(content))
    except UnicodeDecodeError as error:
        if errors == "reject":
            return _not_utf8(content, error, what)
        return of_text(str(content, "utf-8", "replace"), errors)


def of_object(content: bytes, field: str, max_nesting: int, errors: Errors, what: str) -> Record | Rejected:
    """A record of the text in a field of a JSON object."""
    try:
        text = str(content, "utf-8", "strict" if errors == "reject" else "replace")
        return of_text(field_of(text.removeprefix("\ufeff"), field, max_nesting), errors)
    except UnicodeDecodeError as error:
        return _not_utf8(content, error, what)
    except ValueError as error:
        return Rejected(f"{what} is {error}", sha256(content))


def too_long(size: int, most: int, digest: str) -> Rejected:
    """size, most: bytes."""
    return Rejected(f"{size} bytes, the most is max_record_bytes = {most}", digest)


def _not_utf8(content: bytes | bytearray | memoryview, error: UnicodeDecodeError, what: str) -> Rejected:
    return Rejected(f"{what} is not UTF-8: {error.reason} at byte {error.start}", sha256(content))
