"""A Llama that writes down what it is trained on, so that a test can say which records were used without asking the
pipeline; and the installed package that makes it known, as an adapter author's would.

Every process appends to a file of its own in $AUDIT, named so that the files sort by the time at which they began: the
tokens of each training batch, two bytes each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from anytimed_adapters.models.llama import LlamaModel

ROOT = Path(__file__).parents[2]


class AuditedLlama(LlamaModel):
    """Trains like its base."""

    _file = -1

    def losses(
        self, module: Callable[..., torch.Tensor], tokens: torch.Tensor, documents: torch.Tensor | None = None
    ) -> torch.Tensor:
        if torch.is_grad_enabled():  # an evaluation does not train
            if self._file < 0:
                name = f"{time.time_ns()}-{os.getpid()}"
                self._file = os.open(Path(os.environ["AUDIT"]) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(self._file, tokens.numpy().astype("<i2").tobytes())
        return super().losses(module, tokens, documents)


def installed(folder: Path) -> dict[str, str]:
    """Install it into `folder`; the environment in which it is found, and in which it writes to folder/audit."""
    (folder / "audited-1.0.dist-info").mkdir(parents=True)
    (folder / "audited-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: audited\nVersion: 1.0\n")
    (folder / "audited-1.0.dist-info" / "entry_points.txt").write_text(
        "[anytimed.models]\naudited = tests.crash.audited:AuditedLlama\n"
    )
    (folder / "audit").mkdir()
    path = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "AUDIT": str(folder / "audit")}


def trained_on(folder: Path, batch_size: int, sequence_length: int) -> list[NDArray[np.int16]]:
    """What each process trained on, in the order in which they began: shape (steps, batch, sequence_length + 1)."""
    files = sorted((folder / "audit").iterdir())
    return [np.frombuffer(f.read_bytes(), "<i2").reshape(-1, batch_size, sequence_length + 1) for f in files]
