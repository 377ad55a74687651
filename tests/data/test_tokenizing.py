"""Tokenizing here and in worker processes: the same tokens in the same order, whatever happens to the workers."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from anytimed import registry
from anytimed.config import AdapterTable
from anytimed.contracts import AnytimedError, ConfigError, Refused, StreamUnavailable, Tokenizer
from anytimed.data.encoding import PIECE_CHARACTERS, BatchTokenizer, Closed, Rebuild, WorkerDied, pieces
from anytimed.data.tokenizing import Tokenizing, tokenizing
from anytimed.data.worker_pool import WorkerPool
from anytimed_adapters.tokenizers.bytes import ByteTokenizer
from anytimed_adapters.tokenizers.huggingface import HuggingFaceTokenizer

TROUBLED = "tests.data.troubled:Troubled"


def train(folder: Path) -> Path:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    library.train_from_iterator(["the theme of the thesis, there and then"] * 3, trainer)
    library.save(str(folder / "tokenizer.json"))
    return folder


def rebuild(kind: str, base: Path = Path(), **keys: Any) -> Rebuild:
    return Rebuild(AdapterTable.model_validate({"type": kind, **keys}), "config.toml", base)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module", params=["huggingface", "bytes"])
def both(request: pytest.FixtureRequest, trained: Path) -> Iterator[tuple[Tokenizer, list[Tokenizing]]]:
    """A tokenizer, and its forms: here, one worker, two."""
    made = rebuild(request.param, trained, **({"path": "."} if request.param == "huggingface" else {}))
    tokenizer = made.build()
    forms = [tokenizing(tokenizer, workers, made) for workers in (0, 1, 2)]
    yield tokenizer, forms
    for form in forms:
        form.close()


@pytest.fixture
def troubled() -> Iterator[Any]:
    """Makes pools of the tokenizer that does what a text says."""
    registry.allow([TROUBLED])
    pools: list[WorkerPool] = []

    def make(workers: int = 1, **keys: Any) -> WorkerPool:
        made = Rebuild(
            AdapterTable.model_validate({"type": TROUBLED, "parent": os.getpid(), **keys}),
            "config.toml",
            Path(),
            tuple(registry.allowed()),
        )
        pools.append(WorkerPool(made.build(), workers, made))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def expect(tokenizer: Tokenizer, texts: list[str], got: list[Any]) -> None:
    assert len(got) == len(texts)
    for text, tokens in zip(texts, got, strict=True):
        assert tokens.dtype == np.int32 and tokens.ndim == 1
        np.testing.assert_array_equal(tokens, tokenizer.encode(text))


def eventually(condition: Any, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- the same tokens --------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.text() | st.sampled_from(["", "the theme", "🙂👩‍👩‍👧", "\x00\r\n", "<|endoftext|>", "漢字"])))
)
@example([[]])
@example([[""]])
@example([["", "", "a", ""], [], ["\U0010ffff\ue000\ufdd0"]])
@settings(max_examples=60)
def test_every_form_gives_what_encoding_one_by_one_gives(
    both: tuple[Tokenizer, list[Tokenizing]], batches: list[list[str]]
) -> None:
    tokenizer, forms = both
    for form in forms:
        pending = [form.submit(texts) for texts in batches]
        for texts, one in zip(batches, pending, strict=True):
            expect(tokenizer, texts, one.result())


def test_order_is_kept_under_uneven_loads(both: tuple[Tokenizer, list[Tokenizing]]) -> None:
    tokenizer, forms = both
    draw = random.Random(5)
    lengths = [draw.choice([0, 1, 30, 300, 10_000]) for _ in range(200)] + [PIECE_CHARACTERS]
    draw.shuffle(lengths)
    texts = [("the thesis é " * (length // 13 + 1))[:length] + str(i) for i, length in enumerate(lengths)]
    cuts = sorted(draw.sample(range(len(texts)), 30))
    batches = [texts[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
    expected = [[tokenizer.encode(text).tolist() for text in batch] for batch in batches]
    for form in forms:
        pending = [form.submit(batch) for batch in batches]
        for i in draw.sample(range(len(batches)), len(batches)):
            for _ in range(2):  # and asked again
                assert [tokens.tolist() for tokens in pending[i].result()] == expected[i]


@given(st.lists(st.integers(0, 3 * PIECE_CHARACTERS)))
def test_pieces_are_the_texts_in_order_and_bounded(lengths: list[int]) -> None:
    texts = ["x" * length for length in lengths]
    cut = list(pieces(texts))
    assert [text for _, run in cut for text in run] == texts
    for first, run in cut:
        assert texts[first : first + len(run)] == run
        assert len(run) == 1 or sum(map(len, run)) <= PIECE_CHARACTERS


def test_the_batch_method_of_hugging_face_is_its_encode(trained: Path) -> None:
    ours = HuggingFaceTokenizer(HuggingFaceTokenizer.Settings(path=Path()), trained)
    texts = ["", "the theme", " the\n", "<|endoftext|>", "🙂"]
    library = Library.from_file(str(trained / "tokenizer.json"))
    assert isinstance(ours, BatchTokenizer) and not isinstance(
        ByteTokenizer(ByteTokenizer.Settings(), trained), BatchTokenizer
    )
    for text, tokens in zip(texts, ours.encode_batch(texts), strict=True):
        assert tokens.dtype == np.int32
        assert tokens.tolist() == ours.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids


# --- what encoding raises ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("text", "here", "there", "message"),
    [
        ("value:bad", ValueError, ValueError, r"^bad(\n|$)"),
        ("stream:away", StreamUnavailable, StreamUnavailable, r"^away(\n|$)"),
        ("unheard:of", KeyError, RuntimeError, "of"),
        ("surrogate:", UnicodeEncodeError, ValueError, "surrogates not allowed"),
    ],
)
def test_an_error_is_that_of_the_first_text_that_cannot_be_encoded(
    troubled: Any, workers: int, text: str, here: type[Exception], there: type[Exception], message: str
) -> None:
    troubled()
    made = Rebuild(AdapterTable.model_validate({"type": TROUBLED}), "config.toml", Path(), (TROUBLED,))
    form = tokenizing(made.build(), workers, made)
    long = "x" * PIECE_CHARACTERS
    texts = ["a", long, "sleep:0.2", "b", text, "value:a later one", long, "value:in the other worker"]
    failing, good = form.submit(texts), form.submit(["good"])
    for _ in range(2):
        with pytest.raises(there if workers else here, match=message) as raised:
            failing.result()
        assert "text 4 of a batch of 8, counted from 0" in raised.value.__notes__
    assert [tokens.tolist() for tokens in good.result()] == [[103, 111, 111, 100]]
    form.close()
    with pytest.raises(Closed):
        form.submit(["a"])


def test_a_tokenizer_that_cannot_be_built_is_an_error_by_name(tmp_path: Path, trained: Path) -> None:
    tokenizer = rebuild("huggingface", trained, path=".").build()
    pool = WorkerPool(tokenizer, 2, rebuild("huggingface", tmp_path, path="."))
    with pytest.raises(ConfigError, match=r"config\.toml: \[tokenizer\] tokenizer: .* cannot be read"):
        pool.submit(["a"]).result()
    pool.close()


def test_another_tokenizer_than_the_daemons_is_refused(tmp_path: Path, trained: Path) -> None:
    made = rebuild("huggingface", train(tmp_path), path=".")
    tokenizer = made.build()
    content = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content + "\n")
    pool = WorkerPool(tokenizer, 1, made)
    with pytest.raises(Refused, match="its files have changed since the start"):
        pool.submit(["a"]).result()
    pool.close()


def test_other_numbers_are_another_tokenizer(troubled: Any) -> None:
    made = Rebuild(AdapterTable.model_validate({"type": TROUBLED}), "config.toml", Path(), (TROUBLED,))
    other = AdapterTable.model_validate({"type": TROUBLED, "vocab_size": 300})
    pool = WorkerPool(made.build(), 1, Rebuild(other, "config.toml", Path(), (TROUBLED,)))
    with pytest.raises(Refused, match="came to another one"):
        pool.submit(["a"]).result()
    pool.close()


# --- threads ----------------------------------------------------------------------------------------------------------


class Meeting:
    """Two batches meet while they are encoded, or are seen to be alone."""

    vocab_size, end_token = 256, 0

    def __init__(self) -> None:
        self.two = threading.Barrier(2, timeout=60)
        self.at_work: list[int] = [0]
        self._counting = threading.Lock()

    def encode(self, text: str) -> Any:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Any) -> Any:
        if texts[0] == "meet":
            self.two.wait()
        else:
            with self._counting:
                self.at_work.append(self.at_work[-1] + 1)
            time.sleep(0.02)
            with self._counting:
                self.at_work.append(self.at_work[-1] - 1)
        return [np.array([len(text) % 256], np.int32) for text in texts]

    def decode(self, tokens: Any) -> str:
        return ""

    def save(self, folder: Path) -> list[str]:
        return []


def test_two_batches_are_encoded_at_once_and_long_texts_take_turns() -> None:
    tokenizer = Meeting()
    form = tokenizing(tokenizer, 0, Rebuild(AdapterTable.model_validate({"type": TROUBLED}), "config.toml", Path()))
    both = [form.submit(["meet", "meet"]) for _ in range(2)]
    assert [[tokens.tolist() for tokens in one.result()] for one in both] == [[[4], [4]]] * 2
    lengths = [3 * PIECE_CHARACTERS + i for i in range(4)]
    pending = [form.submit(["x" * length]) for length in lengths]
    assert [one.result()[0].tolist() for one in pending] == [[length % 256] for length in lengths]
    assert max(tokenizer.at_work) == 1
    form.close()


# --- workers that die -------------------------------------------------------------------------------------------------


def test_killed_workers_lose_nothing(both: tuple[Tokenizer, list[Tokenizing]]) -> None:
    tokenizer, (_, _, pool) = both
    assert isinstance(pool, WorkerPool)
    texts = [f"{i} the theme of the thesis " * 400 for i in range(120)]
    expected = [tokenizer.encode(text) for text in texts]
    before = pool.replaced
    for round_ in range(4):
        pending = [pool.submit(texts[i : i + 8]) for i in range(0, 120, 8)]
        os.kill(pool.pids[round_ % 2], signal.SIGKILL)
        got = [*pending[0].result(), *pending[1].result()]
        os.kill(pool.pids[0], signal.SIGKILL)
        got += [tokens for one in pending[2:] for tokens in one.result()]
        for want, tokens in zip(expected, got, strict=True):
            np.testing.assert_array_equal(tokens, want)
    assert pool.replaced - before >= 4


def test_a_text_that_ends_its_worker_once_is_encoded(troubled: Any, tmp_path: Path) -> None:
    pool = troubled()
    texts = ["a", f"die once:{tmp_path}/1", "b", f"die once:{tmp_path}/2", "sleep:0.1"]
    assert ["".join(map(chr, tokens)) for tokens in pool.submit(texts).result()] == texts
    assert 1 <= pool.replaced <= 2


@pytest.mark.parametrize("workers", [1, 2])
def test_a_text_that_ends_every_worker_is_named(troubled: Any, workers: int) -> None:
    pool = troubled(workers)
    before = pool.submit(["x" * PIECE_CHARACTERS, "b"])
    failing = pool.submit(["x" * PIECE_CHARACTERS, "a", "b", "die:", "c"])
    after = [pool.submit([f"{i}", "y"]) for i in range(3)]
    with pytest.raises(
        WorkerDied, match=r"text 3 of a batch of 5.* of 4 characters.* 3 times \(the last: SIGKILL\)"
    ) as raised:
        failing.result()
    assert raised.value.index == 3
    assert before.result()[1].tolist() == [98]
    assert [one.result()[0].tolist() for one in after] == [[48], [49], [50]]
    assert pool.replaced >= 3


def test_workers_that_never_start_are_told_of(troubled: Any) -> None:
    pool = troubled(deadly_start=True)
    with pytest.raises(AnytimedError, match=r"3 workers in a row ended before .* exit status 7"):
        pool.submit(["a"]).result()


# --- processes --------------------------------------------------------------------------------------------------------


def test_workers_are_gone_when_their_parent_is_killed(trained: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-m", "tests.data.killed_parent", str(trained)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    try:
        pids = list(map(int, parent.stdout.readline().split()))
        assert len(pids) == 2 and all(map(is_alive, pids))
        for pid in pids:
            assert os.getsid(pid) == pid, "a Ctrl-C in the terminal would reach it"
            opened = [str(one.readlink()) for one in Path(f"/proc/{pid}/fd").iterdir()]
            assert str(trained / "lock") not in opened
            assert "torch" not in Path(f"/proc/{pid}/maps").read_text()
    finally:
        parent.kill()
        parent.wait()
    with (trained / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    eventually(lambda: not any(map(is_alive, pids)), 10)


def test_signals_to_all_end_no_worker(both: tuple[Tokenizer, list[Tokenizing]]) -> None:
    tokenizer, (_, pool, _) = both
    assert isinstance(pool, WorkerPool)
    texts = ["the theme"] * 3
    pool.submit(texts).result()
    before = pool.pids
    for of_all in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(before[0], of_all)
    expect(tokenizer, texts, pool.submit(texts).result())
    assert pool.pids == before


def test_closing_wakes_who_waits_and_ends_the_workers(troubled: Any) -> None:
    pool = troubled(2)
    pending = pool.submit(["sleep:600"])
    pids = pool.pids
    told: list[BaseException] = []

    def wait() -> None:
        try:
            pending.result()
        except Closed as closed:
            told.append(closed)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive()
    pool.close()
    waiting.join(30)
    assert not waiting.is_alive() and len(told) == 1
    assert not any(map(is_alive, pids))
    pool.close()
    with pytest.raises(Closed):
        pending.result()
    with pytest.raises(Closed):
        pool.submit([])


# --- a thread beside --------------------------------------------------------------------------------------------------


class Held:
    """Encodes a batch when it is let; a text "bad" cannot be encoded."""

    vocab_size, end_token = 256, 0

    def __init__(self) -> None:
        self.let, self.batches = threading.Semaphore(0), 0

    def encode(self, text: str) -> Any:
        if text == "bad":
            raise ValueError("this one")
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Any) -> Any:
        self.batches += 1
        assert self.let.acquire(timeout=60)
        return [self.encode(text) for text in texts]


def held() -> tuple[Held, Tokenizing]:
    tokenizer = Held()
    return tokenizer, tokenizing(tokenizer, 0, rebuild("bytes"))  # type: ignore[arg-type]


def test_a_batch_is_begun_before_its_result_is_asked_for() -> None:
    tokenizer, form = held()
    first, second = form.submit(["a", "bc"]), form.submit(["d", "ef"])
    tokenizer.let.release(2)
    while tokenizer.batches < 2:
        time.sleep(0.005)
    assert form.ahead > 0
    assert [t.tolist() for t in second.result()] == [[100], [101, 102]], "in any order, and again"
    assert [t.tolist() for t in first.result()] == [t.tolist() for t in first.result()] == [[97], [98, 99]]
    form.close()


def test_what_the_thread_could_not_encode_is_raised_where_it_is_asked_for_and_the_rest_goes_on() -> None:
    tokenizer, form = held()
    tokenizer.let.release(3)
    good, bad, after = (form.submit(["a", text]) for text in ("b", "bad", "c"))
    assert len(good.result()) == len(after.result()) == 2
    with pytest.raises(ValueError, match="this one") as found:
        bad.result()
    assert found.value.__notes__ == ["text 1 of a batch of 2, counted from 0"]
    form.close()


def test_closing_wakes_who_waits_for_the_thread() -> None:
    tokenizer, form = held()
    pending = form.submit(["a", "b"])
    while not tokenizer.batches:
        time.sleep(0.005)
    threading.Timer(0.05, form.close).start()
    with pytest.raises(Closed):
        pending.result()
    with pytest.raises(Closed):
        form.submit(["c"])
    tokenizer.let.release()
