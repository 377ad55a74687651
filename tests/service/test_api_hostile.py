"""The API under requests that its own description allows, and under some that it does not (schemathesis): it answers
each with something that it has described, never with a failure of its own; what only asks changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from anytimed.contracts import Json
from anytimed.service.openapi import description
from tests import tiny
from tests.service.listening import asked
from tests.service.test_daemon import running, status, until

TOKEN = "a-token-for-the-test-0123"
ROUTES = [(path, method) for path, methods in description()["paths"].items() for method in methods if path != "/stop"]
TAKING = [
    (path, method)
    for path, methods in description()["paths"].items()
    for method, operation in methods.items()
    if "parameters" in operation or "requestBody" in operation
]
"""What takes something that can be wrong."""
ASKING = {"/healthz", "/readyz", "/status", "/metrics", "/openapi.json", "/foresee", "/events"}
"""What may be asked without changing anything."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A run that has read everything, and the address of its daemon."""
    folder = tmp_path_factory.mktemp("daemon")
    tiny.write_text(folder / "data", 30)
    (folder / "token").write_text(TOKEN)
    (folder / "token").chmod(0o600)
    never = {"every_steps": None, "every_s": 100_000.0}
    config = tiny.config(
        folder, control={"listen": "127.0.0.1:0"}, commits=never, exports={**never, "keep": 2, "delete_after_s": 0.0},
        **{"sources.mine": {"type": "inbox", "weight": 0.0}},
    )  # fmt: skip
    with running(config, ANYTIMED_CONTROL_TOKEN_FILE=str(folder / "token")) as process:
        until(process, lambda: status(folder)["state"] == "waiting for data" and status(folder)["commit"] is not None)
        yield folder, status(folder)["listen"]
        assert process.poll() is None, process.communicate()[0]
        assert asked(folder / "run", "GET", "/healthz")[0] == 200
        process.terminate()
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        assert "Traceback" not in output, output


def kept(folder: Path) -> Json:
    """What no question may change."""
    found = status(folder)
    return {key: found[key] for key in ("state", "reason", "step", "tokens", "reload", "export", "commit", "degraded")}


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [(*route, GenerationMode.POSITIVE) for route in ROUTES] + [(*route, GenerationMode.NEGATIVE) for route in TAKING],
)
def test_every_answer_is_one_that_is_described(
    daemon: tuple[Path, str], path: str, method: str, mode: GenerationMode
) -> None:
    folder, address = daemon
    schema = schemathesis.openapi.from_dict(description())
    cases = schema[path][method.upper()].as_strategy(generation_mode=mode)
    before = kept(folder)
    described = description()["paths"][path][method]["responses"]

    @settings(max_examples=8 if path in ("/export", "/commit") else 25, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=cases)
    def ask(case: Any) -> None:
        told = case.as_transport_kwargs(base_url=f"http://{address}")
        told["headers"] = {**(told.get("headers") or {}), "Authorization": f"Bearer {TOKEN}"}
        try:
            with requests.request(**told, timeout=30, stream=True) as response:
                assert response.status_code < 500, (response.status_code, response.text)
                # 400, 404 and 405 are the server's own answers to what is no request of ours.
                assert str(response.status_code) in {*described, "400", "404", "405", "421"}, response.text
                if path != "/events":
                    response.content  # noqa: B018 - all of it comes
        except (requests.exceptions.InvalidHeader, requests.exceptions.InvalidURL, UnicodeError):
            pass  # what the client cannot even send

    ask()
    if path in ASKING:
        assert kept(folder) == before


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_no_other_method_changes_anything(daemon: tuple[Path, str], method: str) -> None:
    folder, address = daemon
    before = kept(folder)
    for path, allowed in ROUTES:
        if allowed != "post":
            continue
        for where in (folder / "run", address):
            code, _, _ = asked(where, method, path, Authorization=f"Bearer {TOKEN}")
            assert code == 405, (method, path, code)
    assert kept(folder) == before
