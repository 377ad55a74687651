"""The API's description for programs: `GET /openapi.json`, OpenAPI 3.1. The status is described by its models."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from anytimed.contracts import Json
from anytimed.service.bulletin import KINDS
from anytimed.service.history import MOST_POINTS
from anytimed.service.status import STATUS_FORMAT, schema

_TEXT: Final = {"type": "string"}
_ERROR: Final = {"$ref": "#/components/schemas/Error"}


@cache
def description() -> Json:
    """The whole document."""
    status = schema()
    parts = status.pop("$defs")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "anytimed",
            "version": str(STATUS_FORMAT),
            "description": "A running training daemon. On the socket in the run directory everything may be asked; "
            "over TCP what changes nothing, and with the token the rest.",
        },
        "paths": {
            "/healthz": _get(
                "Whether the loop goes round", {"idle_s": {"type": "number", "minimum": 0}}, also={"503": "It hangs"}
            ),
            "/readyz": _get(
                "Whether it trains, waits for data or is paused", {"state": _TEXT},
                also={"503": "It starts or stops"},
            ),
            "/status": {"get": _operation("Everything it says of itself", {"$ref": "#/components/schemas/Status"})},
            "/metrics": {"get": _operation("The figures for Prometheus", None, content="text/plain")},
            "/events": {"get": _events()},
            "/history": {"get": _history()},
            "/openapi.json": {"get": _operation("This document", {"type": "object"})},
            "/export": _post("Publish x now; answered when it is published", {
                "checkpoint": _TEXT, "step": {"type": "integer"}, "url": _TEXT,
            }),
            "/commit": _post("Write the resumable state now; answered when it is durable", {
                "step": {"type": "integer"}, "path": _TEXT, "time": {"type": "number"},
            }),
            "/reload": _post("Take the configuration file anew: all of the change, or none", {
                "config": _TEXT, "changed": {"type": "array", "items": _TEXT},
            }, also={"422": "It is wrong, or changes what only a restart can"}),
            "/pause": _post("Take no more steps, and commit", _STATE),
            "/resume": _post("Go on after a pause", _STATE),
            "/stop": _stop(),
            "/foresee": _foresee(),
            "/records": _records(),
        },
        "components": {
            "schemas": {**parts, "Status": status, "Error": {
                "type": "object", "required": ["error"], "properties": {"error": _TEXT},
            }},
            "securitySchemes": {"token": {
                "type": "http", "scheme": "bearer", "description": "Over TCP only; a Unix socket asks for none.",
            }},
        },
    }  # fmt: skip


_STATE: Final = {"state": _TEXT, "step": {"type": "integer"}}


def _operation(
    summary: str, schema: Json | None, *, also: dict[str, str] | None = None, content: str = "application/json"
) -> Json:
    body: Json = {"schema": schema if schema is not None else _TEXT}
    answers: dict[str, Any] = {"200": {"description": "Done", "content": {content: body}}}
    for code, why in (also or {}).items():
        answers[code] = {"description": why, "content": {"application/json": {}}}
    return {"summary": summary, "responses": answers}


def _object(properties: Json) -> Json:
    return {"type": "object", "required": sorted(properties), "properties": properties}


def _get(summary: str, properties: Json, *, also: dict[str, str]) -> Json:
    return {"get": _operation(summary, _object(properties), also=also)}


def _post(summary: str, properties: Json, *, also: dict[str, str] | None = None) -> Json:
    errors = {
        "401": "The token is missing or wrong",
        "403": "Over TCP without a token: only questions",
        "503": "Not now; `error` says why",
        "504": "No answer yet; it goes on",
    }
    operation = _operation(summary, _object(properties))
    for code, why in {**errors, **(also or {})}.items():
        operation["responses"][code] = {"description": why, "content": {"application/json": {"schema": _ERROR}}}
    return {"post": {**operation, "security": [{"token": []}]}}


def _events() -> Json:
    operation = _operation(
        "What happens, as it happens (server-sent events; `data` is a status, or a record as in metrics.jsonl)", None,
        content="text/event-stream",
        also={"400": "An unknown kind", "503": "As many listen as may"},
    )  # fmt: skip
    operation["parameters"] = [
        {"name": "kinds", "in": "query", "schema": _TEXT, "description": f"some of {','.join(KINDS)}; all if missing"},
        {"name": "after", "in": "query", "schema": _TEXT, "description": "id of the last event that was heard"},
        {"name": "Last-Event-ID", "in": "header", "schema": _TEXT, "description": "the same, as browsers send it"},
    ]
    return operation


def _stop() -> Json:
    found = _post("Commit, finish the uploads and end; answered at once", _STATE)
    found["post"]["responses"]["202"] = found["post"]["responses"].pop("200")
    return found


def _history() -> Json:
    operation = _operation(
        "What was measured and what happened, few rows of it, for a picture", {"type": "object"},
        also={"400": "A number that is none"},
    )  # fmt: skip
    operation["parameters"] = [
        {"name": "points", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": MOST_POINTS}},
        {"name": "since", "in": "query", "schema": {"type": "number"}, "description": "seconds since 1970"},
    ]
    return operation


def _foresee() -> Json:
    listed = {"type": "array", "items": _TEXT}
    found = _post(
        "What a reload would make of a configuration; nothing is changed",
        {"changed": listed, "restart": listed, "problem": {"type": ["string", "null"]}},
        also={"400": "The body is no JSON, or too long", "408": "The body took too long", "422": "It is wrong"},
    )
    found["post"]["requestBody"] = {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
    return found


def _records() -> Json:
    count = {"type": "integer", "minimum": 0}
    found = _post(
        "Records for an inbox; answered when they are durable",
        {"source": _TEXT, "records": count, "repeated": count, "bytes": count, "waiting_bytes": count},
        also={
            "400": "A bad line or key; nothing was taken",
            "404": "No such inbox",
            "408": "The body took too long; nothing was taken",
            "413": "Too long; nothing was taken",
            "415": "Another content type",
            "422": "The key, or a record's id, belongs to something else",
            "429": "Full; again after Retry-After",
            "507": "The disk is full",
        },
    )
    found["post"]["parameters"] = [
        {"name": "source", "in": "query", "schema": _TEXT, "description": "the inbox; needed where there are several"},
        {"name": "Idempotency-Key", "in": "header", "schema": _TEXT, "description": "the same request is stored once"},
    ]
    found["post"]["requestBody"] = {
        "required": True,
        "content": {"application/jsonl": {"schema": _TEXT}, "text/plain": {"schema": _TEXT}},
    }
    return found
