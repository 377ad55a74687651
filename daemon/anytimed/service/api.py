"""What can be asked of a running daemon, over HTTP.

    GET  /healthz   200 while the loop goes round, 503 where it has not for `HEALTHY_S`
    GET  /readyz    200 while it trains, waits for data or is paused, 503 while it stops
    GET  /status    everything it says of itself, as JSON (`status`)
    GET  /metrics   the same figures for Prometheus (`exposition`)
    GET  /events    what happens, as it happens: server-sent events (`bulletin`)
    GET  /openapi.json  this list, for programs (`openapi`)
    GET  /          the dashboard, /history what it draws (`dashboard`)
    POST /export    publish x now; the answer comes when it is published
    POST /commit    write the resumable state now; the answer comes when it is durable
    POST /reload    take the configuration file anew: all of the change, or none and the reason
    POST /pause     take no more steps; what was trained is committed
    POST /resume    go on
    POST /stop      commit, finish the uploads and end, as SIGTERM asks; answered at once
    POST /foresee   a configuration, as `Config.to_json`: what a reload would make of it; nothing is changed
    POST /records   an application's own data (`records`)

Every handler reads the last status or posts a request to the loop and waits; nothing here touches the training. An
error answers {"error": …}: 422 for a mistake in the configuration, 503 for what may be tried again, 504 where the
answer took too long and what was asked for goes on. Over TCP there is more to it (`access`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from anytimed.config import Config
from anytimed.contracts import AnytimedError, ConfigError, Json
from anytimed.service import dashboard, exposition
from anytimed.service.bulletin import KINDS, Bulletin
from anytimed.service.history import History
from anytimed.service.inboxes import Inboxes
from anytimed.service.openapi import description
from anytimed.service.records import Records
from anytimed.service.requests import Commit, Export, Mailbox, Pause, Reload, Request, Resume, Stop
from anytimed.storage.strangers import parse
from anytimed.urls import told

WAIT_S = 600.0
"""For the loop's answer; an upload may be long."""
HEALTHY_S = 1800.0
"""A step, an evaluation, a last commit or a compilation may take that long; systemd's watchdog is for the shorter."""
BODY_S, MOST_BODY_BYTES = 10.0, 1 << 20
READY = ("training", "waiting for data", "paused")


Foresee = Callable[[Config], Json]


class Api:
    """The routes. Of these, called in the server's threads: status: the last that was told; idle_s: how long ago the
    loop last went round, in seconds; foresee: what a reload would make of a configuration."""

    def __init__(
        self,
        mailbox: Mailbox,
        status: Callable[[], Json],
        idle_s: Callable[[], float],
        foresee: Foresee,
        inboxes: Inboxes,
        bulletin: Bulletin,
        history: History | None = None,
    ) -> None:
        self._mailbox, self._status, self._idle_s, self._foreseen = mailbox, status, idle_s, foresee
        self._bulletin = bulletin
        self.app = Starlette(
            routes=[
                Route("/healthz", self._healthz),
                Route("/readyz", self._readyz),
                Route("/status", self._get_status),
                Route("/metrics", self._metrics),
                Route("/events", self._events),
                Route("/openapi.json", self._openapi),
                Route("/export", self._asking(Export), methods=["POST"]),
                Route("/commit", self._asking(Commit), methods=["POST"]),
                Route("/reload", self._asking(Reload), methods=["POST"]),
                Route("/pause", self._asking(Pause), methods=["POST"]),
                Route("/resume", self._asking(Resume), methods=["POST"]),
                Route("/stop", self._stop, methods=["POST"]),
                Route("/foresee", self._foresee, methods=["POST"]),
                Route("/records", Records(inboxes).post, methods=["POST"]),
                *(dashboard.routes(history) if history is not None else ()),
            ]
        )

    async def _healthz(self, _: HttpRequest) -> JSONResponse:
        idle = self._idle_s()
        return JSONResponse({"idle_s": round(idle, 3)}, status_code=200 if idle < HEALTHY_S else 503)

    async def _readyz(self, _: HttpRequest) -> JSONResponse:
        state = self._status()["state"]
        return JSONResponse({"state": state}, status_code=200 if state in READY else 503)

    async def _get_status(self, _: HttpRequest) -> JSONResponse:
        return JSONResponse(self._status())

    async def _metrics(self, _: HttpRequest) -> Response:
        return Response(exposition.exposed(self._status()), media_type=exposition.CONTENT_TYPE)

    async def _events(self, request: HttpRequest) -> Response:
        asked = request.query_params.get("kinds")
        kinds = KINDS if asked is None else tuple(dict.fromkeys(asked.split(",")))
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            return JSONResponse(
                {"error": f"kinds: found {told(unknown[0])[:80]!r}, known are {', '.join(KINDS)}"}, status_code=400
            )
        if self._bulletin.crowded:
            return JSONResponse({"error": "as many listen as may; try again later"}, status_code=503)
        after = request.headers.get("last-event-id") or request.query_params.get("after")
        return StreamingResponse(
            self._bulletin.listen(kinds, after),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    async def _openapi(self, _: HttpRequest) -> JSONResponse:
        return JSONResponse(description())

    async def _stop(self, _: HttpRequest) -> JSONResponse:
        self._mailbox.post(Stop("asked to"))
        status = self._status()
        return JSONResponse({"state": "stopping", "step": status["step"]}, status_code=202)

    async def _foresee(self, request: HttpRequest) -> JSONResponse:
        try:
            async with asyncio.timeout(BODY_S):
                body = await _body(request)
            config = Config.from_json(parse(bytes(body), "the request"))
            return JSONResponse(await run_in_threadpool(self._foreseen, config))
        except ConfigError as error:
            return _said(error, 422)
        except AnytimedError as error:
            return _said(error, 400)
        except (TimeoutError, ClientDisconnect):
            return JSONResponse({"error": f"the body did not arrive within {BODY_S:.0f} s"}, status_code=408)

    def _asking(self, make: Callable[[Future[Any]], Request]) -> Callable[[HttpRequest], Any]:
        """A handler that posts a request and answers with what comes of it."""

        async def ask(_: HttpRequest) -> JSONResponse:
            reply: Future[Any] = Future()
            self._mailbox.post(make(reply))
            try:
                # Who gives up waiting takes nothing back: the loop answers a future that nobody may have cancelled.
                return JSONResponse(await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(reply)), WAIT_S))
            except ConfigError as error:
                return _said(error, 422)
            except AnytimedError as error:
                return _said(error, 503)
            except TimeoutError:
                return JSONResponse({"error": f"no answer within {WAIT_S:.0f} s; it goes on"}, status_code=504)

        return ask


async def _body(request: HttpRequest) -> bytearray:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BODY_BYTES:
            raise AnytimedError(f"the body has more than {MOST_BODY_BYTES} bytes; no configuration is as long")
    return body


def _said(error: AnytimedError, status: int) -> JSONResponse:
    return JSONResponse({"error": told(str(error))}, status_code=status)
