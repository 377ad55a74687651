"""URLs and the options beside them: what in them is nobody's business, and how much a server behind one may send.

In order: finding credentials (`credentials`, `kept_in`), keeping them out of what is stored (`without_credentials`,
`public`) and out of what is said (`keep_secret` once, then `told` on every text); and `bounded`, the options under
which fsspec reads from a web server that may lie about sizes, compress a bomb or never end.

Imports nothing of ours, so that every room and every adapter can use it.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, quote_plus, unquote, urlsplit, urlunsplit

ANSWER_BYTES = 64 << 20
"""The most that one answer of a web server may carry: four times the largest range that is asked for."""

_HARMLESS_OPTIONS = frozenset({"endpoint_url", "region_name", "project", "protocol", "host", "port"})
_SECRET_NAME = re.compile(
    r"(^|[_-])(secret|password|passwd|credentials?|(access|api|private|account)[_-]?key)([_-]|$)"
    r"|^token$|(auth|access|session|security|bearer|api)[_-]?token$",
    re.IGNORECASE,
)
"""Not every token is one: `end_token` ends a document."""
_SHORTEST_KEPT = 8
"""A shorter text is not hidden everywhere: replacing `main` or `true` would garble every message."""
_USER = re.compile(r"://[^/\s'\"]+@")
_QUERY = re.compile(r"(://[^\s?'\"]+)\?[^\s'\"]+")
_PARAMETER = re.compile(r"([?&][\w.-]*(?:token|signature|sig|secret|password|credential|key)[\w.-]*=)[^&\s'\"]+", re.I)
_HEADER = re.compile(r"\b(Bearer|Basic)\s+[\w+/=.~-]{8,}", re.I)
_ANOTHER = re.compile(r"\s*,\s*(?=[A-Za-z][A-Za-z0-9+.-]*://)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_kept: set[str] = set()


class BadAnswer(OSError):
    """What a web server sent is not taken, and asking again would bring the same."""


# --- finding them -----------------------------------------------------------------------------------------------------


def credentials(url: str, options: Mapping[str, Any]) -> list[str]:
    """Every text that may be a credential, longest first, for one may hold another: user and password of the URL, and
    all options but those known to be harmless."""
    found = set()
    for one in _each(url):
        user, _, password = _user_of(one).partition(":")
        found |= {user, unquote(user), password, unquote(password)}
    for value in re.findall(r"[?&][^=&]*=([^&#]+)", url):
        found |= {value, unquote(value)}
    found |= set(_leaves(options))
    # Very short texts are no secrets.
    return sorted((text for text in found if len(text) >= 4), key=len, reverse=True)


def kept_in(value: Any, name: str = "") -> list[str]:
    """The credentials in a whole configuration: what lies under `…storage_options` or under a name that says it is
    secret, and those in URLs."""
    if isinstance(value, Mapping):
        inside = ((inner, str(key)) for key, inner in value.items())
        if name.endswith("storage_options"):
            return list(_leaves(value))
        return [text for inner, key in inside for text in kept_in(inner, key)]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in kept_in(inner, name)]
    if not isinstance(value, str):
        return []
    return [value] if is_secret(name) else credentials(value, {}) if "://" in value else []


def is_secret(name: str) -> bool:
    """Whether a key's or variable's name says that its value is nobody's business."""
    return name.endswith("storage_options") or bool(_SECRET_NAME.search(name))


def in_environment(environment: Mapping[str, str]) -> list[str]:
    """Values of variables such as AWS_SECRET_ACCESS_KEY or HF_TOKEN. A path to a file of credentials is no secret."""
    named = (value for name, value in environment.items() if is_secret(name) or name.endswith("_TOKEN"))
    return [value for value in named if not value.startswith("/")]


# --- keeping them to ourselves ----------------------------------------------------------------------------------------


def without_credentials(url: str) -> str:
    """A URL as it may be published: no user, password, query or fragment. Of a list of URLs, separated by commas, each
    of them."""
    return ",".join(map(_without_credentials, _each(url))) if "://" in url else url


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def public(value: Any) -> Any:
    """JSON as it may be stored or published: no `storage_options`, no secret keys, URLs without credentials."""
    if isinstance(value, Mapping):
        return {key: public(inner) for key, inner in value.items() if not is_secret(str(key))}
    if isinstance(value, list | tuple):
        return [public(inner) for inner in value]
    return without_credentials(value) if isinstance(value, str) else value


def keep_secret(texts: Iterable[str]) -> None:
    """From now on `told` hides these in this process, in the forms they take in URLs, JSON and headers too."""
    for text in texts:
        if len(text) >= _SHORTEST_KEPT:
            plain = base64.b64encode(text.encode()).decode()
            _kept.update({text, quote(text, safe=""), quote(text), quote_plus(text), json.dumps(text)[1:-1], plain})


def told(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without what must not be read by others, `secrets` included, and without control characters, which could
    forge lines of a log or steer a terminal."""
    for secret in [*secrets, *sorted(_kept, key=len, reverse=True)]:
        text = text.replace(secret, "***")
    text = _QUERY.sub(r"\1?***", _USER.sub("://***@", text))
    text = _HEADER.sub(r"\1 ***", _PARAMETER.sub(r"\1***", text))
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _each(url: str) -> list[str]:
    """The URLs of a list such as a cluster's servers are."""
    return _ANOTHER.split(url)


def _user_of(url: str) -> str:
    return url.partition("://")[2].partition("/")[0].rpartition("@")[0]


def _leaves(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if name not in _HARMLESS_OPTIONS:
                yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)


# --- what may come ----------------------------------------------------------------------------------------------------


def bounded(url: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Storage options under which no answer of a web server takes more memory than ANSWER_BYTES.

    Nothing is decompressed: a few kilobytes could become gigabytes, and what we read is digested as it is stored. A
    longer or a compressed answer is an OSError. Other URLs keep their options.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        return dict(options)
    from aiohttp import ClientResponse  # fsspec imports it for these URLs anyway

    class Bounded(ClientResponse):
        async def read(self) -> bytes:
            if self._body is None:
                encoding = self.headers.get("Content-Encoding", "identity")
                if encoding not in ("", "identity"):
                    self.close()
                    raise BadAnswer(f"the server answers in Content-Encoding {encoding!r}; asked was identity")
                body = bytearray()
                async for chunk in self.content.iter_any():
                    body += chunk
                    if len(body) > ANSWER_BYTES:
                        self.close()
                        raise BadAnswer(f"an answer of more than {ANSWER_BYTES} bytes; it was broken off")
                self._body = bytes(body)
            return await super().read()

    given = dict(options.get("client_kwargs") or {})
    headers = {"Accept-Encoding": "identity", **given.get("headers", {})}
    session = {**given, "headers": headers, "auto_decompress": False, "response_class": Bounded}
    return {**options, "client_kwargs": session}
