"""The dashboard in Debian's Chromium: what it shows, that it stays current, that it asks nobody else, and that everyone
can read it."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import math
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from anytimed.contracts import Json
from anytimed.service import dashboard
from anytimed.service.history import MOST_BYTES, MOST_POINTS, History, line_of
from anytimed.service.thinning import EARLY, KEEP, partition
from tests import tiny
from tests.service.browser import bridged, chromium, until, visiting
from tests.service.test_daemon import running, status
from tests.service.test_daemon import until as until_daemon
from tests.service.test_history import evaluation, event, put, step

HOSTILE = '<img src=x onerror="document.title=1"><script>alert(1)</script>'


def source(**changes: Any) -> Json:
    told = {"entries": 3, "lag_bytes": 61_800, "lag_unit": "bytes", "records": 812, "held_out": 9, "rejected": 0}
    told |= {"tokens": 1_310_000, "share": 0.5, "when_dry": "wait", "pass_number": 1, "dry": False}
    return {**told, "suspended": None, "unavailable": None, "unacknowledged": None, **changes}


def told(**changes: Any) -> Json:
    """A status as `GET /status` answers."""
    now = time.time()
    losses = {"loss_x": 1.2345, "loss_y": 1.3456, "loss_z": 2.5}
    return {
        "state": "training", "since": now - 7300, "reason": "", "degraded": [], "run_id": "r1", "term": 3, "pid": 7,
        "directory": "/srv/books/run", "device": "CPU", "step": 12_800, "tokens": 41_900_000, "tokens_per_s": 20_480.5,
        "loss": 1.5678, "skipped": 2, "evaluation": {"step": 12_750, "holdout": "ab" * 32, "tokens": 381, **losses},
        "commit": {"step": 12_790, "path": "/srv/books/run/commits/000014-0000012790", "time": now - 40},
        "last_commit_age_s": 40.0, "resumed": None, "verification": None, "mirror": None,
        "export": {"step": 12_700, "checkpoint": "00003-000010-0000012700", "time": now - 200},
        "upload": None, "exports_url": "s3://bucket/it's books", "reload": None, "configured": now, "store": {},
        "sources": {"main": source(), "more": source(share=0.5, rejected=17)}, "batches_ready": 3, "time": now,
        **changes,
    }  # fmt: skip


@dataclass
class Stage:
    """A daemon's side of the page: what it is told can be changed while the page looks."""

    url: str
    history: History
    status: Json
    streams: bool = True
    _sent: list[str] = field(default_factory=list)

    def tell(self, **changes: Any) -> None:
        self.status = {**self.status, "time": time.time(), **changes}
        self._send("status", self.status)

    def record(self, record: Json) -> None:
        self.history.append(record)
        self._send(record["kind"], record)

    def _send(self, event: str, data: Json) -> None:
        self._sent.append(f"event: {event}\ndata: {json.dumps(data)}\n\n")

    async def stream(self) -> AsyncIterator[str]:
        at = len(self._sent)
        yield f"event: status\ndata: {json.dumps(self.status)}\n\n"
        while self.streams:
            if at < len(self._sent):
                yield self._sent[at]
                at += 1
            else:
                await asyncio.sleep(0.02)


