"""HTTP over TCP: it reads, and with the token it does; from a page of somebody else's it does neither."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from anytimed.config import load
from anytimed.contracts import ConfigError
from anytimed.service.access import control_token
from tests import tiny
from tests.service.listening import asked, messages
from tests.service.test_daemon import running, status, until

TOKEN = "0123456789abcdef-a-token"


def private(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_tcp_reads_and_does_with_the_token_only(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 30)
    token = private(tmp_path / "token", TOKEN + "\n")
    config = tiny.config(tmp_path, control={"listen": "127.0.0.1:0"})
    with running(config, ANYTIMED_CONTROL_TOKEN_FILE=str(token)) as process:
        until(process, lambda: status(tmp_path)["state"] == "waiting for data")
        address = status(tmp_path)["listen"]
        assert address.startswith("127.0.0.1:")
        port = address.rpartition(":")[2]
        for route in ("/healthz", "/readyz", "/status", "/metrics", "/openapi.json"):
            assert asked(address, "GET", route)[0] == 200
        assert next(messages(address))[0] == "status"
        for host, code in (
            (address, 200), ("localhost", 200), ("localhost:9000", 200), (f"[::1]:{port}", 200), ("127.0.0.1.", 200),
            ("evil.example", 421), (f"evil.example:{port}", 421), ("127.0.0.1.evil.example", 421), ("10.0.0.1", 421),
            ("localhost@evil.example", 421), ("", 421),
        ):  # fmt: skip
            assert asked(address, "GET", "/status", Host=host)[0] == code, host
        before = status(tmp_path)
        posts = ("/stop", "/export", "/commit", "/reload", "/pause", "/resume", "/foresee", "/records")
        for route in posts:
            for given in ({}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": f"Bearer {TOKEN}x"},
                          {"Authorization": "Bearer"}, {"Authorization": TOKEN}):  # fmt: skip
                code, content, response = asked(address, "POST", route, **given)
                assert code == 401 and "Bearer" in content["error"], (route, given)
                assert response.getheader("www-authenticate", "").startswith("Bearer")
            assert asked(address, "POST", route, Host="evil.example", Authorization=f"Bearer {TOKEN}")[0] == 421
        after = status(tmp_path)
        assert {k: after[k] for k in ("state", "export", "reload", "commit")} == {
            k: before[k] for k in ("state", "export", "reload", "commit")
        }
        assert asked(address, "POST", "/pause", Authorization=f"Bearer {TOKEN}")[:2] == (
            200, {"state": "paused", "step": before["step"]},
        )  # fmt: skip
        assert asked(address, "POST", "/resume", Authorization=f"bearer  {TOKEN}")[0] == 200
        assert asked(tmp_path / "run", "POST", "/reload")[0] == 200  # the socket asks for no token
        assert TOKEN not in str(asked(address, "GET", "/status")[1])
        # A second daemon on the port says so, and the first stays as it was.
        other = tiny.config(tmp_path / "other", control={"listen": f"127.0.0.1:{port}"}, **{
            "sources.main": {"url": str(tmp_path / "data" / "*.txt")}
        }) if (tmp_path / "other").mkdir() is None else config  # fmt: skip
        assert "[control] listen = '127.0.0.1:" in tiny.run("run", other, expect=1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        assert TOKEN not in output
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", int(port)), timeout=5):
        pass


def test_without_a_token_tcp_only_answers_questions(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 30)
    with running(tiny.config(tmp_path, control={"listen": "localhost:0"})) as process:
        until(process, lambda: status(tmp_path).get("listen") is not None)
        address = status(tmp_path)["listen"]
        code, content, _ = asked(address, "POST", "/export")
        assert code == 403 and "it has no token" in content["error"]
        assert asked(address, "POST", "/export", Authorization="Bearer ")[0] == 403


def test_what_is_no_loopback_address_is_refused(tmp_path: Path) -> None:
    for bad in ("0.0.0.0:80", ":8000", "127.0.0.1", "127.0.0.1:99999", "example.org:80", "[::]:80", "192.168.0.1:80"):
        with pytest.raises(ConfigError, match=r"\[control\] listen: found .*loopback address and a port"):
            load(tiny.config(tmp_path, control={"listen": bad}))


def test_where_the_token_is_found(tmp_path: Path) -> None:
    good = private(tmp_path / "control-token", f"  {TOKEN}\n", 0o644)
    assert control_token({}) is None
    assert control_token({"CREDENTIALS_DIRECTORY": str(tmp_path)}) == TOKEN  # systemd's folder is private by itself
    with pytest.raises(ConfigError, match="others can read it: chmod 600"):
        control_token({"ANYTIMED_CONTROL_TOKEN_FILE": str(good)})
    good.chmod(0o600)
    assert (
        control_token({"ANYTIMED_CONTROL_TOKEN_FILE": str(good), "CREDENTIALS_DIRECTORY": str(tmp_path / "x")}) == TOKEN
    )
    for text in ("short", "two words that are long enough", "x" * 5000, "ünicode-ünicode-ünicode"):
        with pytest.raises(ConfigError, match="token"):
            control_token({"ANYTIMED_CONTROL_TOKEN_FILE": str(private(tmp_path / "bad", text))})
    with pytest.raises(ConfigError, match="ANYTIMED_CONTROL_TOKEN_FILE"):
        control_token({"ANYTIMED_CONTROL_TOKEN_FILE": str(tmp_path / "none")})
