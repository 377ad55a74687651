"""`anytimed data`: the sources as they stand and the samples as they will be trained on, and nothing is changed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from anytimed.cli import data as command
from anytimed.config import load
from anytimed.contracts import ConfigError, CorruptError, Describing, Finished, Json, Refused
from anytimed.data.pipeline import Dry
from anytimed.service import data_view
from anytimed.service.assembly import Parts, parts_of
from anytimed.service.control import ask
from anytimed.service.data_report import DataReport, report
from anytimed.service.peek import PassedOver, Sample, peek
from anytimed.service.run_on_disk import read_run
from anytimed.storage.journal import Journal
from tests import tiny
from tests.crash import audited

BATCH, LENGTH = 4, 32


def mixed(folder: Path, **changes: Json) -> Path:
    """Three sources under three rules, in blocks that a run of a few dozen steps passes several of."""
    tiny.write_text(folder / "data", 30)
    tiny.write_text(folder / "more", 5, prefix="more", words=40)
    tiny.write_text(folder / "third", 4, prefix="third", words=40)
    tables: dict[str, Json] = {
        "data": {"shuffle_block_sequences": 32},
        "sources.main": {"weight": 3.0},
        "sources.more": {
            "type": "text",
            "url": str(folder / "more" / "*.txt"),
            "when_dry": "replay",
            "passes": 4,
        },
        "sources.third": {"type": "text", "url": str(folder / "third" / "*.txt"), "when_dry": "others"},
    }
    for name, table in changes.items():
        tables.setdefault(name, {}).update(table)
    return tiny.config(folder, **tables)


def seen(parts: Path) -> tuple[Parts, DataReport]:
    made = parts_of(load(parts))
    return made, report(made, read_run(Path(made.config.run.directory)), None)


def said(config: Path, **options: Any) -> str:
    """What `anytimed data` writes, in this process, on a wide terminal."""
    written = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(written):
        patched.setattr(command, "out", Console(file=written, width=200))
        command.data(config, **{"peek": None, "as_json": False, "allow_adapter": None, **options})
    return written.getvalue()


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below, with what it holds and when it was written; folders with their time only."""
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else b"", path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if not path.is_socket()
    }


@contextlib.contextmanager
def daemon(config: Path, step: int) -> Iterator[subprocess.Popen[str]]:
    """One that runs, and has come to a step."""
    process = tiny.start("run", config)
    try:
        deadline = time.monotonic() + 60
        while live(config.parent).get("step", 0) < step:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.communicate()


def live(folder: Path) -> Json:
    with contextlib.suppress(OSError):
        return ask(folder / "run" / "control.sock", "GET", "/status", timeout_s=5)
    return {}


# --- what comes next --------------------------------------------------------------------------------------------------


