"""A Llama that meets trouble where its text says so: `~` makes a loss that is not finite, `^` raises, `|` aborts the
process, `%` runs what torch has in no deterministic form. The text of the tests has none of these otherwise."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable

import torch

from tests.crash.audited import AuditedLlama

NAN, RAISES, ABORTS, INEXACT = "~", "^", "|", "%"


class TroubledLlama(AuditedLlama):
    def losses(
        self, module: Callable[..., torch.Tensor], tokens: torch.Tensor, documents: torch.Tensor | None = None
    ) -> torch.Tensor:
        found = super().losses(module, tokens, documents)
        if torch.is_grad_enabled():
            if (tokens == ord(RAISES)).any():
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            if (tokens == ord(ABORTS)).any():
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no dump in the folder that the tests run in
                os.abort()
            if (tokens == ord(INEXACT)).any():
                torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))
            if (tokens == ord(NAN)).any():
                return found * torch.nan
        return found
