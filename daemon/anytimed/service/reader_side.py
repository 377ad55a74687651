"""Loading a published checkpoint with our own adapters, found by what its `config.json` says it is."""

from __future__ import annotations

from pathlib import Path

import torch

from anytimed import registry
from anytimed.config import AdapterTable
from anytimed.contracts import ConfigError, CorruptError, Tokenizer
from anytimed.storage.strangers import CONFIG_BYTES, read_json, weight_files
from anytimed.training.sample import load_module


def load_checkpoint(folder: Path) -> tuple[torch.nn.Module, Tokenizer, int]:
    """Module, tokenizer and context length of a checkpoint's folder. Raises ConfigError where no adapter reads it."""
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
        return load_module(model, files, config, vocab_size), tokenizer, context_length
    except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CorruptError(f"{folder}/config.json: describes no model that fits the weights: {error!r}") from error
