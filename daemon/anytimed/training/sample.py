"""Text from a published checkpoint: load it with our own model, continue a prompt token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from anytimed.contracts import CorruptError, Json, Model, Tokenizer


def load_module(model: Model, files: Sequence[Path], hf_config: Json, vocab_size: int) -> torch.nn.Module:
    """The module with the tensors of checked safetensors files, in evaluation mode, on the CPU in float32. Raises
    ConfigError where tensors do not fit, CorruptError on what cannot be loaded or is not finite."""
    weights = model.initial_weights(load_tensors(files), hf_config, vocab_size)
    module = model.build(vocab_size)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name].float())
    return module.eval()


def load_tensors(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's files, by name. Raises CorruptError naming file and tensor."""
    found: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            raise CorruptError(f"{file}: cannot be loaded: {error}") from error
        for name, tensor in tensors.items():
            if name in found:
                raise CorruptError(f"{file}: tensor {name} is in another file too; expected every tensor once")
            if tensor.is_floating_point() and not tensor.float().isfinite().all():
                raise CorruptError(f"{file}: tensor {name} holds NaN or Inf; it would spoil whatever starts from it")
        found |= tensors
    return found


@torch.no_grad()
def continue_text(
    module: torch.nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    context_length: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> Iterator[int]:
    """Token ids after the prompt, until the end token or `max_new_tokens`. Temperature 0 takes the most likely
    token."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = [int(t) for t in tokenizer.encode(prompt)] or [tokenizer.end_token]
    for _ in range(max_new_tokens):
        logits = module(torch.tensor([ids[-context_length:]]))[0, -1].float()
        if temperature == 0:
            chosen = int(logits.argmax())
        else:
            best, index = logits.topk(min(top_k, logits.numel()))
            drawn = torch.multinomial(torch.softmax(best / temperature, 0), 1, generator=generator)
            chosen = int(index[drawn])
        if chosen == tokenizer.end_token:
            return
        ids.append(chosen)
        yield chosen


def decode_stream(tokenizer: Tokenizer, tokens: Iterator[int], shown: Sequence[int] = ()) -> Iterator[str]:
    """Text as it grows: what the tokens so far decode to, piece by piece, waiting for characters to be complete."""
    ids, done = list(shown), tokenizer.decode(list(shown)) if shown else ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("�"):
            yield text[len(done) :]
            done = text
    text = tokenizer.decode(ids)
    if text != done:
        yield text[len(done) :]
