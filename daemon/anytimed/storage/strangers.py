"""Reading what a stranger may have written: JSON of bounded size and depth, and a checkpoint's folder.

`parse` and `read_json` raise one named error whatever the bytes are. `check_folder` looks at a checkpoint before
anything loads it: every weights file is a whole safetensors file, an index names files of this folder only, each
tensor where it says, and config.json is an object. `weight_files` says which files to load; a pickle beside them is
never one of these.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anytimed.contracts import CorruptError, Json

from . import tensors
from .manifest import base_name

CONFIG_BYTES = 4 << 20
HEADER_BYTES = 8 << 20
"""Of a weights file: room for fifty thousand tensors; the worst JSON of that size becomes 250 MB of Python objects."""
INDEX_BYTES = 64 << 20
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def parse(data: bytes | str, where: str) -> Any:
    """The JSON value. Raises CorruptError naming `where` on anything else: not UTF-8, too deep, numbers of thousands of
    digits."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where}: no JSON that can be read: {str(error)[:200]}") from error


def read_json(path: Path, max_bytes: int) -> Json:
    """The JSON object in a file. Raises CorruptError, FileNotFoundError, OSError; reads no more than `max_bytes`."""
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise CorruptError(f"{path}: more than {max_bytes} bytes; expected {max_bytes} at most")
    found = parse(data, str(path))
    if not isinstance(found, dict):
        raise CorruptError(f"{path}: {type(found).__name__}, expected a JSON object")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files to load the weights of a checkpoint's folder from: those that its index names, else model.safetensors,
    else every .safetensors file there, each with a sound header. Empty where there is none. Raises CorruptError."""
    index = folder / INDEX_NAME
    if index.is_file():
        shards = _shards(index)
        found = sorted({folder / name for name in shards.values()})
    elif (folder / SINGLE_NAME).is_file():
        shards, found = {}, [folder / SINGLE_NAME]
    else:
        shards, found = {}, sorted(folder.glob("*.safetensors"))
    names = {path.name: _tensor_names(path) for path in found}
    for tensor, name in shards.items():
        if tensor not in names[name]:
            raise CorruptError(f"{index}: tensor {tensor[:80]!r} is said to be in {name}, and is not")
    return found


def check_folder(folder: Path, names: Iterable[str]) -> None:
    """Raise CorruptError unless the files of a checkpoint, `names`, can be loaded by anybody without surprises."""
    listed = set(names)
    for name in sorted(listed):
        if name.endswith(".safetensors"):
            tensors.read_header(folder / name, HEADER_BYTES)
    if INDEX_NAME in listed:
        absent = sorted(path.name for path in weight_files(folder) if path.name not in listed)
        if absent:
            raise CorruptError(f"{folder / INDEX_NAME}: names {', '.join(absent)[:200]}, which the manifest does not")
    if "config.json" in listed:
        read_json(folder / "config.json", CONFIG_BYTES)


def _shards(index: Path) -> dict[str, str]:
    """File by tensor, as an index says. Raises CorruptError on a name that leads out of the folder."""
    found = read_json(index, INDEX_BYTES).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CorruptError(f"{index}: no weight_map; expected a file name for every tensor")
    for tensor, name in found.items():
        try:
            plain = isinstance(name, str) and base_name(name).endswith(".safetensors")
        except ValueError:
            plain = False
        if not plain:
            raise CorruptError(
                f"{index}: tensor {tensor[:80]!r} is said to be in {str(name)[:80]!r}; expected a .safetensors file "
                "beside the index"
            )
    return found


def _tensor_names(path: Path) -> frozenset[str]:
    try:
        return frozenset(tensors.read_header(path, HEADER_BYTES).tensors)
    except FileNotFoundError:
        raise CorruptError(f"{path}: not there, though the index names it") from None
