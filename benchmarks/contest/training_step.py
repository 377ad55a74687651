"""On a GPU: how much of a real training step the optimizer takes, and whether it ever makes the host wait.

The Llama adapter's model on random tokens, float32 parameters under bfloat16 autocast, as the daemon trains: one step
is 2^19 tokens in micro-batches. Forward and backward are timed by events; their gradients then are the ones that all
contenders step with, interleaved. After the first step, in which the compiler may wait for the device, a few steps of
ours are taken with torch's sync debug mode set to "error".
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from anytimed_adapters.models.llama import LlamaModel
from contest.contenders import CONTENDERS
from contest.field import drop, enter, entries
from contest.rounds import Timer, measure
from contest.shapes import Gradients, Shape, Weights

TOKENS: Final = 2**19
LENGTH: Final = 1024
MICRO_BATCH: Final = 16
GUARDED_STEPS: Final = 3


def training_part(
    device: torch.device,
    shape: Shape,
    keys: Sequence[str],
    *,
    rounds: int,
    warmup: int,
    timer: Timer,
    told: Callable[[str], None],
    tokens: int = TOKENS,
    length: int = LENGTH,
    micro_batch: int = MICRO_BATCH,
) -> dict[str, Any]:
    """The JSON entry, less machine and peak memory."""
    torch.manual_seed(0)
    adapter = LlamaModel(shape.settings)
    module = adapter.build(shape.vocabulary, device=str(device))
    weights = Weights(dict(module.named_parameters()), adapter.roles(module))
    batch = torch.randint(shape.vocabulary, (micro_batch, length + 1), device=device)
    micro_batches = max(1, tokens // (micro_batch * length))

    def forward_backward() -> None:
        module.zero_grad(set_to_none=True)
        for _ in range(micro_batches):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = adapter.losses(module, batch).sum() / (micro_batches * micro_batch * length)
            loss.backward()  # type: ignore[no-untyped-call]

    told("forward and backward")
    forward_backward()
    times = [timer(forward_backward)[0] for _ in range(3)]
    gradients = Gradients({name: p.grad for name, p in weights.named.items() if p.grad is not None})
    module.zero_grad(set_to_none=True)

    syncs: dict[str, str | None] = {}

    def first_steps(key: str, step: Callable[[], object]) -> None:
        if CONTENDERS[key].kind != "ours":
            step()
            return
        syncs[key] = _sync_found(device, step)

    field = enter(keys, weights, gradients, told, first_steps)
    samples = measure(field.lanes(repeats=1), rounds=rounds, warmup=warmup, timer=timer, told=told)
    seconds = statistics.median(times)
    contenders = entries(field, samples)
    for key in field.running:
        mine = statistics.median(samples[key].wall)
        contenders[key]["share_of_training_step"] = round(mine / (mine + seconds), 4)
    found = {
        "status": "measured",
        "parameters": weights.elements,
        "tokens_a_step": micro_batches * micro_batch * length,
        "forward_backward_ms": round(1e3 * seconds, 2),
        "contenders": contenders,
        "host_syncs": syncs,
    }
    drop(field)
    return found


def _sync_found(device: torch.device, step: Callable[[], object]) -> str | None:
    """What torch says of the first wait for the device in a few steps; None if there is none."""
    step()  # compiles, and the compiler measures
    if device.type != "cuda":
        for _ in range(GUARDED_STEPS):
            step()
        return None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(GUARDED_STEPS):
            step()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None
