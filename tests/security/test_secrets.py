"""Planted secrets: after real runs that succeed and that fail, nothing that was written or said holds any of them.

They stand in the environment, in `storage_options` (nested too) and in URLs (password, token, signature). Searched is
everything below the test's folder but the configuration itself, and all output of every command, for each secret as
it is, quoted for a URL, escaped for JSON and in base64.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest

from anytimed.contracts import AnytimedError
from anytimed.service.control import ask
from anytimed.urls import credentials, kept_in, public, without_credentials
from tests import tiny
from tests.security.hostile_server import serving
from tests.service.test_daemon import status, until

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "PLANTEDACCESSKEY0001",
    "AWS_SECRET_ACCESS_KEY": "planted/env+secret=0123456789abcdef",
    "AWS_SESSION_TOKEN": "planted-session-token/+==",
    "HF_TOKEN": "hf_plantedPlantedPlanted",
}
PASSWORD, TOKEN, SIGNATURE = "planted-pass%2Fword", "planted-url-token", "plantedsignature0123456789abcdef"
OPTIONS = {"password": "planted option/+=&", "client": {"auth": ["ada", "planted-nested-option"], "n": 5}}
PLANTED = [
    *(v for k, v in ENVIRONMENT.items() if k != "AWS_ACCESS_KEY_ID"),  # an access key's name is told by AWS itself
    PASSWORD, "planted-pass/word", TOKEN, SIGNATURE, "planted option/+=&", "planted-nested-option",
]  # fmt: skip


def forms(secret: str) -> set[str]:
    pairs = {secret, f"ada:{secret}"}
    coded = {base64.b64encode(text.encode()).decode() for text in pairs}
    coded |= {base64.urlsafe_b64encode(text.encode()).decode() for text in pairs}
    return {secret, quote(secret, safe=""), quote(secret), quote_plus(secret), json.dumps(secret)[1:-1], *coded}


def assert_unsaid(text: str | bytes, where: object) -> None:
    data = text.encode() if isinstance(text, str) else text
    found = [form for secret in PLANTED for form in forms(secret) if form.encode() in data]
    assert not found, f"{where} holds {found}:\n{data[:3000].decode(errors='replace')}"


def assert_unwritten(folder: Path) -> None:
    """Nothing below the folder but the configuration."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("config.toml", "planted.py")]
    assert len(files) > 3
    for path in files:
        assert_unsaid(path.read_bytes(), path)
        assert_unsaid(str(path), "a file's name")


def say(*arguments: str | Path, expect: int = 0) -> str:
    output = tiny.run(*arguments, expect=expect, **ENVIRONMENT)
    assert_unsaid(output, arguments[0])
    return output


