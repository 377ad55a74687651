"""Appends to an inbox: one write and one fsync for all that came together.

What is appended counts once it is durable, and only then does the log's end move. Where a write fails, what it left is
cut off. After a failed fsync, or a crash that left half a request, a segment is never written again: the next append
begins a new one, whose name says where the old one ends (cf. `storage.journal`, which has one file only).
"""

from __future__ import annotations

import contextlib
import os

from anytimed.contracts import Refused
from anytimed.data.inbox_log import InboxLog, Segment, segment_name
from anytimed.storage.durable import fsync_folder, make_folders, write_all

_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


class InboxFile:
    """The one that appends to a log, in the process that owns the run; for one thread."""

    def __init__(self, log: InboxLog) -> None:
        self._log = log
        self._file: int | None = None
        self._sound = True

    def prepare(self, segment_bytes: int) -> tuple[int, int]:
        """Have a segment open that is shorter than `segment_bytes`; the numbers of the byte and of the record that come
        next. Raises Refused where what is there is damaged, OSError."""
        log = self._log
        if log.damage:
            raise Refused(log.damage)
        newest, (end, record) = log.newest, log.end
        if newest is None or not self._sound or not log.clean or end - newest.byte >= segment_bytes or self._lost:
            self._begin(*max(log.reached, (end, record)))
        elif self._file is None:
            self._file = os.open(newest.path, _FLAGS)
        return log.end

    def append(self, data: bytes, records: int) -> None:
        """Whole requests, durable when this returns. Raises OSError; nothing of it then counts."""
        assert self._file is not None, "prepare comes first"
        try:
            write_all(self._file, memoryview(data))
        except OSError:
            self._take_back()
            raise
        try:
            os.fsync(self._file)
        except OSError:
            self._take_back()
            self._sound = False  # the kernel may call the pages clean: nothing after them could be trusted
            raise
        self._log.grew(len(data), records)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @property
    def _lost(self) -> bool:
        """The journal knows of more than is here: what comes next must not take the place of it."""
        return self._log.reached > self._log.end

    def _begin(self, byte: int, record: int) -> None:
        folder = self._log.folder
        make_folders(folder, mode=0o700)
        path = folder / segment_name(byte, record)
        self.close()
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # of this name, it has no whole request
        file = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fsync_folder(folder)
        except OSError:
            os.close(file)
            raise
        self._file, self._sound = file, True
        self._log.began(Segment(path, byte, record))

    def _take_back(self) -> None:
        assert self._file is not None
        newest, (end, _) = self._log.newest, self._log.end
        assert newest is not None
        try:
            os.ftruncate(self._file, end - newest.byte)
        except OSError:
            self._sound = False
