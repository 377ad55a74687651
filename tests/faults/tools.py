"""What the injections need from the machine: strace, mounts, an S3 server. Missing on a user's machine: the test says
so; missing in CI (`CI` is set): it fails, for there nothing is skipped."""

from __future__ import annotations

import os
import shutil

import pytest


def needs(command: str, install: str) -> str:
    """The path of a command. Where it is missing the test is skipped, saying what to install; in CI it fails."""
    import sys
    from pathlib import Path

    beside = Path(sys.executable).with_name(command)
    found = str(beside) if beside.exists() else shutil.which(command)
    if found is None:
        _without(f"{command} is missing: {install}")
    assert found is not None
    return found


def needs_root(what: str) -> None:
    """Mounting needs root."""
    if os.geteuid() != 0:
        _without(f"{what} needs root")


def _without(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; in CI nothing is skipped")
    pytest.skip(reason)


def needs_faketime() -> str:
    """The path of libfaketime's shared library, to be preloaded."""
    import importlib.util
    from pathlib import Path

    found = importlib.util.find_spec("libfaketime")
    library = found and Path(str(found.origin)).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
    if not library or not library.is_file():
        _without("libfaketime is missing: pip install libfaketime")
    return str(library)
