"""Real system calls, and at the n-th of them a fault: the process is killed, or the kernel's error comes back.

Everything that storage writes goes through these functions of `os`, so a sweep over n visits every step of a protocol.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from anytimed.storage.store import Store

CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "link", "symlink", "unlink", "rmdir", "ftruncate")


class Counter:
    """How many calls were made while faults were armed."""

    def __init__(self) -> None:
        self.calls = 0


@contextlib.contextmanager
def at_call(n: int, fault: Callable[[str, tuple[Any, ...]], None]) -> Iterator[Counter]:
    """Run `fault(name, arguments)` instead of the n-th call (from 1); all others are made. n = 0: only count."""
    counter = Counter()

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counter.calls += 1
            if counter.calls == n:
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
