"""The text of a JSON object, within limits that do not depend on who parses it.

Python's parser gives up at a depth that depends on the stack it is called on. So the depth is limited here, far below
that, and the same bytes always give the same answer.
"""

from __future__ import annotations

import json
import re
from typing import Any

DEEPEST = 400
"""The largest limit that Python's parser reaches on any stack that we call it on."""
_SHOWN_CHARACTERS = 300
"""Of an object's keys, which may be as long as the object."""
_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"?|([\[{])|([\]}])', re.DOTALL)


def field_of(text: str, field: str, most_nesting: int) -> str:
    """The text in `field` of the object. Raises ValueError saying what is wrong, briefly."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        if _depth_of_text(text, most_nesting) > most_nesting:
            raise _too_deep(most_nesting) from None
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        if _is_deeper(value, most_nesting):
            raise _too_deep(most_nesting)
        raise ValueError(f"{type(value).__name__}, expected an object")
    content = value.get(field)
    if (len(value) > 1 or type(content) is not str) and _is_deeper(value, most_nesting):
        raise _too_deep(most_nesting)
    if type(content) is str and content:
        return content
    if field not in value:
        raise ValueError(f"an object with no field {field!r}, found {_names(value)}")
    told = "empty" if content == "" else type(content).__name__
    raise ValueError(f"an object whose field {field!r} is {told}, expected text")


def is_object(content: bytes | bytearray) -> bool:
    """Whether the bytes are a whole JSON object. Most are not, and most of those do not end in a brace."""
    if not content.rstrip().endswith(b"}"):
        return False
    try:
        return isinstance(json.loads(content.decode("utf-8", "replace").removeprefix("\ufeff")), dict)
    except (ValueError, RecursionError):
        return False


def _too_deep(most: int) -> ValueError:
    return ValueError(f"not JSON that may be read: nested more than max_nesting = {most} deep")


def _names(value: dict[str, Any]) -> str:
    return f"{sorted(value)}"[:_SHOWN_CHARACTERS]


def _is_deeper(value: Any, most: int) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return False
    return True


def _depth_of_text(text: str, enough: int) -> int:
    """How deep brackets nest, strings aside, in text that need not be JSON; at most `enough` + 1."""
    depth = deepest = 0
    for found in _BRACKETS.finditer(text):
        if found[1]:
            depth += 1
            deepest = max(deepest, depth)
            if deepest > enough:
                break
        elif found[2]:
            depth -= 1
    return deepest
