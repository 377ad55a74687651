"""What S3 offers beyond fsspec's interface: conditions, and uploads that were begun and never ended.

In order: the options that leave all retrying to us; reading an object with the ETag of just these bytes; replacing
it only if it still has that ETag; listing and aborting unfinished multipart uploads. Works on an `s3fs.S3FileSystem`
without importing it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from .patience import patiently_async

_PART_BUDGET_S = 120.0
"""One part of a large upload may be tried again for this long, so that one bad answer does not cost the whole file."""


def is_s3(fs: Any) -> bool:
    """Whether a file system is s3fs's."""
    return "s3" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def options(url: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Storage options under which botocore tries once; what the user gave goes first."""
    if not url.startswith(("s3://", "s3a://")):
        return dict(given)
    retries = {"retries": {"total_max_attempts": 1, "mode": "standard"}}
    return {**given, "config_kwargs": {**retries, **given.get("config_kwargs", {})}}


def try_once(fs: Any) -> None:
    """Have s3fs try once too, all but the parts of a large file."""
    fs.retries = 1
    call = fs._call_s3

    async def call_s3(method: str, *arguments: Any, **named: Any) -> Any:
        once = functools.partial(call, method, *arguments, **named)
        return await (patiently_async(once, _PART_BUDGET_S) if method == "upload_part" else once())

    fs._call_s3 = call_s3


async def read_versioned(fs: Any, path: str, max_bytes: int) -> tuple[int, bytes, str]:
    """An object's size, at most `max_bytes` + 1 of its bytes, and its ETag, from one answer."""
    bucket, key, _ = fs.split_path(path)
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=key)
    body = answer["Body"]
    try:
        # 0 bytes must not be asked for: the body answers b"" for ever.
        data = b""
        while len(data) <= max_bytes and (chunk := await body.read(max_bytes + 1 - len(data))):
            data += chunk
    finally:
        body.close()
    return max(answer.get("ContentLength") or 0, len(data)), data, str(answer["ETag"])


async def replace_if(fs: Any, path: str, data: bytes, etag: str) -> None:
    """Replace an object that still has that ETag. Raises OSError where it has another, or is gone."""
    await fs._pipe_file(path, data, IfMatch=etag)


async def unfinished_uploads(fs: Any, path: str) -> list[tuple[str, str, datetime]]:
    """(path, upload id, when it was begun) of the multipart uploads under a prefix that nobody completed."""
    bucket, prefix, _ = fs.split_path(path)
    found: list[tuple[str, str, datetime]] = []
    more: dict[str, str] = {}
    while True:
        page = await fs._call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **more)
        found += [(f"{bucket}/{u['Key']}", u["UploadId"], u["Initiated"]) for u in page.get("Uploads", [])]
        if not page.get("IsTruncated"):
            return [upload for upload in found if upload[0].startswith(path)]
        more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


async def abort_upload(fs: Any, path: str, upload_id: str) -> None:
    """Throw away the parts of an unfinished upload."""
    bucket, key, _ = fs.split_path(path)
    await fs._call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload_id)
