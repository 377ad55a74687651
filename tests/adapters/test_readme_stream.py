"""The stream that adapters/README.md shows keeps the contract."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from anytimed.contracts import Stream
from anytimed.testing.streams import StreamContract

README = Path(__file__).parents[2] / "adapters" / "README.md"
scope: dict[str, Any] = {"__name__": "readme"}
exec(compile(re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0], str(README), "exec"), scope)


class TestSqliteRows(StreamContract):
    def stream(self, folder: Path) -> Stream:
        adapter = scope["SqliteRows"]
        made: Stream = adapter(adapter.Settings(path=str(folder / "rows.db")), "rows")
        return made

    def write(self, folder: Path, name: str, texts: Sequence[str]) -> None:
        with closing(sqlite3.connect(folder / "rows.db")) as database, database:
            database.execute("CREATE TABLE IF NOT EXISTS documents (name TEXT, text TEXT)")
            database.executemany("INSERT INTO documents VALUES (?, ?)", [(name, text) for text in texts])

    append = write

    def rewrite(self, folder: Path, name: str) -> None:
        with closing(sqlite3.connect(folder / "rows.db")) as database, database:
            database.execute(
                "UPDATE documents SET text = 'X' || substr(text, 2) WHERE rowid ="
                " (SELECT min(rowid) FROM documents WHERE name = ?)",
                (name,),
            )
