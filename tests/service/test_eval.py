"""`anytimed eval`: its figures are Hugging Face's and the daemon's own, whatever form the text comes in."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from anytimed.cli import app
from anytimed.contracts import AnytimedError, ConfigError, CorruptError, HeldRecord, Holdout, Record, Rejected
from anytimed.service.documents import Format, documents
from anytimed.service.reader_side import load
from anytimed.service.scoring import Score, batch, score, window
from anytimed.storage.located import Located, locate
from anytimed.storage.pull import list_checkpoints
from anytimed.training.device import Device
from anytimed.training.evaluate import Evaluator
from tests import tiny

LENGTH = 32

TEXTS = [
    "a",
    "the stream of records\n",
    "déjà vu — naïve 北京 🙂\n",
    "one <|endoftext|> inside is a token of the text, not the end of the document" * 2,
    "x" * 31,
    "y" * 32,
    "z" * 33,
    " ".join(tiny.WORDS * 6),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real run that has published a few checkpoints, and the texts as files."""
    folder = tmp_path_factory.mktemp("eval")
    tiny.write_text(folder / "data", 40)
    tiny.run("run", tiny.config(folder), "--steps", "40")
    (folder / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"texts/{i}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def newest(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Located:
    return locate(str(run / "published"), tmp_path_factory.mktemp("pulled"))


def scored(
    at: Located, *globs: str, length: int = LENGTH, batch_size: int | None = 3, form: Format | None = None
) -> Score:
    return score(at, lambda: documents(globs, form=form), Device("cpu"), sequence_length=length, batch_size=batch_size)


def theirs(folder: Path, texts: list[str], length: int) -> tuple[float, int, float]:
    """By transformers alone, a window at a time: nats of the targets, how many, nats of the whole texts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end, nats, targets, text_nats = tokenizer.eos_token_id, 0.0, 0, 0.0
    with torch.no_grad():
        for text in texts:
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
            for start in range(0, len(ids) - 1, length):
                piece = torch.tensor([ids[start : start + length + 1]])
                count = piece.shape[1] - 1
                out = model(input_ids=piece, labels=piece)
                nats += out.loss.item() * count
                targets += count
                text_nats += out.loss.item() * count
                if start + length >= len(ids) - 1:
                    text_nats += torch.log_softmax(out.logits[0, -2].double(), 0)[end].item()
            first = model(input_ids=torch.tensor([[end]])).logits[0, 0].double()
            text_nats -= torch.log_softmax(first, 0)[ids[0]].item()
    return nats, targets, text_nats


def test_the_figures_are_those_of_transformers(run: Path, newest: Located) -> None:
    found = scored(newest, f"{run}/texts/*.txt")
    nats, targets, text_nats = theirs(newest.folder, TEXTS, LENGTH)
    size = sum(len(text.encode()) for text in TEXTS)
    assert (found.documents, found.targets, found.size_bytes) == (len(TEXTS), targets, size)
    # float32 products in another order; their sums differ by less than 1e-5 of themselves.
    assert found.nats == pytest.approx(nats, rel=1e-5) and found.text_nats == pytest.approx(text_nats, rel=1e-5)
    assert found.loss == pytest.approx(nats / targets, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / targets), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(text_nats / math.log(2) / size, rel=1e-5)
    assert abs(text_nats - nats) / nats > 1e-3  # so the two could not be mistaken for one another


def test_the_loss_is_that_of_the_daemons_evaluation(run: Path, newest: Located) -> None:
    loaded = load(newest.folder)
    records = tuple(
        HeldRecord(
            "main", str(i), np.append(loaded.tokenizer.encode(text), loaded.tokenizer.end_token).astype(np.int32)
        )
        for i, text in enumerate(TEXTS)
    )
    device = Device("cpu")
    evaluator = Evaluator(loaded.model, loaded.module, device, sequence_length=LENGTH, batch_size=4)
    loss = evaluator.loss_at(dict(loaded.module.named_parameters()), Holdout(records, {"main": 1.0}))
    assert scored(newest, f"{run}/texts/*.txt").loss == pytest.approx(loss, rel=1e-6)


def test_it_is_the_same_every_time_and_batches_do_not_matter(run: Path, newest: Located) -> None:
    glob = f"{run}/texts/*.txt"
    first = scored(newest, glob)
    assert scored(newest, glob) == first
    for size in (1, 7, 1000, None):
        again = scored(newest, glob, batch_size=size)
        assert again.targets == first.targets and again.text_nats == pytest.approx(first.text_nats, rel=1e-6)
    # Longer windows give more context: other numbers for the same targets.
    assert scored(newest, glob, length=64).targets == first.targets
    assert scored(newest, glob, length=64).nats != pytest.approx(first.nats, rel=1e-4)


def test_the_form_of_the_text_does_not_matter(run: Path, newest: Located, tmp_path: Path) -> None:
    expected = scored(newest, f"{run}/texts/*.txt")
    lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "d.log").write_bytes(lines)
    for glob, form in (("*.jsonl", None), ("*.gz", "jsonl"), ("*.jsonl.zst", None), ("*.log", "jsonl")):
        found = scored(newest, f"{tmp_path}/{glob}", form=form)
        assert (found.text_nats, found.size_bytes) == pytest.approx((expected.text_nats, expected.size_bytes), rel=1e-6)
    # A glob that tells nothing, and a folder: each file as what its name says; .log is a text.
    for glob in (f"{tmp_path}/*", str(tmp_path), f"{tmp_path}/**"):
        found = scored(newest, glob)
        assert found.documents == 3 * len(TEXTS) + 1 and found.size_bytes == 3 * expected.size_bytes + len(lines)


def test_what_cannot_be_read_is_counted_and_left_out(newest: Located, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\nno json\n{"other": 1}\n{"text": "good too"}\n')
    found = scored(newest, f"{tmp_path}/a.jsonl")
    assert (found.documents, found.rejected, found.size_bytes) == (2, 2, 12)
    (tmp_path / "b.jsonl").write_text("no json\n")
    with pytest.raises(AnytimedError, match="no document to score, 1 could not be read: the line is not JSON"):
        scored(newest, f"{tmp_path}/b.jsonl")
    with pytest.raises(ConfigError, match=r"found no file that is not empty at .*nosuch"):
        scored(newest, f"{tmp_path}/nosuch*.txt")


def test_documents_are_read_as_a_stream_and_no_further_than_asked(newest: Located) -> None:
    taken = 0

    def endless() -> Iterator[Record | Rejected]:
        nonlocal taken
        while True:
            taken += 1
            yield Record("word " * 100, str(taken))

    found = score(newest, endless, Device("cpu"), sequence_length=LENGTH, most_tokens=2000)
    assert found.targets == 2000 and found.documents == 4 and taken < 1000
    same = score(newest, endless, Device("cpu"), sequence_length=LENGTH, most_documents=4)
    assert (same.documents, same.size_bytes) == (4, 2000)


def test_any_hugging_face_llama_and_bits_per_byte_compare_tokenizers(
    run: Path, newest: Located, tmp_path: Path
) -> None:
    """A model that knows nothing spends log2(vocabulary) bits a token, so its bits per byte follow from the tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    folder = tmp_path / "theirs"
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, num_key_value_heads=2, max_position_embeddings=64, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    )
    at = locate(str(folder), tmp_path / "unused")
    assert at.manifest is None and window([at], None) == 64
    found = scored(at, f"{run}/texts/*.txt")
    nats, targets, text_nats = theirs(folder, TEXTS, LENGTH)
    assert found.targets == targets < sum(map(len, TEXTS))
    assert (found.nats, found.text_nats) == pytest.approx((nats, text_nats), rel=1e-5)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(folder)
    found = scored(at, f"{run}/texts/*.txt")
    assert found.loss == pytest.approx(math.log(320), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(math.log2(320) * found.targets / found.size_bytes, rel=1e-6)


def test_windows_are_what_the_checkpoints_were_trained_on(run: Path, newest: Located, tmp_path: Path) -> None:
    assert newest.manifest is not None and newest.manifest.sequence_length == LENGTH
    assert window([newest], None) == LENGTH and window([newest], 100) == 100
    with pytest.raises(ConfigError, match=r"--sequence-length: 4096, and .* takes 2048 tokens at most"):
        window([newest], 4096)
    assert batch(257, 32) * 32 <= 16_384 and batch(257, 32) * 32 * 257 <= 32 << 20
    assert batch(128_256, 2048) == 1
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CorruptError, match="max_position_embeddings is None"):
        window([Located("x", tmp_path, None)], None)


