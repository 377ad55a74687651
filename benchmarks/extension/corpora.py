"""Two texts that lie wherever anytimed is installed: the Python standard library, and the C++ headers of torch.

The first lines of every file, up to 6 KiB, are a document. Documents come in the order of a hash, so that a stream of
them is stationary: read in the order of their paths, both texts change character every few files. Some are set aside to
measure on and are never part of a stream; the others are written as JSON Lines.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

SMALLEST: Final = 1 << 10
"""Bytes of a document."""
LARGEST: Final = 6 << 10
PROBE_DOCUMENT: Final = 1 << 10
"""Bytes of a document that are measured on, so that many documents are."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """stream: the JSON Lines. probe: documents to measure on. digest: SHA-256 over the two."""

    stream: Path
    probe: tuple[str, ...]
    digest: str
    size: int


def python_files() -> Iterator[Path]:
    """The standard library's sources, as in configs/quickstart.toml."""
    for path in Path(sysconfig.get_path("stdlib")).rglob("*.py"):
        if not {"site-packages", "dist-packages"} & set(path.parts):
            yield path


def header_files() -> Iterator[Path]:
    """C++ headers of torch, without the thousands that are generated from one template."""
    for path in (Path(torch.__file__).parent / "include").rglob("*.h"):
        if "ops" not in path.parts:
            yield path


SOURCES: Final[dict[str, Callable[[], Iterator[Path]]]] = {"python": python_files, "headers": header_files}


def gather(name: str, folder: Path, *, stream_bytes: int, probe_bytes: int) -> Corpus:
    """Write a corpus into `folder`, equal bytes for equal files. Exits where the machine has too little of it."""
    documents = _in_order(SOURCES[name]())
    probe: list[str] = []
    measured = size = 0
    lines = []
    for text in documents:
        if measured < probe_bytes:
            probe.append(text[:PROBE_DOCUMENT])
            measured += len(probe[-1].encode())
        elif size < stream_bytes:
            lines.append(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
    if size < stream_bytes:
        raise SystemExit(
            f"{name}: found {size} bytes of text in the first {LARGEST} bytes of every file, expected {stream_bytes}; "
            "install Python with its library, and torch with its headers (some distributions split them off)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    stream = folder / f"{name}-{stream_bytes}.jsonl"
    content = "".join(lines).encode()
    if not stream.exists() or stream.read_bytes() != content:  # the time of a file is part of its identity
        stream.write_bytes(content)
    digest = hashlib.sha256(content + "\0".join(probe).encode()).hexdigest()
    return Corpus(stream, tuple(probe), digest, size)


def _in_order(paths: Iterable[Path]) -> list[str]:
    """Every text once. The hold-out is chosen by a digest of the content, so the order is by another."""
    found: dict[bytes, str] = {}
    for path in paths:
        if not path.is_file():
            continue
        with path.open("rb") as file:
            content = file.read(LARGEST)
        content = content[: content.rfind(b"\n") + 1]  # whole lines
        if len(content) >= SMALLEST:
            try:
                found[hashlib.sha256(b"order" + content).digest()] = content.decode()
            except UnicodeDecodeError:
                continue
    return [found[key] for key in sorted(found)]
