"""FlexAttention within documents: the block mask of a batch, and attention by it.

Importing this imports torch's compiler, so that it is imported where it is used. Both functions are compiled: eager,
FlexAttention writes out every score, and `create_block_mask` every pair of tokens. Inside a module that is compiled as
a whole they become part of its graph. They are compiled for each shape by itself: a run has one, and for any length
torch 2.13 writes C++ for the CPU that does not compile."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

_create_block_mask = torch.compile(create_block_mask, dynamic=False)
_flex_attention = torch.compile(flex_attention, dynamic=False)


def block_mask(documents: Tensor) -> BlockMask:
    """Which blocks of 128 x 128 pairs are masked wholly, in part, or not at all. documents: (batch, length)."""

    def within(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (documents[row, query] == documents[row, key]) & (query >= key)

    batch, length = documents.shape
    found: BlockMask = _create_block_mask(within, batch, None, length, length, device=documents.device)
    return found


def attend(mask: BlockMask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q: (batch, heads, length, dim); k, v: (batch, key heads, length, dim) -> shaped as q."""
    mixed: Tensor = _flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return mixed
