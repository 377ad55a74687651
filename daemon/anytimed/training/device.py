"""The one seam for device work: everything that differs between a CPU and CUDA goes through `Device`.

In order: choosing the device; taking a batch there without blocking; autocast; copying tensors out on a side stream
while the next step runs; the generators' states; memory and settings that make a resume exact."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anytimed.contracts import ConfigError, HostTensor, Json

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def _ask_for_determinism() -> None:
    """torch.use_deterministic_algorithms(True), which imports the compiler to tell it so: a second of every start.
    Where nobody has imported it yet, a variable tells it when somebody does.

    Where it shall only warn, torch also takes the other form of an operation that has both: attention's gradient on
    CUDA would be added up in any order. An operation that has no deterministic form raises RuntimeError."""
    if "torch._inductor.config" in sys.modules:
        torch.use_deterministic_algorithms(True)
    else:
        os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
        torch.set_deterministic_debug_mode("error")


def inexact(error: BaseException) -> str | None:
    """What torch says of an operation that it refused because it has no deterministic form; None of another error."""
    said = str(error)
    if isinstance(error, RuntimeError) and "use_deterministic_algorithms" in said:
        return said.split(", but you set", maxsplit=1)[0]
    return None


def host_view(tensor: Tensor) -> HostTensor:
    """The bytes of a contiguous CPU tensor, not copied."""
    if not tensor.numel():
        return HostTensor(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), memoryview(b""))
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    return HostTensor(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), data)


class Device:
    """A CPU or one CUDA device."""

    def __init__(self, name: str = "auto", *, threads: int = 0, precision: str = "float32", deterministic: bool = True):
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(
                f'[run] device: found "{name}", but torch {torch.__version__} sees no CUDA device; '
                'use device = "auto", or install a CUDA build of torch and its driver'
            )
        # With its number: torch takes "cuda" alone in some places, and not in others.
        self.torch_device = torch.device("cuda:0" if name == "cuda" else name)
        if name.startswith("cuda") and (self.torch_device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f'[run] device: found "{name}", but there are {torch.cuda.device_count()} CUDA devices')
        self.is_cuda = self.torch_device.type == "cuda"
        self.precision = precision if self.is_cuda else "float32"
        self._copies = torch.cuda.Stream(self.torch_device) if self.is_cuda else None  # type: ignore[no-untyped-call]
        if self.is_cuda:
            torch.cuda.set_device(self.torch_device)
        if threads:
            torch.set_num_threads(threads)
        if deterministic:
            # Read by cuBLAS at its first use, so it has to stand before any product runs.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            _ask_for_determinism()
            # The mode would also fill every new tensor with NaN: a debugging aid that costs a pass over memory.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def __str__(self) -> str:
        if self.is_cuda:
            return f"{torch.cuda.get_device_name(self.torch_device)} ({self.precision})"
        return f"CPU, {torch.get_num_threads()} threads ({self.precision})"

    def put(self, tokens: NDArray[np.integer[Any]]) -> Tensor:
        """Token ids or labels on the device as int64, same shape; pinned and asynchronous on CUDA."""
        host = torch.from_numpy(np.require(tokens, requirements="W"))  # of another kind torch warns
        if self.is_cuda:
            return host.pin_memory().to(self.torch_device, non_blocking=True).long()
        return host.long()

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.is_cuda and self.precision == "bfloat16":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def copy_out(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> tuple[dict[str, HostTensor], Callable[[], None]]:
        """Copies in host memory of what the tensors hold at this point of the device's work (floating ones cast to
        `dtype` where given), and a function that waits until they have arrived. The caller may change the tensors at
        once."""

        def cast(tensor: Tensor) -> Tensor:
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            return tensor.detach().to(wanted, memory_format=torch.contiguous_format, copy=True)

        copies = {name: cast(tensor) for name, tensor in tensors.items()}
        if self._copies is None:
            return {name: host_view(copy) for name, copy in copies.items()}, lambda: None
        self._copies.wait_stream(torch.cuda.current_stream())
        hosts: dict[str, Tensor] = {}
        with torch.cuda.stream(self._copies):
            for name, copy in copies.items():
                if copy.is_cuda:
                    hosts[name] = torch.empty(copy.shape, dtype=copy.dtype, pin_memory=True)
                    hosts[name].copy_(copy, non_blocking=True)
                    copy.record_stream(self._copies)
                else:
                    hosts[name] = copy
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._copies)
        return {name: host_view(host) for name, host in hosts.items()}, arrived.synchronize

    def read(self, tensors: Iterable[Tensor]) -> list[float]:
        """The values of tensors, one after the other: one synchronisation for all of them."""
        listed = list(tensors)
        values: list[float] = torch.cat([s.detach().double().reshape(-1) for s in listed]).tolist() if listed else []
        return values

    def generators(self) -> dict[str, Tensor]:
        """States of torch's generators by name, uint8."""
        states = {"rng.cpu": torch.get_rng_state()}
        if self.is_cuda:
            states["rng.cuda"] = torch.cuda.get_rng_state(self.torch_device)
        return states

    def restore_generators(self, states: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(states["rng.cpu"])
        if self.is_cuda and "rng.cuda" in states:
            torch.cuda.set_rng_state(states["rng.cuda"], self.torch_device)

    def usage(self) -> Json | None:
        """How full the device is, and how busy; None on a CPU. Asks the driver, not the device's queue."""
        if not self.is_cuda:
            return None
        free, total = torch.cuda.mem_get_info(self.torch_device)
        busy: float | None = None
        # Without nvidia-ml-py, or a driver that tells it, it is not known; its errors derive from Exception alone.
        with contextlib.suppress(Exception):
            busy = torch.cuda.utilization(self.torch_device) / 100
        return {
            "name": torch.cuda.get_device_name(self.torch_device),
            "memory_used_bytes": total - free,
            "memory_total_bytes": total,
            "utilisation": busy,
        }

    def facts(self) -> dict[str, str | int]:
        """What has to be the same for a resume to be bit for bit; stored in the commit, compared by name at the
        start."""
        return {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(self.torch_device) if self.is_cuda else "cpu",
            "precision": self.precision,
        }
