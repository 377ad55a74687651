"""The configs of real sizes: what their comments and the README promise is what `anytimed check` counts."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from anytimed.config import load
from anytimed.service.assembly import Parts, parts_of
from anytimed.service.check import check, footprint, memory, told_bytes
from anytimed.service.console import size
from tests import standin

ROOT = Path(__file__).parent.parent
SIZES = {"llama-124m": 123_587_328, "llama-772m": 771_534_080}
TOKENS_A_STEP = 524_288


@pytest.fixture(params=SIZES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def path_of(name: str) -> Path:
    return ROOT / "configs" / f"{name}.toml"


def comment(name: str) -> str:
    """The comment at the head of the file, its blanks one each."""
    lines = path_of(name).read_text().split("\n\n")[0].splitlines()
    return "\n".join(re.sub(r" +", " ", line.removeprefix("#").strip()) for line in lines)


def parts(name: str, folder: Path, **more: str) -> Parts:
    return parts_of(load(standin.at_home(path_of(name), folder, **more)))


def test_the_parameters_and_the_tokens_of_a_step_are_as_the_comment_says(name: str, tmp_path: Path) -> None:
    made = parts(name, tmp_path)
    module = made.model.build(made.tokenizer.vocab_size, device="meta")
    assert sum(p.numel() for p in module.parameters()) == SIZES[name]
    assert comment(name).startswith(f"A Llama of {SIZES[name]:,} parameters")
    data = made.config.data
    assert data.batch_size * data.sequence_length == TOKENS_A_STEP and data.micro_batch_size
    assert (
        f"tokens per step: {TOKENS_A_STEP:,} = {data.batch_size} sequences * {data.sequence_length:,} tokens, "
        f"in {data.batch_size // data.micro_batch_size} micro-batches"
    ) in comment(name)


def test_the_memory_table_is_what_check_counts(name: str, tmp_path: Path) -> None:
    made = parts(name, tmp_path)
    found = footprint(made, "cuda", made.config.run.precision)
    told = "\n".join(f"{what} {told_bytes(count)}" for what, count in memory(made.config, found))
    assert told in comment(name)


def test_every_gpu_that_is_named_holds_it_with_room_to_spare(name: str, tmp_path: Path) -> None:
    plain = parts(name, tmp_path)
    rows = re.findall(r"^(\d+) GB (\d+)(, lean)? (\d.*)$", comment(name), re.MULTILINE)
    assert [gpu for gpu, *_ in rows] == ["80", "40", "24"]
    assert int(rows[0][1]) == plain.config.data.micro_batch_size, "the first row is the file as it is"
    for gpu, micro, lean, together in rows:
        made = parts(name, tmp_path, optimizer="lean = true") if lean else plain
        data = made.config.data.model_copy(update={"micro_batch_size": int(micro)})
        made = dataclasses.replace(made, config=made.config.model_copy(update={"data": data}))
        total = footprint(made, "cuda", made.config.run.precision).total_bytes
        assert size(total) == together
        assert made.config.data.batch_size % int(micro) == 0
        assert total < 0.9 * int(gpu) * 2**30, "CUDA itself and what lies in pieces take some"


def test_check_finds_everything_in_order(name: str, tmp_path: Path) -> None:
    made = parts(name, tmp_path)
    findings = {finding.what: finding for finding in check(made.config)}
    assert all(finding.good for finding in findings.values()), findings
    assert f"{SIZES[name]:,} parameters" in findings["model"].told
    assert not (tmp_path / "run").exists()
    total = told_bytes(footprint(made, "cuda", "bfloat16").total_bytes)
    assert total in comment(name)
    here = "memory: together on CUDA" if "memory: together on CUDA" in findings else "memory: together"
    assert findings[here].told.startswith(total), "also where there is no GPU"


def test_the_other_optimizer_is_a_matter_of_uncommenting(name: str, tmp_path: Path) -> None:
    text = path_of(name).read_text()
    table = re.search(r"^# \[optimizer\]\n((?:# .*\n)+)", text, re.MULTILINE)
    assert table is not None
    lines = table[1].replace("# ", "", 1).replace("\n# ", "\n")
    made = parts_of(load(standin.at_home(path_of(name), tmp_path, without=["optimizer"], optimizer=lines)))
    module = made.model.build(made.tokenizer.vocab_size, device="meta")
    made.recipe.build(module.named_parameters(), made.model.roles(module), made.model.row_splits(module))
    assert made.config.optimizer.type == "amuse" and made.recipe.settings.rho == 0.8


def test_the_lines_that_make_the_tokenizer_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = path_of("llama-124m").read_text()
    (lines,) = re.findall(r"^#   python - <<'END'\n(.*?)^#   END$", text, re.MULTILINE | re.DOTALL)
    fetched = 'Tokenizer.from_pretrained("openai-community/gpt2")'
    assert fetched in lines
    theirs = standin.gpt2(tmp_path / "theirs.json")
    code = re.sub(r"^#   ", "", lines, flags=re.MULTILINE).replace(fetched, f"Tokenizer.from_file({str(theirs)!r})")
    (tmp_path / "configs").mkdir()
    for file in SIZES:
        (tmp_path / "configs" / f"{file}.toml").write_text(path_of(file).read_text())
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "llama-124m.toml", "exec"), {})
    for file in SIZES:
        made = parts_of(load(Path("configs") / f"{file}.toml"))
        assert made.tokenizer.vocab_size == 50_304 and made.tokenizer.end_token == 50_256
    assert {path.name for path in tmp_path.iterdir()} == {"configs", "theirs.json"}


def test_the_readme_tells_the_same() -> None:
    text = (ROOT / "README.md").read_text()
    for name in SIZES:
        (row,) = re.findall(rf"^\| \[`{name}.toml`\]\(configs/{name}.toml\) \|(.*)\|$", text, re.MULTILINE)
        parameters, tokens, together, gpus = (cell.strip() for cell in row.split("|"))
        assert (parameters, tokens) == (f"{SIZES[name]:,}", f"{TOKENS_A_STEP:,}")
        assert re.search(rf"^memory: together .*\({re.escape(together)}\)$", comment(name), re.MULTILINE)
        for gpu, micro in re.findall(r"(\d+) GB \((\d+)", gpus):
            assert re.search(rf"^{gpu} GB {micro}\b", comment(name), re.MULTILINE)
