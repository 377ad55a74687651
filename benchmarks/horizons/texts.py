"""Texts of one's own, for the larger model: files cut into documents, in the order of a hash.

Whole files are set aside to measure on, none of whose documents is ever trained on. Everything is written as JSON Lines
once, and taken from there while the list of files, their sizes and their times are the same.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from extension.corpora import PROBE_DOCUMENT, SMALLEST, Corpus

DOCUMENT: Final = 16 << 10
"""Bytes of a document at most; it ends with a line."""


def own_texts(pattern: str, folder: Path, *, stream_bytes: int, probe_bytes: int) -> Corpus:
    """The files that a glob names (`**` goes into folders). Exits where they hold less than is asked for."""
    paths = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())  # noqa: PTH207
    listed = [[str(path), (stat := path.stat()).st_size, stat.st_mtime_ns] for path in paths]
    made = hashlib.sha256(json.dumps([listed, stream_bytes, probe_bytes, DOCUMENT]).encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    stream, beside = folder / f"own-{made[:16]}.jsonl", folder / f"own-{made[:16]}.json"
    if beside.exists():
        told = json.loads(beside.read_text(encoding="utf-8"))
        return Corpus(stream, tuple(told["probe"]), told["digest"], told["size"])
    ordered = sorted(paths, key=lambda path: hashlib.sha256(str(path).encode()).digest())
    probe: list[str] = []
    measured = size = 0
    digest = hashlib.sha256()
    with stream.open("w", encoding="utf-8") as out:
        for path in ordered:
            documents = list(_documents(path))
            if documents and measured < probe_bytes:
                probe.append(documents[0][:PROBE_DOCUMENT])
                measured += len(probe[-1].encode())
                continue
            for text in documents:
                if size < stream_bytes:
                    line = json.dumps({"text": text}) + "\n"
                    out.write(line)
                    digest.update(line.encode())
                    size += len(text.encode())
    if size < stream_bytes:
        raise SystemExit(
            f"--texts {pattern}: found {size:,} bytes of text in {len(paths):,} files, expected {stream_bytes:,}; "
            "name more files, or fewer horizons with --multiples"
        )
    digest.update("\0".join(probe).encode())
    told = {"probe": probe, "digest": digest.hexdigest(), "size": size}
    beside.write_text(json.dumps(told), encoding="utf-8")
    return Corpus(stream, tuple(probe), told["digest"], size)


def _documents(path: Path) -> Iterator[str]:
    """Whole lines, up to DOCUMENT bytes each; a file that is not text has none."""
    try:
        content = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return
    rest = content.encode()
    while len(rest) >= SMALLEST:
        end = rest.rfind(b"\n", 0, DOCUMENT) + 1 or min(DOCUMENT, len(rest))
        yield rest[:end].decode(errors="ignore")
        rest = rest[end:]
