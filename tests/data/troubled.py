"""A tokenizer for the tests of the workers, named as code: what a text says, happens. A worker imports it: no pytest
here."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from anytimed.contracts import StreamUnavailable, Tokens


class Unheard(KeyError):
    """An exception that the daemon's process need not know."""


class Troubled:
    """A token a character, except for texts that begin with an order."""

    class Settings(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")
        parent: int = 0
        vocab_size: int = 1 << 21
        deadly_start: bool = False

    end_token = 0

    def __init__(self, settings: Settings, base: Path) -> None:
        self.vocab_size = settings.vocab_size
        if settings.deadly_start and os.getpid() != settings.parent:
            os._exit(7)

    def encode(self, text: str) -> Tokens:
        order, _, argument = text.partition(":")
        match order:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "die once":  # the file says that it has
                if not Path(argument).exists():
                    Path(argument).touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            case "sleep":
                time.sleep(float(argument))
            case "value":
                raise ValueError(argument)
            case "stream":
                raise StreamUnavailable(argument)
            case "unheard":
                raise Unheard(argument)
            case "surrogate":
                "\ud800".encode()
        return np.array([ord(character) for character in text], np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))

    def save(self, folder: Path) -> list[str]:
        raise NotImplementedError("nothing is exported here")
