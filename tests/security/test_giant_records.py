"""Records that are too large, too deep or no text: set aside with a reason, in bounded memory, and reading goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anytimed.contracts import Finished, Record, Rejected
from anytimed_adapters.streams.jsonl import JsonLines
from anytimed_adapters.streams.text import TextFiles
from tests.security.measured import MIB, measured

GIANT_BYTES = 400 * MIB
MOST = 1 << 20


def giant(path: Path, before: bytes = b"", after: bytes = b"") -> None:
    """`before`, hundreds of megabytes of `x`, `after`."""
    with path.open("wb") as file:
        file.write(before)
        for _ in range(GIANT_BYTES // MIB):
            file.write(b"x" * MIB)
        file.write(after)


def items(kind: str, url: str, **settings: Any) -> list[Record | Rejected]:
    adapter: Any = {"text": TextFiles, "jsonl": JsonLines}[kind]
    stream = adapter(adapter.Settings(url=url, max_record_bytes=MOST, **settings), "main")
    stream.adopt(stream.discover())
    return [item for item, _ in stream.read(None) if not isinstance(item, Finished)]


def read(kind: str, url: str) -> str:
    """What became of each item: the length of a text, or the reason."""
    found = items(kind, url)
    return json.dumps([len(item.text) if isinstance(item, Record) else item.reason for item in found])


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_hundreds_of_megabytes_are_set_aside(tmp_path: Path, kind: str) -> None:
    if kind == "text":
        (tmp_path / "a.txt").write_text("before")
        giant(tmp_path / "b.txt")
        (tmp_path / "c.txt").write_text("after")
        url, size = str(tmp_path / "*.txt"), GIANT_BYTES
    else:
        giant(tmp_path / "a.jsonl", b'{"text": "before"}\n{"text": "', b'"}\n{"text": "after"}\n')
        url, size = str(tmp_path / "a.jsonl"), GIANT_BYTES + len('{"text": ""}') + 1
    cost = measured(read, kind, url)
    assert json.loads(cost.said) == [6, f"{size} bytes, the most is max_record_bytes = {MOST}", 5]
    assert cost.grew_bytes < 64 * MIB, cost


def test_a_line_without_an_end(tmp_path: Path) -> None:
    """It may still come: nothing is given out, and nothing is kept of it in memory."""
    giant(tmp_path / "a.jsonl", b'{"text": "before"}\n{"text": "')
    cost = measured(read, "jsonl", str(tmp_path / "a.jsonl"))
    assert json.loads(cost.said) == [6]
    assert cost.grew_bytes < 64 * MIB, cost


DEEP = "[" * 200_000 + "]" * 200_000


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (DEEP, "not JSON"),
        ('{"text": ' + DEEP + "}", "not JSON"),
        ('{"text": ' + "9" * 100_000 + "}", "not JSON"),
        ('{"text": null}', "NoneType, expected text"),
        ('{"text": {"text": "x"}}', "dict, expected text"),
        ("[]", "list, expected an object"),
        ('{"' + "k" * 500_000 + '": 1}', "no field 'text', found"),
        (json.dumps({f"k{i}": 1 for i in range(50_000)}), "no field 'text', found"),
    ],
    ids=["deep", "deep inside", "a long number", "null", "an object", "a list", "a giant key", "many keys"],
)
def test_json_that_is_meant_to_break_the_reader(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "before"}}\n{line}\n{{"text": "after"}}\n')
    before, bad, after = items("jsonl", str(tmp_path / "a.jsonl"))
    assert isinstance(before, Record) and isinstance(after, Record) and (before.text, after.text) == ("before", "after")
    assert isinstance(bad, Rejected) and reason in bad.reason
    assert len(bad.reason) < 500, "the reason is logged and kept: it must not be as long as the record"


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_what_is_not_utf_8_by_both_policies(tmp_path: Path, kind: str) -> None:
    content = b"caf\xe9 \xff\xfe \xed\xa0\x80"
    (tmp_path / "a").write_bytes(content if kind == "text" else b'{"text": "' + content + b'"}\n')
    (kept,) = items(kind, str(tmp_path / "a"))
    assert isinstance(kept, Record) and "�" in kept.text and kept.text.startswith("caf")
    (refused,) = items(kind, str(tmp_path / "a"), encoding_errors="reject")
    assert isinstance(refused, Rejected) and "not UTF-8" in refused.reason


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_nul_and_escape_bytes_are_text(tmp_path: Path, kind: str) -> None:
    text = "a\0b\x1b[2Jc\r\u2028d"
    content = text.encode() if kind == "text" else json.dumps({"text": text}).encode() + b"\n"
    (tmp_path / "a").write_bytes(content)
    (found,) = items(kind, str(tmp_path / "a"))
    assert isinstance(found, Record) and found.text == text


HOSTILE_NAMES = [
    "..txt",
    "-rf.txt",
    "a\nforged line.txt",
    "\x1b]0;owned\x07.txt",
    "$(id).txt",
    "%s%n.txt",
    "{x}.txt",
    "a?b#c.txt",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_file_names_are_names_and_nothing_else(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text("read me")
    found = items("text", f"{tmp_path}/data/*.txt")
    hidden = name.startswith(".")
    assert [item.text for item in found if isinstance(item, Record)] == ([] if hidden else ["read me"])


def test_links_out_of_the_folder_name_files_that_the_operator_put_there_and_no_more(tmp_path: Path) -> None:
    """A link is followed, as documented: whoever can write the folder decides what is read. A loop ends."""
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere.txt").write_text("linked")
    (tmp_path / "data" / "a.txt").symlink_to(tmp_path / "elsewhere.txt")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "device.txt").symlink_to("/dev/zero")
    found = items("text", f"{tmp_path}/data/**/*.txt")
    assert [item.text for item in found if isinstance(item, Record)] == ["linked"]