def test_the_command_compares_checkpoints(run: Path) -> None:
    url = str(run / "published")
    listed = list_checkpoints(url)
    glob = f"{run}/data/*.txt"
    told = tiny.run("eval", url, f"{url}@{listed[-1].id}", "--data", glob, "--max-tokens", "3000", "--json")
    found = json.loads(told)
    late, early = found["results"]
    assert found["sequence_length"] == LENGTH and (late["id"], early["id"]) == (listed[0].id, listed[-1].id)
    assert (late["step"], late["trained_tokens"]) == (listed[0].step, listed[0].tokens)
    assert late["documents"] == early["documents"] < 40 and 3000 <= late["tokens"] == early["tokens"] < 4000
    # It has learned something, and bytes are tokens here: both losses say so.
    assert late["loss"] < early["loss"] < math.log(257) + 0.5
    assert late["bits_per_byte"] == pytest.approx(late["loss"] / math.log(2), rel=0.01)
    here = CliRunner()  # a process of its own would import torch once more
    shown = here.invoke(app, ["eval", url, "--data", glob, "--data", f"{run}/texts", "--checkpoint", "best"])
    assert shown.exit_code == 0, shown.output
    table = shown.output
    assert "@best" in table and "48 documents" in table and "bits/byte" in table
    wrong = here.invoke(app, ["eval", url, "--data", glob, "--device", "tpu"])
    assert isinstance(wrong.exception, ConfigError) and "--device" in str(wrong.exception)


@pytest.mark.parametrize("ask", [lambda f: documents([f"{f}/*.npy"]), lambda f: documents([f"{f}/empty"])])
def test_files_without_text_are_named(tmp_path: Path, ask: Callable[[Path], Iterator[Record | Rejected]]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="found no file that is not empty"):
        next(ask(tmp_path))
