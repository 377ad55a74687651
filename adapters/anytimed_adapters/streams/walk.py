"""Local files that match a glob, folder by folder: paths, sizes and versions, in columns, for there may be millions.

A `Selection` says which files count: those that match the glob, and are neither hidden, unfinished (".tmp", ".part"),
excluded, nor named in bytes that are no UTF-8 and cannot be journalled.

A version is whatever changes when a file is written: the modification time in nanoseconds of a local file, what a
store calls the object's ETag or the like; "" where it says nothing.

Run as a program (lister.py does) it reads a selection from stdin and writes what it found to stdout. It needs nothing
but the standard library, so that it starts in a few hundredths of a second.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import sys
from array import array
from collections.abc import Iterable, Iterator, MutableSequence, Sequence
from dataclasses import asdict, dataclass, field
from itertools import compress, islice
from operator import attrgetter, not_
from stat import S_IFMT, S_IFREG, S_ISREG
from typing import IO, Any

Version = int | str

_KIND = S_IFMT(-1 & 0xFFFF)
_PART = 10_000
"""Files in a part, or more: those of a folder stay together."""
_ENTRIES = 128
"""Of a folder at a time: what is known of them then stays in the processor's cache."""
_is_folder, _stat_of = os.DirEntry.is_dir, os.DirEntry.stat
_name_of = attrgetter("name")
_mode_of, _size_of, _time_of = attrgetter("st_mode"), attrgetter("st_size"), attrgetter("st_mtime_ns")
_UNFINISHED = (".tmp", ".part")


@dataclass(slots=True)
class Listing:
    """Row i: paths[i], sizes[i] in bytes, versions[i]. Columns of plain values: the garbage collector has nothing to
    walk through."""

    paths: list[str] = field(default_factory=list)
    sizes: MutableSequence[int] = field(default_factory=list)
    versions: MutableSequence[Any] = field(default_factory=list)
    """Each a `Version`."""

    def add(self, path: str, size: int, version: Version) -> None:
        self.paths.append(path)
        self.sizes.append(size)
        self.versions.append(version)

    def extend(self, more: Listing) -> None:
        self.paths += more.paths
        self.sizes += more.sizes
        self.versions += more.versions

    def rows(self) -> Iterator[tuple[str, int, Version]]:
        return zip(self.paths, self.sizes, self.versions, strict=True)

    def of(self, rows: Iterable[int]) -> Listing:
        """These rows alone."""
        paths, sizes, versions = self.paths, self.sizes, self.versions
        some = list(rows)
        return Listing([paths[row] for row in some], [sizes[row] for row in some], [versions[row] for row in some])


@dataclass
class Selection:
    """Which files of a filesystem are the source's.

    base: the folder above all of them; folder: a regular expression of the full paths that the glob allows, as far as
    their folder goes; name: one of file names that match the glob's last part; excluded: those of relative paths to
    leave out; deepest: how many folders below the base files can lie, None for any; unnamed: paths met that cannot be
    journalled."""

    base: str
    folder: str
    name: str
    excluded: Sequence[str]
    deepest: int | None
    unnamed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._folder = re.compile(self.folder)
        self._excluded = [re.compile(each) for each in self.excluded]
        self.is_named = re.compile(rf"(?!\.){self.name}(?<!\.tmp)(?<!\.part)").match
        """Whether a file's name matches the glob's last part and is not left out."""

    def to_json(self) -> dict[str, Any]:
        """What another process needs to make the same one."""
        return {**asdict(self), "unnamed": []}

    def takes_files_of(self, folder: str) -> bool:
        """Whether the files of a folder (full path) can match the glob."""
        return self._folder.match(f"{folder}/x") is not None

    def takes_path(self, path: str) -> bool:
        """Whether a file that matches the glob already is the source's. path: relative."""
        return not any(map(left_out, path.split("/"))) and self.remains(path)

    def remains(self, path: str) -> bool:
        """Whether a file that matches is not excluded and can be journalled. path: relative."""
        if self._excluded and any(glob.match(path) for glob in self._excluded):
            return False
        return path.isascii() or self._can_be_journalled(path)

    def all_remain(self, paths: Iterable[str]) -> bool:
        """Whether `remains` is known to be true of all of them without asking for each."""
        return not self._excluded and all(map(str.isascii, paths))

    def _can_be_journalled(self, path: str) -> bool:
        try:
            path.encode()
        except UnicodeEncodeError:
            self.unnamed.add(path)
            return False
        return True


def left_out(name: str) -> bool:
    """Whether a file or folder of this name is hidden or unfinished."""
    return name.startswith(".") or name.endswith(_UNFINISHED)


def walked(selection: Selection) -> Iterator[Listing]:
    """The files in parts, none of them empty.

    fsspec's glob takes a folder below the first that it cannot list for an empty one, rounds the modification time,
    and does not look through links; so local files are walked here, by the same translation of the glob.

    Folders behind links come after all others: what is reached both ways keeps its own path, whatever order a folder
    lists in. A link that leads nowhere is no file. Raises OSError."""
    found = Listing()
    seen: set[tuple[int, int]] = set()  # folders, so that a link to one above ends the walk there
    folders: list[tuple[str, int]] = [("", 0)]
    linked: list[tuple[str, int]] = []
    while folders or linked:
        if not folders:
            linked.sort(reverse=True)
            folders.append(linked.pop())
        folder, depth = folders.pop()
        full = f"{selection.base}/{folder}" if folder else selection.base or "/"
        stat = os.stat(full)  # noqa: PTH116 - a Path for each of a million is what this avoids
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        descend = selection.deepest is None or depth < selection.deepest
        for entry, path in _walk_folder(selection, found, full, f"{folder}/" if folder else ""):
            if descend:
                (linked if entry.is_symlink() else folders).append((path, depth + 1))
        if len(found.paths) >= _PART:
            yield found
            found = Listing()
    if found.paths:
        yield found


