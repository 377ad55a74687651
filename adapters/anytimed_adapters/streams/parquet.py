"""Parquet files: every row a record, its text or its tokens in one column. Needs pyarrow (`anytimed[parquet]`).

Only the footer and that column are read, a row group after the other, in batches of a few megabytes. A place is a row
group, the rows of it that were read, and a digest of the footer and of all records before; so it is not the bytes of
the other columns that a resume compares, but everything that was trained on, and their sizes. A Parquet file does not
grow: new data goes into new files.

Values of a dictionary page are kept once, however often rows repeat them, so that a small file cannot become a large
batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from numpy.typing import NDArray
from pydantic import Field

from anytimed.contracts import Json, Record, Rejected
from anytimed_adapters.streams.compression import Torn
from anytimed_adapters.streams.files import AT_END, FileSettings, FileStream, Items, torn
from anytimed_adapters.streams.records import of_bytes, sha256, sha256_of_tokens, too_long
from anytimed_adapters.streams.spans import Span
from anytimed_adapters.streams.store import FileStore

_BATCH_BYTES = 4 << 20
_MOST_BATCH_ROWS = 4096
_BUFFER_BYTES = 4 << 20
_TAIL_BYTES = 8
_MOST_FOOTER_BYTES = 64 << 20
_FREE_BYTES = 16 << 20
_SHOWN_CHARACTERS = 300
_EMPTY = sha256(b"")


class ParquetFiles(FileStream):
    """A `Stream` with a document for every row of a column of text, or a record for every list of tokens."""

    class Settings(FileSettings):
        """The settings of all file streams, and the column."""

        text_field: str = Field(
            default="text", description="The column that holds the documents: text, or lists of token ids."
        )
        max_ratio: float = Field(
            default=1000.0,
            ge=1,
            description="A column that expands to more than this many times its size (beyond 16 MiB) is not read.",
        )

    _settings: Settings

    def __init__(self, settings: Settings, name: str, **clocks: Any) -> None:
        super().__init__(settings, name, **clocks)
        with contextlib.suppress(NotImplementedError):  # a build without it
            # Of the whole process: the default pool keeps some 25 MB more of what was let go.
            pa.set_memory_pool(pa.jemalloc_memory_pool())

    def _items(self, index: int, at: Json | None) -> Items:
        span = self._spans[index]
        wanted = (at["group"], at["offset"]) if at else None
        digest = hashlib.sha256(span.stop.to_bytes(8, "little"))
        file = _RangeFile(self._store, span)
        try:
            footer = _footer(file, span.stop)
            digest.update(footer)
            for item, group, row in self._rows(file):
                digest.update(bytes.fromhex(item.digest))
                if wanted is None:
                    yield item, {"entry": index, "group": group, "offset": row, "digest": digest.hexdigest()}
                elif wanted == (group, row):
                    assert at is not None, "there is no place to reach"
                    self._compare(index, at["digest"], digest.hexdigest())
                    wanted = None
        except (Torn, pa.ArrowException, OSError, ValueError, KeyError, MemoryError) as reason:
            if file.failure is not None:
                raise file.failure from None
            if at is not None and wanted is not None:
                self._compare(index, at["digest"], f"a file that cannot be read: {_briefly(reason)}")
            digest.update(b"torn")
            whole = digest.hexdigest()
            yield torn(_briefly(reason), whole), {"entry": index, "group": 0, "offset": AT_END, "digest": whole}
            return whole
        if at is not None and wanted is not None:
            self._compare(index, at["digest"], "fewer rows")
        return digest.hexdigest()

    def _digest(self, index: int) -> str:
        reading = self._items(index, None)
        while True:
            try:
                next(reading)
            except StopIteration as end:
                return str(end.value)

    def _rows(self, file: _RangeFile) -> Iterator[tuple[Record | Rejected, int, int]]:
        """Items, each with its row group and the rows of the group up to and including it."""
        column = self._settings.text_field
        options = {"buffer_size": _BUFFER_BYTES, "pre_buffer": False, "page_checksum_verification": True}
        parquet = pq.ParquetFile(file, **options)
        metadata, schema = parquet.metadata, parquet.schema_arrow
        if (place := schema.get_field_index(column)) < 0:
            raise Torn(f"it has no column {column!r}, or several; found {schema.names}")
        kind = schema.field(place).type
        leaf = _leaf(metadata, column)
        if _is_text(kind) and any(
            metadata.row_group(i).column(leaf).has_dictionary_page for i in range(metadata.num_row_groups)
        ):
            parquet = pq.ParquetFile(file, read_dictionary=[column], metadata=metadata, **options)
        for group in range(metadata.num_row_groups):
            rows = self._batch_rows(metadata.row_group(group), leaf)
            row = 0
            for batch in parquet.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False):
                for item in self._batch(batch.column(0), kind):
                    row += 1
                    yield item, group, row
            if row != metadata.row_group(group).num_rows:
                raise Torn(f"row group {group} holds {row} rows, expected {metadata.row_group(group).num_rows}")

    def _batch_rows(self, group: Any, leaf: int) -> int:
        """How many rows to take at once, by what the footer says about the column's size."""
        chunk = group.column(leaf)
        size, most = chunk.total_uncompressed_size, self._settings.max_ratio
        if size > _FREE_BYTES + most * max(0, chunk.total_compressed_size):
            raise Torn(f"column {self._settings.text_field!r} decompresses to more than max_ratio = {most:g} times")
        rows: int = _BATCH_BYTES * max(1, group.num_rows) // max(1, size)
        return max(1, min(_MOST_BATCH_ROWS, rows))

    def _batch(self, array: Any, kind: Any) -> Iterator[Record | Rejected]:
        if _is_text(kind):
            yield from self._texts(array)
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            yield from _token_lists(array, kind)
        else:
            raise Torn(f"column {self._settings.text_field!r} is {kind}, expected text or lists of integers")

    def _texts(self, array: Any) -> Iterator[Record | Rejected]:
        indices: list[int | None] | range = range(len(array))
        if pa.types.is_dictionary(array.type):
            indices, array = array.indices.to_pylist(), array.dictionary
            valid = True
        else:
            valid = array.null_count == 0
        offsets, data = _offsets(array)
        most = self._settings.max_record_bytes
        for i in indices:
            if i is None or not (valid or array[i].is_valid):
                yield Rejected("the row is null", _EMPTY)
                continue
            start, stop = offsets[i], offsets[i + 1]
            content = data[start:stop]
            if stop - start > most:
                yield too_long(stop - start, most, sha256(content))
            elif start == stop:
                yield Rejected("the row is empty", _EMPTY)
            else:
                yield of_bytes(content, self._settings.encoding_errors, "the row")

    def _grows(self, path: str) -> bool:
        return False

    def _settles(self, path: str) -> bool:
        return True


