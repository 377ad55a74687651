"""Files that are written once for somebody who may change them: nothing of theirs is overwritten unasked.

A file that was written here carries the digest of itself in its first line (`marked`), so that a later version of it
replaces one that nobody has changed, and no other.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anytimed.contracts import ConfigError
from anytimed.storage.durable import make_folders, write_durably

Found = Literal["new", "same", "outdated", "differs", "kept"]

_MARK = re.compile(r"# Written by `anytimed install-service` \(sha256 ([0-9a-f]{64})\)[^\n]*\n")


@dataclass(frozen=True)
class Wanted:
    """A file that has to be there. `theirs`: written once, and the administrator's from then on. `secret`: its content
    is not shown."""

    path: Path
    text: str
    mode: int = 0o644
    theirs: bool = False
    secret: bool = False

    def found(self) -> Found:
        """How what is there compares with it."""
        try:
            there = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return "new"
        if there == self.text:
            return "same"
        return "kept" if self.theirs else "outdated" if unchanged(there) else "differs"

    def difference(self) -> str:
        """From what is there to what is wanted, as a unified diff."""
        if self.secret:
            return f"{self.path}: has been changed; what is in it is not shown"
        there = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        lines = difflib.unified_diff(there, self.text.splitlines(keepends=True), str(self.path), "would be written")
        return "".join(line if line.endswith("\n") else line + "\n" for line in lines).rstrip("\n")


def write(files: Sequence[Wanted], *, force: bool = False) -> list[tuple[Wanted, Found]]:
    """Write what is new or outdated; what each was before. Raises ConfigError, with nothing written, where a file was
    changed by somebody; `force` keeps such a one as NAME.old. Raises OSError."""
    before = [(file, file.found()) for file in files]
    changed = [file for file, found in before if found == "differs"]
    if changed and not force:
        raise ConfigError(
            "\n".join(file.difference() for file in changed)
            + "\nNothing was written: the file above is another than would be written. --force replaces it and keeps "
            "it as NAME.old; what you want to change in a unit belongs into `systemctl edit`"
        )
    for file, found in before:
        if found in ("same", "kept"):
            continue
        with _umask(0o022):  # whatever that of the administrator's shell is: a service has to come through here
            make_folders(file.path.parent)
        if found == "differs":
            file.path.rename(file.path.with_name(file.path.name + ".old"))
        # With its mode before its name: a file of credentials is never open to others, not for a moment.
        _write(file)
    return before


def marked(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()
    mark = f"# Written by `anytimed install-service` (sha256 {digest}); a later version replaces it if it is unchanged"
    return f"{mark}\n{text}"


def unchanged(text: str) -> bool:
    """Whether a file is as `write` left it, in this version or an earlier one."""
    mark = _MARK.match(text)
    return mark is not None and hashlib.sha256(text[mark.end() :].encode()).hexdigest() == mark[1]


# --- within -----------------------------------------------------------------------------------------------------------


def _write(file: Wanted) -> None:
    with _umask(0o777 & ~file.mode):
        write_durably(file.path, file.text.encode())


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
