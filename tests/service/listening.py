"""A listener to server-sent events, over the socket of a run directory or over TCP."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anytimed.contracts import Json
from anytimed.service.control import UnixConnection


def connection_to(where: Path | str, timeout_s: float = 60) -> http.client.HTTPConnection:
    """where: the run directory, or HOST:PORT."""
    if isinstance(where, Path):
        return UnixConnection(where / "control.sock", timeout_s)
    return http.client.HTTPConnection(where, timeout=timeout_s)


def asked(
    where: Path | str, method: str, route: str, body: str | None = None, **headers: str
) -> tuple[int, Any, http.client.HTTPResponse]:
    """Status, content (JSON where it is), response."""
    connection = connection_to(where)
    try:
        connection.request(method, route, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        content = response.read()
        is_json = (response.getheader("content-type") or "").startswith("application/json")
        return response.status, json.loads(content) if is_json else content, response
    finally:
        connection.close()


def messages(where: Path | str, query: str = "", **headers: str) -> Iterator[tuple[str, str | None, Json]]:
    """Kind, id and data of what `/events` says, as it comes; ends with the connection."""
    connection = connection_to(where)
    try:
        connection.request("GET", f"/events{query}", None, {n.replace("_", "-"): v for n, v in headers.items()})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        assert response.getheader("content-type", "").startswith("text/event-stream")
        fields: dict[str, str] = {}
        while line := response.readline().decode():
            name, _, value = line.rstrip("\n").partition(": ")
            if name:
                fields[name] = value
            elif "data" in fields:
                yield fields["event"], fields.get("id"), json.loads(fields["data"])
                fields = {}
            else:
                fields = {}
    finally:
        connection.close()
