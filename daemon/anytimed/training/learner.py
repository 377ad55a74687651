"""Model and optimizer as one thing that takes steps.

In order: a batch goes to the device; its gradient is taken at y, over micro-batches; it is clipped once; whether loss
and gradient are finite becomes a gate on the device, which the optimizer obeys without anybody waiting for it; what
the step did is kept as device scalars until `reports` reads them all at once. `snapshot` and `export` copy state out,
`restore` puts it back. Parameters hold y at all times; x and z are the optimizer's own tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from anytimed.contracts import Batch, CorruptError, Evaluation, Holdout, HostTensor, Json, Model, Snapshot, StepReport
from anytimed.optim import ScheduleFree
from anytimed.training.device import Device
from anytimed.training.evaluate import Evaluator, sums_by

EXPORT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class _Unread:
    """What a step did, still on the device. sources: targets of each; told: loss, norm, whether it was finite, and the
    summed loss of every source."""

    step: int
    batch: int
    sources: Mapping[str, int]
    told: tuple[Tensor, Tensor, Tensor, Tensor]


class Learner:
    """Takes steps and gives out copies. One thread uses it.

    end_token: given where attention stays within documents, of which it is the last token; evaluation needs none, for
    its rows hold one record each."""

    def __init__(
        self,
        model: Model,
        module: nn.Module,
        optimizer: ScheduleFree,
        device: Device,
        *,
        sequence_length: int,
        micro_batch_size: int | None = None,
        end_token: int | None = None,
        clip_grad_norm: float | None = None,
        evaluation_batch_size: int = 16,
        compile: bool = False,
    ) -> None:
        self.model, self.module, self.optimizer, self.device = model, module, optimizer, device
        self.step_count = 0
        self.tokens = 0
        self.skipped = 0
        self._forward = torch.compile(module) if compile else module
        self._micro, self._clip, self._length = micro_batch_size, clip_grad_norm, sequence_length
        self._end_token = end_token
        self._named = dict(module.named_parameters())
        self._unread: list[_Unread] = []
        self._evaluator = Evaluator(
            model, module, device, sequence_length=sequence_length, batch_size=evaluation_batch_size
        )

    # --- steps

    def step(self, batch: Batch) -> None:
        """One step on tokens (batch, length + 1); what they lost before it is kept by source, for `reports`. A loss or
        gradient that is not finite leaves weights, moments, averages and the optimizer's counters untouched; the batch
        counts as taken all the same. Does not wait for the device."""
        tokens = self.device.put(batch.tokens)
        targets = tokens[:, 1:].numel()
        counts = np.bincount(batch.labels.ravel(), minlength=len(batch.sources)).tolist()
        labels = self.device.put(batch.labels) if len(batch.sources) > 1 else None
        loss = torch.zeros((), device=self.device.torch_device)
        told = torch.zeros(len(batch.sources), dtype=torch.float64, device=self.device.torch_device)
        self.optimizer.zero_grad(set_to_none=True)
        micro = self._micro or len(tokens)
        for at in range(0, len(tokens), micro):
            with self.device.autocast():
                part = tokens[at : at + micro]
                losses = self.model.losses(self._forward, part, self._documents(part))
                mean = losses.sum() / targets
            mean.backward()  # type: ignore[no-untyped-call]
            loss = loss + mean.detach()
            if labels is not None:
                told += sums_by(losses, labels[at : at + micro], len(batch.sources))
        gradients = [p.grad for p in self._named.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self._clip is not None:
            nn.utils.clip_grads_with_norm_(self._named.values(), self._clip, norm)
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        self.optimizer.step(gate=finite, loss=loss)
        self.step_count += 1
        self.tokens += targets
        of = told if labels is not None else loss * targets
        sources = dict(zip(batch.sources, counts, strict=True))
        self._unread.append(_Unread(self.step_count, batch.number, sources, (loss, norm.detach(), finite, of)))

    def _documents(self, tokens: Tensor) -> Tensor | None:
        """Which document each input belongs to, (batch, length) int32: the end tokens before it in its row. None where
        attention does not ask. tokens: (batch, length + 1)."""
        if self._end_token is None:
            return None
        ends = tokens[:, :-1] == self._end_token
        return ends.cumsum(1, dtype=torch.int32) - ends.int()

    def compile_now(self, batch_size: int) -> None:
        """Compile forward and backward before the first step, which would look like a hang otherwise. Nothing changes:
        the gradient of a batch of zeros is dropped."""
        zeros = torch.zeros(self._micro or batch_size, self._length + 1, dtype=torch.long)
        zeros = zeros.to(self.device.torch_device)
        with self.device.autocast():
            loss = self.model.losses(self._forward, zeros, self._documents(zeros)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.zero_grad(set_to_none=True)

    def reports(self) -> list[StepReport]:
        """What the steps since the last call did; waits for the device once."""
        unread, self._unread = self._unread, []
        values = iter(self.device.read([tensor for each in unread for tensor in each.told]))
        found = []
        for each in unread:
            loss, norm, finite = next(values), next(values), bool(next(values))
            by_source = {name: (count, next(values)) for name, count in each.sources.items()}
            present = {name: of for name, of in by_source.items() if of[0]}
            found.append(StepReport(each.step, each.batch, loss, norm, not finite, present))
        self.skipped += sum(report.skipped for report in found)
        return found

    def metrics(self) -> dict[str, float]:
        """The optimizer's own figures (c, beta, eta, norms); waits for the device once."""
        named = self.optimizer.metrics()
        values = dict(zip(named, self.device.read(named.values()), strict=True))
        return {**values, "averaging_memory_steps": 1 / values["c"] if values["c"] else math.inf}

    def memory(self) -> dict[str, float]:
        """Over how many steps x averages, as 1 / c; waits for the device."""
        steps = self.device.read([self.optimizer.memory_steps()])[0]
        return {"averaging_memory_steps": steps} if math.isfinite(steps) else {}

    def forget(self) -> None:
        """Halve the memory of x: the weight sum, but not below that of the end of warm-up. x itself does not change."""
        self.optimizer.forget(0.5)

    def evaluate(self, holdout: Holdout) -> Evaluation | None:
        """Losses of x, y and z on the hold-out; None while nothing is held out."""
        y = {name: p.detach() for name, p in self._named.items()}
        return self._evaluator.evaluate(self.step_count, holdout, self._at("x"), y, self._at("z"))

    def loss_at(self, export: Path, holdout: Holdout) -> float | None:
        """Mean loss in nats per token of the weights in an export's folder on the hold-out; None while nothing is held
        out, or where the folder does not hold this model."""
        try:
            weights = {name: t for file in export.glob("*.safetensors") for name, t in load_file(file).items()}
        except (OSError, SafetensorError):
            return None
        shapes = {name: p.shape for name, p in self._named.items()}
        if {name: t.shape for name, t in weights.items()} != shapes:
            return None
        held = {name: weights[name].to(p.device, p.dtype) for name, p in self._named.items()}
        return self._evaluator.loss_at(held, holdout)

    # --- copies

    def _at(self, which: str) -> dict[str, Tensor]:
        values = self.optimizer.averaged() if which == "x" else self.optimizer.iterate()
        return {name: values[p] for name, p in self._named.items()}

    def _state(self) -> dict[str, Tensor]:
        """What the optimizer keeps, as `<what>.<parameter>`; and y itself where x lies in it (a lean optimizer)."""
        found = {f"{key}.{name}": t for name, p in self._named.items() for key, t in self.optimizer.state[p].items()}
        if self.optimizer.lean:
            found |= {f"y.{name}": p.detach() for name, p in self._named.items()}
        return found

    def export(self, dtype: str = "float32") -> Snapshot:
        """x by parameter name, cast to `dtype`, in host memory once waited for."""
        tensors, wait = self.device.copy_out(self._at("x"), EXPORT_DTYPES[dtype])
        return Snapshot(self.step_count, tensors, {}, wait)

    def snapshot(self, extra: Mapping[str, HostTensor], state: Json) -> Snapshot:
        """Everything a resume needs, as `<what>.<parameter>`, with what the caller adds to it. Reads the clock, so it
        waits for the device; `reports` has to be empty, or a skip would be counted on neither side of the commit."""
        assert not self._unread, "read the reports before a commit"
        tensors, wait = self.device.copy_out({**self._state(), **self.device.generators()})
        own = {
            "step": self.step_count,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "clocks": self.optimizer.clock_state(),
            "arithmetic": self.optimizer.arithmetic(),
            "facts": self.device.facts(),
        }
        return Snapshot(self.step_count, {**tensors, **extra}, {**state, "learner": own}, wait)

    def restore(self, files: list[Path], state: Json) -> dict[str, Tensor]:
        """The inverse of `snapshot`: loads the tensors and rebuilds y. Returns the tensors that are not the learner's.
        Raises CorruptError where names, shapes or types differ from this model's and this optimizer's."""
        stored: dict[str, Tensor] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as reader:
                    stored.update({name: reader.get_tensor(name) for name in reader.keys()})  # noqa: SIM118 (not a dict)
            except (SafetensorError, OSError, KeyError, RuntimeError) as error:
                raise CorruptError(f"{file}: cannot be loaded: {error}") from error
        for name, tensor in self._state().items():
            found = stored.pop(name, None)
            if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
                shown = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}"
                raise CorruptError(
                    f"commit: {name} is {shown}, expected {tensor.dtype} {tuple(tensor.shape)}; "
                    "the model or the optimizer differs from the one that wrote it"
                )
            tensor.copy_(found)
        own = state["learner"]
        self.optimizer.load_clock_state(own["clocks"])
        self.optimizer.load_arithmetic(own["arithmetic"])
        self.optimizer.restore_y()
        self.device.restore_generators({name: stored.pop(name) for name in list(stored) if name.startswith("rng.")})
        self.step_count, self.tokens, self.skipped = own["step"], own["tokens"], own["skipped"]
        return stored

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Begin at given weights: x, y and z are all of them. Only before the first step."""
        assert self.step_count == 0, "weights are given before the first step"
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(weights[name])
        self.optimizer.begin()
