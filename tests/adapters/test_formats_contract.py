"""The contract of a stream over every file format and compression; over stores, for those that read at random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest

from anytimed.contracts import Record, Refused, Stream
from anytimed.testing.streams import Items, StreamContract
from tests.adapters.formats import BIN, FORMATS, JSONL, NPY, PARQUET, TAR, Format, text_of, write_again
from tests.faults.servers import BUCKET, Server, moto


class FormatContract(StreamContract):
    """A format that appends within a file, one that appends by new files, and one with a document a file."""

    format: ClassVar[Format]

    def stream(self, folder: Path) -> Stream:
        made: Stream = self.format.stream(self.base(folder))
        return made

    def base(self, folder: Path) -> str:
        return str(folder)

    def files(self, folder: Path, name: str) -> list[str]:
        return sorted(file.name for file in folder.glob(f"{name}.*"))

    def put(self, folder: Path, name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)

    def get(self, folder: Path, name: str) -> bytes:
        return (folder / name).read_bytes()

    def put_again(self, folder: Path, name: str, content: bytes) -> None:
        write_again(folder / name, content)

    def write(self, folder: Path, name: str, texts: Sequence[str]) -> None:
        first = len(self.files(folder, name))
        for i, part in enumerate([[text] for text in texts] if self.format.one else [list(texts)]):
            self.put(folder, f"{name}.{first + i:03}{self.format.suffix}", self.format.content(part))

    def append(self, folder: Path, name: str, texts: Sequence[str]) -> None:
        if not self.format.appends:
            self.write(folder, name, texts)
            return
        last = self.files(folder, name)[-1]
        self.put_again(folder, last, self.get(folder, last) + self.format.content(texts))

    def rewrite(self, folder: Path, name: str) -> None:
        """Same length of the content, another letter in the first document."""
        first = self.files(folder, name)[0]
        content = bytearray(self.format.unpack(self.get(folder, first)))
        for at in self.places_to_change(bytes(content)):
            content[at] ^= 1
        self.put_again(folder, first, self.format.pack(bytes(content)))

    def places_to_change(self, content: bytes) -> list[int]:
        return [0]

    def documents(self, items: Items) -> list[str]:
        records = [item for item, _ in items if isinstance(item, Record)]
        return [record.text if record.tokens is None else text_of(record.tokens) for record in records]


class TestText(FormatContract):
    format = FORMATS["text"]


class TestTextGzip(FormatContract):
    format = FORMATS["text.gz"]


class TestTextZstd(FormatContract):
    format = FORMATS["text.zst"]


class TestJsonLines(FormatContract):
    format = JSONL

    def places_to_change(self, content: bytes) -> list[int]:
        return [10]


class TestJsonLinesGzip(TestJsonLines):
    format = FORMATS["jsonl.gz"]


class TestJsonLinesZstd(TestJsonLines):
    format = FORMATS["jsonl.zst"]


class TestTar(FormatContract):
    format = TAR

    def places_to_change(self, content: bytes) -> list[int]:
        """The first byte of the data of the second member, which begins after the first's and its own headers."""
        return [_first_text(content)]


class TestTarGzip(TestTar):
    format = FORMATS["tar.gz"]


class TestTarZstd(TestTar):
    format = FORMATS["tar.zst"]


class TestBin(FormatContract):
    format = BIN


class TestNpy(FormatContract):
    format = NPY

    def places_to_change(self, content: bytes) -> list[int]:
        return [content.index(b"\n") + 1]


class TestParquet(FormatContract):
    format = PARQUET

    def rewrite(self, folder: Path, name: str) -> None:
        """Another file of the same size, as a Parquet file is rewritten."""
        first = self.files(folder, name)[0]
        before = self.get(folder, first)
        texts = [str(text) for text in _column(before)]
        changed = self.format.content([chr(ord(texts[0][0]) ^ 1) + texts[0][1:], *texts[1:]])
        self.put_again(folder, first, changed)


class TestParquetOfTokens(TestParquet):
    """The same with the documents' tokens in lists."""

    def stream(self, folder: Path) -> Stream:
        made: Stream = self.format.stream(self.base(folder), text_field="tokens")
        return made


# --- behind a store ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


class Remote(FormatContract):
    """The same in a bucket."""

    cases = 5
    server: ClassVar[Server]

    @pytest.fixture(autouse=True)
    def _server(self, store: Server) -> None:
        type(self).server = store

    @property
    def fs(self) -> Any:
        return fsspec.filesystem("s3", **self.server.options())

    def stream(self, folder: Path) -> Stream:
        made: Stream = self.format.stream(f"s3://{self.base(folder)}", storage_options=self.server.options())
        return made

    def base(self, folder: Path) -> str:
        return f"{BUCKET}/{type(self).__name__}/{folder.name}"

    def files(self, folder: Path, name: str) -> list[str]:
        self.fs.invalidate_cache()
        return sorted(Path(path).name for path in self.fs.glob(f"{self.base(folder)}/{name}.*"))

    def put(self, folder: Path, name: str, content: bytes) -> None:
        self.fs.pipe_file(f"{self.base(folder)}/{name}", content)

    put_again = put

    def get(self, folder: Path, name: str) -> bytes:
        found: bytes = self.fs.cat_file(f"{self.base(folder)}/{name}")
        return found

    @pytest.mark.parametrize("left", [0, 1])
    def test_an_object_that_shrank_is_refused_and_not_waited_for(self, tmp_path: Path, left: int) -> None:
        """The store answers 416 to a range that begins behind its end."""
        stream = self.stream(tmp_path)
        self.write(tmp_path, "a", ["one", "two", "three"])
        found = stream.discover()
        stream.adopt(found)
        place = next(iter(stream.read(None)))[1]
        first = self.files(tmp_path, "a")[0]
        self.put_again(tmp_path, first, self.get(tmp_path, first)[:left])
        with pytest.raises(Refused, match="--fresh"):
            list(self.adopted(tmp_path, found).read(place))


class TestParquetInBucket(Remote, TestParquet):
    pass


class TestBinInBucket(Remote, TestBin):
    pass


class TestNpyInBucket(Remote, TestNpy):
    pass


class TestJsonLinesZstdInBucket(Remote, TestJsonLinesZstd):
    pass


class TestTarGzipInBucket(Remote, TestTarGzip):
    pass


class TestJsonLinesInMemory(TestJsonLines):
    """The same behind a filesystem whose versions are times as text."""

    cases = 50

    def base(self, folder: Path) -> str:
        return f"memory:/{folder}"

    def files(self, folder: Path, name: str) -> list[str]:
        found = fsspec.filesystem("memory").glob(f"{folder}/{name}.*")
        return sorted(Path(path).name for path in found)

    def put(self, folder: Path, name: str, content: bytes) -> None:
        fsspec.filesystem("memory").pipe_file(f"{folder}/{name}", content)

    put_again = put

    def get(self, folder: Path, name: str) -> bytes:
        found: bytes = fsspec.filesystem("memory").cat_file(f"{folder}/{name}")
        return found


def _first_text(archive: bytes) -> int:
    import io
    import tarfile

    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return tar.getmembers()[1].offset_data


def _column(content: bytes) -> list[Any]:
    import io

    import pyarrow.parquet as pq

    found: list[Any] = pq.read_table(io.BytesIO(content), columns=["text"]).column("text").to_pylist()
    return found
