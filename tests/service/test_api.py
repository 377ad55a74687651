"""What can be asked of a running daemon over its socket, and the commands that ask."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from anytimed.config import Config, load
from anytimed.contracts import Json
from anytimed.service import api as api_module
from anytimed.service.api import READY, Api
from anytimed.service.bulletin import Bulletin
from anytimed.service.control import Control, UnixConnection
from anytimed.service.exposition import CONTENT_TYPE, STATES, exposed
from anytimed.service.inboxes import Inboxes
from anytimed.service.requests import Commit, Mailbox
from tests import tiny
from tests.service.test_daemon import running, status, until


def asked(folder: Path, method: str, route: str, body: str | None = None) -> tuple[int, bytes, str]:
    connection = UnixConnection(folder / "run" / "control.sock", 60)
    try:
        connection.request(method, route, body)
        response = connection.getresponse()
        return response.status, response.read(), response.getheader("content-type", "")
    finally:
        connection.close()


def figures(content: bytes) -> dict[tuple[str, tuple[str, ...]], float]:
    """By name and values of the labels, in the order of their names."""
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(content.decode())
        for sample in family.samples
    }


def test_a_daemon_answers_what_it_is_asked(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 12)
    never = {"every_steps": None, "every_s": 100_000.0}
    config = tiny.config(tmp_path, commits=never, exports={"every_steps": None, "every_s": 100_000.0})
    with running(config) as process:
        until(process, lambda: status(tmp_path)["state"] == "waiting for data")
        until(process, lambda: status(tmp_path)["commit"] is not None)
        assert asked(tmp_path, "GET", "/healthz")[0] == 200
        code, content, _ = asked(tmp_path, "GET", "/readyz")
        assert (code, json.loads(content)) == (200, {"state": "waiting for data"})
        code, content, kind = asked(tmp_path, "GET", "/metrics")
        assert (code, kind) == (200, CONTENT_TYPE)
        found, told = figures(content), status(tmp_path)
        assert found["anytimed_steps_total", ()] == told["step"] > 0
        assert found["anytimed_tokens_total", ()] == told["tokens"]
        assert found["anytimed_state", ("waiting for data",)] == 1
        assert sum(found["anytimed_state", (state,)] for state in STATES) == 1
        assert found["anytimed_source_records_total", ("main",)] == told["sources"]["main"]["records"]
        assert found["anytimed_source_lag", ("main", "bytes")] == 0
        assert found["anytimed_last_commit_step", ()] == told["commit"]["step"]
        assert found["process_open_fds", ()] > 3
        for method, route, code in (
            ("GET", "/export", 405), ("GET", "/commit", 405), ("GET", "/reload", 405), ("POST", "/metrics", 405),
            ("POST", "/status", 405), ("DELETE", "/healthz", 405), ("GET", "/", 200), ("POST", "/", 405),
        ):  # fmt: skip
            assert asked(tmp_path, method, route)[0] == code, (method, route)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output


def test_a_commit_that_is_asked_for_is_of_this_step(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 2000)
    never = {"every_steps": None, "every_s": 100_000.0}
    with running(tiny.config(tmp_path, commits=never, exports=never)) as process:
        until(process, lambda: status(tmp_path)["step"] >= 5)
        for _ in range(3):
            before = status(tmp_path)["step"]
            code, content, _ = asked(tmp_path, "POST", "/commit")
            told = json.loads(content)
            assert code == 200 and told["step"] >= before
            assert json.loads((Path(told["path"]) / "MANIFEST.json").read_text())["step"] == told["step"]
        before = status(tmp_path)["step"]
        with ThreadPoolExecutor(8) as pool:  # some are asked for while another step's is in flight
            answers = [json.loads(a) for _, a, _ in pool.map(lambda _: asked(tmp_path, "POST", "/commit"), range(40))]
        assert min(answer["step"] for answer in answers) >= before
        assert len({answer["step"] for answer in answers}) > 1
        said = tiny.run("commit", tmp_path / "run")
        assert f"Committed step {status(tmp_path)['commit']['step']}: " in said
    assert "no daemon answers" in tiny.run("commit", tmp_path / "run", expect=1)


def test_a_reload_is_answered_with_what_changed_or_the_reason(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 12)
    config = tiny.config(tmp_path, commits={"keep": 3})
    before = config.read_text()
    with running(config) as process:
        until(process, lambda: status(tmp_path)["state"] == "waiting for data")
        began = status(tmp_path)["configured"]
        assert "nothing in it has changed" in tiny.run("reload", tmp_path / "run")
        config.write_text(before.replace("keep = 3", "keep = 5"))
        assert "[commits] keep\n" in tiny.run("reload", tmp_path / "run")
        good = status(tmp_path)
        assert good["reload"]["error"] is None and good["reload"]["changed"] == ["[commits] keep"]
        assert began < good["configured"] == good["reload"]["time"]

        config.write_text(before.replace("keep = 3", "keep = 5\nkep = 1"))
        assert "did you mean keep?" in tiny.run("reload", tmp_path / "run", expect=2)
        bad = status(tmp_path)
        assert "kep" in bad["reload"]["error"] and "kep" in "".join(bad["degraded"])
        assert bad["configured"] == good["configured"]
        found = figures(asked(tmp_path, "GET", "/metrics")[1])
        assert found["anytimed_config_last_reload_successful", ()] == 0
        assert found["anytimed_config_last_reload_success_timestamp_seconds", ()] == good["configured"]
        assert found["anytimed_degraded", ()] == len(bad["degraded"]) == 1

        config.write_text(before.replace("keep = 3", "keep = 5"))
        code, content, _ = asked(tmp_path, "POST", "/reload")
        assert (code, json.loads(content)["changed"]) == (200, [])
        assert status(tmp_path)["degraded"] == []


def test_a_check_against_a_run_says_what_a_reload_would_do(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 12)
    config = tiny.config(tmp_path, commits={"keep": 3})
    other = tmp_path / "other.toml"
    before = config.read_text()
    with running(config) as process:
        until(process, lambda: status(tmp_path)["state"] == "waiting for data")
        for change, expect, told in (
            (lambda text: text, 0, "would change nothing"),
            (lambda text: text.replace("keep = 3", "keep = 5"), 0, "would change [commits] keep"),
            (lambda text: text.replace("seed = 7", "seed = 8"), 2, "only a restart changes [run] seed"),
            (lambda text: text.replace('type = "text"', 'type = "jsonl"'), 2, "'main' reads something else"),
        ):
            changed = change(before)
            assert changed != before or told.endswith("nothing")
            other.write_text(changed)
            said = tiny.run("check", other, "--against", tmp_path / "run", expect=expect)
            assert told in " ".join(said.split()), said
        assert status(tmp_path)["reload"] is None
    assert "no daemon answers" in tiny.run("check", config, "--against", tmp_path / "run", expect=1)


# --- without a daemon -------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[tuple[Path, Mailbox, dict[str, Any]]]:
    """The socket, with what it would be told: `state`, `idle_s`."""
    said: dict[str, Any] = {"state": "training", "idle_s": 0.0}
    mailbox = Mailbox()
    config = load(tiny.config(tmp_path))
    inboxes = Inboxes(lambda: config, mailbox.post)
    api = Api(
        mailbox, lambda: {"state": said["state"]}, lambda: float(said["idle_s"]), Config.to_json, inboxes, Bulletin()
    )
    (tmp_path / "run").mkdir()
    control = Control(tmp_path / "run" / "control.sock", api.app)
    control.start()
    try:
        deadline = time.monotonic() + 30
        while not answers(tmp_path):
            assert time.monotonic() < deadline, "it never listened"
            time.sleep(0.01)
        yield tmp_path, mailbox, said
    finally:
        control.close()


def answers(folder: Path) -> bool:
    try:
        return asked(folder, "GET", "/healthz")[0] == 200
    except OSError:
        return False


def test_a_loop_that_hangs_is_not_healthy_and_one_that_stops_not_ready(
    alone: tuple[Path, Mailbox, dict[str, Any]],
) -> None:
    folder, _, said = alone
    for idle, code in ((api_module.HEALTHY_S - 1, 200), (api_module.HEALTHY_S + 1, 503)):
        said["idle_s"] = idle
        assert asked(folder, "GET", "/healthz")[0] == code
    for state in STATES:
        said["state"] = state
        assert asked(folder, "GET", "/readyz")[0] == (200 if state in READY else 503)


def test_who_gives_up_waiting_does_not_disturb_the_answer(
    alone: tuple[Path, Mailbox, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mailbox, _ = alone
    monkeypatch.setattr(api_module, "WAIT_S", 0.05)
    code, content, _ = asked(folder, "POST", "/commit")
    assert code == 504 and b"it goes on" in content
    (request,) = mailbox.drain()
    assert isinstance(request, Commit) and request.reply is not None
    request.reply.set_result({"step": 1})  # raises where the waiting has cancelled it


def test_a_configuration_that_is_none_is_refused(alone: tuple[Path, Mailbox, dict[str, Any]]) -> None:
    folder, _, _ = alone
    for body, code, told in (
        ({}, 422, "not a configuration"),
        ({"path": "a", "folder": "b", "tables": {}}, 422, "missing"),
        ({"path": "a", "folder": "b", "tables": {"x": "y" * api_module.MOST_BODY_BYTES}}, 400, "bytes"),
    ):
        found = asked(folder, "POST", "/foresee", json.dumps(body))
        assert found[0] == code and told in found[1].decode(), found
    assert asked(folder, "POST", "/foresee", "no json")[0] == 400
    assert asked(folder, "POST", "/foresee", "[1]")[0] == 422


STATUS: Json = {
    "state": "training", "run_id": 'a"b\\c\nd', "term": 3, "device": "cpu", "step": 7, "tokens": 900, "skipped": 1,
    "tokens_per_s": None, "loss": None, "batches_ready": 4, "degraded": [], "evaluation": None, "commit": None,
    "export": None, "mirror": None, "verification": None, "reload": None, "configured": 12.5, "sources": {},
}  # fmt: skip


def test_what_is_not_known_is_left_out_and_names_are_escaped() -> None:
    found = figures(exposed(STATUS))
    assert ("anytimed_loss_nats", ()) not in found
    assert not [name for name, _ in found if name.startswith(("anytimed_last_", "anytimed_holdout"))]
    assert found["anytimed_run_info", ("cpu", 'a"b\\c\nd', "3")] == 1
    assert found["anytimed_skipped_steps_total", ()] == 1
