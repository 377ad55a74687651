"""The documents that every contender reads, made once and kept in a folder.

The text is the Python standard library's own sources, cut at ends of lines into documents of 1 to 4 KiB; it is gone
through as often as the wanted size takes, each time cut elsewhere and in another order, so that no document comes
twice. A byte-level BPE is trained on the first pass. Then the same documents are written as

- `zst/`: JSON Lines, zstd; `parquet/`: Parquet with the text and a number, zstd: for ours and Hugging Face datasets;
- `mds_text/`, `litdata_text/`: mosaicml-streaming's and LitData's own formats, zstd (neither reads the former two at
  speed without a conversion);
- `bin/`: the tokens with an end token after each document, flat little-endian uint16: for ours;
- `mds_tokens/`: packed windows, an array a sample, as llm-foundry converts a corpus; `litdata_tokens/`: flat chunks for
  its TokensLoader; `parquet_tokens/`: packed windows, list<uint16>.

All of it is a function of the interpreter's version and `Size`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

END: Final = "<|endoftext|>"
TEXT_KINDS: Final = ("zst", "parquet")
SEQUENCE_LENGTH: Final = 1024
BATCH_SIZE: Final = 16
_LEAST, _MOST = 1 << 10, 4 << 10
_ROW_GROUP = 1000
_SEED = 5


@dataclass(frozen=True)
class Size:
    """text_bytes: of all documents; vocabulary: tokens, at most 65,536; passes: over the documents, each in another
    order, that the tokenized sets hold; shards: files of each set."""

    text_bytes: int
    vocabulary: int
    passes: int
    shards: int


FULL: Final = Size(96 << 20, 16_384, 4, 8)
QUICK: Final = Size(8 << 20, 4_096, 2, 2)


class Corpus:
    """The folders, made where they are missing. `told` hears what is being made."""

    def __init__(self, folder: Path, size: Size, told: Callable[[str], None]) -> None:
        named = (
            f"{sysconfig.get_python_version()}-{size.text_bytes >> 20}M-{size.vocabulary}-{size.passes}-{size.shards}"
        )
        self.folder, self.size, self._told = folder / named, size, told
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        return self.folder / name

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.json"

    def make(self, names: set[str]) -> None:
        """Write the sets of these names that are not there yet."""
        if all((self.folder / name).exists() for name in names | {"tokenizer.json"}):
            return
        documents = list(_documents(self.size.text_bytes))
        if not self.tokenizer.exists():
            self._told("training the tokenizer")
            _train(documents, self.size.vocabulary, self.tokenizer)
        tokens: list[NDArray[np.uint16]] = []
        for name in sorted(names):
            if (self.folder / name).exists():
                continue
            if not name.endswith(("_text", *TEXT_KINDS)) and not tokens:
                self._told("tokenizing")
                tokens = self._tokenized(documents)
            self._told(f"writing {name}")
            unfinished = self.folder / f"{name}.tmp"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            _WRITERS[name](unfinished, documents if not tokens or name in _OF_TEXT else tokens, self.size)
            unfinished.rename(self.folder / name)

    def facts(self) -> dict[str, Any]:
        """The JSON entry."""
        flat = sum(file.stat().st_size for file in (self.folder / "bin").glob("*.bin")) // 2
        return {**asdict(self.size), "tokens_of_the_tokenized_sets": flat}

    def _tokenized(self, documents: list[str]) -> list[NDArray[np.uint16]]:
        """Every document's tokens and its end token, all passes."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.tokenizer))
        end = tokenizer.token_to_id(END)
        encoded: list[NDArray[np.uint16]] = []
        for at in range(0, len(documents), 1000):
            batch = tokenizer.encode_batch_fast(documents[at : at + 1000], add_special_tokens=False)
            encoded += [np.array([*encoding.ids, end], np.uint16) for encoding in batch]
        found: list[NDArray[np.uint16]] = []
        for number in range(self.size.passes):
            order = list(range(len(encoded)))
            random.Random(_SEED + number).shuffle(order)
            found += [encoded[index] for index in order]
        return found


