"""A proxy in front of an S3 server that does harm to the requests that a test picks.

It reads a request as a whole, asks the test's `plan` what to do with it, and does that: pass it on, break the
connection before or after the server got it, answer 500 or 503 itself, swallow it, cut the bytes of a download short,
turn a bit, or kill a process between the server's answer and the client's. Every request is counted
and kept. It runs an event loop in a thread of its own. `cutting` is a relay of bytes that breaks uploads in their
midst.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientSession, ClientTimeout, DummyCookieJar, web
from yarl import URL


@dataclass(frozen=True)
class Seen:
    """One request. `n` counts from 1 since the plan was made."""

    n: int
    method: str
    path: str
    query: str
    size: int


@dataclass(frozen=True)
class Do:
    """What happens to a request. Without any of these it is passed on.

    refuse: the status to answer with instead of asking the server. swallow: never answer. before, after: break the
    connection before the server got it, or once it has answered. cut_download: break the connection after so many
    bytes. turn: flip a bit of what is uploaded. kill, stop: SIGKILL, SIGSTOP this process once the server has answered.
    """

    refuse: int | None = None
    swallow: bool = False
    before: bool = False
    after: bool = False
    cut_download: int | None = None
    turn: bool = False
    kill: int | None = None
    stop: int | None = None


Plan = Callable[[Seen], Do]

_CODES = {500: "InternalError", 503: "SlowDown", 403: "ExpiredToken"}


@dataclass
class Proxy:
    """`port` is where it listens. `plan` may be exchanged at any moment with `play`."""

    upstream: int
    port: int = 0
    seen: list[Seen] = field(default_factory=list)
    _plan: Plan = lambda _: Do()
    _n: int = 0

    def play(self, plan: Plan) -> None:
        """Follow another plan; requests are counted from 1 again."""
        self._plan, self._n, self.seen = plan, 0, []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """One request, whatever is to be done to it."""
        try:
            return await self._handle(request)
        except ConnectionError:  # the client is gone
            return web.Response()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self._n += 1
        seen = Seen(self._n, request.method, request.path, request.query_string, len(body))
        self.seen.append(seen)
        do = self._plan(seen)
        if do.swallow:
            await asyncio.sleep(3600)
        if do.refuse is not None:
            text = f"<Error><Code>{_CODES[do.refuse]}</Code><Message>injected</Message></Error>"
            return web.Response(status=do.refuse, text=text, content_type="application/xml")
        if do.before:
            return self._break(request)
        if do.turn and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        status, headers, answer = await self._ask(request, body)
        if do.kill is not None:
            os.kill(do.kill, signal.SIGKILL)
        if do.stop is not None:
            os.kill(do.stop, signal.SIGSTOP)
        if do.after:
            return self._break(request)
        response = web.StreamResponse(status=status, headers=headers)
        if request.method == "HEAD":
            response.headers["Content-Length"] = headers.get("Content-Length", "0")
            await response.prepare(request)
            return response
        response.content_length = len(answer)
        await response.prepare(request)
        await response.write(answer[: do.cut_download])
        if do.cut_download is not None and do.cut_download < len(answer):
            return self._break(request)
        return response

    async def _ask(self, request: web.Request, body: bytes) -> tuple[int, dict[str, str], bytes]:
        dropped = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length"}
        headers = {name: value for name, value in request.headers.items() if name.lower() not in dropped}
        url = URL(f"http://127.0.0.1:{self.upstream}{request.raw_path}", encoded=True)
        async with (
            ClientSession(
                timeout=ClientTimeout(total=60), auto_decompress=False, cookie_jar=DummyCookieJar()
            ) as session,
            session.request(request.method, url, headers=headers, data=body, allow_redirects=False) as got,
        ):
            answer = await got.read()
            skip = dropped - {"content-length"}
            kept = {n: v for n, v in got.headers.items() if n.lower() not in skip}
            return got.status, kept, answer

    @staticmethod
    def _break(request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()


@contextlib.contextmanager
def proxy(upstream: int) -> Iterator[Proxy]:
    """A proxy in front of the server on that port of loopback."""
    made = Proxy(upstream)
    started, stop = threading.Event(), threading.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        application = web.Application(client_max_size=1 << 30)
        application.router.add_route("*", "/{key:.*}", made.handle)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        made.port = runner.addresses[0][1]
        started.set()
        while not stop.is_set():
            await asyncio.sleep(0.02)
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert started.wait(20)
    try:
        yield made
    finally:
        stop.set()
        thread.join(10)


@contextlib.contextmanager
def cutting(upstream: int, after_bytes: Callable[[int], int | None]) -> Iterator[int]:
    """A plain TCP relay that resets its n-th connection after so many bytes from the client (None: never); its port."""
    stop = threading.Event()
    loop = asyncio.new_event_loop()
    ports: list[int] = []
    started = threading.Event()
    count = 0

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        left = after_bytes(count)
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", upstream)

        async def pump(source: asyncio.StreamReader, goal: asyncio.StreamWriter, limit: int | None) -> None:
            moved = 0
            while data := await source.read(16384):
                if limit is not None and moved + len(data) > limit:
                    goal.write(data[: limit - moved])
                    await goal.drain()
                    raise ConnectionResetError
                moved += len(data)
                goal.write(data)
                await goal.drain()

        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(pump(reader, up_writer, left)),
            asyncio.create_task(pump(up_reader, writer, None)),
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await task
        for end in (writer, up_writer):
            end.transport.abort()

    async def serve() -> None:
        server = await asyncio.start_server(relay, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        started.set()
        while not stop.is_set():
            await asyncio.sleep(0.02)
        server.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert started.wait(20)
    try:
        yield ports[0]
    finally:
        stop.set()
        thread.join(10)
