"""Damaged shards and hostile records of every format, and what reading them has to come to.

Every case follows from its number. A shard is read twice, and once more from a place in the middle: always the same
items. Where it can be known, each record is accounted for: what was written comes out, or the shard has a Rejected; a
line is one item; every token of a raw file is in a record.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anytimed.contracts import Finished, Record, Rejected
from tests.adapters.formats import FORMATS, Format, Item, table

GOOD = "a good document"
_A_FILE = 200
_PIECES = [
    "",
    "a",
    "\n",
    "\r",
    "\0",
    '"',
    "\\",
    "{",
    "}",
    "[[[",
    "]",
    "é",
    "🙂",
    "\ufeff",
    "\ud800",
    "1e999",
    "null",
    "text",
    ":",
]


def damaged(content: bytes, source: random.Random) -> bytes:
    """One to three damages of a file."""
    data = bytearray(content)
    for _ in range(source.choice([1, 1, 2, 3])):
        at, size = source.randrange(len(data) + 1), source.randrange(1, 200)
        match source.randrange(7):
            case 0:
                del data[at:]
            case 1:
                for _ in range(source.randrange(1, 5)):
                    if data:
                        data[source.randrange(len(data))] ^= 1 << source.randrange(8)
            case 2:
                data[at : at + size] = bytes(len(data[at : at + size]))
            case 3:
                data[at:at] = source.randbytes(size)
            case 4:
                data[at:at] = data[max(0, at - size) : at]
            case 5:
                del data[at : at + size]
            case 6:
                data[at : at + 8] = source.choice([b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\0\0\0\x80" * 2])
    return bytes(data)


def shard(name: str, number: int, folder: Path) -> Counter[str]:
    """One damaged file between two whole ones; what became of its records. AssertionError where it is not right."""
    source, format = random.Random(f"{name}-{number}"), FORMATS[name]
    texts = [_text(source) for _ in range(1 if format.one else source.randrange(1, 12))]
    options = (
        {}
        if name != "parquet"
        else {"write_page_checksum": True, "compression": source.choice(["zstd", "snappy", "none", "gzip"])}
    )
    whole = table(texts, group=source.choice([1, 3, 100]), **options) if name == "parquet" else format.content(texts)
    content = damaged(whole, source)
    good = format.content([GOOD])
    for part, data in (("a", good), ("b", content), ("c", good)):
        (folder / f"{part}{format.suffix}").write_bytes(data)
    items = _read_three_times(format, folder, source)
    spans: list[list[Item]] = [[]]
    for item in items:
        spans[-1].append(item)
        if isinstance(item, Finished):
            spans.append([])
    assert [len(span) for span in (spans[0], spans[-2])] == [2, 2], "the shards beside the damaged one are whole"
    if not content:
        return Counter(empty=1)
    found = spans[1][:-1]
    records = [item for item in found if isinstance(item, Record)]
    rejected = len(found) - len(records)
    _account(name, content, whole, texts, records, rejected)
    return Counter(records=len(records), rejected=rejected, shards=1, undamaged=content == whole)


def _account(
    name: str, content: bytes, whole: bytes, texts: Sequence[str], records: list[Record], rejected: int
) -> None:
    if name == "jsonl":
        lines = content.split(b"\n")
        blank = [
            not line.decode("utf-8", "replace").removeprefix("\ufeff" if not i else "").strip()
            for i, line in enumerate(lines)
        ]
        known = len(lines) - 1 - sum(blank[:-1])  # the last has no end: it may still come
        assert known <= len(records) + rejected <= known + 1
    elif name == "text":
        assert (len(records), rejected) == (1, 0)
    elif name == "bin":
        tokens = sum(len(record.tokens) for record in records if record.tokens is not None)
        assert tokens == len(content) // 2 and not rejected
    elif name == "npy" or name == "tar":
        pass  # a changed byte of the data is no damage that could be seen
    elif not rejected:
        # Checksums tell. Only whole documents were added or taken away, as where a member was cut off at its end.
        told = [record.text for record in records]
        if name.startswith("text"):  # a frame that comes twice, or not at all, is one document still
            told = [texts[0]] if not "".join(told).replace(texts[0], "") else told
        assert told == list(texts) or (content != whole and set(told) <= set(texts)), (told, texts)


def _read_three_times(format: Format, folder: Path, source: random.Random) -> list[Item]:
    def adopted() -> Any:
        stream = format.stream(str(folder), max_record_bytes=1 << 20)
        stream.adopt(stream.discover())
        return stream

    taken = list(adopted().read(None))
    assert list(adopted().read(None)) == taken
    at = source.randrange(len(taken))
    assert list(adopted().read(json.loads(json.dumps(taken[at][1])))) == taken[at + 1 :]
    return [item for item, _ in taken]


def _text(source: random.Random) -> str:
    size = source.choice([1, 3, 40, 400, 5000])
    return "".join(chr(source.choice([32, 65, 97, 233, 0x1F600])) for _ in range(source.randrange(1, size + 1)))


def records(name: str, count: int, seed: int, folder: Path) -> Counter[str]:
    """A shard of so many hostile records; each comes out as a record or is rejected."""
    source, format = random.Random(f"{name}-{seed}"), FORMATS[name]
    if name.startswith("jsonl"):
        lines = [_hostile_line(source) for _ in range(count)]
        (folder / f"r{format.suffix}").write_bytes(format.pack(b"".join(line + b"\n" for line in lines)))
        expected = sum(
            line.decode("utf-8", "replace").removeprefix("" if i else "\ufeff").strip() != ""
            for i, line in enumerate(lines)
        )
    else:
        texts = [_hostile_text(source) for _ in range(count)]
        (folder / f"r{format.suffix}").write_bytes(format.content(texts))
        expected = count
    stream = format.stream(str(folder), max_record_bytes=4096, encoding_errors=source.choice(["replace", "reject"]))
    stream.adopt(stream.discover())
    told: Counter[str] = Counter()
    for item, _ in stream.read(None):
        if not isinstance(item, Finished):
            told["rejected" if isinstance(item, Rejected) else "records"] += 1
    assert told["records"] + told["rejected"] == expected, (told, expected)
    return told


def _hostile_text(source: random.Random) -> str:
    text = "".join(source.choices(_PIECES, k=source.randrange(1, 30))).encode("utf-8", "replace").decode()
    return text * source.choice([1, 1, 1, 100]) or "x"


def _hostile_line(source: random.Random) -> bytes:
    match source.randrange(9):
        case 0:
            return source.randbytes(source.randrange(60)).replace(b"\n", b" ")
        case 1:
            return b"[" * source.randrange(1, 3000)
        case 2:
            return b'{"text": ' + b"[" * source.randrange(200) + b"]" * source.randrange(200) + b"}"
        case 3:
            line = bytearray(json.dumps({"text": "some text é", "n": [1, {"a": None}]}).encode())
            line[source.randrange(len(line))] = source.choice(b'{}[]":,\\ax0 \xff')
            return bytes(line)
        case 4:
            return b'{"text": "' + source.randbytes(20).replace(b"\n", b"") + b'"}'
        case 5:
            return json.dumps({"text": "x" * source.choice([10, 4000, 4090, 5000, 50_000])}).encode()
        case 6:
            return json.dumps(
                {source.choice(["text", "Text", "", "a"]): source.choice([1, None, [], "", "fine"])}
            ).encode()
        case 7:
            return b'{"text": ' + b"9" * source.randrange(1, 6000) + b"}"
        case _:
            return json.dumps({"text": "".join(source.choices(_PIECES, k=9))}).encode()


def run(shards: int, count: int) -> str:
    """Over all formats: so many damaged shards and so many records, of all together. JSON of what became of them."""
    told: dict[str, Counter[str]] = {name: Counter() for name in FORMATS}
    names = list(FORMATS)
    of_records = [name for name in names if not FORMATS[name].one]
    with tempfile.TemporaryDirectory() as base:
        for i in range(shards):
            name = names[i % len(names)]
            folder = Path(base) / f"shard-{i}"
            folder.mkdir()
            try:
                told[name] += shard(name, i, folder)
            except Exception as error:
                raise AssertionError(f"shard {name} {i}") from error
        for i, name in enumerate(of_records):
            folder = Path(base) / f"records-{i}"
            folder.mkdir()
            left = -(-count // len(of_records))
            while left > 0:  # in small files: what writes them must not take the memory that reading is measured by
                for key, value in records(name, min(left, _A_FILE), left, folder).items():
                    told[name][f"fuzzed_{key}"] += value
                left -= _A_FILE
    return json.dumps(told)
