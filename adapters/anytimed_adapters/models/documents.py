"""Attention among documents that share a row: a token sees the earlier tokens of its own document, and nothing else.

In order: the position of every token in its document; the switch between the two kernels, which say the same; SDPA with
a mask, which every device has; FlexAttention, which skips what is masked and never writes the mask out, but has to be
compiled, and has no backward on a CPU.

`documents` is (batch, length), int32, ascending in a row: equal numbers are one document."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (batch, heads, length, dim), k and v (batch, key heads, length, dim) -> mixed values, shaped as q."""

SMALLEST_HEAD = 16
"""FlexAttention's kernels on CUDA multiply tiles that are no narrower."""


def positions(documents: Tensor) -> Tensor:
    """Where each token stands in its document, from 0; (batch, length), int64."""
    first = torch.searchsorted(documents, documents)  # in ascending numbers: where each one is found first
    return torch.arange(documents.shape[1], device=documents.device) - first


def tools() -> bool:
    """Whether there is Triton, and the C compiler that it needs."""
    return bool(importlib.util.find_spec("triton") and any(shutil.which(name) for name in ("cc", "gcc", "clang")))


TOOLS = tools()  # once, for a module that is compiled as a whole cannot look for files


def flex_by_itself(device_type: str, head_dim: int) -> bool:
    """Whether FlexAttention is taken where nobody said: on CUDA, with its tools."""
    return device_type == "cuda" and head_dim >= SMALLEST_HEAD and TOOLS


def attention(documents: Tensor, dtype: torch.dtype, *, flex: bool) -> Attend:
    """Attention within these documents, made once and used by every layer. dtype: of the additive mask, as the hidden
    states have it."""
    if flex:
        from anytimed_adapters.models import flex as kernel  # imports the compiler: a second that only this way pays

        return partial(kernel.attend, kernel.block_mask(documents))
    return partial(_attend, additive_mask(documents, dtype))


def additive_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a token may look and -inf elsewhere, (batch, 1, length, length). Of a boolean mask, SDPA would make this
    one in every layer and keep each for the backward pass; the bits that come out are the same."""
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    seen = (documents[:, :, None] == documents[:, None, :]) & causal
    mask = torch.zeros(seen.shape, dtype=dtype, device=documents.device)
    return mask.masked_fill(~seen, float("-inf")).unsqueeze(1)


def _attend(mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
