"""Bytes as tokens: ids 0 to 255 are the bytes of the text in UTF-8, 256 ends a document. Nothing to train, nothing
lost.

`save` writes the same map as a Hugging Face tokenizer: a BPE without merges over GPT-2's byte alphabet (Radford et al.
2019: every byte stands for one printable character), ordered by byte value.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from anytimed.contracts import Json, Tokens

_END = "<|endoftext|>"


class ByteTokenizer:
    """A `Tokenizer` of 257 ids."""

    class Settings(BaseModel):
        """None: bytes need no settings."""

        model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size = 257
    end_token = 256

    def __init__(self, settings: Settings, base: Path) -> None:
        pass

    def encode(self, text: str) -> Tokens:
        """Byte values of the text in UTF-8, shape (n,). Raises UnicodeEncodeError on lone surrogates."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; U+FFFD for what is not UTF-8, the end token as Hugging Face shows it. ValueError beyond 256."""
        parts, run = [], bytearray()
        for token in tokens:
            if token == self.end_token:
                parts += [run.decode("utf-8", "replace"), _END]
                run = bytearray()
            else:
                run.append(token)
        return "".join([*parts, run.decode("utf-8", "replace")])

    def save(self, folder: Path) -> list[str]:
        """Write tokenizer.json and tokenizer_config.json."""
        # imported here: reading bytes needs no tokenizer library
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(_alphabet())}, merges=[]))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = byte_level  # type: ignore[assignment, unused-ignore]
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment, unused-ignore]
        tokenizer.add_special_tokens([AddedToken(_END, special=True, normalized=False)])
        assert tokenizer.token_to_id(_END) == self.end_token
        tokenizer.save(str(folder / "tokenizer.json"))
        config: Json = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": _END,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return ["tokenizer.json", "tokenizer_config.json"]


def _alphabet() -> list[str]:
    """GPT-2's character for every byte value: printable Latin-1 stands for itself, the others for U+0100 and up, in
    order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 0x100 + others.index(byte)) for byte in range(256)]
