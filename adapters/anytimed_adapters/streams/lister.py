"""Lists local files; many of them in a process of its own.

A million files take seconds, in which a thread that lists them would let the training have the interpreter only now
and then. So where there are many, walk.py runs beside this process and writes its columns, which are taken while they
come. If it comes to nothing, the files are listed here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from anytimed_adapters.streams import walk as walk_module
from anytimed_adapters.streams.walk import Listing, Selection, walked

_LOOKS_S = 0.01
"""Between two looks at what the process has written, in seconds: it walks some thousand files meanwhile."""
MANY = 50_000
"""Files from which on a process of its own is worth its start: a tenth of a second here."""

log = logging.getLogger(__name__)

Select = Callable[[Listing], Listing]
"""What is wanted of a part of the files."""


class Lister:
    """One thread at a time. `count`: files that the last list had, or that one once had."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._walk: _Walk | None = None
        self.count = 0

    def begin(self, done: Callable[[], None]) -> None:
        """Begin the next `list`, where there are many files. `done` is called, from any thread, when it will not
        wait."""
        walk = self._walk or self._begun()
        if walk is None:
            done()
        else:
            threading.Thread(target=walk.ends, args=[done], name="anytimed-list", daemon=True).start()

    def forget(self) -> None:
        """End what was begun: the next `list` is as new as can be."""
        walk, self._walk = self._walk, None
        if walk is not None:
            walk.close()

    def list(self, select: Select) -> Listing:
        """What is wanted of all files, taken part by part while they are found. Raises OSError."""
        walk = self._walk or self._begun()
        found = self._selected(walk, select) if walk is not None else None
        return found if found is not None else self._sum(walked(self._selection), select)

    def _begun(self) -> _Walk | None:
        if self.count < MANY:
            return None
        try:
            self._walk = _Walk(self._selection)
        except OSError as error:
            log.info("no process can be started to list %s (%s)", self._selection.base, error)
            return None
        return self._walk

    def _selected(self, walk: _Walk, select: Select) -> Listing | None:
        """By another process; None where that came to nothing. Raises OSError where the walk did."""
        try:
            found = self._sum(walk.parts(), select)
        except (EOFError, ValueError, LookupError, TypeError) as error:
            log.info("the process that lists %s ended early (%s)", self._selection.base, error)
            return None
        finally:
            self.forget()
        self._selection.unnamed.update(walk.unnamed)
        return found

    def _sum(self, parts: Iterator[Listing], select: Select) -> Listing:
        found, count = Listing(), 0
        for part in parts:
            count += len(part.paths)
            found.extend(select(part))
        self.count = count
        return found


class _Walk:
    """A process that lists, and what it has said so far. Raises OSError where none can be started."""

    def __init__(self, selection: Selection) -> None:
        self.unnamed: list[str] = []
        # Not a pipe: who reads one while this process is busy with something else makes the other one wait.
        self._out = _in_memory()
        interpreter = [sys.executable, "-I", "-S", "-X", f"utf8={sys.flags.utf8_mode}"]
        try:
            self._process = subprocess.Popen(
                [*interpreter, str(Path(walk_module.__file__))],
                stdin=subprocess.PIPE,
                stdout=self._out,
                stderr=subprocess.DEVNULL,
            )
        except OSError:
            self._out.close()
            raise
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as told:  # it has ended: there is no list then
            told.write(json.dumps(selection.to_json()).encode())

    def ends(self, done: Callable[[], None]) -> None:
        """Wait for it, and tell."""
        self._process.wait()
        done()

    def parts(self) -> Iterator[Listing]:
        """Its files, as they come. Raises OSError where the walk did, and EOFError, ValueError, LookupError or
        TypeError where it did not come to an end."""
        at = 0
        while True:
            ended = self._process.poll() is not None  # before the look: what it wrote is there
            frame, at = self._frame(at)
            if frame is None:
                if ended:
                    raise EOFError("the list is cut off")
                time.sleep(_LOOKS_S)
                continue
            told, part = walk_module.received(frame)
            if part is None:
                self.unnamed = told["unnamed"]
                return
            yield part

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._out.close()

    def _frame(self, at: int) -> tuple[bytes | None, int]:
        """The frame that begins there, if all of it was written, and where the next one begins."""
        file, first = self._out.fileno(), at + walk_module.SIZE_BYTES
        written = os.fstat(file).st_size
        if first > written:
            return None, at
        end = first + int(os.pread(file, walk_module.SIZE_BYTES, at), 16)
        return (os.pread(file, end - first, first), end) if end <= written else (None, at)


def _in_memory() -> IO[bytes]:
    """A file without a name."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("anytimed-list"), "w+b")
    return tempfile.TemporaryFile()
