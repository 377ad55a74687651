"""Fault 18: SIGKILL at random moments, by `anytimed prove`, while a reader pulls without pause; and an audit of what
was trained on that asks neither the pipeline nor its counters."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests import tiny
from tests.crash import audited
from tests.faultlog import FULL, Injected

KILLS, STEPS = (200, 1200) if FULL else (20, 200)
LENGTH, BATCH, BLOCK, HELD_OUT = 32, 4, 64, 0.25


def unique(number: int, draw: random.Random) -> bytes:
    return f"{number:06d} {draw.randbytes(draw.randrange(100, 500)).hex()}".encode()


def write_records(folder: Path, count: int) -> list[bytes]:
    """Records of which no 33 bytes come twice, so that a sequence tells where it is from."""
    folder.mkdir()
    draw = random.Random(18)
    contents = [unique(i, draw) for i in range(count)]
    for i, content in enumerate(contents):
        (folder / f"{i:06d}.txt").write_bytes(content)
    return contents


def held_out(content: bytes) -> bool:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") < HELD_OUT * 2**64


def windows(contents: Sequence[bytes], held_out: Callable[[bytes], bool] = held_out) -> dict[bytes, int]:
    """Every sequence that training may see, by its tokens: records laid end to end, an end token (256) after each."""
    tokens = [t for content in contents if not held_out(content) for t in (*content, 256)]
    flat = np.array(tokens, "<i2")
    count = (len(flat) - 1) // LENGTH
    numbered = {flat[k * LENGTH : (k + 1) * LENGTH + 1].tobytes(): k for k in range(count)}
    assert len(numbered) == count, "a sequence comes twice: the audit could not tell them apart"
    return numbered


def audit(
    lives: Sequence[NDArray[np.int16]],
    contents: Sequence[bytes],
    steps: int = STEPS,
    held_out: Callable[[bytes], bool] = held_out,
) -> None:
    """The undisturbed run used every sequence once; the killed one used them at the same steps, and at no other."""
    known = windows(contents, held_out)
    line, *killed = [[tuple(known[row.tobytes()] for row in batch) for batch in life] for life in lives]
    used = [k for batch in line for k in batch]
    assert len(used) == len(set(used)), "a sequence was trained on twice"
    left_out = set(range(max(used))) - set(used)
    longest_block = BLOCK + max(map(len, contents)) // LENGTH + 1
    assert not left_out or min(left_out) > max(used) - longest_block, "sequences of a finished block were passed over"
    same_steps(line, killed, steps)


def same_steps(line: Sequence[Hashable], killed: Sequence[Sequence[Hashable]], steps: int) -> None:
    """The lives of a killed run, batch by batch, were the steps of the undisturbed `line`, in its order; no batch comes
    twice in that."""
    assert len(line) == steps
    at = {batch: step for step, batch in enumerate(line)}
    spans = [(at[life[0]], at[life[0]] + len(life)) for life in killed]
    for life, (first, end) in zip(killed, spans, strict=True):
        assert list(life) == list(line[first:end]), f"steps {first} to {end} were taken on other batches"
    assert spans[0][0] == 0 and spans[-1][1] == steps
    for (before, reached), (first, _) in pairwise(spans):
        assert before <= first <= reached, "a commit was lost, or steps were passed over"


@pytest.mark.fault(18)
@pytest.mark.timeout(3600)
def test_killed_at_random_it_ends_where_it_would_have_and_a_reader_never_sees_less(
    tmp_path: Path, injected: Injected
) -> None:
    contents = write_records(tmp_path / "data", STEPS * BATCH * LENGTH // 300)
    config = tiny.config(
        tmp_path, model={"type": "audited"}, commits={"every_steps": 4}, exports={"every_steps": 9, "keep": 1000}
    )
    scratch, environment = tmp_path / "scratch", audited.installed(tmp_path / "plugin")
    reader = subprocess.Popen(
        [sys.executable, "-m", "tests.crash.reader", scratch / "killed" / "published", tmp_path / "pulled"],
        cwd=audited.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        told = tiny.run(
            "prove", config, "--steps", str(STEPS), "--kills", str(KILLS), "--keep", scratch, "--json",
            timeout_s=3000, **environment,
        )  # fmt: skip
    finally:
        pulls, _ = reader.communicate()
    proof = json.loads(next(line for line in told.splitlines() if line.startswith("{")))
    assert proof["equal"], proof["found"]
    assert len(proof["killed"]) == KILLS
    assert not proof["dry"]
    tiny.assert_same_state(tiny.newest_commit(scratch / "undisturbed"), tiny.newest_commit(scratch / "killed"))

    audit(audited.trained_on(tmp_path / "plugin", BATCH, LENGTH), contents)
    # The counts that the commit holds, against the same ones made of the files.
    read = tiny.state_of(tiny.newest_commit(scratch / "killed"))[1]["position"]["sources"]["main"]
    first = contents[: read["records"] + read["held_out"]]
    assert read["held_out"] == sum(map(held_out, first))
    assert read["tokens"] == sum(len(content) + 1 for content in first if not held_out(content))
    assert read["rejected"] == 0

    assert reader.returncode == 0, pulls
    *pulled, polls = [line.split() for line in pulls.splitlines()]
    assert int(polls[1]) >= len(pulled) >= 5
    undisturbed = {
        int(path.parent.name[-10:]): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (scratch / "undisturbed" / "published" / "checkpoints").glob("*/model.safetensors")
    }
    # On a busy machine an export gives way to the next one, in either run.
    both = [(int(step), digest) for step, digest in pulled if int(step) in undisturbed]
    assert len(both) >= 5 and 2 * len(both) > len(pulled)
    for step, digest in both:
        assert undisturbed[step] == digest, f"the checkpoint of step {step} has tensors of another step"
    for number, (during, step) in enumerate(proof["killed"]):
        injected(18, f"kill {number}, {during}, newest commit {step}")
