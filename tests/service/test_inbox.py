"""What is sent to an inbox: taken in durably and once, or declined with a reason; and the command that sends it."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from anytimed import registry
from anytimed.config import load
from anytimed.contracts import Json
from anytimed.data import inbox_lines, inbox_log
from anytimed.data.inbox import Inbox
from anytimed.data.inbox_log import InboxLog
from anytimed.service import intake as intake_module
from anytimed.service import records as records_module
from anytimed.service.api import Api
from anytimed.service.bulletin import Bulletin
from anytimed.service.control import Control, UnixConnection
from anytimed.service.feeding import Feeder, Line
from anytimed.service.inboxes import Inboxes
from anytimed.service.intake import Intake
from anytimed.service.offer import Declined, Offer, json_lines, plain
from anytimed.service.requests import Mailbox
from anytimed.storage import durable
from tests import tiny
from tests.service.test_daemon import running, status, until

INBOX = "anytimed.data.inbox:Inbox"
ALLOWED = {"ANYTIMED_ALLOW_ADAPTERS": INBOX}


def offered(*documents: str, key: str = "", ids: Sequence[str] = ()) -> Offer:
    body = b"\n".join(
        json.dumps({"text": text, **({"id": ids[i]} if ids else {})}).encode() for i, text in enumerate(documents)
    )
    return json_lines(body, key, 1 << 20)


@contextlib.contextmanager
def taking(folder: Path, **more: int) -> Iterator[Intake]:
    settings = Inbox.Settings(**{"max_record_bytes": 1000, "max_request_bytes": 1000, **more})
    errors: list[BaseException] = []
    intake = Intake("mine", inbox_log.of(folder), settings, lambda: None, errors.append)
    try:
        yield intake
    finally:
        intake.close()
        assert not errors, errors


def stored(folder: Path) -> list[str]:
    """What another process would find."""
    log = InboxLog(folder)
    return [inbox_lines.text_of(line) for s in log.spans(0) for line in log.lines(s.start, s.stop)]


# --- the body of a request --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "line", "why"),
    [
        (b'{"text": "a"}\n{"text": ""}\n', 2, "'text' is empty"),
        (b'{"text": "a"}\n\n{"txt": "b"}\n', 3, r"no field 'text', found \['txt'\]"),
        (b'{"text": 5}', 1, "'text' is int"),
        (b'["text"]', 1, "found list"),
        (b'{"text": "a"', 1, "not JSON"),
        (b"[" * 100_000, 1, "not JSON"),
        (b'{"text": "\xff"}', 1, "not UTF-8"),
        (b'{"text": "\\ud800"}', 1, "surrogate"),
        (b'{"text": "' + b"x" * 200 + b'"}', 1, "200 bytes, the most is max_record_bytes = 100"),
        (b'{"text": "a", "id": 7}', 1, "'id' is int"),
        (b'{"text": "a", "id": ""}', 1, "an id has 1 to 255"),
        (b" \n\n", None, "no record in the body"),
    ],
)
def test_a_bad_record_is_named_by_its_line(body: bytes, line: int | None, why: str) -> None:
    with pytest.raises(Declined, match=why) as declined:
        json_lines(body, "", 100)
    assert (declined.value.status, declined.value.line) == (400, line)


def test_a_body_of_plain_text_is_one_record() -> None:
    offer = plain("one\nrecord ü".encode(), "", 100)
    assert [json.loads(record.text) for record in offer.records] == ["one\nrecord ü"]
    for body, code in ((b"", 400), (b"\xff", 400), (b"x" * 101, 413)):
        with pytest.raises(Declined) as declined:
            plain(body, "", 100)
        assert declined.value.status == code


# --- taking in --------------------------------------------------------------------------------------------------------


def test_it_answers_once_it_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), synced.append(os.fstat(file).st_size))[0])
    with taking(tmp_path) as intake:
        answer = intake.submit(offered("one", "two ü")).result(10)
        assert synced[-1] == sum(path.stat().st_size for path in tmp_path.iterdir())
        assert answer == {
            "source": "mine", "records": 2, "repeated": 0, "bytes": 9, "waiting_bytes": inbox_log.of(tmp_path).end[0]
        }  # fmt: skip
    assert stored(tmp_path) == ["one", "two ü"]


def test_what_comes_together_is_one_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Senders that came while the disk was busy do not wait one after the other."""
    fsync, calls, begin = os.fsync, [0], threading.Event()

    def slow(file: int) -> None:
        calls[0] += 1
        begin.wait(10)
        fsync(file)

    with taking(tmp_path) as intake:
        intake.submit(offered("first")).result(10)
        monkeypatch.setattr(durable.os, "fsync", slow)
        answers = [intake.submit(offered(f"record {i}")) for i in range(50)]
        begin.set()
        for answer in answers:
            answer.result(10)
        assert calls[0] <= 2
    assert stored(tmp_path) == ["first", *(f"record {i}" for i in range(50))]