def _walk_folder(selection: Selection, found: Listing, full: str, prefix: str) -> list[tuple[os.DirEntry[str], str]]:
    """Add the folder's files to `found`; its folders and their paths."""
    folders: list[tuple[os.DirEntry[str], str]] = []
    wanted = selection.takes_files_of(full.rstrip("/"))
    with os.scandir(full) as entries:
        while some := list(islice(entries, _ENTRIES)):
            if not wanted or not _add_plain(selection, found, some, prefix, folders):
                folders += _add_each(selection, found, some, prefix, wanted=wanted)
    return folders


def _add_plain(
    selection: Selection,
    found: Listing,
    entries: Sequence[os.DirEntry[str]],
    prefix: str,
    folders: list[tuple[os.DirEntry[str], str]],
) -> bool:
    """What `_add_each` does, where nothing is peculiar about any of the entries; False, and nothing done, where
    something may be. It takes no step of the interpreter for each: asking the system is then most of what listing a
    million files costs."""
    try:
        inside = list(map(_is_folder, entries))
        files: Sequence[os.DirEntry[str]] = list(compress(entries, map(not_, inside))) if any(inside) else entries
        names = list(map(_name_of, files))
        named = list(map(selection.is_named, names))
        if not all(named):
            files, names = list(compress(files, named)), list(compress(names, named))
        stats = list(map(_stat_of, files))
    except OSError:
        return False
    paths, sizes = list(map(prefix.__add__, names)), list(map(_size_of, stats))
    if not (all(sizes) and all(map(S_ISREG, set(map(_mode_of, stats)))) and selection.all_remain(paths)):
        return False
    found.paths += paths
    found.sizes += sizes
    found.versions += map(_time_of, stats)
    folders += [(entry, prefix + entry.name) for entry in compress(entries, inside) if not left_out(entry.name)]
    return True


def _add_each(
    selection: Selection, found: Listing, entries: Iterable[os.DirEntry[str]], prefix: str, *, wanted: bool
) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Add the files among the entries to `found`, if they are `wanted`; the folders among them, and their paths."""
    for entry in entries:
        name = entry.name
        try:
            if entry.is_dir():
                if not left_out(name):
                    yield entry, prefix + name
            elif wanted and selection.is_named(name):
                stat = entry.stat()
                path, size = prefix + name, stat.st_size
                if size and stat.st_mode & _KIND == S_IFREG and selection.remains(path):
                    found.add(path, size, stat.st_mtime_ns)
        except FileNotFoundError:
            continue  # deleted between the two looks, or a link to nothing
        except OSError:
            if not entry.is_symlink():
                raise


# --- to another process -----------------------------------------------------------------------------------------------


SIZE_BYTES = 16
"""Before every frame: its size in hexadecimal digits."""


def send(told: dict[str, Any], out: IO[bytes], part: Listing | None = None) -> None:
    """A frame: a line of JSON, then the columns, of a part. Raises OverflowError on times beyond the year 2262."""
    paths, columns = b"", [b"", b""]
    if part is not None:
        paths = "\0".join(part.paths).encode()
        columns = [array("q", column).tobytes() for column in (part.sizes, part.versions)]
        told = {**told, "files": len(part.paths), "path_bytes": len(paths)}
    frame = b"".join([json.dumps(told).encode() + b"\n", paths, *columns])
    out.write(b"%016x" % len(frame) + frame)


def received(frame: bytes) -> tuple[dict[str, Any], Listing | None]:
    """What was told, and the part, None in the frame that ends the list. Raises OSError where the walk did, and
    ValueError, LookupError or TypeError on what `send` did not make."""
    line, _, rest = frame.partition(b"\n")
    told = json.loads(line)
    if "errno" in told:
        raise OSError(told["errno"], told["strerror"], told["path"])
    if "unnamed" in told:
        return told, None
    count, first = told["files"], told["path_bytes"]
    paths = rest[:first].decode().split("\0")
    sizes, versions = (array("q", rest[first + 8 * count * i : first + 8 * count * (i + 1)]) for i in range(2))
    if not len(paths) == len(sizes) == len(versions) == count:
        raise ValueError("a part is not as long as it says")
    return told, Listing(paths, sizes, versions)


def main() -> None:
    """A selection as JSON on stdin; its files to stdout, while they are found."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asked, and ends this one
    gc.disable()  # nothing here refers to itself
    selection = Selection(**json.load(sys.stdin))
    selection.unnamed = set()
    out = sys.stdout.buffer
    try:
        for part in walked(selection):
            send({}, out, part)
            out.flush()
        send({"unnamed": sorted(selection.unnamed)}, out)
    except OSError as error:
        send({"errno": error.errno, "strerror": error.strerror, "path": error.filename}, out)
    out.flush()


if __name__ == "__main__":
    main()
