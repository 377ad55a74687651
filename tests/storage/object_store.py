"""An object store in memory behind fsspec's asynchronous interface, as s3fs is: one put is one object, create-only is
honoured.

What goes wrong at real ones is switched on by storage options: `ignore_conditions` (answers 200 to a create-only put
over an existing object), `lose_answers` (does what was asked, then breaks the connection), `hang` (never answers),
`no_ranges` (sends whole objects).
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, ClassVar

from fsspec import register_implementation
from fsspec.asyn import AsyncFileSystem


class BackendError(Exception):
    """As botocore's: not an OSError, and chatty."""


class ObjectStore(AsyncFileSystem):  # type: ignore[misc]  # fsspec has no types
    protocol = "objects"
    objects: ClassVar[dict[str, bytes]] = {}
    calls: ClassVar[list[str]] = []

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.options = options

    async def _arrive(self, call: str, path: str) -> str:
        self.calls.append(call)
        if self.options.get("hang"):
            await asyncio.sleep(3600)
        if self.options.get("denied"):
            raise BackendError(f"403 for key {self.options.get('secret')} at {self.options.get('endpoint_url')}")
        return str(self._strip_protocol(path))

    def _answer(self) -> None:
        if self.options.get("lose_answers"):
            raise BackendError("connection reset by peer")

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        path = await self._arrive("info", path)
        if path not in self.objects:
            raise FileNotFoundError(path)
        return {"name": path, "size": len(self.objects[path]), "type": "file"}

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        path = await self._arrive("cat_file", path)
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path] if self.options.get("no_ranges") else self.objects[path][start:end]

    async def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        path = await self._arrive("pipe_file", path)
        if mode == "create" and path in self.objects and not self.options.get("ignore_conditions"):
            raise BackendError("412 PreconditionFailed")
        self.objects[path] = bytes(value)
        self._answer()

    async def _put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        path = await self._arrive("put_file", rpath)
        self.objects[path] = Path(lpath).read_bytes()
        self._answer()

    async def _rm_file(self, path: str, **_: Any) -> None:
        path = await self._arrive("rm_file", path)
        self.objects.pop(path, None)

    async def _find(self, path: str, **_: Any) -> list[str]:
        path = await self._arrive("find", path)
        return sorted(name for name in self.objects if name.startswith(path.rstrip("/") + "/"))


register_implementation("objects", ObjectStore, clobber=True)