def test_the_same_key_and_the_same_id_are_stored_once_also_after_a_restart(tmp_path: Path) -> None:
    with taking(tmp_path) as intake:
        together = [intake.submit(offered("one", "two", key="k")) for _ in range(3)]
        assert sorted(answer.result(10)["repeated"] for answer in together) == [0, 2, 2]
        assert intake.submit(offered("three", "three", "four", ids=("3", "3", "4"))).result(10)["repeated"] == 1
    assert stored(tmp_path) == ["one", "two", "three", "four"]
    with taking(tmp_path) as intake:
        again = intake.submit(offered("one", "two", key="k")).result(10)
        assert (again["records"], again["repeated"]) == (2, 2)
        assert intake.submit(offered("four", "five", ids=("4", "5"))).result(10)["repeated"] == 1
        for other in (offered("one", "other", key="k"), offered("six", "other", ids=("6", "4"))):
            with pytest.raises(Declined) as declined:
                intake.submit(other).result(10)
            assert declined.value.status == 422
        assert intake.submit(offered("six", ids=("6",))).result(10)["repeated"] == 0, "what was declined left no id"
    assert stored(tmp_path) == ["one", "two", "three", "four", "five", "six"]


def test_the_newest_ids_are_remembered(tmp_path: Path) -> None:
    for _ in range(2):
        with taking(tmp_path, remembered_ids=3) as intake:
            for i in range(6):
                intake.submit(offered(f"{i}", ids=(f"{i}",))).result(10)
    with taking(tmp_path, remembered_ids=3) as intake:
        assert intake.submit(offered("5", ids=("5",))).result(10)["repeated"] == 1
        assert intake.submit(offered("2", ids=("2",))).result(10)["repeated"] == 0


def test_senders_are_told_to_wait_while_too_much_waits_to_be_read(tmp_path: Path) -> None:
    with taking(tmp_path / "streams" / "mine", max_bytes=2000) as intake:
        taken = 0
        with pytest.raises(Declined, match="max_bytes = 2000") as declined:
            while taken < 100:
                intake.submit(offered("x" * 100)).result(10)
                taken += 1
        assert (declined.value.status, declined.value.again_s) == (429, 1)
        assert 5 < taken <= 2000 // 130
        with pytest.raises(Declined) as declined:
            intake.submit(offered(*["x" * 900] * 3))
        assert (declined.value.status, declined.value.again_s) == (413, None), "it would never fit"

        stream = Inbox(intake.settings, "mine")
        stream.use_folder(tmp_path / "streams" / "mine")
        stream.adopt(stream.discover())
        assert len(list(stream.read(None))) == taken + 1
        assert intake.submit(offered("x" * 100)).result(10)["records"] == 1