def test_what_it_shows_is_bit_for_bit_what_is_trained_on_next(tmp_path: Path) -> None:
    environment = audited.installed(tmp_path)
    config = mixed(tmp_path, model={"type": "audited"})
    tiny.run("run", config, "--steps", "21", **environment)
    commit, before = tiny.newest_commit(tmp_path), content(tmp_path)
    state = json.loads((commit / "state.json").read_text())
    assert state["position"]["index"] > 0, "the run should have stopped inside a block"

    decided = len((tmp_path / "run" / "journal.jsonl").read_text().splitlines())
    found = json.loads(tiny.run("data", config, "--peek", "1000", "--json", **environment))
    assert content(tmp_path) == before, "looking has changed something"
    assert found["commit"]["step"] == 21
    assert found["daemon"] is None
    shown = [np.array(sample["tokens"], np.int16) for sample in found["samples"]]
    numbers = [(sample["batch"], sample["row"]) for sample in found["samples"]]
    assert numbers == [(22 + i // BATCH, 1 + i % BATCH) for i in range(len(shown))]
    assert "main" in found["waiting"]

    # Beyond what the journal holds: sources were read again, left out, and waited for, as the daemon will decide it.
    steps = len(shown) // BATCH
    tiny.run("run", config, "--steps", str(21 + steps), **environment)
    first, second = audited.trained_on(tmp_path, BATCH, LENGTH)
    assert len(first) == 21
    assert len(second) == steps > 60
    assert np.array_equal(np.stack(shown).reshape(steps, BATCH, LENGTH + 1), second)
    since = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()[decided:]
    assert {"replayed", "left_out"} <= {json.loads(line)["entry"]["kind"] for line in since}


def test_every_token_of_a_sample_is_in_one_document_of_its_source(tmp_path: Path) -> None:
    config = mixed(tmp_path, data={"tokenizer_workers": 2})
    parts = parts_of(load(config))
    samples = []
    for item in peek(parts, read_run(tmp_path / "run"), 200):
        assert isinstance(item, Sample)
        samples.append(item)
        children = [p.read_text() for p in Path("/proc/self/task").glob("*/children")]
        assert all(str(os.getpid()) not in child for child in children)
    assert len(samples) == 200
    assert not (tmp_path / "run").exists()
    for sample in samples:
        documents = sample.documents(parts.tokenizer.end_token)
        assert np.array_equal(np.concatenate([d.tokens for d in documents]), sample.tokens)
        assert sum(sample.targets().values()) == LENGTH
        for document in documents:
            ends = document.tokens == parts.tokenizer.end_token
            assert ends.sum() == ends[-1] == document.ended
        told = sample.to_json(parts.tokenizer)
        for document in told["documents"]:
            # Each file says in its first line which source it is of.
            word = document["text"].partition(" ")[0]
            if word in ("doc", "more", "third"):
                assert document["source"] == {"doc": "main"}.get(word, word)
    several = [s for s in samples if len(s.targets()) > 1]
    assert several, "no sample has documents of two sources"


def test_a_batch_that_the_guard_jumped_over_is_not_shown(tmp_path: Path) -> None:
    config = mixed(tmp_path)
    tiny.run("run", config, "--steps", "8")
    journal = Journal(tmp_path / "run" / "journal.jsonl")
    journal.append("training", {"kind": "jump", "step": 8, "first_batch": 9, "last_batch": 10})
    journal.close()
    items = list(peek(parts_of(load(config)), read_run(tmp_path / "run"), 5))
    assert items[:2] == [PassedOver(9), PassedOver(10)]
    assert [i.batch for i in items[2:] if isinstance(i, Sample)] == [11] * 4 + [12]


def test_a_commit_that_the_training_went_back_from_is_not_where_it_goes_on(tmp_path: Path) -> None:
    config = mixed(tmp_path)
    tiny.run("run", config, "--steps", "21")
    seqs = sorted(int(path.name.partition("-")[0]) for path in (tmp_path / "run" / "commits").iterdir())
    span = {"first_batch": 100, "last_batch": 101, "to_seq": seqs[0], "newest_seq": seqs[-1]}
    journal = Journal(tmp_path / "run" / "journal.jsonl")
    journal.append("training", {"kind": "rollback", "step": 21, "why": "a test", **span})
    journal.close()
    run = read_run(tmp_path / "run")
    assert run.commit is not None
    assert run.commit.manifest.seq == seqs[0] < seqs[-1]
    first = next(iter(peek(parts_of(load(config)), run, 1)))
    assert isinstance(first, Sample)
    assert first.batch == run.state["position"]["batches"] + 1


def test_samples_on_a_terminal_are_short_and_cannot_steer_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    evil = "a\x1b[2J\x07b\u202ec\r\nd\te\u200bf\x9b31m [bold]markup[/bold] [/nothing] \ud7ff 漢字"
    for i in range(12):
        (tmp_path / "data" / f"evil{i:02}.txt").write_text(f"{i} {evil}", newline="")
    config = tiny.config(tmp_path, data={"sequence_length": 64, "holdout": {"fraction": 1e-9}, "mask_documents": True})
    parts = parts_of(load(config))
    run = read_run(tmp_path / "run")
    items = list(peek(parts, run, 3))
    out = io.StringIO()
    console = Console(file=out, width=40, force_terminal=False)
    head = data_view.Head(run.told(), None, mask_documents=True)
    for line in data_view.sample_lines(head, items, parts.tokenizer, console, time.time()):
        console.print(line)
    told = out.getvalue()
    assert not [c for c in told if ord(c) < 32 and c != "\n"]
    assert not set("\x9b\u202e\u200b\x07\x1b") & set(told)
    flowed = told.replace("\n", "")
    for sign in ("\\x1b[2J", "\\u202e", "\\x9b", "↵", "→", "<|end|>", "[bold]markup[/bold]"):
        assert sign in flowed, sign
    assert "attends to its own" in told
    blocks = told.split("\nbatch ")
    assert len(blocks) == 4
    assert all(len(block.strip().splitlines()) <= 3 + data_view.SAMPLE_LINES for block in blocks[1:])


# --- where the sources stand ------------------------------------------------------------------------------------------


def test_without_a_run_the_sources_stand_at_their_beginning_and_nothing_is_made(tmp_path: Path) -> None:
    config = mixed(tmp_path)
    before = content(tmp_path)
    told = tiny.run("data", config)
    assert content(tmp_path) == before
    assert "none yet" in told
    assert "doc0000.txt (entry 1 of 30)" in told
    assert "30 new entries" in told
    _, found = seen(config)
    sizes = {name: [p.stat().st_size for p in (tmp_path / name).iterdir()] for name in ("data", "more", "third")}
    for name, folder, share in (("main", "data", 0.6), ("more", "more", 0.2), ("third", "third", 0.2)):
        row = found.rows[name]
        assert row.share == row.wanted == pytest.approx(share)
        assert (row.records, row.entries, row.new_entries) == (0, 0, len(sizes[folder]))
        assert row.new_lag == sum(sizes[folder])


def test_a_commit_says_what_was_read_and_the_source_what_comes_next(tmp_path: Path) -> None:
    config = mixed(tmp_path)
    tiny.run("run", config, "--steps", "21")
    tiny.write_text(tmp_path / "data", 2, prefix="new")
    _, state = tiny.state_of(tiny.newest_commit(tmp_path))
    _, found = seen(config)
    assert found.commit is not None
    assert (found.commit["step"], found.commit["batches"], found.daemon) == (21, 21, None)
    assert found.commit["block"] == state["position"]["block"] > 0
    for name, at in state["position"]["sources"].items():
        row = found.rows[name]
        told = {key: getattr(row, key) for key in ("records", "held_out", "rejected", "tokens", "place", "pass_number")}
        assert told == {key: at[key] for key in told}
        assert row.records + row.held_out > 0
    main = found.rows["main"]
    assert (main.entries, main.new_entries) == (30, 2)
    read = state["position"]["sources"]["main"]["records"] + state["position"]["sources"]["main"]["held_out"]
    files = sorted((tmp_path / "data").glob("doc*"))
    assert main.lag == sum(path.stat().st_size for path in files[read:])
    assert main.next == f"{files[read].name} (entry {read + 1} of 32)"
    assert json.loads(said(config, as_json=True))["sources"]["main"]["lag"] == main.lag
    assert f"of the commit, at the beginning of its block {found.commit['block']}" in said(config)


def test_beside_a_daemon_the_figures_are_its_own_and_it_trains_on_undisturbed(tmp_path: Path) -> None:
    config = mixed(tmp_path)
    with daemon(config, 30) as process:
        while live(tmp_path)["state"] != "waiting for data":
            time.sleep(0.05)
        status = live(tmp_path)
        found = json.loads(said(config, as_json=True))
        assert found["daemon"] == {"step": status["step"], "pid": process.pid}
        for name, source in status["sources"].items():
            row = found["sources"][name]
            keys = ("records", "held_out", "tokens", "entries", "share", "pass_number", "place")
            assert [row[key] for key in keys] == [source[key] for key in keys]
            assert row["lag"] == source["lag_bytes"]
            assert row["left_out"] is source["dry"]
        assert found["sources"]["third"]["left_out"] is True
        assert found["sources"]["main"]["next"] == ""
        assert f"(pid {process.pid}, step" in said(config)
        assert "running, at step" in said(config, peek=1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        assert "WARNING" not in output


def test_a_source_that_does_not_answer_says_so_in_its_row(tmp_path: Path) -> None:
    config = mixed(tmp_path)
    shutil.rmtree(tmp_path / "more")
    told = said(config)
    assert "does not answer:" in told
    assert "doc0000.txt (entry" in told
    _, found = seen(config)
    assert found.rows["more"].unavailable is not None
    assert found.rows["main"].unavailable is None
    assert found.rows["main"].new_entries == 30
    items = list(peek(parts_of(load(config)), read_run(tmp_path / "run"), 1000))
    assert isinstance(items[-1], Dry)
    assert "more" in items[-1].reasons


def test_rewritten_data_says_so(tmp_path: Path) -> None:
    config = mixed(tmp_path)
    tiny.run("run", config, "--steps", "21")
    (tmp_path / "data" / "doc0000.txt").write_text("short")
    told = said(config)
    assert "refused:" in told
    assert "doc0000.txt changed after it was taken into the run" in told
    with pytest.raises(Refused, match="changed after it was taken into the run"):
        said(config, peek=1)


def test_bad_records_their_budget_and_the_quarantine(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    tiny.write_text(tmp_path / "main", 30)
    lines = [json.dumps({"text": f"line {i} of words and words"}) if i % 3 else "{broken" for i in range(300)]
    (tmp_path / "data" / "a.jsonl").write_text("\n".join(lines) + "\n")
    bad = {"url": str(tmp_path / "data" / "*.jsonl"), "type": "jsonl", "rejected_records": 20}
    changes: dict[str, Json] = {
        "sources.main": {"url": str(tmp_path / "main" / "*.txt"), "weight": 0.2},
        "sources.bad": {**bad, "when_dry": "others"},
    }
    config = tiny.config(tmp_path, **changes)
    tiny.run("run", config, "--steps", "60")
    _, found = seen(config)
    row = found.rows["bad"]
    assert row.rejected == 21 == row.quarantined
    assert row.suspended is not None
    assert row.rejected_fraction == pytest.approx(21 / (row.records + row.held_out + 21))
    assert row.rejected_budget == {"records": 20, "fraction": 0.01}
    assert row.quarantine_reason
    told = said(config)
    assert "suspended: 21 of" in told
    assert f"21 records in quarantine, the last one: {row.quarantine_reason}"[:80] in told


def test_a_mixture_that_is_not_in_force_yet_says_so(tmp_path: Path) -> None:
    config = mixed(tmp_path)
    tiny.run("run", config, "--steps", "8")
    text = config.read_text().replace("weight = 3.0", "weight = 8.0")
    config.write_text(text.replace('[sources.third]\ntype = "text"\n', '[sources.third]\ntype = "text"\nweight = 0\n'))
    _, found = seen(config)
    assert found.mixture_waits
    assert (found.rows["main"].share, found.rows["main"].wanted) == (pytest.approx(0.6), pytest.approx(8 / 9))
    assert (found.rows["third"].share, found.rows["third"].wanted) == (pytest.approx(0.2), None)
    told = said(config)
    assert "takes effect at the first block" in told
    assert "by the configuration, not in force yet, it takes no part" in told


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_a_config_that_is_wrong_or_does_not_fit_ends_with_2(tmp_path: Path) -> None:
    config = mixed(tmp_path)
    tiny.run("run", config, "--steps", "8")
    text = config.read_text()
    config.write_text(text.replace("sequence_length = 32", "sequence_length = 16"))
    with pytest.raises(ConfigError, match="does not fit the commit"):
        said(config, peek=1)
    config.write_text(text.replace('type = "text"', 'type = "text"\nmax_record_bytes = 100', 1))
    with pytest.raises(ConfigError, match="reads something else than before"):
        seen(config)
    config.write_text(text.replace('type = "text"', 'type = "nothing"'))
    tiny.run("data", config, expect=2)


@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json", "rank-00000-of-00001.safetensors"])
def test_a_newest_commit_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    config = mixed(tmp_path)
    tiny.run("run", config, "--steps", "16")
    newest = tiny.newest_commit(tmp_path)
    older = sorted(newest.parent.iterdir())[0]
    (older / "MANIFEST.json").write_bytes(b"{}")  # of no concern to anyone who wants the newest
    seen(config)
    data = bytearray((newest / name).read_bytes())
    data[10] ^= 1
    (newest / name).write_bytes(data)
    with pytest.raises(CorruptError, match=f"{newest}.*anytimed verify"):
        seen(config)
    if name == "state.json":
        output = tiny.run("data", config, expect=1)
        assert str(newest) in output
        assert "Traceback" not in output


def test_files_tell_where_a_place_is(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, lines in (("a", 3), ("b", 1), ("c", 2)):
        text = "".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(lines))
        (tmp_path / "data" / f"{name}.jsonl").write_text(text)
    config = tiny.config(tmp_path, **{"sources.main": {"type": "jsonl", "url": str(tmp_path / "data" / "*.jsonl")}})
    stream = parts_of(load(config)).open_stream("main")
    assert isinstance(stream, Describing)
    assert stream.describe(None) == ""
    stream.adopt(stream.discover())
    place: Json | None = None
    for item, after in stream.read(None):
        if not isinstance(item, Finished):
            name, number = item.text.split()  # type: ignore[union-attr]
            line, whole = len(json.dumps({"text": "a 0"})) + 1, {"a": 3, "b": 1, "c": 2}[name]
            rest = f", its last {(whole - int(number)) * line} of {whole * line} bytes" if int(number) else ""
            assert stream.describe(place) == f"{name}.jsonl{rest} (entry {'abc'.index(name) + 1} of 3)"
        place = after
    assert stream.describe(place) == ""
