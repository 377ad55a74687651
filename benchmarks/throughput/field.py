"""Who takes part: a title, what is read for each kind of data, and the settings to try."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from throughput import ours, peers
from throughput.peers import FOR_TEXT, FOR_TOKENS, Setting

KINDS: Final = {"zst": "JSONL.zst", "parquet": "Parquet text", "bin": "tokens"}

Open = Callable[[Path, str, Setting, Path], Iterator[Any]]


@dataclass(frozen=True)
class Contender:
    """package: None for ours. text, tokens: openers. sets: the corpus's sets by kind."""

    title: str
    package: str | None
    text: Open
    tokens: Open
    sets: Mapping[str, str]

    def open(self, kind: str) -> Open:
        return self.tokens if kind == "bin" else self.text

    def settings(self, kind: str) -> tuple[Setting, ...]:
        if self.package is None:  # as the daemon comes: no workers, which would be sessions of their own here
            return (Setting(0, kind != "bin"),)
        return FOR_TOKENS if kind == "bin" else FOR_TEXT


CONTENDERS: Final = {
    "ours": Contender("ours", None, ours.ours, ours.ours, {kind: kind for kind in (*KINDS, "jsonl")}),
    "mosaic": Contender(
        "mosaicml-streaming",
        "mosaicml-streaming",
        peers.mosaic_text,
        peers.mosaic_tokens,
        {"zst": "mds_text", "parquet": "mds_text", "bin": "mds_tokens"},
    ),
    "litdata": Contender(
        "LitData",
        "litdata",
        peers.litdata_text,
        peers.litdata_tokens,
        {"zst": "litdata_text", "parquet": "litdata_text", "bin": "litdata_tokens"},
    ),
    "datasets": Contender(
        "Hugging Face datasets",
        "datasets",
        peers.hf_text,
        peers.hf_tokens,
        {"zst": "zst", "parquet": "parquet", "bin": "parquet_tokens"},
    ),
}