@pytest.fixture
def closed() -> Iterator[int]:
    """A port of the loopback that nobody listens on, and nobody else gets."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def signed(url: str, kind: str) -> str:
    """Where data.txt lies on the hostile server, with everything in the URL that proves who asks."""
    host = url.replace("http://", f"http://ada:{PASSWORD}@")
    return f"{host}/{kind}/data.txt?token={TOKEN}&X-Amz-Signature={SIGNATURE}"


def data(folder: Path) -> None:
    made = tiny.write_text(folder / "data", 40)
    (folder / "served").mkdir()
    (folder / "served" / "data.txt").write_bytes(b"".join(path.read_bytes() for path in made))


def test_the_search_would_find_them() -> None:
    for secret in PLANTED:
        for form in forms(secret):
            with pytest.raises(AssertionError, match="holds"):
                assert_unsaid(f"x{form}y", "here")


def test_a_run_that_goes_well(tmp_path: Path) -> None:
    """Source with a password, a token and a signature; options at every end; commits and their mirror, exports, pulls,
    a resume, a verification, a proof."""
    data(tmp_path)
    with serving(tmp_path / "served") as (url, asked):
        options = {"client_kwargs": {"headers": {"X-Key": PLANTED[-1]}}}
        source = {"type": "text", "url": signed(url, "honest"), "storage_options": options}
        path = tiny.config(
            tmp_path,
            exports={"storage_options": OPTIONS},
            commits={"mirror_url": str(tmp_path / "mirror"), "mirror_storage_options": OPTIONS},
            **{"sources.web": source},
        )
        process = tiny.start("run", path, **ENVIRONMENT)
        try:
            until(process, lambda: bool(status(tmp_path)["export"]))
            until(process, lambda: bool(status(tmp_path)["commit"]))
            control = tmp_path / "run" / "control.sock"
            assert_unsaid(json.dumps(ask(control, "GET", "/status")), "the control socket")
            assert_unsaid(json.dumps(ask(control, "POST", "/export")), "the control socket")
            for name in ("cmdline", "comm"):
                assert_unsaid(Path(f"/proc/{process.pid}/{name}").read_bytes(), f"the daemon's {name}")
            assert "source web" in say("status", path)
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 0, output
        assert_unsaid(output, "the log")
        assert any(SIGNATURE in path for path in asked), "it was used"
        published = str(tmp_path / "published")
        say("list", published, "--json")
        say("pull", published, "--to", tmp_path / "model")
        assert "exports" in say("check", path)
        assert "mirrored commit" in say("verify", path) and "checkpoint" in say("verify", published)
        assert "Equal" in say("prove", path, "--steps", "4", "--kills", "1", "--keep", tmp_path / "proof")
        state = json.loads((tiny.newest_commit(tmp_path) / "state.json").read_text())
        step = state["learner"]["step"]
        # Signed anew, under another password: it resumes, for neither is part of what a commit binds a run to.
        path.write_text(path.read_text().replace(SIGNATURE, "anothersignature").replace(PASSWORD, "another"))
        say("run", path, "--steps", str(step + 3))
    assert state["position"]["mixture"]["web"]["reads"]["url"].endswith("/honest/data.txt")
    card = (tmp_path / "model" / "current" / "README.md").read_text()
    assert "honest/data.txt" in card, "the source is named, without what gives access to it"
    assert_unwritten(tmp_path)


def test_a_store_that_cannot_be_reached(tmp_path: Path, closed: int) -> None:
    data(tmp_path)
    address = f"127.0.0.1:{closed}"
    bucket = {
        "secret": OPTIONS["password"],
        "key": "ada-planted",
        "client_kwargs": {"endpoint_url": f"http://{address}"},
    }

    def check(folder: Path, url: str, options: dict[str, Any]) -> None:
        tiny.write_text(folder / "data", 20)
        path = tiny.config(folder, exports={"url": url, "storage_options": options, "drain_s": 0.0})
        assert "not everything is published" in say("run", path, "--steps", "10")
        assert "Traceback" not in say("check", path, expect=2)
        assert "published" not in say("status", path)
        assert_unwritten(folder)

    with ThreadPoolExecutor() as pool:  # most of it is waiting
        asked = [
            pool.submit(check, tmp_path / "0", f"http://ada:{PASSWORD}@{address}/prefix?token={TOKEN}", {}),
            pool.submit(check, tmp_path / "1", "s3://bucket/prefix", bucket),
            pool.submit(
                say, "pull", f"http://ada:{PASSWORD}@{address}/x?sig={SIGNATURE}", "--to", tmp_path / "m", expect=1
            ),
        ]
    for one in asked:
        one.result()
    assert_unwritten(tmp_path)


def test_a_mirror_that_cannot_be_reached(tmp_path: Path, closed: int) -> None:
    """An empty machine may not begin anew, a machine with a commit goes on; both say why, without the password."""
    tiny.write_text(tmp_path / "data", 20)
    path = tiny.config(tmp_path, exports={"drain_s": 0.0})
    say("run", path, "--steps", "2")
    path.write_text(
        path.read_text().replace(
            "[commits]\n",
            f'[commits]\nmirror_url = "http://ada:{PASSWORD}@127.0.0.1:{closed}/mirror?token={TOKEN}"\n'
            f'mirror_storage_options = {{ headers = {{ X-Key = "{PLANTED[-1]}" }} }}\n',
        )
    )
    assert "the newest commit is mirrored later" in say("run", path, "--steps", "3")
    assert "Traceback" not in say("verify", path, expect=1)
    (tmp_path / "run").rename(tmp_path / "away")
    assert "the mirror cannot be asked" in say("run", path, "--steps", "3", expect=1)
    assert_unwritten(tmp_path)


def test_a_server_that_says_no_and_repeats_what_it_was_told(tmp_path: Path) -> None:
    data(tmp_path)
    with serving(tmp_path / "served") as (url, _):
        path = tiny.config(tmp_path, **{"sources.web": {"type": "text", "url": signed(url, "denied")}})
        process = tiny.start("run", path, **ENVIRONMENT)
        try:
            until(process, lambda: bool(status(tmp_path)["state"]))
            until(process, lambda: "data.txt?*** is not there" in json.dumps(status(tmp_path)))
            assert_unsaid(json.dumps(status(tmp_path)), "the status")
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        assert_unsaid(output, "the log")
        assert "is not there" in say("check", path, expect=2)
        prefix = url.replace("http://", f"http://ada:{PASSWORD}@") + "/denied"
        assert "Nothing is published at http://***@" in say("list", f"{prefix}?token={TOKEN}")
        assert "Traceback" not in say("pull", f"{prefix}?token={TOKEN}", "--to", tmp_path / "m", expect=1)
    assert_unwritten(tmp_path)


MISTAKES = {
    "a text for a table": ("status", "[exports]", f'storage_options = "{OPTIONS["password"]}"'),
    "a list for a table": ("status", "[exports]", f'storage_options = ["{PLANTED[-1]}"]'),
    "a URL for a number": ("status", "[exports]", f'keep_every_s = "http://ada:{PASSWORD}@h/x?token={TOKEN}"'),
    "a mistyped key": ("status", "[exports]", f'storage_option = {{ secret = "{PLANTED[-1]}" }}'),
    "no TOML": ("status", "[exports]", f'storage_options = {{ secret = "{PLANTED[-1]}"'),
    "a source's options": ("check", "[sources.main]", f'storage_options = "{PLANTED[-1]}"'),
    "an unknown driver": (
        "check", "[sources.main]", f'type = "text"\nurl = "nosuch://ada:{PASSWORD}@h/x?token={TOKEN}"\n[sources.more]'
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_configuration_are_told_without_the_value(tmp_path: Path, mistake: str) -> None:
    command, table, line = MISTAKES[mistake]
    path = tiny.config(tmp_path)
    path.write_text(path.read_text().replace(f"{table}\n", f"{table}\n{line}\n"))
    told = say(command, path, expect=2)
    assert str(path) in told and "Traceback" not in told
    assert mistake == "no TOML" or table in told, told


CRASHING = """
import os
from anytimed_adapters.streams.text import TextFiles


