"""The files of a checkpoint that a person or a library opens: weights as Hugging Face names them, and the model card.

`ExportContent` is what an export is made of. `write_weights` writes model.safetensors, or shards and their index
where one file would be too large. `model_card` is README.md: which checkpoint this is, how good, how to pull and load
it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anytimed.contracts import Evaluation, HostTensor, Json

from . import tensors
from .durable import write_new
from .manifest import FileEntry


@dataclass(frozen=True, slots=True)
class ExportContent:
    """What an export is made of. `tensors` and `config` as Hugging Face names them; `files`: tokenizer files, by base
    name.

    tokens: trained on up to `step`. parent: id of the checkpoint published before. lineage: per source, what was read.
    url: the prefix as a reader would name it, without credentials; license: named in the model card. refused: why it
    must not be published, if it must not. sequence_length: tokens that it was trained on at a time.
    """

    step: int
    tokens: int
    tensors: Mapping[str, HostTensor]
    config: Json
    files: Mapping[str, bytes]
    optimizer: Json
    evaluation: Evaluation | None
    config_digest: str
    lineage: Json
    parent: str | None = None
    interventions: Sequence[Any] = ()
    flags: Sequence[str] = ()
    title: str = "anytimed checkpoint"
    url: str = "URL"
    license: str | None = None
    refused: str | None = None
    sequence_length: int | None = None


def write_weights(folder: Path, named: Mapping[str, HostTensor], max_shard_bytes: int) -> list[FileEntry]:
    """Write the tensors into a folder, in shards filled in the order given; what was written. Raises ValueError,
    OSError.

    Each file's header is read back, which shows that it loads and that the shapes are right.
    """
    shards: list[dict[str, HostTensor]] = [{}]
    filled = 0
    for name, tensor in named.items():
        if shards[-1] and filled + tensor.data.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.data.nbytes

    entries: list[FileEntry] = []
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        size, sha256 = tensors.write(folder / file, shard, {"format": "pt"})
        header = tensors.read_header(folder / file)
        assert {n: (p.dtype, p.shape) for n, p in header.tensors.items()} == {
            n: (t.dtype, t.shape) for n, t in shard.items()
        }
        entries.append(FileEntry(name=file, size=size, sha256=sha256))
        index |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(t.data.nbytes for t in named.values())
        told = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        size, sha256 = write_new(folder / "model.safetensors.index.json", json.dumps(told, indent=2).encode() + b"\n")
        entries.append(FileEntry(name="model.safetensors.index.json", size=size, sha256=sha256))
    return entries


def model_card(content: ExportContent, evaluation: Evaluation | None, ident: str) -> str:
    """README.md in Markdown."""
    if evaluation is None:
        quality = "Not evaluated yet."
    else:
        quality = (
            f"Held-out loss of x: **{evaluation.loss_x:.4f}** nats per token, over {evaluation.tokens:,} tokens, "
            f"evaluated at step {evaluation.step:,} on hold-out `{evaluation.holdout[:12]}`."
        )
    rows = "\n".join(
        f"| {source} | {span.get('url', '')} | {span.get('records', 0):,} | {span.get('held_out', 0):,} "
        f"| {span.get('tokens', 0):,} |"
        for source, span in sorted(content.lineage.items())
    )
    licensed = f"license: {content.license}\n" if content.license else ""
    flagged = f"\nFlags: {', '.join(content.flags)}.\n" if content.flags else ""
    return f"""---
library_name: transformers
tags: [anytimed]
{licensed}---
# {content.title}

Checkpoint `{ident}`: the averaged weights x after step {content.step:,}, {content.tokens:,} tokens.
Training goes on; a newer one may be out.

{quality}
{flagged}
## Use

    anytimed pull {content.url} --to model      # verified; model/current is the newest

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("model/current")
    tokenizer = AutoTokenizer.from_pretrained("model/current")

Every file's size and SHA-256, the optimizer's numbers, the parent checkpoint and the exact place in every source are in
`manifest.json`.

## What it has read

| source | where | records | held out | tokens |
|---|---|---|---|---|
{rows}
"""