@contextmanager
def staged(folder: Path, port: int = 0) -> Iterator[Stage]:
    """The page's routes with a history of their own, a status and a stream of events that the test writes."""
    history = History(folder / "metrics.jsonl")
    if history._path.exists():
        history.load()
    stage = Stage("", history, told())

    async def said(_: Request) -> JSONResponse:
        return JSONResponse(stage.status)

    async def events(_: Request) -> StreamingResponse:
        return StreamingResponse(stage.stream(), media_type="text/event-stream")

    routes = [*dashboard.routes(history), Route("/status", said), Route("/events", events)]
    config = uvicorn.Config(
        Starlette(routes=routes), port=port, log_level="critical", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive()
        time.sleep(0.01)
    stage.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    try:
        yield stage
    finally:
        stage.streams = False
        server.should_exit = server.force_exit = True
        thread.join(timeout=20)
        history.close()


def few_steps(history: History, count: int = 60) -> None:
    for n in range(1, count + 1):
        now = {"time": time.time() - 10 * (count - n)}
        history.append(step(n, loss=1.5 + 4 / n, prequential={"main": 1.5 + 4 / n, "more": 1.7 + 4 / n}, **now))
        if n % 10 == 0:
            put(history, evaluation(n, loss_x=1 + 3 / n, **now), {**event(n, "commit"), **now})
    put(history, {**event(count, "rollback"), "time": time.time(), "told": "Went back to step 50"})


CONTROLS = "a, button, select, summary, [tabindex='0'], input:not([type=radio])"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with staged(tmp_path) as made:
        few_steps(made.history)
        yield made


def get(url: str, path: str, method: str = "GET", **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection(url.removeprefix("http://").rstrip("/"), timeout=30)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def text(page: Page, selector: str) -> str:
    """With ordinary spaces."""
    return page.inner_text(selector).replace("\u202f", " ")


# --- over HTTP --------------------------------------------------------------------------------------------------------


def test_the_page_and_its_files_are_served_with_their_types_and_a_strict_policy(stage: Stage) -> None:
    for name in (dashboard.PAGE, *dashboard.ASSETS):
        path = "/" if name == dashboard.PAGE else f"/dashboard/{name}"
        code, headers, content = get(stage.url, path)
        assert code == 200 and content == (Path(dashboard.__file__).parent / name).read_bytes(), name
        assert headers["content-type"] == dashboard.TYPES[f".{name.rpartition('.')[2]}"]
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'self';") and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer" and headers["cache-control"] == "no-cache"
        code, _, content = get(stage.url, path, If_None_Match=f'"other", W/{headers["etag"]}')
        assert code == 304 and content == b""
        assert get(stage.url, path, If_None_Match='"other"')[0] == 200
        assert get(stage.url, path, "POST")[0] == 405
    for path in ("/dashboard/", "/dashboard/__init__.py", "/dashboard/../history.py", "/dashboard/page.html"):
        assert get(stage.url, path)[0] == 404


def test_every_file_of_the_page_is_listed_and_asks_only_for_listed_ones() -> None:
    folder = Path(dashboard.__file__).parent
    files = {path.name for path in folder.iterdir() if path.suffix in dashboard.TYPES}
    assert files == {*dashboard.ASSETS, dashboard.PAGE}
    for name in files - {"icon.svg"}:
        content = (folder / name).read_text()
        assert "innerHTML" not in content and "insertAdjacentHTML" not in content and "document.write" not in content
        assert "://" not in content.replace("http://www.w3.org/2000/svg", ""), name


def test_the_history_is_given_in_as_many_points_as_asked_for(stage: Stage) -> None:
    seen = json.loads(get(stage.url, "/history?points=20")[2])
    assert 10 <= len(seen["steps"]["step"]) <= 22 and seen["steps"]["step"][-1] == 60
    assert set(seen["steps"]["prequential"]) == {"main", "more"}
    assert seen["evaluations"]["step"] == [10, 20, 30, 40, 50, 60]
    assert seen["events"][-1]["told"] == "Went back to step 50"
    late = json.loads(get(stage.url, f"/history?since={time.time() - 95}")[2])
    assert late["steps"]["step"] == list(range(51, 61))
    for bad in ("points=0", "points=x", f"points={MOST_POINTS + 1}", "since=nan", "since=x", "points=1e9"):
        code, _, content = get(stage.url, f"/history?{bad}")
        assert code == 400 and "expected points" in json.loads(content)["error"], bad


# --- in the browser ---------------------------------------------------------------------------------------------------


def test_it_shows_the_run_and_stays_current_by_events_alone(browser: Browser, stage: Stage) -> None:
    with visiting(browser, stage.url, permissions=["clipboard-read", "clipboard-write"]) as visit:
        page = visit.page
        assert text(page, "#state") == "training" and "2 h 01 min" in text(page, "#since")
        shown = text(page, "#figures")
        for figure in ("12 800", "2 skipped", "41.9 M", "20.5 k", "1.5678", "1.2345", "y 1.3456", "40 s", "3 min 20 s"):
            assert figure in shown, (figure, shown)
        assert page.locator(".chart").count() == 4
        assert page.locator(".chart:nth-child(1) .plot path.line").count() == 2, "x and y; z can be chosen"
        assert page.locator(".chart:nth-child(2) .plot path.line").count() == 3
        assert text(page, "#command") == "anytimed pull 's3://bucket/it'\\''s books' --to model"
        assert "00003-000010-0000012700" in text(page, "#checkpoints")
        assert page.locator("#events li").first.inner_text().split("\n")[1:] == [
            "guard: rollback",
            "Went back to step 50",
        ]
        until(page, "document.getElementById('contact').textContent === 'live'")
        asked = len(visit.requests)

        stage.tell(step=12_801, state="waiting for data", reason="everything is read", degraded=["the disk is full"])
        stage.record(step(61, loss=7.7777))
        stage.record(evaluation(61, loss_x=0.4242))
        stage.record({**event(61, "degraded"), "told": "The disk is full"})
        until(page, "document.getElementById('state').textContent === 'waiting for data'")
        until(page, "document.querySelector('#events li .told').textContent === 'The disk is full'")
        assert "everything is read" in text(page, ".line") and "the disk is full" in text(page, "#degraded")
        assert "12 801" in text(page, "#figures")
        assert "7.7777" in text(page, ".chart:nth-child(2) .legend")
        assert "0.4242" in text(page, ".chart:nth-child(1) .legend")
        page.click(".copy")
        until(page, "document.querySelector('.copy').textContent === 'Copied'")
        assert page.evaluate("navigator.clipboard.readText()") == text(page, "#command")
        stage.record({**event(61, "export"), "id": "1-e", "checkpoint": "00003-000011-0000000061"})
        until(page, "document.querySelector('#recent code').textContent === '00003-000011-0000000061'")
        assert page.evaluate("document.activeElement.className") == "copy", "what is in hand stays"
        before = text(page, "#figures")
        page.wait_for_timeout(1500)
        assert text(page, "#figures") != before, "ages tick between two statuses"
        assert len(visit.requests) == asked, "nothing was asked for: events brought it"

        stage.record(step(31, loss=2.0))  # taken again after a resume
        with page.expect_request(lambda request: "/history" in request.url):
            stage.record(step(32, loss=2.1))
        until(page, "document.querySelector('.chart:nth-child(2) .legend').textContent.includes('2.1000')")
        assert all(url.startswith(stage.url) for url in visit.requests), visit.requests
        assert visit.complaints == []


def test_it_says_that_the_connection_is_lost_and_recovers_by_itself(browser: Browser, tmp_path: Path) -> None:
    with staged(tmp_path) as stage:
        few_steps(stage.history)
        url, port = stage.url, int(stage.url.rstrip("/").rpartition(":")[2])
        window = browser.new_context()
        page = window.new_page()
        page.goto(url)
        until(page, "document.getElementById('contact').textContent === 'live'")
    until(page, "!document.getElementById('lost').hidden")
    assert "Connection lost" in text(page, "#lost") and "last heard" in text(page, "#heard")
    assert text(page, "#state") == "training" and "stale" in str(page.get_attribute("body", "class"))
    with staged(tmp_path, port) as stage:
        stage.tell(step=13_000)
        until(page, "document.getElementById('lost').hidden")
        until(page, "document.getElementById('figures').textContent.includes('13\\u202f000')")
        until(page, "document.getElementById('contact').textContent === 'live'", 60)
        assert text(page, "#heard") == ""
        window.close()


def test_without_a_stream_of_events_it_asks(browser: Browser, stage: Stage) -> None:
    with visiting(browser, stage.url) as visit:
        visit.page.route("**/events", lambda route: route.abort())
        visit.page.reload()
        until(visit.page, "document.getElementById('contact').textContent === 'asking every 2 s'")
        stage.tell(step=14_000)
        stage.record(step(62, loss=8.8888))
        until(visit.page, "document.getElementById('figures').textContent.includes('14\\u202f000')")
        until(visit.page, "document.getElementById('charts').textContent.includes('8.8888')")


def test_a_window_that_nobody_looks_at_holds_no_connection(browser: Browser, stage: Stage) -> None:
    with visiting(browser, stage.url) as visit:
        until(visit.page, "document.getElementById('contact').textContent === 'live'")
        for hidden, contact in (("true", "asking every 2 s"), ("false", "live")):
            visit.page.evaluate(f"Object.defineProperty(document, 'hidden', {{ value: {hidden}, configurable: true }})")
            visit.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
            until(visit.page, f"document.getElementById('contact').textContent === '{contact}'")


def test_what_the_daemon_says_is_text(browser: Browser, tmp_path: Path) -> None:
    with staged(tmp_path) as stage:
        few_steps(stage.history, 5)
        stage.status = told(
            state=HOSTILE, reason=HOSTILE, degraded=[HOSTILE], directory=f"/srv/{HOSTILE}", device=HOSTILE,
            run_id=HOSTILE, exports_url=HOSTILE,
            sources={HOSTILE: source(unavailable=HOSTILE), "__proto__": source(lag_unit=HOSTILE)},
            export={"step": 1, "checkpoint": HOSTILE, "time": time.time(), "digest": HOSTILE},
            accelerator={"name": HOSTILE, "memory_used_bytes": 3e9, "memory_total_bytes": 8e9, "utilisation": 0.4},
        )  # fmt: skip
        odd = {"prequential": {HOSTILE: 1.0, "__proto__": 2.0, "constructor": 3.0}}
        put(
            stage.history,
            step(6, **odd),
            {**event(6, HOSTILE), "told": HOSTILE},
            {**event(6, "commit"), "path": HOSTILE},
        )
        with visiting(browser, stage.url) as visit:
            page = visit.page
            until(page, "document.getElementById('contact').textContent === 'live'")
            stage.record(step(7, **odd))
            stage.record({**event(7, "skipped"), "told": HOSTILE, "id": HOSTILE})
            until(page, "document.querySelector('#events li').textContent.includes('skipped')")
            for selector in (
                "#state",
                "#reason",
                "#degraded",
                "#sources",
                "#checkpoints",
                "#events",
                "#charts",
                "#figures",
            ):
                assert HOSTILE in page.inner_text(selector), selector
            assert page.locator("img").count() == 1 and page.locator("script").count() == 1
            legend = page.locator(".chart:nth-child(2) .legend .of").all_inner_texts()
            assert legend == ["all batches", HOSTILE, "__proto__", "constructor", "main", "more"]
            losses = page.locator(".chart:nth-child(2) .legend .value").all_inner_texts()
            assert losses[:4] == ["2.0000", "1.0000", "2.0000", "3.0000"]
            assert page.evaluate("document.title").startswith("⚠ ")
            assert visit.complaints == [] and all(url.startswith(stage.url) for url in visit.requests)


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_many_sources_with_long_names_fit(browser: Browser, tmp_path: Path, width: int) -> None:
    names = [f"a-rather-long-name-of-a-source-{i}" for i in range(12)]
    with staged(tmp_path) as stage:
        put(stage.history, *(step(n, prequential=dict.fromkeys(names, 2 + 1 / n)) for n in range(1, 20)))
        stage.status = told(sources={name: source() for name in names}, exports_url="s3://" + "x" * 200)
        with visiting(browser, stage.url, width=width) as visit:
            for summary in visit.page.locator("summary").all():
                summary.click()
            until(visit.page, "document.querySelectorAll('.chart:nth-child(2) tbody tr').length > 5")
            assert visit.page.evaluate("document.documentElement.scrollWidth") == width
            assert visit.page.locator(".chart:nth-child(2) .plot path.line").count() == 6
            last = visit.page.locator(".chart:nth-child(2) .legend button").last
            last.click()
            assert visit.page.locator(".chart:nth-child(2) .plot path.line").count() == 7


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_everyone_can_read_it(browser: Browser, stage: Stage, width: int, scheme: Any) -> None:
    """axe-core's rules (WCAG 2.2 A and AA, contrast included), in both schemes and at both widths."""
    accelerator = {"name": "GPU", "memory_used_bytes": 3e9, "memory_total_bytes": 8e9, "utilisation": 0.4}
    stage.status = told(degraded=["the disk is full"], accelerator=accelerator, reason="because")
    with visiting(browser, stage.url, width=width, color_scheme=scheme) as visit:
        page = visit.page
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(252, 251, 248)") == (scheme == "light")
        page.locator("summary").first.click()
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert "device memory" in text(page, "#figures") and "38 %" in text(page, "#figures")
        # Its own policy forbids a script from elsewhere; the test's comes by the debugger.
        found = Axe().run(
            page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
        )
        assert found.violations_count == 0, found.generate_report()
        other = "dark" if scheme == "light" else "light"
        page.select_option("#scheme", other)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != paper
        page.reload()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != paper, "it is remembered"


def test_the_keyboard_reaches_everything_and_reads_the_curves(browser: Browser, stage: Stage) -> None:
    with visiting(browser, stage.url, reduced_motion="reduce") as visit:
        page = visit.page
        assert page.evaluate("document.getAnimations().length") == 0
        count = page.locator(CONTROLS).count()
        seen = set()
        for _ in range(count + 10):
            page.keyboard.press("Tab")
            seen.add(
                page.evaluate("(() => { const a = document.activeElement; a.dataset.seen = 1; return a.tagName; })()")
            )
        left = [
            found.get_attribute("class")
            for found in page.locator(CONTROLS).all()
            if not found.get_attribute("data-seen")
        ]
        assert left == [] and {"INPUT", "BUTTON", "A", "DIV"} <= seen
        assert page.evaluate("document.querySelectorAll('input[type=radio][data-seen]').length") == 2, (
            "one of each group"
        )

        plot = page.locator(".chart:nth-child(1) .plot")
        plot.focus()
        page.keyboard.press("Home")
        assert plot.get_attribute("aria-valuetext") == "1.28\u202fk tokens: x, exported 1.3000, y, gradient 1.1000"
        page.keyboard.press("ArrowRight")
        assert str(plot.get_attribute("aria-valuetext")).startswith("2.56\u202fk tokens: x, exported 1.1500")
        assert page.locator(".chart:nth-child(1) circle.dot").count() == 2
        assert text(page, ".chart:nth-child(1) .at") == "2.56 k tokens"
        page.keyboard.press("Escape")
        assert str(plot.get_attribute("aria-valuetext")).startswith("7.68\u202fk tokens: x, exported 1.0500")

        z = page.locator(".chart:nth-child(1) .legend button").nth(2)
        assert z.get_attribute("aria-pressed") == "false"
        z.focus()
        page.keyboard.press("Enter")
        assert z.get_attribute("aria-pressed") == "true"
        assert page.locator(".chart:nth-child(1) .plot path.line").count() == 3
        page.locator("input[name=axis][value=linear]").focus()
        linear = page.locator(".chart:nth-child(2) .plot path.line").first.get_attribute("d")
        page.keyboard.press("ArrowRight")
        assert page.locator("input[name=axis][value=log]").is_checked()
        assert page.locator(".chart:nth-child(2) .plot path.line").first.get_attribute("d") != linear
        page.locator("input[name=window][value='']").focus()
        with page.expect_response(lambda answer: "since=" in answer.url):
            page.keyboard.press("ArrowLeft")  # around, to the last hour
        page.locator("#routine").focus()
        page.keyboard.press("Space")
        assert page.locator("#events li").count() == 1
        details = page.locator(".chart:nth-child(1) details")
        details.locator("summary").focus()
        page.keyboard.press("Enter")
        until(page, "document.querySelectorAll('.chart:nth-child(1) details tbody tr').length === 6")
        assert page.locator("[aria-live]").count() == 1


def test_a_long_history_opens_in_a_second(browser: Browser, tmp_path: Path) -> None:
    """A million steps behind it, thinned as the daemon thins them. From the navigation to what is drawn."""
    path = tmp_path / "metrics.jsonl"
    write_million(path)
    with staged(tmp_path) as stage:
        took = []
        for _ in range(3):
            with visiting(browser, stage.url) as visit:
                took.append(visit.page.evaluate("performance.getEntriesByName('rendered')[0].startTime"))
                assert visit.page.locator(".plot path.line").count() == 7
                assert visit.page.locator(".chart:nth-child(2) .plot").get_attribute("aria-valuemax") in map(
                    str, range(300, 502)
                )
                assert visit.complaints == []
        assert min(took) < 1000, took


def write_million(path: Path) -> None:
    """What the rule leaves of a million steps, and as much after it as the file may grow before it is thinned again."""
    of: list[int] = []
    for _ in range(49):
        more = [*of, *[1] * 20_000]
        of = [sum(more[first:end]) for first, end in partition(more, KEEP["step"], EARLY)]
    of += [1] * 20_000
    assert sum(of) == 1_000_000
    ends = list(itertools.accumulate(of))
    began = time.time() - ends[-1]
    with path.open("wb") as file:
        for n, span in zip(ends, of, strict=True):
            loss = 1.5 + 40 / n**0.5 + math.sin(n) / 10
            told = step(n, loss=loss, tokens=20_480 * n, prequential={"main": loss, "more": loss + 0.2}, time=began + n)
            more_told = {"of": span, "range": {"loss": [loss - 0.1, loss + 0.2]}} if span > 1 else {}
            file.write(line_of({**told, **more_told}) + b"\n")
            if len(of) % 50 == 0 or n % 100 == 0:
                file.write(line_of(evaluation(n, loss_x=loss, time=began + n)) + b"\n")
                file.write(line_of({**event(n, "commit"), "time": began + n}) + b"\n")
    assert MOST_BYTES // 2 < path.stat().st_size < MOST_BYTES


def test_a_running_daemon_is_seen_to_train(browser: Browser, tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 60)
    config = tiny.config(tmp_path)
    with running(config) as process, bridged(tmp_path / "run" / "control.sock") as url:
        until_daemon(process, lambda: status(tmp_path)["step"] >= 20)
        with visiting(browser, url) as visit:
            page = visit.page
            first = int(text(page, "#figures dd").replace(" ", ""))
            until(page, f"Number(document.querySelector('#figures dd').textContent.replace(/\\D/g, '')) > {first}")
            assert page.locator(".chart:nth-child(1) .plot path.line").count() == 2
            assert text(page, "#sources th[scope=row]") == "main"
            until(page, "document.getElementById('checkpoints').textContent.includes('00001-')")
            assert all(found.startswith(url) for found in visit.requests)
            assert visit.complaints == []
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
