"""Documents from files, for an evaluation: the stream adapters, read once from beginning to end.

The names choose the adapter, as far as a glob tells them: `*.jsonl` (also .ndjson) is JSON Lines, `*.parquet` Parquet,
anything else plain text, a document a file; .gz and .zst are taken off first. A glob that ends in a `*` is read by all
three, each the files that are its own. A folder stands for all files below it. The order is that of the globs, then
text, JSON Lines, Parquet, then by path: the same whenever it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from anytimed import registry
from anytimed.config import AdapterTable
from anytimed.contracts import Closable, ConfigError, Finished, Json, Record, Rejected, Stream

Format = Literal["text", "jsonl", "parquet"]

_COMPRESSED = ("", ".gz", ".zst")
_SUFFIXES: dict[str, Format] = {
    **{f".{name}{end}": "jsonl" for name in ("jsonl", "ndjson") for end in _COMPRESSED},
    ".parquet": "parquet",
}
"""What is no plain text, by the end of the name."""


def documents(
    globs: Sequence[str],
    *,
    form: Format | None = None,
    text_field: str = "text",
    progress: Callable[[int, int | None], None] | None = None,
) -> Iterator[Record | Rejected]:
    """Every document of the files, in a fixed order. form: read all as this; progress: told bytes read and bytes in
    all. Raises ConfigError on a glob without files, a form whose package is missing, or tokens instead of text;
    StreamUnavailable."""
    opened = [found for glob in globs for found in _open(glob, form, text_field)]
    total = sum(stream.lag(None) for stream in opened)
    done = 0
    for stream in opened:
        size = stream.lag(None)
        try:
            for item, place in stream.read(None):
                if progress is not None:
                    progress(done + size - stream.lag(place), total)
                if isinstance(item, Record) and item.tokens is not None:
                    raise ConfigError("--data: these files hold token ids; bits per byte need the text")
                if not isinstance(item, Finished):
                    yield item
        finally:
            if isinstance(stream, Closable):
                stream.close()
        done += size


def _open(glob: str, form: Format | None, text_field: str) -> list[Stream]:
    found = [stream for table in _tables(glob, form, text_field) if (stream := _adopted(table)) is not None]
    if not found:
        raise ConfigError(f"--data: found no file that is not empty at {glob!r}; expected a path or a glob of text")
    return found


def _tables(glob: str, form: Format | None, text_field: str) -> list[Json]:
    """The settings of the streams that read a glob."""
    if "://" not in glob and Path(glob).is_dir():
        glob = f"{glob.rstrip('/')}/**/*"
    if glob.endswith("**"):
        glob += "/*"
    field = {"text_field": text_field}
    told = form or next((kind for suffix, kind in _SUFFIXES.items() if glob.lower().endswith(suffix)), None)
    if told is not None or not glob.endswith("*"):
        return [{"type": told or "text", "url": glob, **(field if told in ("jsonl", "parquet") else {})}]
    others = [f"**/*{suffix}" for suffix in _SUFFIXES]
    return [
        {"type": "text", "url": glob, "exclude": others},
        *({"type": kind, "url": f"{glob}{suffix}", **field} for suffix, kind in _SUFFIXES.items()),
    ]


def _adopted(table: Json) -> Stream | None:
    """A stream of all files that are there now; None where there are none."""
    try:
        stream = _build(table)
    except ConfigError:
        # A package that is missing does not matter where nothing needs it.
        if _build({"type": "text", "url": table["url"]}).discover():
            raise
        return None
    entries = stream.discover()
    stream.adopt(entries)
    return stream if entries else None


def _build(table: Json) -> Stream:
    """settle_s: what is there is read, however new it is."""
    settings = AdapterTable.model_validate({**table, "settle_s": 0.0})
    stream: Stream = registry.build("anytimed.streams", settings, "--data", (settings.type,), "data")
    return stream
