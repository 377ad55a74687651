"""A model for the service under a real systemd: the shipped one, slowed down, so that the machine is left to others; it
hangs while a file `stuck` lies in the working directory, and writes down what it finds of its sandbox."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from anytimed_adapters.models.llama import LlamaModel, LlamaSettings

STEP_S = 0.05


class SlowLlama(LlamaModel):
    """Hangs, sleeps, and tells."""

    Settings = LlamaSettings

    def losses(
        self, module: Callable[..., torch.Tensor], tokens: torch.Tensor, documents: torch.Tensor | None = None
    ) -> torch.Tensor:
        if not Path("sandbox.json").exists():
            Path("sandbox.json").write_text(json.dumps(sandbox()))
        while Path("stuck").exists():
            time.sleep(3600)
        time.sleep(STEP_S)
        return super().losses(module, tokens, documents)


def sandbox() -> dict[str, object]:
    """What this process may do, tried out."""
    told = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    token = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nowhere"), "control-token")
    other = Path(os.environ.get("HF_TOKEN_PATH", "/nowhere"))
    return {
        "uid": os.getuid(),
        "status": {key: told[key].strip() for key in ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp")},
        "writes": {path: _error(Path(path).write_bytes, b"") for path in ("/etc/x", "/opt/x", "/var/lib/x", "/run/x")},
        "reads": {path: _error(os.listdir, path) for path in ("/root", "/home", "/var/lib/private")},
        "namespace": _in_a_namespace_of_its_own(),
        "devices": sorted(path.name for path in Path("/dev").iterdir()),
        "processes": sorted(p.name for p in Path("/proc").glob("[0-9]*") if p.name != str(os.getpid())),
        "tmp": [path.name for path in Path("/tmp").iterdir()],
        "umask": f"{_umask():04o}",
        "token": token.read_text() if token.exists() else None,
        "hf_token": other.read_text() if other.exists() else None,
        "token_of_others": _error(Path("/etc/credstore/anytimed.demo.control-token").read_bytes),
    }


def _error(attempt: Callable[..., object], *arguments: object) -> str:
    try:
        attempt(*arguments)
    except OSError as error:
        return type(error).__name__
    return "allowed"


def _in_a_namespace_of_its_own() -> str:
    """unshare(CLONE_NEWUSER), which Python has from 3.12 on only."""
    failed = ctypes.CDLL(None, use_errno=True).unshare(0x10000000)
    return errno.errorcode[ctypes.get_errno()] if failed else "allowed"


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
