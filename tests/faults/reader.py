"""A consumer that looks at a pulled folder all the time: what `current` leads to is whole, verified, never older."""

from __future__ import annotations

import os
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
        current = self._to / "current"
        try:
            standing = current.stat()
        except FileNotFoundError:
            # Looked at again, for it may have been made just now.
            if self.seen or (current.is_symlink() and not current.exists()):
                self._wrong.append("current was taken away, or leads nowhere")
            return
        try:
            folder = current.resolve(strict=True)
            manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes(), str(folder))
            wrong = [e.name for e in manifest.files if digest_of(folder / e.name) != (e.size, e.sha256)]
        except OSError as error:
            wrong = [str(error)]
        if wrong:
            # Where another run's checkpoint took the place of the same id meanwhile, a reader looks again.
            if os.path.samestat(standing, current.stat()):
                self._wrong.append(f"incomplete, or not what its manifest says: {wrong}")
            return
        if self.seen and manifest.order < self.seen[-1] and not self._may_go_back:
            self._wrong.append(f"{manifest.order} after {self.seen[-1]}")
        if not self.seen or manifest.order != self.seen[-1]:
            self.seen.append(manifest.order)
        self.looks += 1
