"""Loading a published checkpoint with our own adapters, found by what its `config.json` says it is."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from anytimed import registry
from anytimed.config import AdapterTable
from anytimed.contracts import ConfigError, Tokenizer
from anytimed.training.sample import load_module


def load_checkpoint(folder: Path) -> tuple[torch.nn.Module, Tokenizer, int]:
    """Module, tokenizer and context length of a checkpoint's folder. Raises ConfigError where no adapter reads it."""
    folder = folder.resolve()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
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
    model = family.from_hf(config)
    return load_module(model, folder, config["vocab_size"]), tokenizer, config["max_position_embeddings"]