@pytest.mark.parametrize(("code", "expected"), [(errno.ENOSPC, 507), (errno.EIO, 503)])
def test_a_disk_that_says_no_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, expected: int
) -> None:
    def failing(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with taking(tmp_path) as intake:
        intake.submit(offered("before")).result(10)
        with monkeypatch.context() as patch:
            patch.setattr(durable.os, "write" if expected == 507 else "fsync", failing)
            with pytest.raises(Declined, match="nothing was taken") as declined:
                intake.submit(offered("same", key="k")).result(10)
            assert (declined.value.status, declined.value.again_s) == (expected, 5)
        assert stored(tmp_path) == ["before"]
        assert intake.submit(offered("same", key="k")).result(10)["repeated"] == 0
    assert stored(tmp_path) == ["before", "same"]


def test_closing_answers_what_was_admitted(tmp_path: Path) -> None:
    with taking(tmp_path) as intake:
        answers = [intake.submit(offered(f"{i}")) for i in range(20)]
        intake.close()
        assert [answer.result(0)["records"] for answer in answers] == [1] * 20
        with pytest.raises(Declined, match="stopping"):
            intake.submit(offered("late"))
    assert stored(tmp_path) == [f"{i}" for i in range(20)]


def test_the_reader_is_asked_soon_and_not_for_every_request(tmp_path: Path) -> None:
    asked: list[float] = []
    intake = Intake("mine", inbox_log.of(tmp_path), Inbox.Settings(), lambda: asked.append(time.monotonic()), print)
    began = time.monotonic()
    for i in range(100):
        stored_last = time.monotonic()
        intake.submit(offered(f"{i}")).result(10)
    last = time.monotonic()
    intake.close()
    assert len(asked) <= 2 + (last - began) / intake_module.DISCOVER_S
    assert asked[-1] >= stored_last, "the last record has to be seen as well"


# --- the daemon -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a daemon runs with two inboxes, one of them small and without a share, and a file source."""
    folder = tmp_path_factory.mktemp("inbox")
    tiny.write_text(folder / "data", 40)
    small = {"type": INBOX, "weight": 0.0, "max_record_bytes": 300, "max_request_bytes": 1000, "max_bytes": 1500}
    inboxes = {"sources.mine": {"type": INBOX}, "sources.small": small}
    with running(tiny.config(folder, **inboxes), **ALLOWED) as process:
        until(process, lambda: status(folder)["state"] == "waiting for data")
        yield folder
        assert process.poll() is None, process.communicate()[0]


def post(
    folder: Path, body: Any, route: str = "/records?source=mine", kind: str | None = "application/jsonl", **headers: str
) -> tuple[int, Json, http.client.HTTPMessage]:
    connection = UnixConnection(folder / "run" / "control.sock", 30)
    sent = {**({"Content-Type": kind} if kind else {}), **{k.replace("_", "-"): v for k, v in headers.items()}}
    try:
        connection.request("POST", route, body, sent)
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers
    finally:
        connection.close()


def test_what_is_posted_is_trained_on(folder: Path) -> None:
    before = status(folder)["sources"]["mine"]
    documents = [f"posted {i} " + "word " * 60 for i in range(20)]
    body = b"\n".join(json.dumps({"text": text}).encode() for text in documents)
    code, answer, _ = post(folder, body)
    assert (code, answer["records"], answer["repeated"]) == (200, 20, 0)
    assert answer["bytes"] == sum(map(len, documents))
    code, answer, _ = post(folder, "plain ü".encode(), kind="text/plain; charset=UTF-8")
    assert (code, answer["records"], answer["bytes"]) == (200, 1, 8)

    def read() -> bool:
        now = status(folder)["sources"]["mine"]
        return now["records"] + now["held_out"] == before["records"] + before["held_out"] + 21

    until(_Alive(), read)  # type: ignore[arg-type]


class _Alive:
    def poll(self) -> None:
        return None


def test_the_same_key_is_answered_the_same_way_and_stored_once(folder: Path) -> None:
    body = b'{"text": "sent twice"}'
    first = post(folder, body, Idempotency_Key="a key")
    second = post(folder, body, Idempotency_Key="a key")
    assert [first[0], second[0], first[1]["repeated"], second[1]["repeated"]] == [200, 200, 0, 1]
    assert post(folder, b'{"text": "another"}', Idempotency_Key="a key")[0] == 422
    assert sum(path.read_bytes().count(b"sent twice") for path in (folder / "run/streams/mine").iterdir()) == 1


@pytest.mark.parametrize(
    ("changes", "code", "why"),
    [
        ({"route": "/records?source=none"}, 404, "no inbox 'none', found mine, small"),
        ({"route": "/records?source=main"}, 404, "no inbox 'main'"),
        ({"route": "/records"}, 400, "mine, small"),
        ({"kind": None}, 415, "application/jsonl"),
        ({"kind": "application/x-www-form-urlencoded"}, 415, "text/plain"),
        ({"kind": "text/plain; charset=latin-1"}, 415, "UTF-8"),
        ({"Idempotency_Key": "x" * 300}, 400, "Idempotency-Key"),
        ({"body": b'{"text": "good"}\n{"text": 5}'}, 400, "line 2: field 'text' is int"),
        ({"body": b"x" * 1001, "route": "/records?source=small"}, 413, "max_request_bytes = 1000, this one has 1001"),
        ({"body": iter([b"x" * 600] * 2), "route": "/records?source=small"}, 413, "max_request_bytes = 1000"),
        ({"body": b"x" * 301, "route": "/records?source=small", "kind": "text/plain"}, 413, "max_record_bytes = 300"),
    ],
)
def test_a_request_that_is_declined_says_why_and_leaves_nothing(
    folder: Path, changes: dict[str, Any], code: int, why: str
) -> None:
    def sizes() -> list[int]:
        return [p.stat().st_size for p in sorted((folder / "run").glob("streams/*/*.jsonl"))]

    before = sizes()
    found, answer, _ = post(folder, **{"body": b'{"text": "good"}', **changes})
    assert found == code, answer
    assert why in answer["error"]
    assert answer.get("line") == (2 if "line 2" in why else None)
    assert sizes() == before


def test_a_full_inbox_asks_for_patience(folder: Path) -> None:
    """The source has no share, so nobody reads it."""
    codes = []
    for _ in range(20):
        code, answer, headers = post(folder, json.dumps({"text": "x" * 200}), route="/records?source=small")
        codes.append(code)
    assert codes[0] == 200 and codes[-1] == 429
    assert headers["Retry-After"] == "1"
    assert "max_bytes = 1500" in answer["error"]
    assert sum(path.stat().st_size for path in (folder / "run/streams/small").iterdir()) <= 1500


def test_a_body_that_is_cut_off_leaves_nothing(folder: Path) -> None:
    before = [p.stat().st_size for p in sorted((folder / "run/streams").glob("*/*.jsonl"))]
    body = b'{"text": "half a request"}\n'
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as half:
        here = os.open(folder / "run", os.O_PATH)
        half.connect(f"/proc/self/fd/{here}/control.sock")
        os.close(here)
        half.sendall(
            b"POST /records?source=mine HTTP/1.1\r\nHost: a\r\nContent-Type: application/jsonl\r\n"
            + b"Content-Length: %d\r\n\r\n" % (2 * len(body))
            + body
        )
    assert status(folder)["state"]
    time.sleep(0.2)
    assert [p.stat().st_size for p in sorted((folder / "run/streams").glob("*/*.jsonl"))] == before


def test_many_at_once_are_each_taken(folder: Path) -> None:
    def send(i: int) -> list[int]:
        connection = UnixConnection(folder / "run" / "control.sock", 60)
        codes = []
        for k in range(25):
            body = json.dumps({"text": f"crowd {i}-{k} end"})
            connection.request("POST", "/records?source=mine", body, {"Content-Type": "application/jsonl"})
            response = connection.getresponse()
            response.read()
            codes.append(response.status)
        connection.close()
        return codes

    with ThreadPoolExecutor(16) as pool:
        codes = [code for told in pool.map(send, range(16)) for code in told]
    assert codes == [200] * 400
    data = b"".join(path.read_bytes() for path in (folder / "run/streams/mine").iterdir())
    for i in range(16):
        for k in range(25):
            assert data.count(b"crowd %d-%d end" % (i, k)) == 1


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, Inboxes]]:
    """The socket and an inbox in this process, without a daemon around them."""
    registry.allow([INBOX])
    config = load(tiny.config(tmp_path, **{"sources.mine": {"type": INBOX}}))
    (tmp_path / "run").mkdir()
    mailbox = Mailbox()
    inboxes = Inboxes(lambda: config, mailbox.post)
    control = Control(tmp_path / "run" / "control.sock", Api(mailbox, dict, lambda: 0.0, dict, inboxes, Bulletin()).app)
    control.start()
    try:
        deadline = time.monotonic() + 30
        while not _answers(tmp_path):
            assert time.monotonic() < deadline
        yield tmp_path, inboxes
    finally:
        inboxes.close()
        control.close()


