"""Stand-ins for what a config of a real size reads from afar: its dataset, and the tokenizer that it asks for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from anytimed.config import load

END = "<|endoftext|>"


def gpt2(path: Path, tokens: int = 50_257) -> Path:
    """A tokenizer.json of GPT-2's size: its bytes, its end token, and names in place of its merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    filled = [*letters, *(f"merge {i}" for i in range(tokens - len(letters) - 1))]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(filled)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment, unused-ignore]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment, unused-ignore]
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path


def at_home(path: Path, folder: Path, *, without: Sequence[str] = (), **more: str) -> Path:
    """A config that is based on the one at `path` and needs no network: its data, tokenizer, run and store lie in
    `folder`. more: lines of further tables; without: keys that are left out."""
    config = load(path)
    tables = {"run": f'directory = "{folder}/run"', "exports": f'url = "{folder}/published"', **more}
    for name, table in config.sources.items():
        if "://" in table.settings["url"]:
            assert table.type == "parquet"
            data = folder / name / "0000.parquet"
            data.parent.mkdir(exist_ok=True)
            pq.write_table(pa.table({table.settings["text_field"]: ["a stream of text"] * 20}), data)
            tables[f"sources.{name}"] = f'url = "{data.parent}/*.parquet"\nsettle_s = 0.0'
    if config.tokenizer.type == "huggingface":
        tables["tokenizer"] = f'path = "{gpt2(folder / "tokenizer.json", 50_304)}"'
    home = folder / "home.toml"
    head = f'based_on = "{path}"\nwithout = {json.dumps(list(without))}\n'
    home.write_text(head + "".join(f"[{name}]\n{lines}\n" for name, lines in tables.items()))
    return home
