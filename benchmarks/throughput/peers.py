"""The peers, each as its users would set it up, and given the best of what it has: whole batches made in the workers,
documents tokenized many at a time without offsets, no shuffling (ours shuffles in blocks), no state saved.

Every opener gives an endless-looking iterator over one pass of the documents: arrays or tensors of integers, shape
(BATCH_SIZE, SEQUENCE_LENGTH + 1). `Setting` is what is tried out for each of them beforehand.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from throughput.corpus import BATCH_SIZE, END, SEQUENCE_LENGTH

DOCUMENTS_A_CALL: Final = 256
"""Of the tokenizer."""


@dataclass(frozen=True)
class Setting:
    """workers: processes of the DataLoader, 0 for none; threads: whether the tokenizer uses its own."""

    workers: int
    threads: bool

    @property
    def told(self) -> str:
        return f"{self.workers} workers" + (", threaded tokenizer" if self.threads else "")


FOR_TEXT: Final = (Setting(0, True), Setting(1, True), Setting(2, False), Setting(2, True))
FOR_TOKENS: Final = (Setting(0, False), Setting(1, False), Setting(2, False))


class Packed(IterableDataset):  # type: ignore[type-arg]
    """Texts tokenized and packed into batches; in a worker, of the worker's share.

    texts: (worker, workers) to lists of documents.
    """

    def __init__(self, texts: Callable[[int, int], Iterator[list[str]]], tokenizer: Path) -> None:
        self._texts, self._file = texts, str(tokenizer)

    def __iter__(self) -> Iterator[torch.Tensor]:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(self._file)
        end = tokenizer.token_to_id(END)
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        parts: list[int] = []
        wanted = BATCH_SIZE * SEQUENCE_LENGTH + 1
        rest = np.zeros(0, np.int32)
        for texts in self._texts(worker, workers):
            parts = []
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                parts += encoding.ids
                parts.append(end)
            rest = np.concatenate((rest, np.array(parts, np.int32)))
            while rest.size >= wanted:
                windows = np.lib.stride_tricks.sliding_window_view(rest[:wanted], SEQUENCE_LENGTH + 1)
                yield torch.from_numpy(windows[::SEQUENCE_LENGTH].copy())
                rest = rest[wanted - 1 :]


def grouped(texts: Iterator[str]) -> Iterator[list[str]]:
    group: list[str] = []
    for text in texts:
        group.append(text)
        if len(group) == DOCUMENTS_A_CALL:
            yield group
            group = []
    if group:
        yield group


def _stacked(samples: list[Any]) -> torch.Tensor:
    return torch.from_numpy(np.stack(samples).astype(np.int32))


# --- mosaicml-streaming -----------------------------------------------------------------------------------------------


def mosaic() -> Any:
    """The package. It imports torchvision for its sets of images, and PyPI's torchvision runs with PyPI's torch for
    CUDA only; a blank stands in for it where it is missing, which makes it lighter, not slower."""
    import transformers.feature_extraction_utils  # noqa: F401 - looks for torchvision, so it comes first

    if "torchvision" not in sys.modules:
        nothing: Any = None
        for name, content in (
            ("torchvision", {}),
            ("torchvision.datasets", {"VisionDataset": type("VisionDataset", (), {})}),
            ("torchvision.transforms", {}),
            ("torchvision.transforms.functional", {"to_tensor": nothing}),
        ):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__dict__.update(content)
    import streaming

    return streaming


def _mosaic_set(folder: Path, scratch: Path, **settings: Any) -> Any:
    package = mosaic()
    package.base.util.clean_stale_shared_memory()
    where = (
        {"local": str(folder)} if not settings.pop("zipped", False) else {"remote": str(folder), "local": str(scratch)}
    )
    return package.StreamingDataset(**where, shuffle=False, **settings)


def mosaic_text(corpus: Path, kind: str, setting: Setting, scratch: Path) -> Iterator[Any]:
    found = _mosaic_set(corpus / "mds_text", scratch, zipped=True, batch_size=DOCUMENTS_A_CALL)
    packed = Packed(lambda worker, workers: grouped(sample["text"] for sample in found), corpus / "tokenizer.json")
    return iter(DataLoader(packed, batch_size=None, num_workers=setting.workers))


def mosaic_tokens(corpus: Path, kind: str, setting: Setting, scratch: Path) -> Iterator[Any]:
    found = _mosaic_set(corpus / "mds_tokens", scratch, batch_size=BATCH_SIZE)
    return iter(
        DataLoader(
            found,
            batch_size=BATCH_SIZE,
            num_workers=setting.workers,
            collate_fn=lambda samples: _stacked([sample["tokens"] for sample in samples]),
        )
    )


# --- LitData ----------------------------------------------------------------------------------------------------------


def litdata_text(corpus: Path, kind: str, setting: Setting, scratch: Path) -> Iterator[Any]:
    import litdata

    found = litdata.StreamingDataset(str(corpus / "litdata_text"), cache_dir=str(scratch), shuffle=False)
    packed = Packed(lambda worker, workers: grouped(iter(found)), corpus / "tokenizer.json")
    return iter(DataLoader(packed, batch_size=None, num_workers=setting.workers))


def litdata_tokens(corpus: Path, kind: str, setting: Setting, scratch: Path) -> Iterator[Any]:
    import litdata

    loader = litdata.TokensLoader(block_size=SEQUENCE_LENGTH + 1)
    found = litdata.StreamingDataset(str(corpus / "litdata_tokens"), item_loader=loader, shuffle=False)
    return iter(
        litdata.StreamingDataLoader(
            found, batch_size=BATCH_SIZE, num_workers=setting.workers, collate_fn=_stacked, drop_last=True
        )
    )


# --- Hugging Face datasets --------------------------------------------------------------------------------------------


def _hf_set(kind: str, files: Path) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    reader = "json" if kind == "zst" else "parquet"
    return datasets.load_dataset(
        reader, data_files=[str(file) for file in sorted(files.iterdir())], split="train", streaming=True
    )


def _hf_tables(found: Any, worker: int, workers: int, size: int) -> Iterator[Any]:
    share = found.shard(workers, worker) if workers > 1 else found
    return iter(share.with_format("arrow").iter(batch_size=size))


def hf_text(corpus: Path, kind: str, setting: Setting, scratch: Path) -> Iterator[Any]:
    found = _hf_set(kind, corpus / kind).select_columns(["text"])

    def texts(worker: int, workers: int) -> Iterator[list[str]]:
        for table in _hf_tables(found, worker, workers, DOCUMENTS_A_CALL):
            yield table["text"].to_pylist()

    packed = Packed(texts, corpus / "tokenizer.json")
    return iter(DataLoader(packed, batch_size=None, num_workers=setting.workers))


class _Windows(IterableDataset):  # type: ignore[type-arg]
    """Batches straight from Arrow's buffers."""

    def __init__(self, found: Any) -> None:
        self._found = found

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        for table in _hf_tables(self._found, *((info.id, info.num_workers) if info else (0, 1)), BATCH_SIZE):
            flat: NDArray[np.uint16] = table["input_ids"].combine_chunks().flatten().to_numpy()
            if flat.size == BATCH_SIZE * (SEQUENCE_LENGTH + 1):
                yield torch.from_numpy(flat.astype(np.int32).reshape(BATCH_SIZE, SEQUENCE_LENGTH + 1))


def hf_tokens(corpus: Path, kind: str, setting: Setting, scratch: Path) -> Iterator[Any]:
    found = _hf_set(kind, corpus / "parquet_tokens")
    return iter(DataLoader(_Windows(found), batch_size=None, num_workers=setting.workers))
