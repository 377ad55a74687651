"""Loading a published checkpoint with our own adapters, found by what its `config.json` says it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from anytimed import registry
from anytimed.config import AdapterTable
from anytimed.contracts import ConfigError, CorruptError, Model, Tokenizer
from anytimed.storage.strangers import CONFIG_BYTES, read_json, weight_files
from anytimed.training.sample import load_module


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checkpoint in memory. module: on the CPU, float32, in evaluation mode; context_length: the most tokens that it
    takes at a time; vocab_size: of its embedding, which may have more rows than the tokenizer has tokens."""

    model: Model
    module: torch.nn.Module
    tokenizer: Tokenizer
    context_length: int
    vocab_size: int


def load_checkpoint(folder: Path) -> tuple[torch.nn.Module, Tokenizer, int]:
    """Module, tokenizer and context length of a checkpoint's folder. Raises as `load`."""
    loaded = load(folder)
    return loaded.module, loaded.tokenizer, loaded.context_length


def load(folder: Path) -> Loaded:
    """A checkpoint's folder, ours or a Hugging Face model's. Raises ConfigError where no adapter reads it,
    CorruptError."""
    folder = folder.resolve()
    config = read_json(folder / "config.json", CONFIG_BYTES)
    files = weight_files(folder)
    if not files:
        raise ConfigError(f"{folder}: no .safetensors file; give the folder that `anytimed pull` printed, or a URL")
    for name in (*registry.installed("anytimed.models"), *registry.allowed()):
        family = registry.find("anytimed.models", name, "sample:")
        if getattr(family, "hf_model_type", None) == config.get("model_type"):
            break
    else:
        raise ConfigError(
            f'{folder}/config.json: model_type "{config.get("model_type")}"; no installed adapter reads it'
        )
    table = AdapterTable.model_validate({"type": "huggingface", "path": str(folder / "tokenizer.json")})
    tokenizer: Tokenizer = registry.build("anytimed.tokenizers", table, str(folder), ("tokenizer",), folder)
    try:
        model = family.from_hf(config)
        vocab_size, context_length = int(config["vocab_size"]), int(config["max_position_embeddings"])
        module = load_module(model, files, config, vocab_size)
        return Loaded(model, module, tokenizer, context_length, vocab_size)
    except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CorruptError(f"{folder}/config.json: describes no model that fits the weights: {error!r}") from error