def _answers(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return post(folder, b"", "/records", kind=None)[0] == 415
    time.sleep(0.02)
    return False


def slow_body(folder: Path, sent: bytes, announced: int) -> socket.socket:
    client = UnixConnection(folder / "run" / "control.sock", 30)
    client.connect()
    connection: socket.socket = client.sock
    head = b"POST /records HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"
    connection.sendall(head % announced + sent)
    return connection


def answered(connection: socket.socket) -> tuple[int, bytes]:
    """Code and body; an answer comes in as many pieces as it likes."""
    with http.client.HTTPResponse(connection) as response:
        response.begin()
        return response.status, response.read()


def test_a_body_that_never_comes_is_given_up(served: tuple[Path, Inboxes], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = served
    monkeypatch.setattr(records_module, "BODY_S", 0.2)
    with slow_body(folder, b"a", 2) as connection:
        code, answer = answered(connection)
    assert code == 408 and b"nothing was taken" in answer
    assert not (folder / "run" / "streams").exists() or kept(folder) == []


def test_bodies_that_arrive_slowly_are_held_up_to_a_bound(
    served: tuple[Path, Inboxes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = served
    monkeypatch.setattr(records_module, "HELD_BYTES", 10_000)
    with slow_body(folder, b"x" * 6000, 6001) as slow:
        codes: list[int] = []
        deadline = time.monotonic() + 30
        while 429 not in codes:
            assert time.monotonic() < deadline
            code, answer, headers = post(folder, b"y" * 6000, "/records", "text/plain")
            codes.append(code)
        assert "too many requests" in answer["error"] and headers["Retry-After"] == "1"
        slow.sendall(b"x")
        assert answered(slow)[0] == 200
    assert post(folder, b"y" * 6000, "/records", "text/plain")[0] == 200, "what was held is let go"
    assert kept(folder)[-2:] == ["x" * 6001, "y" * 6000]


def test_a_daemon_that_stops_takes_nothing_more(served: tuple[Path, Inboxes]) -> None:
    folder, inboxes = served
    assert post(folder, b"before", "/records", "text/plain")[0] == 200
    inboxes.close()
    code, answer, headers = post(folder, b"after", "/records", "text/plain")
    assert (code, headers["Retry-After"]) == (503, "5")
    assert "stopping" in answer["error"]
    assert kept(folder) == ["before"]


# --- anytimed feed ----------------------------------------------------------------------------------------------------


def kept(folder: Path, source: str = "mine") -> list[str]:
    return stored(folder / "run" / "streams" / source)


def test_files_are_fed(folder: Path, tmp_path: Path) -> None:
    before = kept(folder)
    (tmp_path / "a.txt").write_text("the first\nfile ü")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n\n" for i in range(2500)))
    told = tiny.run("feed", folder / "run", tmp_path / "a.txt", tmp_path / "b.jsonl", "--source", "mine")
    assert told.strip() == "2,501 records were taken"
    assert kept(folder)[len(before) :] == ["the first\nfile ü", *(f"line {i}" for i in range(2500))]
    # By the configuration instead of the directory, and whatever the name says.
    told = tiny.run(
        "feed", folder / "config.toml", tmp_path / "b.jsonl", "--source", "mine", "--format", "text", **ALLOWED
    )
    assert told.strip() == "1 records were taken"
    assert kept(folder)[-1] == (tmp_path / "b.jsonl").read_text()


@pytest.mark.parametrize(("form", "records"), [("text", ["one\ntwo\n"]), ("jsonl", None)])
def test_standard_input_is_fed(folder: Path, form: str, records: list[str] | None) -> None:
    before = kept(folder)
    sent = "one\ntwo\n" if records else '{"text": "through a pipe"}\n'
    done = subprocess.run(
        [sys.executable, "-m", "anytimed.cli", "feed", folder / "run", "--source", "mine", "--format", form],
        input=sent, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "1 records were taken"), done.stderr
    assert kept(folder)[len(before) :] == (records or ["through a pipe"])


def test_a_mistake_in_a_file_is_named_by_file_and_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "good"}\n\n{"text": 1}\n')
    told = tiny.run("feed", folder / "run", tmp_path / "b.jsonl", "--source", "mine", expect=1)
    assert f"{tmp_path}/b.jsonl, line 3: field 'text' is int" in told
    assert "0 records were taken" in told
    told = tiny.run("feed", folder / "run", tmp_path / "b.jsonl", expect=2)
    assert "mine, small" in told
    (tmp_path / "c.txt").write_bytes(b"\xff")
    assert "c.txt: not UTF-8" in tiny.run("feed", folder / "run", tmp_path / "c.txt", "--source", "mine", expect=1)


def test_a_feed_goes_as_fast_as_it_is_read_in_requests_as_short_as_the_inbox_wants(tmp_path: Path) -> None:
    """Lines of which a few fit into a request, and a few requests into the inbox."""
    lines = [Line(json.dumps({"text": f"{i} " + "y" * 100}).encode(), "here", 1) for i in range(60)]
    limits = {"max_record_bytes": 300, "max_request_bytes": 1000, "max_bytes": 2000}
    whys: list[str | None] = []
    with running(tiny.config(tmp_path, **{"sources.main": {"type": INBOX, "url": None, **limits}}), **ALLOWED) as run:
        until(run, lambda: status(tmp_path)["state"] == "waiting for data")
        feeder = Feeder(tmp_path / "run" / "control.sock", None, whys.append)
        feeder.send(lines)
        feeder.close()
        assert (feeder.fed.records, feeder.fed.size) == (60, 60)
        assert any(why and "is full" in why for why in whys)
        assert kept(tmp_path, "main") == [json.loads(line.data)["text"] for line in lines]


def test_a_feed_waits_while_the_inbox_is_full_and_ctrl_c_says_what_was_taken(folder: Path, tmp_path: Path) -> None:
    while post(folder, json.dumps({"text": "x" * 200}), route="/records?source=small")[0] == 200:
        pass
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "y" * 250}) + "\n")
    process = tiny.start("feed", folder / "run", tmp_path / "b.jsonl", "--source", "small")
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("waiting: the inbox 'small' is full"), line
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output.splitlines()[-1]) == (130, "Stopped: 0 records were taken")


