"""Lists local files; many of them in a process of its own.

A million files take seconds, in which a thread that lists them would let the training have the interpreter only now
and then. So where there were many the last time, walk.py runs beside this process and sends its columns. That process
may also be begun before its list is asked for: a start reads its journal meanwhile. If it comes to nothing, the files
are listed here.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

from anytimed_adapters.streams import walk
from anytimed_adapters.streams.walk import Listing, Selection, listed_locally

MANY = 50_000
"""Files from which on a process of its own is worth its start: a tenth of a second here."""

log = logging.getLogger(__name__)


class Lister:
    """One thread at a time."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._count = 0
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self, count: int) -> None:
        """The list will be asked for soon; about `count` files were there once."""
        if count >= MANY and self._process is None:
            self._process = _begun(self._selection)

    def list(self) -> Listing:
        """All files, as they are now or were at `begin`. Raises OSError."""
        self.begin(self._count)
        process, self._process = self._process, None
        found = self._result_of(process) if process is not None else None
        if found is None:
            found = listed_locally(self._selection)
        self._count = len(found.paths)
        return found

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            with process:
                process.kill()

    def _result_of(self, process: subprocess.Popen[bytes]) -> Listing | None:
        """None where it came to nothing. Raises OSError where the walk did."""
        assert process.stdout is not None
        with process:
            try:
                found, unnamed = walk.received(process.stdout)
            except (EOFError, ValueError, LookupError, TypeError) as error:
                log.info("the process that lists %s ended early (%s); listed here", self._selection.base, error)
                return None
            finally:
                process.kill()  # it has said all it had to say
        self._selection.unnamed.update(unnamed)
        return found


def _begun(selection: Selection) -> subprocess.Popen[bytes] | None:
    interpreter = [sys.executable, "-I", "-S", "-X", f"utf8={sys.flags.utf8_mode}"]
    try:
        process = subprocess.Popen(
            [*interpreter, str(Path(walk.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError as error:
        log.info("no process can be started to list %s (%s); listed here", selection.base, error)
        return None
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(selection.to_json()).encode())
        process.stdin.close()
    except BrokenPipeError:
        pass  # its list will be cut off
    return process
