"""A consumer that looks at a pulled folder all the time: what `current` leads to is whole, verified, never older."""

from __future__ import annotations

import threading
from pathlib import Path

from anytimed.storage.durable import digest_of
from anytimed.storage.manifest import Manifest


class Reader(threading.Thread):
    """Follows `to`/current until it is left; leaving raises what was wrong. `may_go_back`: an older one was asked
    for."""

    def __init__(self, to: Path, *, may_go_back: bool = False) -> None:
        super().__init__(daemon=True)
        self.looks = 0
        self.seen: list[tuple[int, int]] = []
        """(term, seq) of what was found, each once it changed."""
        self._to = to
        self._may_go_back = may_go_back
        self._over = threading.Event()
        self._wrong: list[str] = []

    def __enter__(self) -> Reader:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        self.join()
        self.look()  # the state in the end
        assert kind is not None or not self._wrong, self._wrong

    def run(self) -> None:
        while not self._over.wait(0.001) and not self._wrong:  # the others of this process want to run too
            self.look()

    def look(self) -> None:
        """Resolve `current` once and verify every byte behind it."""
        try:
            folder = self._to / (self._to / "current").readlink()
        except FileNotFoundError:
            if self.seen:
                self._wrong.append("current was taken away")
            return
        try:
            manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes(), str(folder))
            for entry in manifest.files:
                if digest_of(folder / entry.name) != (entry.size, entry.sha256):
                    self._wrong.append(f"{folder / entry.name}: not what its manifest says")
        except OSError as error:
            self._wrong.append(f"incomplete: {error}")
            return
        if self.seen and manifest.order < self.seen[-1] and not self._may_go_back:
            self._wrong.append(f"{manifest.order} after {self.seen[-1]}")
        if not self.seen or manifest.order != self.seen[-1]:
            self.seen.append(manifest.order)
        self.looks += 1
