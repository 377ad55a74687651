"""Real system calls, and at the n-th of them a fault: the process is killed, or the kernel's error comes back.

Everything that storage writes goes through these functions of `os`, so a sweep over n visits every step of a protocol.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from anytimed.storage.store import Store

CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "link", "symlink", "unlink", "rmdir", "ftruncate")


class Counter:
    """How many calls were made while faults were armed."""

    def __init__(self) -> None:
        self.calls = 0


@contextlib.contextmanager
def at_call(n: int, fault: Callable[[str, tuple[Any, ...]], None], *, thread: int | None = None) -> Iterator[Counter]:
    """Run `fault(name, arguments)` instead of the n-th call (from 1); all others are made. n = 0: only count.
    `thread`: only the calls of this one count."""
    counter = Counter()

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counter.calls += thread in (None, threading.get_ident())
            if counter.calls == n and thread in (None, threading.get_ident()):
                fault(name, arguments)
            return real(*arguments, **options)

        return call

    reals = {name: getattr(os, name) for name in CALLS}
    try:
        for name, real in reals.items():
            setattr(os, name, wrapped(name, real))
        yield counter
    finally:
        for name, real in reals.items():
            setattr(os, name, real)


def kill(name: str, arguments: tuple[Any, ...]) -> None:
    """SIGKILL; a write gets half of its bytes out first."""
    if name == "write":
        file, data = arguments
        os.pwrite(file, bytes(data)[: len(data) // 2], os.fstat(file).st_size)
    os.kill(os.getpid(), signal.SIGKILL)


def error(number: int) -> Callable[[str, tuple[Any, ...]], None]:
    """The kernel's error of that number."""

    def fail(name: str, arguments: tuple[Any, ...]) -> None:
        raise OSError(number, os.strerror(number))

    return fail


Event = tuple[str, Path, Path | None]
"""A call, the file that it was about, and for a rename where to."""


@contextlib.contextmanager
def recorded() -> Iterator[list[Event]]:
    """What is written, fsynced and renamed, in order."""
    events: list[Event] = []
    write, fsync, rename = os.write, os.fsync, os.rename

    def name(file: int) -> Path:
        return Path(f"/proc/self/fd/{file}").readlink()

    def written(file: int, data: bytes) -> int:
        events.append(("write", name(file), None))
        return write(file, data)

    def synced(file: int) -> None:
        events.append(("fsync", name(file), None))
        fsync(file)

    def renamed(source: Path, goal: Path) -> None:
        events.append(("rename", Path(source), Path(goal)))
        rename(source, goal)

    try:
        os.write, os.fsync, os.rename = written, synced, renamed  # type: ignore[assignment]
        yield events
    finally:
        os.write, os.fsync, os.rename = write, fsync, rename


def check_order(events: list[Event], goal: Path) -> None:
    """`goal`, a file or folder, became durable before it could be seen, and its name after."""
    (at,) = (i for i, (call, _, to) in enumerate(events) if call == "rename" and to == goal)
    source = events[at][1]
    inside = [source / p.name for p in goal.iterdir()] if goal.is_dir() else [source]
    files_done = []
    for file in inside:
        last_write = max(i for i, event in enumerate(events) if event == ("write", file, None))
        files_done.append(events.index(("fsync", file, None), last_write))
    if goal.is_dir():
        files_done.append(events.index(("fsync", source, None), max(files_done)))
    assert max(files_done) < at, f"{goal} was renamed before it was durable"
    assert ("fsync", goal.parent, None) in events[at:], f"the name of {goal} was not made durable"


class Cut(Exception):
    """The process ends here, between two requests to a store."""


@contextlib.contextmanager
def cut_at(n: int, verbs: Sequence[str]) -> Iterator[None]:
    """Raise `Cut` instead of the n-th call (from 1) to those methods of any Store; the others are made."""
    left = n

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Cut
            return real(*arguments, **options)

        return call

    reals = {verb: getattr(Store, verb) for verb in verbs}
    try:
        for verb, real in reals.items():
            setattr(Store, verb, wrapped(real))
        yield
    finally:
        for verb, real in reals.items():
            setattr(Store, verb, real)