def _documents(wanted: int) -> Iterator[str]:
    """Documents of 1 to 4 KiB, `wanted` bytes in all."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    made = 0
    for number in range(1000):
        drawn = random.Random(_SEED * 1000 + number)
        drawn.shuffle(files)
        pieces: list[str] = []
        for file in files:
            text = file.read_text(encoding="utf-8", errors="replace")
            at = drawn.randrange(_LEAST)
            while len(text) - at >= _LEAST:
                stop = text.find("\n", at + drawn.randrange(_LEAST, _MOST - 512)) + 1
                stop = min(stop or len(text), at + _MOST)
                if stop - at >= _LEAST:
                    pieces.append(text[at:stop])
                at = stop
        drawn.shuffle(pieces)
        for piece in pieces:
            made += len(piece.encode())
            yield piece
            if made >= wanted:
                return


def _train(documents: list[str], vocabulary: int, file: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(documents[: (16 << 20) // 2048], trainer)
    unfinished = file.with_suffix(".tmp")
    tokenizer.save(str(unfinished))
    unfinished.rename(file)


# --- the sets ---------------------------------------------------------------------------------------------------------


def _shards(items: list[Any], count: int) -> Iterator[tuple[str, list[Any]]]:
    each = -(-len(items) // count)
    for number in range(count):
        yield f"shard-{number:03d}", items[number * each : (number + 1) * each]


def _windows(tokens: list[NDArray[np.uint16]]) -> NDArray[np.uint16]:
    """All of it end to end in windows of SEQUENCE_LENGTH + 1, shape (n, SEQUENCE_LENGTH + 1)."""
    flat = np.concatenate(tokens)
    return flat[: flat.size - flat.size % (SEQUENCE_LENGTH + 1)].reshape(-1, SEQUENCE_LENGTH + 1)


def _zst(folder: Path, documents: list[str], size: Size) -> None:
    import zstandard

    for name, part in _shards(documents, size.shards):
        lines = "".join(json.dumps({"id": n, "text": text}, ensure_ascii=False) + "\n" for n, text in enumerate(part))
        (folder / f"{name}.jsonl.zst").write_bytes(zstandard.ZstdCompressor(level=3).compress(lines.encode()))


def _jsonl(folder: Path, documents: list[str], size: Size) -> None:
    for name, part in _shards(documents, size.shards):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"id": n, "text": text}, ensure_ascii=False) + "\n" for n, text in enumerate(part)
            )


def _parquet(folder: Path, documents: list[str], size: Size) -> None:
    import pyarrow
    import pyarrow.parquet

    for name, part in _shards(documents, size.shards):
        table = pyarrow.table({"id": range(len(part)), "text": part})
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", compression="zstd", row_group_size=_ROW_GROUP)


def _parquet_tokens(folder: Path, tokens: list[NDArray[np.uint16]], size: Size) -> None:
    import pyarrow
    import pyarrow.parquet

    for name, part in _shards(list(_windows(tokens)), size.shards):
        flat = pyarrow.array(np.concatenate(part))
        offsets = np.arange(0, flat.__len__() + 1, SEQUENCE_LENGTH + 1, dtype=np.int32)
        table = pyarrow.table({"input_ids": pyarrow.ListArray.from_arrays(offsets, flat)})
        file = folder / f"{name}.parquet"
        pyarrow.parquet.write_table(table, file, use_dictionary=False, compression="none", row_group_size=_ROW_GROUP)


def _bin(folder: Path, tokens: list[NDArray[np.uint16]], size: Size) -> None:
    for name, part in _shards(tokens, size.shards):
        np.concatenate(part).astype("<u2").tofile(folder / f"{name}.bin")


def _mds_text(folder: Path, documents: list[str], size: Size) -> None:
    from throughput.peers import mosaic

    with mosaic().MDSWriter(out=str(folder), columns={"text": "str"}, compression="zstd:3") as out:
        for text in documents:
            out.write({"text": text})


def _mds_tokens(folder: Path, tokens: list[NDArray[np.uint16]], size: Size) -> None:
    from throughput.peers import mosaic

    columns = {"tokens": f"ndarray:uint16:{SEQUENCE_LENGTH + 1}"}
    with mosaic().MDSWriter(out=str(folder), columns=columns) as out:
        for window in _windows(tokens):
            out.write({"tokens": window})


def _litdata_text(folder: Path, documents: list[str], size: Size) -> None:
    _optimized(folder, [part for _, part in _shards(documents, size.shards)], compression="zstd")


def _litdata_tokens(folder: Path, tokens: list[NDArray[np.uint16]], size: Size) -> None:
    from litdata import TokensLoader

    _optimized(
        folder, [part for _, part in _shards(tokens, size.shards)], item_loader=TokensLoader(SEQUENCE_LENGTH + 1)
    )


_given: list[Any] = []


def _one(index: int) -> Iterator[Any]:
    yield from _given[index]


def _optimized(folder: Path, shards: list[Any], **settings: Any) -> None:
    """LitData writes in processes of its own; the shards reach them by fork, and are not pickled."""
    for name in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER"):  # else beside everybody's in /tmp
        os.environ[name] = str(folder.with_name(f"{folder.name}.cache"))
    from litdata import optimize

    _given[:] = shards
    quiet = {"verbose": False, "start_method": "fork", "num_workers": 1, "chunk_bytes": "64MB"}
    optimize(_one, list(range(len(shards))), str(folder), **{**quiet, **settings})
    _given.clear()
    shutil.rmtree(folder.with_name(f"{folder.name}.cache"), ignore_errors=True)


_WRITERS: Final[dict[str, Callable[[Path, Any, Size], None]]] = {
    "zst": _zst,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "mds_text": _mds_text,
    "litdata_text": _litdata_text,
    "bin": _bin,
    "mds_tokens": _mds_tokens,
    "litdata_tokens": _litdata_tokens,
    "parquet_tokens": _parquet_tokens,
}
_OF_TEXT: Final = {"zst", "jsonl", "parquet", "mds_text", "litdata_text"}
