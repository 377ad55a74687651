"""What lies under a glob now, whatever it lies in.

Local files are walked (walk.py), many of them by a process of their own (lister.py); a store is asked by fsspec's
glob, past its cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fsspec.utils import glob_translate

from anytimed_adapters.streams.walk import Listing, Selection

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_VERSION_KEYS = (
    "ETag",
    "etag",
    "md5Hash",
    "blob_id",
    "generation",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)


def selection(pattern: str, exclude: Iterable[str]) -> Selection:
    """By globs as fsspec understands them; those to leave out are relative to the first one's base. Raises ValueError
    on what is none."""
    base = _base(pattern)
    parent, _, last = pattern.rpartition("/")
    everything = last == "**"
    rest = pattern[len(base) + 1 :]
    return Selection(
        base=base,
        folder=glob_translate(f"{parent}/**" if everything else f"{parent}/*"),
        name=glob_translate("*" if everything else last),
        excluded=[glob_translate(glob) for glob in exclude],
        deepest=None if "**" in rest else rest.count("/"),
    )


def listed_by_store(fs: AbstractFileSystem, pattern: str, selected: Selection, query: str, *, by_name: bool) -> Listing:
    """by_name: a glob without wildcard is asked for as the one file it is."""
    fs.invalidate_cache()
    if by_name and not set(pattern) & set("*["):
        # A glob takes a file that must not be read for one that is not there; asked for by name it is an error.
        url = pattern + query
        matched = {url: fs.info(url)}
    else:
        matched = fs.glob(pattern + query, detail=True)
    found = Listing()
    for full, info in matched.items():
        path = full[len(selected.base) + 1 :].removesuffix(query)
        if info["type"] != "directory" and selected.takes_path(path):
            if info["size"] is None:
                raise OSError(f"{path}: its size is not told, or it is sent compressed; expected a plain file")
            if info["size"]:
                found.add(path, info["size"], _version(info))
    return found


def _base(pattern: str) -> str:
    """The folder before the first wildcard; the file's own folder where there is none."""
    parts = pattern.split("/")
    wild = (i for i, part in enumerate(parts) if set(part) & set("*?["))
    return "/".join(parts[: next(wild, len(parts) - 1)])


def _version(info: Mapping[str, Any]) -> str:
    for key in _VERSION_KEYS:
        if info.get(key):
            return str(info[key]).strip('"')
    return ""
