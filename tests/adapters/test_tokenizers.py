"""Both tokenizers: what transformers loads from a saved folder is the same tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from anytimed.contracts import ConfigError
from anytimed_adapters.tokenizers.bytes import ByteTokenizer
from anytimed_adapters.tokenizers.huggingface import HuggingFaceTokenizer

TEXTS = [
    "",
    "plain",
    "  leading and trailing  ",
    "a  b   c , d ' s 're . !",  # what clean-up of spaces would change
    "line\r\nline\n\n\ttab\r",
    "NUL \x00 and DEL \x7f and \x01",
    "emoji 🙂👩‍👩‍👧 ﬁ é e\u0301 漢字 \ufeff \u2028",
    "".join(map(chr, range(0x250))),
]


def byte_tokenizer(base: Path = Path()) -> ByteTokenizer:
    return ByteTokenizer(ByteTokenizer.Settings(), base)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("bytes")
    assert sorted(byte_tokenizer().save(folder)) == sorted(path.name for path in folder.iterdir())
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_the_same_in_transformers(loaded: object, text: str) -> None:
    ours = byte_tokenizer()
    ids = ours.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode()) == loaded(text)["input_ids"]
    assert ours.decode(ids) == text == loaded.decode(ids.tolist())


def test_bytes_end_token_is_the_same_in_transformers(loaded: object) -> None:
    ours = byte_tokenizer()
    assert (loaded.eos_token_id, len(loaded)) == (ours.end_token, ours.vocab_size) == (256, 257)
    assert ours.decode([104, 105, 256, 256]) == loaded.decode([104, 105, 256, 256]) == "hi<|endoftext|><|endoftext|>"
    # in a document the end token's name is text like any other, and cannot end it
    assert 256 not in ours.encode("<|endoftext|>")


@given(st.text())
def test_bytes_come_back(text: str) -> None:
    ours = byte_tokenizer()
    assert ours.decode(ours.encode(text)) == text


def train(folder: Path, config: object = None, specials: tuple[str, ...] = ("<|endoftext|>",)) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(specials), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the theme of the thesis, there and then"] * 3, trainer)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def hugging_face(base: Path, path: str = ".", end_token: str | None = None) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(HuggingFaceTokenizer.Settings(path=Path(path), end_token=end_token), base)


def test_hugging_face_is_the_same_in_transformers_after_saving(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    train(tmp_path)
    ours = hugging_face(tmp_path, "tokenizer.json")
    assert ours.save(tmp_path / "saved") == ["tokenizer.json", "tokenizer_config.json"]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (theirs.eos_token_id, len(theirs)) == (ours.end_token, ours.vocab_size)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids.tolist() == theirs(text, add_special_tokens=False, truncation=False)["input_ids"]
        assert ours.decode(ids) == text
    assert ours.encode("the theme of the thesis").size > 4, "the file's own truncation must not shorten documents"
    again = hugging_face(tmp_path, "saved")
    assert again.end_token == ours.end_token


@pytest.mark.parametrize(
    ("config", "specials", "named", "expected"),
    [
        (None, ("<|endoftext|>",), None, "<|endoftext|>"),
        (None, ("<pad>", "</s>"), None, "</s>"),
        ({"eos_token": "<stop>"}, ("</s>", "<stop>"), None, "<stop>"),
        ({"eos_token": {"content": "<stop>", "special": True}}, ("</s>", "<stop>"), None, "<stop>"),
        ({"eos_token": None}, ("</s>",), None, "</s>"),
        ({"eos_token": "</s>"}, ("</s>", "<stop>"), "<stop>", "<stop>"),
    ],
)
def test_hugging_face_finds_its_end_token(
    tmp_path: Path, config: object, specials: tuple[str, ...], named: str | None, expected: str
) -> None:
    ours = hugging_face(train(tmp_path, config, specials), end_token=named)
    assert ours.decode([ours.end_token]) == expected


@pytest.mark.parametrize(
    ("config", "specials", "named", "told"),
    [
        (None, ("<pad>",), None, "names no end token, and of the usual ones .* it has none"),
        (None, ("</s>", "<eos>"), None, "it has </s>, <eos>"),
        (None, ("</s>",), "<stop>", "end_token = '<stop>' is not in the vocabulary"),
        ({"eos_token": "<stop>"}, ("</s>",), None, "eos_token of .*tokenizer_config.json = '<stop>' is not"),
        ([], ("</s>",), None, "is not a tokenizer_config.json"),
    ],
)
def test_hugging_face_says_what_is_wrong_with_the_end_token(
    tmp_path: Path, config: object, specials: tuple[str, ...], named: str | None, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        hugging_face(train(tmp_path, config, specials), end_token=named)


def test_hugging_face_says_what_is_wrong_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        hugging_face(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is not a tokenizer\.json"):
        hugging_face(tmp_path)
