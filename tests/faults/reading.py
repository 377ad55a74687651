"""A reader that never stops: it asks latest.json and pulls in a loop while the faults are injected, and what it got
has to be whole, of one step, and never older than what it had. `python -m tests.faults.reading FOLDER URL PORT`; it
ends when its stdin does, and says what it pulled, or what was wrong.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from safetensors.numpy import load_file

from anytimed.contracts import AnytimedError, CorruptError
from anytimed.storage.manifest import CheckpointId
from anytimed.storage.pull import pull
from anytimed.storage.store import StoreError
from anytimed.storage.target import Target
from tests.faults import servers

ROOT = Path(__file__).parents[2]


def check_whole(folder: Path) -> str:
    """What `folder`/current leads to: every file as its manifest says, all of one step. Its id."""
    target = Target(folder)
    manifest = target.current()
    assert manifest is not None, f"{folder}/current leads nowhere"
    assert target.whole(manifest), f"{manifest.id} is torn"
    version = target.version(manifest)
    assert json.loads((version / "config.json").read_bytes())["step"] == manifest.step, f"{manifest.id} is mixed"
    for file in version.glob("*.safetensors"):
        for name, values in load_file(file).items():
            assert np.all(values == manifest.step), f"{manifest.id}: {name} is mixed"
    return manifest.id


def main(folder: Path, url: str, port: int) -> None:
    """Pull until stdin ends. Failures of the store are what is injected; they are counted and passed over."""
    options = servers.options(port) if url.startswith("s3") else {}
    got: list[str] = []
    failures = 0
    while not select.select([0], [], [], 0.02)[0]:
        try:
            pulled = pull(url, folder, storage_options=options)
        except (StoreError, CorruptError):
            failures += 1
            continue
        except AnytimedError as error:
            print(json.dumps({"wrong": str(error)}), flush=True)
            return
        ident = pulled.manifest.id
        if not got or ident != got[-1]:
            if got and CheckpointId.parse(ident).order < CheckpointId.parse(got[-1]).order:
                print(json.dumps({"wrong": f"went back from {got[-1]} to {ident}"}), flush=True)
                return
            try:
                check_whole(folder)
            except AssertionError as error:
                print(json.dumps({"wrong": str(error)}), flush=True)
                return
            got.append(ident)
    print(json.dumps({"got": got, "failures": failures}), flush=True)


class Reader:
    """The process from the test's side. Leaving the block ends it and fails where it saw something wrong."""

    def __init__(self, folder: Path, url: str, port: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.reading", str(folder), url, str(port)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.got: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        time.sleep(0.2)
        try:
            told, _ = self._process.communicate("", timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            told, _ = self._process.communicate()
        if error is None:
            last = json.loads(told.splitlines()[-1])
            assert "wrong" not in last, last
            self.got = last["got"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
