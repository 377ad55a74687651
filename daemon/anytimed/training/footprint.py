"""How many bytes a configuration needs, before anything is allocated.

The module and the optimizer are built on torch's `meta` device, where tensors have shapes and no storage, and are
counted exactly; activations are the model adapter's estimate. Besides the steps, two things need room for a moment: an
evaluation, and the copy of the state that a commit is written from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from anytimed.contracts import Model
from anytimed.optim import ScheduleFree

_EVALUATED_LOGIT_BYTES = 8
"""Beside the logit itself: the loss makes it float32, and takes the softmax of that."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on the device, and the number of parameters. copy_stays: the copy for a commit lies beside the steps until
    it is written; else it has gone to the host before a step needs its room."""

    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    evaluation_bytes: int
    copy_bytes: int
    copy_stays: bool

    @property
    def total_bytes(self) -> int:
        """At the highest moment: what is always there, and the largest of what comes and goes."""
        always = self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes
        works = max(self.activation_bytes, self.evaluation_bytes)
        return always + (works + self.copy_bytes if self.copy_stays else max(works, self.copy_bytes))


def estimate(
    model: Model,
    module: nn.Module,
    optimizer: ScheduleFree,
    *,
    micro_batch: int,
    evaluation_batch: int,
    length: int,
    vocab_size: int,
    element_bytes: int,
    device_type: str,
    documents: bool = False,
) -> Footprint:
    """Bytes for a module and its optimizer (both may be on `meta`) on a device of this type, at micro-batches and
    evaluations of sequences of `length` tokens; `element_bytes` is the size of a product's element, documents: whether
    attention stays within them."""
    parameters = list(module.parameters())
    state = sum(t.numel() * t.element_size() for p in parameters for t in optimizer.state[p].values())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    return Footprint(
        parameters=sum(p.numel() for p in parameters),
        parameter_bytes=weights,
        gradient_bytes=weights,
        optimizer_bytes=state,
        activation_bytes=model.activation_bytes(
            micro_batch, length, vocab_size, element_bytes, device_type if documents else None
        ),
        evaluation_bytes=evaluation_batch * length * vocab_size * (element_bytes + _EVALUATED_LOGIT_BYTES),
        copy_bytes=state + (weights if optimizer.lean else 0),
        copy_stays=device_type == "cpu",
    )