class _RangeFile(io.RawIOBase):
    """What pyarrow reads from. `failure`: why the store did not give what was asked for."""

    def __init__(self, store: FileStore, span: Span) -> None:
        super().__init__()
        self._store, self._span = store, span
        self._at = 0
        self.failure: Exception | None = None

    def read(self, size: int | None = -1) -> bytes:
        stop = self._span.stop if size is None or size < 0 else min(self._at + size, self._span.stop)
        try:
            found = b"".join(self._store.ranges(self._span.path, self._at, stop))
        except Exception as error:
            self.failure = error
            raise
        self._at += len(found)
        return found

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._span.stop)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def size(self) -> int:
        return self._span.stop

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _footer(file: _RangeFile, size: int) -> bytes:
    """The metadata at the file's end, as it is stored."""
    file.seek(max(0, size - _TAIL_BYTES))
    tail = file.read(_TAIL_BYTES)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or length + _TAIL_BYTES > size:
        raise Torn("it does not end as a Parquet file does")
    if length > _MOST_FOOTER_BYTES:
        raise Torn(f"its footer has {length} bytes, the most is {_MOST_FOOTER_BYTES}")
    file.seek(size - _TAIL_BYTES - length)
    return file.read(length) + tail


def _leaf(metadata: Any, column: str) -> int:
    """The number of the column's leaf: itself, or the elements of its lists."""
    schema = metadata.schema
    paths = [schema.column(i).path for i in range(len(schema))]
    found = [i for i, path in enumerate(paths) if path == column or path.startswith(f"{column}.")]
    if len(found) != 1:
        raise Torn(f"column {column!r} is a structure, expected text or lists of integers")
    return found[0]


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    types = pa.types
    return bool(
        types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)
    )


def _offsets(array: Any) -> tuple[list[int], memoryview]:
    """Where each value begins and ends in the bytes, (n + 1), and the bytes."""
    wide = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    _, starts, data = array.buffers()
    if not len(array) or starts is None:
        return [0] * (len(array) + 1), memoryview(b"")
    found = np.frombuffer(starts, np.int64 if wide else np.int32)[array.offset : array.offset + len(array) + 1]
    return found.tolist(), memoryview(data) if data is not None else memoryview(b"")


def _token_lists(array: Any, kind: Any) -> Iterator[Record | Rejected]:
    values = array.values
    if not pa.types.is_integer(values.type):
        raise Torn(f"the lists hold {values.type}, expected integers")
    offsets = array.offsets.to_pylist()
    holes = values.null_count > 0
    numbers: NDArray[Any] = values.fill_null(0).to_numpy(zero_copy_only=False)
    for i in range(len(array)):
        taken = numbers[offsets[i] : offsets[i + 1]]
        if array.null_count and not array[i].is_valid:
            yield Rejected("the row is null", _EMPTY)
        elif not taken.size:
            yield Rejected("the row is empty", _EMPTY)
        elif (holes and values[offsets[i] : offsets[i + 1]].null_count) or taken.min() < 0 or taken.max() >= 1 << 31:
            told = "token ids are missing, below 0, or of 2**31 and above"
            yield Rejected(told, sha256(taken.astype("<i8").tobytes()))
        else:
            tokens = taken.astype(np.int32)
            yield Record("", sha256_of_tokens(tokens), tokens)


def _briefly(reason: Exception) -> str:
    return f"{type(reason).__name__}: {reason}"[:_SHOWN_CHARACTERS] if not isinstance(reason, Torn) else f"{reason}"
