"""What the figures depend on: processor, cores, GPU, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any, Final

import torch

from anytimed.optim import native

PACKAGES: Final = ("torch", "schedulefree", "pytorch-optimizer", "zij", "heavyball")


def machine() -> dict[str, Any]:
    """The JSON entry. load: of the last minute, everybody's; native: whether our optimizers have their sweep in C, or
    why not. Packages that are not installed are not in it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "native": native.why_not() or "yes",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
