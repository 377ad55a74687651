"""How good checkpoints are on a text: what `anytimed eval` does.

Each checkpoint in turn is loaded, reads the same documents from the beginning, encodes them in groups with its own
tokenizer, and has a `Scorer` sum its losses. Documents are read as a stream and forgotten, so that memory does not
depend on how many there are. A limit in tokens is one of whole documents and holds for the first checkpoint; the others
get just as many documents, or the figures could not be compared.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from anytimed.contracts import AnytimedError, ConfigError, CorruptError, Json, Record, Rejected, Tokens
from anytimed.data.encoding import encode_all, size
from anytimed.service.reader_side import Loaded, load
from anytimed.storage.located import Located
from anytimed.storage.strangers import CONFIG_BYTES, read_json
from anytimed.training.device import Device
from anytimed.training.score import Scorer

log = logging.getLogger("anytimed")

LONGEST = 2048
"""Tokens of a window, where nothing says what a model was trained on and it could take more."""
_GROUP_CHARACTERS = 256 << 10
_LOGITS = 32 << 20
"""Of a batch, at most, in numbers: 128 MB and as much again for their softmax."""
_MOST_TOKENS = 16_384
"""Of a batch."""

Read = Callable[[], Iterable[Record | Rejected]]
"""The documents, from the beginning."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a checkpoint makes of the documents. nats: over all `targets`; text_nats: over all tokens of the texts,
    which have `size_bytes` in UTF-8; rejected: documents that could not be read."""

    at: Located
    documents: int
    rejected: int
    size_bytes: int
    targets: int
    nats: float
    text_nats: float

    @property
    def loss(self) -> float:
        """Nats a token, over every token but the documents' first, end tokens included."""
        return self.nats / self.targets

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Of all bytes of the texts, end tokens not included."""
        return self.text_nats / math.log(2) / self.size_bytes

    def to_json(self) -> Json:
        manifest = self.at.manifest
        figures = {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return {
            "checkpoint": self.at.name,
            "id": manifest.id if manifest else None,
            "run_id": manifest.run_id if manifest else None,
            "step": manifest.step if manifest else None,
            "trained_tokens": manifest.tokens if manifest else None,
            **{name: value if math.isfinite(value) else None for name, value in figures.items()},
            "nats": self.nats,
            "tokens": self.targets,
            "text_nats": self.text_nats,
            "bytes": self.size_bytes,
            "documents": self.documents,
            "rejected": self.rejected,
        }


def window(located: Iterable[Located], asked: int | None) -> int:
    """Tokens of a window that all these checkpoints can take: as asked for, else what they were trained on. Raises
    ConfigError where one cannot."""
    found = []
    for at in located:
        try:
            longest = read_json(at.folder / "config.json", CONFIG_BYTES).get("max_position_embeddings")
        except FileNotFoundError:
            raise ConfigError(
                f"{at.folder}: no config.json; expected a published checkpoint or a Hugging Face model"
            ) from None
        if not isinstance(longest, int) or longest < 1:
            raise CorruptError(f"{at.folder}/config.json: max_position_embeddings is {longest!r}, expected a number")
        if asked is not None and asked > longest:
            raise ConfigError(f"--sequence-length: {asked}, and {at.name} takes {longest} tokens at most")
        trained = at.manifest.sequence_length if at.manifest else None
        found.append(min(longest, trained or LONGEST))
    return asked or min(found)


def score(
    at: Located,
    read: Read,
    device: Device,
    *,
    sequence_length: int,
    batch_size: int | None = None,
    most_tokens: int | None = None,
    most_documents: int | None = None,
) -> Score:
    """Score a checkpoint on documents until there are no more, or one has brought the targets to `most_tokens`, or
    there were `most_documents`. Raises ConfigError where no adapter reads the checkpoint, CorruptError, AnytimedError
    where a document cannot be encoded or nothing is left to score."""
    loaded = load(at.folder)
    rows = batch_size or batch(loaded.vocab_size, sequence_length)
    scorer = Scorer(
        loaded.model,
        loaded.module.to(device.torch_device),
        device,
        end_token=loaded.tokenizer.end_token,
        sequence_length=sequence_length,
        batch_size=rows,
    )
    rejected = _Rejections()
    documents = size_bytes = targets = 0
    for text, tokens in _encoded(rejected.left(read()), loaded, at):
        if tokens.size:
            scorer.add(tokens)
        documents, size_bytes, targets = documents + 1, size_bytes + len(text.encode()), targets + tokens.size
        if documents == most_documents or (most_tokens is not None and targets >= most_tokens):
            break
    if not targets:
        raise AnytimedError(f"--data: no document to score, {rejected.count} could not be read{rejected.example}")
    sums = scorer.sums()
    return Score(at, documents, rejected.count, size_bytes, sums.targets, sums.nats, sums.text_nats)


def batch(vocab_size: int, sequence_length: int) -> int:
    """Windows at a time: as many as keep the logits within bounds."""
    return max(1, min(_MOST_TOKENS, _LOGITS // vocab_size) // sequence_length)


class _Rejections:
    """Counts what could not be read; `example` tells the first."""

    def __init__(self) -> None:
        self.count, self.example = 0, ""

    def left(self, items: Iterable[Record | Rejected]) -> Iterator[str]:
        for item in items:
            if isinstance(item, Record):
                yield item.text
                continue
            self.count += 1
            if self.count == 1:
                self.example = f": {item.reason}"
                log.warning("a document cannot be read, and is left out%s", self.example)


def _encoded(texts: Iterator[str], loaded: Loaded, at: Located) -> Iterator[tuple[str, Tokens]]:
    """Each text with its tokens, without the end token, in order."""
    number = 0
    for group in _groups(texts):
        tokens, error = encode_all(loaded.tokenizer, group)
        for text, found in zip(group, tokens, strict=False):
            number += 1
            if found.size and not 0 <= int(found.min()) <= int(found.max()) < loaded.vocab_size:
                raise CorruptError(
                    f"{at.name}: its tokenizer gives token {int(found.max())}, its weights have {loaded.vocab_size}: "
                    "they do not belong together"
                )
            yield text, found
        if error is not None:
            raise AnytimedError(f"{at.name}: document {number + 1} cannot be encoded: {error!r}") from error


def _groups(texts: Iterator[str]) -> Iterator[list[str]]:
    """Some texts at a time, that the tokenizer encodes as one batch."""
    while (first := next(texts, None)) is not None:
        group, filled = [first], size(first)
        while filled < _GROUP_CHARACTERS and (more := next(texts, None)) is not None:
            group.append(more)
            filled += size(more)
        yield group
