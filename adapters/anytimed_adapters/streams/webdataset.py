"""WebDataset tar archives, plain or compressed: every member with the configured extension is a record.

The archive is read from its first byte to its last. Members are names and bytes here: a name is compared with the
extension and told in a reason, and nothing is ever extracted. A place is the offset after a member and its padding.
An archive that ends between two members is whole; blocks of zeros are passed over, so that archives in a row are one.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from anytimed.contracts import Record, Rejected
from anytimed_adapters.streams.compression import Torn, compression
from anytimed_adapters.streams.content import Content, ContentSettings, ContentStream
from anytimed_adapters.streams.json_text import DEEPEST
from anytimed_adapters.streams.records import of_bytes, of_object, sha256, too_long

_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
_MOST_HEADER_BYTES = 1 << 20
_SHOWN_CHARACTERS = 100
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
_LONG_NAME, _LONG_LINK, _SPARSE = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.GNUTYPE_SPARSE
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


class TarFiles(ContentStream):
    """A `Stream` with a document for every member with the extension (.tar, .tar.gz, .tar.zst)."""

    class Settings(ContentSettings):
        """The settings of all file streams, and which members are documents."""

        extension: str = Field(
            default="txt",
            pattern=r"^[^./][^/]*$",
            description='Of the members that are records. Ending in "json": an object whose `text_field` is the text.',
        )
        text_field: str = Field(default="text", description="The field of a JSON member that holds the document.")
        max_nesting: int = Field(
            default=100, gt=0, le=DEEPEST, description="JSON members that nest deeper are set aside in quarantine."
        )

    _settings: Settings

    def __init__(self, settings: Settings, name: str, **clocks: Any) -> None:
        super().__init__(settings, name, **clocks)
        self._suffix = f".{settings.extension.lower()}"
        self._is_json = settings.extension.lower().endswith("json")

    def _records(self, index: int, content: Content, at: int) -> Iterator[tuple[Record | Rejected, int]]:
        named: dict[str, str] = {}
        while header := content.read(_BLOCK):
            at += len(header)
            if header == _ZEROS:
                continue
            member = _member(header)
            if member.type in _PAX or member.type in (tarfile.XGLTYPE, _LONG_NAME, _LONG_LINK):
                data = _data(content, member.size, _MOST_HEADER_BYTES)
                at += _padded(member.size)
                if member.type in _PAX:
                    named |= _pax(data)
                elif member.type == _LONG_NAME:
                    named["path"] = data.rstrip(b"\0").decode("utf-8", "replace")
                continue
            name, size = named.get("path", member.name), _size(member, named)
            named = {}
            if member.type not in _REGULAR or not self._is_wanted(name):
                if content.skip(_padded(size)) < _padded(size):
                    raise Torn(f"it ends inside member {_shown(name)}")
                at += _padded(size)
                continue
            at += _padded(size)
            item = self._member_item(content, name, size)
            yield item, at

    def _member_item(self, content: Content, name: str, size: int) -> Record | Rejected:
        if size > self._settings.max_record_bytes:
            whole, left = hashlib.sha256(), size
            while left > 0 and (piece := content.read(min(left, _MOST_HEADER_BYTES))):
                whole.update(piece)
                left -= len(piece)
            if left or len(content.read(_padded(size) - size)) < _padded(size) - size:
                raise Torn(f"it ends inside member {_shown(name)}")
            return too_long(size, self._settings.max_record_bytes, whole.hexdigest())
        data = _data(content, size, size)
        if not data:
            return Rejected(f"member {_shown(name)} is empty", sha256(data))
        what, settings = f"member {_shown(name)}", self._settings
        if self._is_json:
            return of_object(data, settings.text_field, settings.max_nesting, settings.encoding_errors, what)
        return of_bytes(data, settings.encoding_errors, what)

    def _is_wanted(self, name: str) -> bool:
        base = name.rpartition("/")[2].lower()
        return base.endswith(self._suffix) and not base.startswith(".")

    def _grows(self, path: str) -> bool:
        return bool(compression(path))  # appending to a plain archive writes over its end

    def _settles(self, path: str) -> bool:
        return True


def _member(header: bytes) -> tarfile.TarInfo:
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
    except (tarfile.HeaderError, ValueError) as error:
        raise Torn(f"damaged tar: {error}") from None
    if member.type == _SPARSE:
        raise Torn(f"member {_shown(member.name)} is a sparse file, which is not read")
    return member


def _size(member: tarfile.TarInfo, named: dict[str, str]) -> int:
    if member.type in _WITHOUT_DATA:
        return 0
    told = named.get("size", str(member.size))
    if not (told.isascii() and told.isdigit() and len(told) < 20):
        raise Torn(f"damaged tar: member {_shown(member.name)} with size {told[:_SHOWN_CHARACTERS]!r}")
    if any(key.startswith("GNU.sparse") for key in named):
        raise Torn(f"member {_shown(member.name)} is a sparse file, which is not read")
    return int(told)


def _data(content: Content, size: int, most: int) -> bytes:
    """The data of a member that is kept in memory, its padding taken along."""
    if not 0 <= size <= most:
        raise Torn(f"damaged tar: a header of {size} bytes, the most is {most}")
    data = content.read(_padded(size))
    if len(data) < _padded(size):
        raise Torn("it ends inside a member")
    return data[:size]


def _pax(data: bytes) -> dict[str, str]:
    """The keywords of an extended header: lines of "length key=value"."""
    found, at = {}, 0
    while at < len(data):
        told, space, _ = data[at : at + 20].partition(b" ")
        length = int(told) if told.isdigit() and len(told) < 8 else 0
        line = data[at + len(told) + 1 : at + length]
        key, equals, value = line.partition(b"=")
        if not (space and equals and line.endswith(b"\n")):
            raise Torn("damaged tar: an extended header that cannot be read")
        found[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "replace")
        at += length
    return found


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _shown(name: str) -> str:
    return repr(name[:_SHOWN_CHARACTERS])