def test_an_empty_inbox_is_in_order(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 12)
    told = tiny.run("check", tiny.config(tmp_path, **{"sources.mine": {"type": INBOX}}), **ALLOWED)
    assert "an inbox, empty" in told
    assert not (tmp_path / "run" / "streams").exists()
    wrong = {"type": INBOX, "max_bytes": 100}
    told = tiny.run("check", tiny.config(tmp_path, **{"sources.mine": wrong}), expect=2, **ALLOWED)
    assert "max_record_bytes <= max_request_bytes <= max_bytes" in told


def test_without_a_daemon_nothing_is_taken(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 12)
    config = tiny.config(tmp_path, **{"sources.mine": {"type": INBOX, "weight": 0.0}})
    tiny.run("run", config, "--steps", "1", **ALLOWED)
    told = tiny.run("feed", tmp_path / "run", tmp_path / "data" / "doc0000.txt", expect=1)
    assert "no daemon answers" in told and "anytimed run" in told
    assert not (tmp_path / "run" / "streams").exists()


def test_a_run_without_an_inbox_says_how_to_have_one_and_a_reload_brings_it(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 12)
    config = tiny.config(tmp_path)
    document = tmp_path / "data" / "doc0000.txt"
    with running(config, **ALLOWED) as process:
        until(process, lambda: status(tmp_path)["state"] == "waiting for data")
        told = tiny.run("feed", tmp_path / "run", document, expect=2)
        assert 'type = "inbox"' in told
        tiny.config(tmp_path, **{"sources.mine": {"type": INBOX, "when_dry": "others"}})
        process.send_signal(signal.SIGHUP)
        fed: Callable[[], bool] = lambda: post(tmp_path, b'{"text": "new"}', "/records")[0] == 200  # noqa: E731
        until(process, fed)
        until(process, lambda: status(tmp_path)["sources"].get("mine", {}).get("entries", 0) > 0)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 0
