"""Who may do what over HTTP on the loopback address; on the socket in the run directory the file's owner is who asks.

In order: the token, which whoever starts the daemon puts into a file; and what every request that came over TCP has to
pass: a Host that means this machine (a web page of somebody else's can make a browser send requests here, under its own
name), and the token where something is asked to happen. Reading needs none.
"""

from __future__ import annotations

import hmac
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from anytimed.contracts import ConfigError
from anytimed.urls import keep_secret

CREDENTIAL = "control-token"
VARIABLE = "ANYTIMED_CONTROL_TOKEN_FILE"
SHORTEST, LONGEST = 16, 4096
READING = ("GET", "HEAD")
_HOST = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])\.?(:\d{1,5})?", re.ASCII | re.IGNORECASE)


def control_token(environment: Mapping[str, str] = os.environ) -> str | None:
    """The token that changes need over TCP: systemd's credential `control-token`, else the file that
    ANYTIMED_CONTROL_TOKEN_FILE names; None where there is neither, and then TCP only reads. Raises ConfigError on a
    file that cannot be read, that others can read, or that holds no token."""
    folder = environment.get("CREDENTIALS_DIRECTORY")
    credential = Path(folder, CREDENTIAL) if folder else None
    if credential is not None and credential.exists():
        return _read(credential)
    named = environment.get(VARIABLE)
    if not named:
        return None
    path = Path(named)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"{VARIABLE}: {error}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{VARIABLE}: {path} has mode {stat.S_IMODE(mode):04o}, others can read it: chmod 600 {path}")
    return _read(path)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            token = file.read(LONGEST + 1).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no token can be read from it: {error}") from None
    if not SHORTEST <= len(token) <= LONGEST or not token.isprintable() or " " in token:
        raise ConfigError(
            f"{path}: no token: expected one line of {SHORTEST} to {LONGEST} characters without spaces, found "
            f"{len(token)} characters{', spaces among them' if ' ' in token else ''}; `openssl rand -hex 32` makes one"
        )
    keep_secret([token])
    return token


class Guarded:
    """The application behind what TCP has to pass."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # ASGI names the address that a connection came in by; that of a Unix socket has no port.
        by_tcp = scope["type"] == "http" and (scope.get("server") or (None, None))[1] is not None
        refusal = self._refusal(scope) if by_tcp else None
        await (self._app if refusal is None else refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
            told = f"Host: found {', '.join(hosts)[:100] or 'none'}, expected localhost, 127.0.0.1 or [::1]"
            return JSONResponse({"error": told}, status_code=421)
        if scope["method"] in READING:
            return None
        if self._token is None:
            told = (
                f"over TCP this daemon only answers questions: it has no token. Give it one (credential {CREDENTIAL}, "
                f"or {VARIABLE}), or ask on the socket in the run directory"
            )
            return JSONResponse({"error": told}, status_code=403)
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token.encode()):
            return JSONResponse(
                {"error": "expected the header Authorization: Bearer TOKEN"},
                status_code=401,
                headers={"WWW-Authenticate": 'Bearer realm="anytimed"'},
            )
        return None
