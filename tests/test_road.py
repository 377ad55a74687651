"""The whole road on a tiny model, as a newcomer walks it: init, check, run, list, pull, transformers, sample, go on
elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import anytimed
from anytimed.service.reader_side import load_checkpoint
from tests import tiny


def test_from_text_to_transformers_and_on(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 60)
    config = tiny.config(tmp_path, model={"kv_heads": 1, "tie_embeddings": False})
    assert "memory: optimizer" in tiny.run("check", config)
    told = tiny.run("run", config, "--steps", "27")
    assert f" pull {tmp_path / 'published'} --to DIR" in told

    url = str(tmp_path / "published")
    listed = json.loads(tiny.run("list", url, "--json"))
    assert [m["step"] for m in listed] == [27, 18, 9]
    assert anytimed.latest(url).step == 27
    assert str(tmp_path / "model" / "current") in tiny.run("pull", url, "--to", tmp_path / "model").replace("\n", "")
    pulled = anytimed.pull(url, tmp_path / "other")
    assert pulled.manifest.evaluation is not None
    assert pulled.manifest.evaluation.loss_x > 0

    folder = tmp_path / "model" / "current"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, our_tokenizer, context = load_checkpoint(folder)
    text = "stream of batches, naïve and 𝔘nicode\n\tdef "
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    assert ids[0].tolist() == our_tokenizer.encode(text).tolist()
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        # float32 products in another order
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    assert context == 2048

    # The export is the optimizer's x, to the bit.
    state, _ = tiny.state_of(tiny.newest_commit(tmp_path))
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, state[f"x.{name}"]), name

    sampled = tiny.run("sample", folder.parent, "--prompt", "def ", "--tokens", "20")
    assert sampled.startswith("def ")
    assert len(sampled) > len("def \n")
    assert tiny.run("sample", url, "--prompt", "def ", "--tokens", "20", "--seed", "0") == sampled

    # Another run starts from what was published.
    other = tmp_path / "next"
    tiny.write_text(other / "data", 60, seed=9)
    model = {"kv_heads": 1, "tie_embeddings": False, "init_from": url}
    tiny.run("run", tiny.config(other, model=model, commits={"every_steps": 1}), "--steps", "1")
    after, _ = tiny.state_of(tiny.newest_commit(other))
    for name in state:
        if name.startswith("x.") and name.endswith("q_proj.weight"):
            moved = (after[name] - state[name]).norm() / state[name].norm()
            assert 0 < moved < 0.1, "one warm-up step away from where the other run was"


def test_json_lines_and_a_hugging_face_tokenizer(tmp_path: Path) -> None:
    files = tiny.write_text(tmp_path / "raw", 80)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train([str(f) for f in files], trainer)
    bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"body": f.read_text(), "n": i}) for i, f in enumerate(files)]
    lines[10:10] = ["not json", json.dumps({"n": 1})]
    (tmp_path / "data" / "a.jsonl").write_text("\n".join(lines[:50]) + "\n")
    (tmp_path / "data" / "b.jsonl").write_text("\n".join(lines[50:]))
    config = tiny.config(
        tmp_path,
        tokenizer={"type": "huggingface", "path": "tokenizer.json"},
        **{"sources.main": {"type": "jsonl", "url": str(tmp_path / "data" / "*.jsonl"), "text_field": "body"}},
    )
    told = tiny.run("run", config, "--steps", "20")
    assert "a record cannot be read" in told
    rejected = (tmp_path / "run" / "quarantine" / "records" / "main.jsonl").read_text().splitlines()
    assert len(rejected) == 2
    pulled = anytimed.pull(str(tmp_path / "published"), tmp_path / "model")
    theirs = AutoTokenizer.from_pretrained(pulled.path)
    assert theirs("stream step").input_ids == bpe.encode("stream step").ids
    AutoModelForCausalLM.from_pretrained(pulled.path)


def test_init_writes_a_file_that_check_likes_and_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    told = tiny.run("init", path)
    assert " check " in told
    text = path.read_text().replace('"state/', f'"{tmp_path}/state/')
    path.write_text(text)
    checked = tiny.run("check", path)
    assert "memory: together" in checked and "elements" in checked
    assert not (tmp_path / "state" / "run").exists(), "check leaves nothing behind"
    assert "exists already" in tiny.run("init", path, expect=2)
    assert path.read_text() == text


def test_check_says_what_would_fail(tmp_path: Path) -> None:
    told = tiny.run("check", tiny.config(tmp_path), expect=2)
    assert f"{tmp_path / 'data'}/*.txt is not there" in told
    (tmp_path / "data").mkdir()
    assert "nothing there yet" in tiny.run("check", tiny.config(tmp_path), expect=2)
    tiny.write_text(tmp_path / "data", 3)
    (tmp_path / "other").write_text("in the way")
    told = tiny.run("check", tiny.config(tmp_path, exports={"url": str(tmp_path / "other")}), expect=2)
    assert "Traceback" not in told
    assert re.search(r"no  exports +.*other", told)


def test_mistakes_on_the_command_line_have_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for arguments, code in (
        (("run", tmp_path / "none.toml"), 2),
        (("status", tmp_path), 2),
        (("pull", str(tmp_path / "nothing"), "--to", str(tmp_path / "m")), 1),
        (("list", "nosuch://bucket/x"), None),
        (("sample", str(tmp_path / "nothing"), "--prompt", "x"), 1),
        (("run", tmp_path / "none.toml", "--steps", "0"), 2),
        (("run", tiny.config(tmp_path / "a", run={"directory": "/proc/anytimed"})), 1),
        (("run", tiny.config(tmp_path / "b", run={"device": "cuda:99"})), 2),
    ):
        process = tiny.start(*arguments)
        output, _ = process.communicate(timeout=60)
        assert "Traceback" not in output, output
        assert process.returncode == code if code is not None else process.returncode in (1, 2), output


def test_a_run_starts_from_a_hugging_face_folder_at_a_url(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 20)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
        )
    )
    theirs.save_pretrained(tmp_path / "llama")
    config = tiny.config(tmp_path, model={"init_from": f"file://{tmp_path / 'llama'}"}, commits={"every_steps": 1})
    tiny.run("run", config, "--steps", "1")
    state, _ = tiny.state_of(tiny.newest_commit(tmp_path))
    for name, parameter in theirs.named_parameters():
        moved = (state[f"x.{name}"] - parameter.detach()).norm() / parameter.norm()
        assert 0 < moved < 0.2, name  # one warm-up step away
    # A checkpoint that does not fit is named, and nothing has begun.
    other = tiny.config(tmp_path, model={"init_from": str(tmp_path / "llama"), "hidden_size": 16})
    told = tiny.run("run", other, "--fresh", expect=2)
    assert "hidden_size is 32 there and 16 in [model]" in told


def test_exports_inside_the_run_directory_are_refused(tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "data", 3)
    told = tiny.run("check", tiny.config(tmp_path, exports={"url": str(tmp_path / "run" / "published")}), expect=2)
    assert "inside the run directory" in told
