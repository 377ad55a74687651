"""Any tokenizer of the Hugging Face ecosystem, from its tokenizer.json.

The end token is the one named in the settings, else the `eos_token` of tokenizer_config.json beside it, else the one
usual name that is in the vocabulary. `save` copies the files as they are.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer

from anytimed.contracts import ConfigError, Json, Tokens

_MOST_BYTES = 256 << 20
"""Ten times the largest tokenizer.json in use; more is not read."""
_USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


class HuggingFaceTokenizer:
    """A `Tokenizer` read from disk. Raises ConfigError when it cannot be read or has no end token."""

    class Settings(BaseModel):
        """Where the tokenizer is."""

        model_config = ConfigDict(frozen=True, extra="forbid")

        path: Path = Field(description="A tokenizer.json or the folder with one; relative to the configuration file.")
        end_token: str | None = Field(
            default=None, description="The token that ends a document; found by itself where the tokenizer names it."
        )

    def __init__(self, settings: Settings, base: Path) -> None:
        given = base / settings.path
        self._file = given / "tokenizer.json" if given.is_dir() else given
        self._config_file = self._file.with_name("tokenizer_config.json")
        try:
            content = _read(self._file)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"tokenizer: {self._file} cannot be read: {error}. Expected a tokenizer.json or a folder with one"
            ) from error
        try:
            self._tokenizer = Tokenizer.from_str(content)
        except Exception as error:  # the library raises nothing more specific
            raise ConfigError(f"tokenizer: {self._file} is not a tokenizer.json: {error}") from error
        # a document is encoded whole and as it is, whatever its length
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.digest = hashlib.sha256(content.encode()).hexdigest()
        """SHA-256 (hex) of the tokenizer.json that was read."""
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.end_token = self._find_end(settings.end_token)

    def encode(self, text: str) -> Tokens:
        """Token ids, shape (n,), without the tokens that a template would add around them."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """As `encode` of each, by the library's own threads and without the GIL (TOKENIZERS_PARALLELISM=false: by
        this one)."""
        # the fast form leaves out where in the text each token stood: a fifth of the time
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.fromiter(ids := one.ids, np.int32, len(ids)) for one in encoded]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text, special tokens included."""
        text: str = self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)
        return text

    def save(self, folder: Path) -> list[str]:
        """Copy tokenizer.json and, where there is one, tokenizer_config.json; else write one that names the end
        token."""
        shutil.copyfile(self._file, folder / "tokenizer.json")
        target = folder / "tokenizer_config.json"
        if self._config_file.is_file():
            shutil.copyfile(self._config_file, target)
        else:
            config: Json = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": self._tokenizer.id_to_token(self.end_token),
                "clean_up_tokenization_spaces": False,
            }
            target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return ["tokenizer.json", "tokenizer_config.json"]

    def _find_end(self, named: str | None) -> int:
        where = "tokenizer: end_token"
        if named is None and self._config_file.is_file():
            try:
                config = json.loads(_read(self._config_file))
                token = config.get("eos_token")
            except (OSError, ValueError, AttributeError, RecursionError) as error:
                raise ConfigError(f"tokenizer: {self._config_file} is not a tokenizer_config.json: {error}") from error
            named = token.get("content") if isinstance(token, dict) else token
            where = f"tokenizer: eos_token of {self._config_file}"
        if named is None:
            usual = [token for token in _USUAL_ENDS if self._tokenizer.token_to_id(token) is not None]
            if len(usual) != 1:
                raise ConfigError(
                    f"tokenizer: {self._file} names no end token, and of the usual ones ({', '.join(_USUAL_ENDS)}) it "
                    f"has {', '.join(usual) or 'none'}. Expected end_token = one token of its vocabulary"
                )
            named = usual[0]
        if not isinstance(named, str):
            raise ConfigError(f"{where} is {type(named).__name__}, expected a text")
        token_id = self._tokenizer.token_to_id(named)
        if token_id is None:
            raise ConfigError(
                f"{where} = {named!r} is not in the vocabulary of {self._file}. Expected a token that is, like its "
                "end-of-sequence token"
            )
        return int(token_id)


def _read(path: Path) -> str:
    """The text of a file. Raises OSError, ValueError where it is too long or not UTF-8."""
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES} bytes")
    return content.decode("utf-8")
