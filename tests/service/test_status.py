"""The status keeps the form that is promised, in every state; and the API says what it can do."""

from __future__ import annotations

import json
from pathlib import Path

from anytimed.contracts import Json
from anytimed.service.openapi import description
from anytimed.service.status import Status
from anytimed.service.systemd import unit
from tests import tiny
from tests.service.listening import asked
from tests.service.test_daemon import running, status, until


def test_every_status_keeps_its_form(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 60)
    seen: list[Json] = []
    config = tiny.config(tmp_path, commits={"mirror_url": str(tmp_path / "mirror"), "verify_every_s": 0.5})

    def look(state: str) -> bool:
        found = status(tmp_path)
        if found["state"]:
            seen.append(found)
        return bool(found["state"] == state)

    for _ in range(2):
        with running(config) as process:
            until(process, lambda: look("waiting for data"))
            until(process, lambda: look("waiting for data") and seen[-1]["verification"] is not None)
            until(process, lambda: seen[-1]["mirror"]["commit"] is not None or not look("waiting for data"))
            asked(tmp_path / "run", "POST", "/reload")
            process.terminate()
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0, output
        seen.append(json.loads((tmp_path / "run" / "status.json").read_text()))
    for found in seen:
        Status.model_validate(found)
    last = seen[-1]
    assert last["state"] == "stopped" and last["resumed"]["from"] == "local" and last["format"] == 1
    assert last["disk"]["free_bytes"] <= last["disk"]["total_bytes"]
    assert last["accelerator"] is None and last["unit"] is None and last["listen"] is None
    for key in ("evaluation", "commit", "export", "verification", "mirror", "reload"):
        assert last[key] is not None, key


def test_the_description_names_every_route(tmp_path: Path) -> None:
    from anytimed.service.api import Api
    from anytimed.service.bulletin import Bulletin
    from anytimed.service.history import History
    from anytimed.service.requests import Mailbox

    told = description()
    routes = Api(Mailbox(), dict, lambda: 0.0, dict, None, Bulletin(), History(tmp_path / "m")).app.routes  # type: ignore[arg-type]
    served = {(route.path, method.lower()) for route in routes for method in (route.methods or ()) if method != "HEAD"}  # type: ignore[attr-defined]
    served = {(path, method) for path, method in served if path != "/" and not path.startswith("/dashboard/")}
    assert served == {(path, method) for path, methods in told["paths"].items() for method in methods}
    text = json.dumps(told)
    parts = told["components"]["schemas"]
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in parts


def test_the_unit_is_read_off_the_cgroup(tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    started = {"INVOCATION_ID": "x"}
    for text, found in (
        (
            "0::/system.slice/system-anytimed.slice/anytimed@demo.service\n",
            {"name": "anytimed@demo.service", "user": False},
        ),
        (
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-anytimed.slice/anytimed@a.service\n",
            {"name": "anytimed@a.service", "user": True},
        ),
        ("12:cpu:/x\n1:name=systemd:/system.slice/a.service/inner\n0::/\n", {"name": "a.service", "user": False}),
        ("0::/init.scope\n", None),
    ):
        groups.write_text(text)
        assert unit(started, groups) == found
        assert unit({}, groups) is None
    assert unit(started, tmp_path / "no") is None
