"""`POST /records`: an application sends its own data.

    POST /records?source=NAME
    Content-Type: application/jsonl         a record a line: {"text": "…"}, with an "id" if wanted
    Content-Type: text/plain                the body is one record
    Idempotency-Key: any text               the same request sent again is not stored again

The answer {"source", "records", "repeated", "bytes", "waiting_bytes"} comes once all of the request is durable; an
error, {"error"} and for a bad line {"line"}, once it is certain that nothing of it was taken. 429 asks for patience.
A body is held in memory while it arrives and until it is stored; what all of them hold together is bounded.
"""

from __future__ import annotations

import asyncio

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from anytimed.contracts import AnytimedError, Json
from anytimed.service.inboxes import Inboxes
from anytimed.service.intake import FULL_AGAIN_S, TROUBLE_AGAIN_S
from anytimed.service.offer import Declined, Offer, json_lines, plain, usable
from anytimed.urls import told

HELD_BYTES = 128 << 20
BODY_S = 60.0
"""A body that takes longer to arrive is given up."""
_ASIDE_BYTES = 64 << 10
"""A body that is longer is taken apart in another thread, so that the socket answers meanwhile."""

LINES = ("application/jsonl", "application/x-ndjson", "application/json")
PLAIN = "text/plain"


class Records:
    """The route. All of it runs in the control thread's event loop."""

    def __init__(self, inboxes: Inboxes) -> None:
        self._inboxes = inboxes
        self._held = 0

    async def post(self, request: HttpRequest) -> JSONResponse:
        try:
            return JSONResponse(await self._take(request))
        except Declined as why:
            return _declined(why)
        except AnytimedError as error:
            return _declined(Declined(503, str(error), again_s=TROUBLE_AGAIN_S))
        except TimeoutError:
            return _declined(Declined(408, f"the body did not arrive within {BODY_S:.0f} s; nothing was taken"))
        except ClientDisconnect:
            return _declined(Declined(400, "the body ended early; nothing was taken"))  # nobody reads it

    async def _take(self, request: HttpRequest) -> Json:
        kind, key = _kind(request), _key(request)
        intake = self._inboxes.intake(request.query_params.get("source"))
        settings = intake.settings
        announced = _announced(request, settings.max_request_bytes)
        intake.admit(announced)  # before it is sent, where its length is known
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                async for chunk in request.stream():
                    self._hold(len(chunk))
                    body += chunk
                    if len(body) > settings.max_request_bytes:
                        raise _too_long(settings.max_request_bytes)
            read = plain if kind == PLAIN else json_lines
            if len(body) > _ASIDE_BYTES:
                offer: Offer = await run_in_threadpool(read, bytes(body), key, settings.max_record_bytes)
            else:
                offer = read(bytes(body), key, settings.max_record_bytes)
            return await asyncio.wrap_future(intake.submit(offer))
        finally:
            self._held -= len(body)

    def _hold(self, size: int) -> None:
        if self._held + size > HELD_BYTES:
            raise Declined(429, "too many requests are on their way; send it again later", again_s=FULL_AGAIN_S)
        self._held += size


def _kind(request: HttpRequest) -> str:
    kind, _, parameters = request.headers.get("content-type", "").lower().partition(";")
    charset = parameters.partition("charset=")[2].strip(' "')
    if kind.strip() not in (*LINES, PLAIN) or charset not in ("", "utf-8", "utf8"):
        raise Declined(
            415,
            f"Content-Type: found {request.headers.get('content-type', 'none')[:100]!r}, expected application/jsonl "
            '({"text": "…"} a line) or text/plain (one record), in UTF-8',
        )
    return kind.strip()


def _key(request: HttpRequest) -> str:
    key = request.headers.get("idempotency-key")
    try:
        return "" if key is None else usable(key)
    except ValueError as error:
        raise Declined(400, f"Idempotency-Key: {error}") from None


def _announced(request: HttpRequest, most: int) -> int:
    """The length of the body; 0 where it is not known before. Raises Declined on one that is too long."""
    length = request.headers.get("content-length", "0")
    size = int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0
    if size > most:
        raise _too_long(most, size)
    return size


def _too_long(most: int, size: int | None = None) -> Declined:
    found = f"has {size}" if size else "goes beyond so many"
    return Declined(413, f"the most of a request is max_request_bytes = {most}, this one {found}; send it in parts")


def _declined(why: Declined) -> JSONResponse:
    answer: Json = {"error": told(str(why))}
    if why.line is not None:
        answer["line"] = why.line
    headers = {"Retry-After": str(why.again_s)} if why.again_s is not None else None
    return JSONResponse(answer, status_code=why.status, headers=headers)
