"""Lists local files; many of them in a process of its own.

A million files take seconds, in which a thread that lists them would let the training have the interpreter only now
and then. So where there are many, walk.py runs beside this process and writes its columns. If it comes to nothing, the
files are listed here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from anytimed_adapters.streams import walk
from anytimed_adapters.streams.walk import Listing, Selection, listed_locally

MANY = 50_000
"""Files from which on a process of its own is worth its start: a tenth of a second here."""

log = logging.getLogger(__name__)


class Lister:
    """One thread at a time, but for `close`. `count`: files that the last list had, or that one once had."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self.count = 0

    def list(self) -> Listing:
        """All files. Raises OSError, also after `close`."""
        found = self._listed_beside() if self.count >= MANY else None
        if self._closed:
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED), self._selection.base)
        if found is None:
            found = listed_locally(self._selection)
        self.count = len(found.paths)
        return found

    def close(self) -> None:
        """End the process, if there is one. From any thread."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()

    def _listed_beside(self) -> Listing | None:
        """By another process; None where that came to nothing. Raises OSError where the walk did."""
        # Not a pipe: who reads one while this process is busy with something else makes the other one wait.
        with _in_memory() as found:
            process = self._process = _begun(self._selection, found)
            if process is None:
                return None
            if self._closed:
                process.kill()
            process.wait()
            found.seek(0)
            try:
                listing, unnamed = walk.received(found)
            except (EOFError, ValueError, LookupError, TypeError) as error:
                log.info("the process that lists %s ended early (%s)", self._selection.base, error)
                return None
        self._selection.unnamed.update(unnamed)
        return listing


def _in_memory() -> IO[bytes]:
    """A file without a name."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("anytimed-list"), "w+b")
    return tempfile.TemporaryFile()


def _begun(selection: Selection, out: IO[bytes]) -> subprocess.Popen[bytes] | None:
    interpreter = [sys.executable, "-I", "-S", "-X", f"utf8={sys.flags.utf8_mode}"]
    try:
        process = subprocess.Popen(
            [*interpreter, str(Path(walk.__file__))], stdin=subprocess.PIPE, stdout=out, stderr=subprocess.DEVNULL
        )
    except OSError as error:
        log.info("no process can be started to list %s (%s)", selection.base, error)
        return None
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as told:  # it has ended: there is no list then
        told.write(json.dumps(selection.to_json()).encode())
    return process