class Crashing(TextFiles):
    def read(self, place):
        raise RuntimeError(
            f"cannot log in with {self._settings.storage_options} at {self._settings.url}, "
            f"{os.environ['AWS_SECRET_ACCESS_KEY']}, {os.environ['HF_TOKEN']}"
        )
"""


def test_a_crash_has_a_traceback_without_secrets(tmp_path: Path) -> None:
    """An adapter of the user's that breaks with everything it knows in its message."""
    data(tmp_path)
    (tmp_path / "planted.py").write_text(CRASHING)
    with serving(tmp_path / "served") as (url, _):
        source = {"type": "planted:Crashing", "url": signed(url, "honest"), "storage_options": OPTIONS}
        path = tiny.config(tmp_path, **{"sources.main": source})
        process = tiny.start(
            "run", path, "--allow-adapter", "planted:Crashing", **ENVIRONMENT,
            PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        )  # fmt: skip
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "RuntimeError: cannot log in with" in output and "Traceback" in output
    assert_unsaid(output, "the traceback")
    assert_unwritten(tmp_path)


def test_errors_are_told_without_secrets_to_whoever_asks_the_socket() -> None:
    from anytimed import urls

    urls.keep_secret(["planted-for-the-socket"])
    error = AnytimedError("no planted-for-the-socket, http://a:b@c/?x=y and \x1b[2Jforged\rline")
    assert urls.told(str(error)) == "no ***, http://***@c/?*** and \\x1b[2Jforged\\x0dline"


def test_every_url_of_a_list_keeps_its_credentials_to_itself() -> None:
    servers = f"nats://ada:{PASSWORD}@one:4222, nats://bob:another-{PASSWORD}@two:4222"
    assert without_credentials(servers) == "nats://one:4222,nats://two:4222"
    assert {PASSWORD, f"another-{PASSWORD}"} <= set(credentials(servers, {}))
    assert {PASSWORD, f"another-{PASSWORD}"} <= set(kept_in({"url": servers}))
    assert public({"url": servers}) == {"url": "nats://one:4222,nats://two:4222"}
    assert without_credentials("s3://bucket/a,b/*.txt") == "s3://bucket/a,b/*.txt", "a comma in a name is no list"
