"""What is read from a plain web server (http://, https://), about which nothing can be taken for granted.

`read_small` takes a pointer or a manifest in one request, so that asking again and again costs a server little.
`read_range` looks at the status: only a 206 is a range, and no more is read than was asked for. `whole` streams an
object from its beginning, for servers that know no ranges. Compressed transfer is not asked for: sizes and ranges are
those of the stored bytes. Works on fsspec's `HTTPFileSystem` without importing it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fsspec.asyn import sync

from anytimed.urls import BadAnswer

from .durable import CHUNK_BYTES


class WholeObject(Exception):
    """The server answered a request for a range with the whole object."""


def is_web(fs: Any) -> bool:
    """Whether a file system is fsspec's for HTTP."""
    return "http" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


async def read_small(fs: Any, url: str, max_bytes: int) -> tuple[int, bytes]:
    """An object's size, as far as it is told, and at most `max_bytes` + 1 of its bytes.

    Raises OSError, aiohttp's errors.
    """
    async with await _get(fs, url, {}) as answer:
        _check(fs, answer, url)
        encoding = answer.headers.get("Content-Encoding", "identity")
        if encoding not in ("", "identity"):
            raise BadAnswer(f"the server answers in Content-Encoding {encoding!r}; asked was identity")
        size = answer.content_length or 0
        return size, b"" if size > max_bytes else await _read(answer, max_bytes + 1)


async def read_range(fs: Any, url: str, start: int, end: int) -> bytes:
    """The bytes `start` up to `end`; fewer where the object is shorter.

    Raises WholeObject, OSError, aiohttp's errors.
    """
    async with await _get(fs, url, {"Range": f"bytes={start}-{end - 1}"}) as answer:
        if answer.status == 416:  # nothing there
            return b""
        _check(fs, answer, url)
        if answer.status != 206:
            raise WholeObject
        return await _read(answer, end - start)


def whole(fs: Any, url: str, deadline_s: float) -> Iterator[bytes]:
    """An object in chunks, each within the deadline. Raises OSError, TimeoutError, aiohttp's errors."""
    answer = sync(fs.loop, _get, fs, url, {}, timeout=deadline_s)
    try:
        _check(fs, answer, url)
        while chunk := sync(fs.loop, _read, answer, CHUNK_BYTES, timeout=deadline_s):
            yield chunk
    finally:
        fs.loop.call_soon_threadsafe(answer.close)


async def _get(fs: Any, url: str, headers: dict[str, str]) -> Any:
    from aiohttp import ClientTimeout

    session = await fs.set_session()
    options = {**fs.kwargs, "timeout": ClientTimeout(total=None)}  # aiohttp's would end a large object after 5 minutes
    options["headers"] = {**options.get("headers", {}), **headers, "Accept-Encoding": "identity"}
    return await session.get(fs.encode_url(url), **options)


def _check(fs: Any, answer: Any, url: str) -> None:
    if answer.status in (401, 403):
        raise PermissionError(f"{answer.status} {answer.reason}")
    fs._raise_not_found_for_status(answer, url)


async def _read(answer: Any, size: int) -> bytes:
    """`size` bytes, or what there is."""
    parts = []
    while size > 0 and (part := await answer.content.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
