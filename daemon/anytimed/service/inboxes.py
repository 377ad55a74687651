"""The inboxes of a run: which sources are one, by the configuration in force, and what takes in for each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from anytimed import registry
from anytimed.config import Config
from anytimed.contracts import AnytimedError
from anytimed.data import inbox_log
from anytimed.data.inbox import Inbox
from anytimed.service.intake import Intake, stopping
from anytimed.service.offer import Declined
from anytimed.service.requests import Crashed, Discover, Request

HOW_TO = 'an inbox is a source such as\n[sources.mine]\ntype = "inbox"'


class Inboxes:
    """Opens an inbox when something is sent to it. `config`: the one in force; a reload may bring another."""

    def __init__(self, config: Callable[[], Config], post: Callable[[Request], None]) -> None:
        self._config, self._post = config, post
        self._lock = threading.Lock()
        self._intakes: dict[str, Intake] = {}
        self._seen: Config | None = None
        self._settings: dict[str, Inbox.Settings] = {}
        self._closed = False

    def intake(self, name: str | None) -> Intake:
        """Of the source of this name, or of the only inbox. Raises Declined where there is none, or the daemon
        stops."""
        with self._lock:
            if self._closed:
                raise stopping()
            self._look()
            names = ", ".join(self._settings)
            if not self._settings:
                raise Declined(404, f"{self._config().path} has no inbox; {HOW_TO}")
            if name is None:
                if len(self._settings) > 1:
                    raise Declined(400, f"name one of the inboxes with ?source=NAME: {names}")
                name = names
            if name not in self._settings:
                raise Declined(404, f"no inbox {name[:80]!r}, found {names}")
            return self._opened(name)

    def close(self) -> None:
        """Take nothing more in; what was admitted is answered first. Again is fine."""
        with self._lock:
            self._closed = True
            intakes = list(self._intakes.values())
        for intake in intakes:
            intake.close()

    # --- within ---

    def _look(self) -> None:
        """Find the inboxes of the configuration, where it is another than before."""
        config = self._config()
        if config is self._seen:
            return
        found = {}
        for name, table in config.sources.items():
            where = f"{config.path}: [sources.{name}]"
            adapter = registry.find("anytimed.streams", table.type, where)
            if isinstance(adapter, type) and issubclass(adapter, Inbox):
                found[name] = registry.settings(adapter, table, str(config.path), ("sources", name))
        self._seen, self._settings = config, found
        for name, intake in self._intakes.items():
            if name in found:
                intake.settings = found[name]

    def _opened(self, name: str) -> Intake:
        if name not in self._intakes:
            folder = Path(self._config().run.directory) / "streams" / name
            try:
                inbox = inbox_log.of(folder)
            except OSError as error:
                raise AnytimedError(f"{folder}: the inbox cannot be read: {error.strerror}") from error
            self._intakes[name] = Intake(
                name, inbox, self._settings[name], lambda: self._post(Discover()), lambda e: self._post(Crashed(e))
            )
        return self._intakes[name]
