"""The page that shows a run, and the figures that it draws.

    GET /                   the page
    GET /dashboard/NAME     what belongs to it: a fixed list of files, read once
    GET /history?points=N   steps and evaluations by column, and events (`History.view`); `since=T`: from a time on

The page is plain: HTML, one stylesheet, modules as they lie here. It asks this daemon only, and its policy forbids it
anything else: no script or style in the page itself, no other host. What the daemon says enters it as text.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from anytimed.service.history import MOST_POINTS, History

POINTS = 500
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGE = "page.html"
ASSETS = (
    "style.css", "icon.svg", "main.js", "live.js", "model.js", "chart.js",
    "lines.js", "scale.js", "charts.js", "panels.js",
    "format.js", "dom.js",
)  # fmt: skip
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Asked again every time, and answered with 304: an upgrade of the daemon must not meet scripts of the last version.
    "Cache-Control": "no-cache",
}


class _File:
    """A file of the page, in memory."""

    def __init__(self, name: str) -> None:
        path = Path(__file__).with_name(name)
        self._content, self._type = path.read_bytes(), TYPES[path.suffix]
        self._etag = f'"{hashlib.sha256(self._content).hexdigest()[:32]}"'

    async def serve(self, request: Request) -> Response:
        headers = {**HEADERS, "ETag": self._etag}
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self._etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(self._content, media_type=self._type, headers=headers)


def routes(history: History) -> Sequence[Route]:
    """For the daemon's application; `history` is asked in the server's threads."""

    async def view(request: Request) -> JSONResponse:
        try:
            points = int(request.query_params.get("points", POINTS))
            since = float(request.query_params.get("since", 0))
            if not (0 < points <= MOST_POINTS and math.isfinite(since)):
                raise ValueError
        except ValueError:
            told = f"/history: expected points, a whole number from 1 to {MOST_POINTS}, and since, seconds since 1970"
            return JSONResponse({"error": told}, status_code=400)
        answer = await run_in_threadpool(history.view, points, since)
        return JSONResponse(answer, headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})

    files = [Route(f"/dashboard/{name}", _File(name).serve, methods=["GET"]) for name in ASSETS]
    return [Route("/", _File(PAGE).serve, methods=["GET"]), *files, Route("/history", view, methods=["GET"])]
