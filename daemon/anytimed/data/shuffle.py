"""The order of a block's sequences: a function of (seed, block, number of sequences), with no state to store."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_UINT64 = (1 << 64) - 1


def permutation(seed: int, block: int, count: int) -> NDArray[np.intp]:
    """A permutation of range(count), shape (count,).

    The stable argsort of the raw 64-bit words of Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy
    as 1, 2, 3") under the key (seed, block). Raw words are fixed by the algorithm; `Generator.permutation` is not
    promised to stay the same between numpy versions, and a resume may come after an upgrade.
    """
    key = np.array([seed & _UINT64, block & _UINT64], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(count)
    return np.argsort(words, kind="stable")
