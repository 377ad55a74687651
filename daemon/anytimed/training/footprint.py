"""How many bytes a configuration needs, before anything is allocated.

The module and the optimizer are built on torch's `meta` device, where tensors have shapes and no storage, and are
counted exactly; activations are the model adapter's estimate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from anytimed.contracts import Model
from anytimed.optim import ScheduleFree


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on the device while a step runs, and the number of parameters."""

    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


def estimate(
    model: Model,
    module: nn.Module,
    optimizer: ScheduleFree,
    *,
    micro_batch: int,
    length: int,
    vocab_size: int,
    element_bytes: int,
    documents_on: str | None = None,
) -> Footprint:
    """Bytes for a module and its optimizer (both may be on `meta`) at a micro-batch of sequences of `length` tokens;
    `element_bytes` is the size of an activation's element, `documents_on` the type of the device where documents are
    masked."""
    parameters = list(module.parameters())
    state = sum(t.numel() * t.element_size() for p in parameters for t in optimizer.state[p].values())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    return Footprint(
        parameters=sum(p.numel() for p in parameters),
        parameter_bytes=weights,
        gradient_bytes=weights,
        optimizer_bytes=state,
        activation_bytes=model.activation_bytes(micro_batch, length, vocab_size, element_bytes, documents_on),
    )
