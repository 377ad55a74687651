"""Attention within documents: a row that holds several says what each would alone, whichever kernel keeps them apart.

What is compiled needs a C++ compiler (apt-get install g++), and skips without one; what runs on CUDA is there where it
is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import flex_attention
from transformers import AutoModelForCausalLM

from anytimed_adapters.models import documents as within
from anytimed_adapters.models import flex
from anytimed_adapters.models.llama import Llama, LlamaModel

VOCAB, LENGTH = 61, 40
STARTS = ((0, 1, 9, 30), (0, 20))
"""Where documents begin in two rows; the first document of the first row is a single token."""
FEW_BLOCKS = 10
"""Times as long, FlexAttention has 4 x 4 blocks of 128, of which it skips some."""

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler: apt-get install g++"
)
CUDA = torch.cuda.is_available() and within.flex_by_itself("cuda", 16)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The compiler's files go with the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


def model(**changes: object) -> LlamaModel:
    """Heads of 16, the narrowest that FlexAttention has on CUDA, three to a key head."""
    return LlamaModel(
        LlamaModel.Settings.model_validate({"hidden_size": 96, "layers": 2, "heads": 6, "kv_heads": 2, **changes})
    )


def built(ours: LlamaModel, *, kernel: bool | None = None, device: str = "cpu") -> Llama:
    """Weights larger than at initialisation, so that a token that is seen shows. kernel: `Decoder.flex`."""
    torch.manual_seed(3)
    module = ours.build(VOCAB)
    assert isinstance(module, Llama)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    module.model.flex = kernel
    return module.to(device)


def packed(times: int = 1, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Tokens (2, times LENGTH + 1) and documents (2, times LENGTH), which begin at `times` STARTS."""
    length = times * LENGTH
    tokens = torch.randint(0, VOCAB, (len(STARTS), length + 1), generator=torch.Generator().manual_seed(5))
    numbers = torch.zeros(len(STARTS), length, dtype=torch.int32)
    for row, starts in enumerate(STARTS):
        for start in starts[1:]:
            numbers[row, times * start :] += 1
    return tokens.to(device), numbers.to(device)


def gradients(losses: Tensor, module: nn.Module) -> dict[str, Tensor]:
    module.zero_grad()
    losses.sum().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float = 2e-5) -> None:
    """Gradients agree by the largest element of each: sums over the same terms in float32, in another order, 80 tokens
    long and three layers deep."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max() / gradient.abs().max()) < tolerance, name


def test_positions_begin_anew_in_each_document() -> None:
    _, numbers = packed()
    for row, starts in zip(within.positions(numbers).tolist(), STARTS, strict=True):
        ends = (*starts[1:], LENGTH)
        assert row == [at for start, end in zip(starts, ends, strict=True) for at in range(end - start)]


def test_the_decoder_rotates_by_them() -> None:
    """Losses hardly tell: attention asks for distances only, and these are the same from any beginning."""
    module = built(model())
    tokens, numbers = packed()
    given: list[Tensor] = []
    module.model.layers[1].register_forward_pre_hook(lambda block, told: given.extend(told[1:3]))
    module(tokens[:, :-1], numbers)
    for found, table in zip(given, module.model.rotary(LENGTH, torch.device("cpu")), strict=True):
        assert torch.equal(found, torch.stack([table[row] for row in within.positions(numbers)])[:, None])


@pytest.mark.parametrize("shape", [{}, {"kv_heads": 6}, {"kv_heads": 1, "tie_embeddings": False}])
def test_a_packed_row_says_what_each_document_says_alone(shape: dict[str, object]) -> None:
    ours = model(**shape)
    module = built(ours)
    tokens, numbers = packed()
    together = ours.losses(module, tokens, numbers)
    alone = torch.zeros_like(together)
    for row, starts in enumerate(STARTS):
        for start, end in zip(starts, (*starts[1:], LENGTH), strict=True):
            alone[row, start:end] = ours.losses(module, tokens[row : row + 1, start : end + 1])[0]
    # Losses of about 5 from products in tiles of other shapes: 40 units in the last place.
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)
    close(gradients(together, module), gradients(alone, module))
    unmasked = ours.losses(module, tokens)
    assert float((unmasked - together).detach()[:, 25:].abs().max()) > 0.01, "the documents do change what is seen"


def test_one_document_a_row_is_plain_causal_attention() -> None:
    ours = model()
    module = built(ours)
    tokens, numbers = packed()
    # As above; a mask is another kernel than `is_causal`.
    torch.testing.assert_close(
        ours.losses(module, tokens, torch.full_like(numbers, 7)), ours.losses(module, tokens), atol=2e-5, rtol=0
    )


@torch.no_grad()
def leaves_no_trace(ours: LlamaModel, module: Llama, times: int) -> None:
    """Losses do not change by a bit where another document changes, before or after theirs."""
    tokens, numbers = packed(times)
    before = ours.losses(module, tokens, numbers)
    other, start, end = tokens.clone(), 9 * times, 30 * times
    other[0, start:end] = (other[0, start:end] + 17) % VOCAB
    after = ours.losses(module, other, numbers)
    assert torch.equal(before[0, end:], after[0, end:])
    assert torch.equal(before[0, : start - 1], after[0, : start - 1]), "start - 1 predicts a token that changed"
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0, start:end], after[0, start:end])


def test_another_document_leaves_no_trace() -> None:
    ours = model()
    leaves_no_trace(ours, built(ours), 1)
    leaves_no_trace(ours, built(ours), FEW_BLOCKS)


def test_hugging_face_computes_the_same_logits_of_a_packed_row(tmp_path: Path) -> None:
    ours = model(rope_theta=5000.0)
    module = built(ours)
    save_file({n: p.detach() for n, p in module.named_parameters()}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(ours.hf_config(VOCAB, 0)))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens, numbers = packed()
    at, seen = torch.zeros_like(numbers), torch.zeros(len(STARTS), 1, LENGTH, LENGTH, dtype=torch.bool)
    for row, starts in enumerate(STARTS):  # said in another way than ours
        for start, end in zip(starts, (*starts[1:], LENGTH), strict=True):
            at[row, start:end] = torch.arange(end - start)
            seen[row, 0, start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
    with torch.no_grad():
        expected = theirs(tokens[:, :-1], position_ids=at, attention_mask=seen).logits
        # float32 products in another order; logits are of order 10, so 1e-4 is about 100 units in the last place
        torch.testing.assert_close(module(tokens[:, :-1], numbers), expected, atol=1e-4, rtol=0)


@needs_compiler
def test_a_compiled_module_takes_documents() -> None:
    """One graph, backward included; `compiled` is called as the learner calls it."""
    ours = model(layers=1)
    module = built(ours)
    compiled = torch.compile(module, fullgraph=True)
    tokens, numbers = packed()
    expected = ours.losses(module, tokens, numbers)
    found = ours.losses(compiled, tokens, numbers)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)  # fused sums are rounded otherwise
    close(gradients(found, module), gradients(expected, module))
    # Other documents go through the same graph.
    torch._dynamo.config.error_on_recompile = True
    try:
        ours.losses(compiled, tokens, numbers.flip(0).contiguous())
    finally:
        torch._dynamo.config.error_on_recompile = False


# --- FlexAttention ----------------------------------------------------------------------------------------------------


@needs_compiler
@torch.no_grad()
def test_flex_attention_says_the_same_compiled() -> None:
    """All of the way that CUDA takes but its kernel, and the backward pass, which no CPU has."""
    ours = model(layers=1)
    tokens, numbers = packed(FEW_BLOCKS)
    expected = ours.losses(built(ours, kernel=False), tokens, numbers)
    module = built(ours, kernel=True)
    for run in (module, torch.compile(module, fullgraph=True, dynamic=False)):
        # float32 in an online softmax; as above
        torch.testing.assert_close(ours.losses(run, tokens, numbers), expected, atol=2e-5, rtol=0)
    leaves_no_trace(ours, module, FEW_BLOCKS)
    mask = flex.block_mask(numbers)
    seen = within.additive_mask(numbers, torch.float32) == 0
    padded = torch.nn.functional.pad(seen, (0, 4 * 128 - seen.shape[3], 0, 4 * 128 - seen.shape[2]))
    blocks = padded.unflatten(3, (4, 128)).unflatten(2, (4, 128)).any(dim=(3, 5))
    assert torch.equal(mask.to_dense().bool(), blocks), "what is masked is skipped"
    assert int(blocks.sum()) < 2 * (4 + 3 + 2 + 1), "and some of it is only masked by documents"


def test_flex_attention_has_the_same_gradients_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager, torch writes every score out, and has the backward pass on a CPU too, though it refuses to be asked."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_flex_attention", flex_attention.flex_attention)
    monkeypatch.setattr(flex, "_create_block_mask", flex_attention.create_block_mask)
    ours = model()
    tokens, numbers = packed(FEW_BLOCKS)
    found, expected = built(ours, kernel=True), built(ours, kernel=False)
    close(
        gradients(ours.losses(found, tokens, numbers), found),
        gradients(ours.losses(expected, tokens, numbers), expected),
    )


def test_who_takes_flex_attention_is_decided_by_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(within.importlib.util, "find_spec", lambda name: name == "triton")
    monkeypatch.setattr(within.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert within.tools()
    monkeypatch.setattr(within, "TOOLS", True)
    assert within.flex_by_itself("cuda", 16)
    assert not within.flex_by_itself("cuda", 8), "narrower than its tiles"
    assert not within.flex_by_itself("cpu", 16)
    ours = model()
    plain = ours.activation_bytes(8, 64, VOCAB, 4)
    assert ours.activation_bytes(8, 64, VOCAB, 4, "cuda") == plain
    assert ours.activation_bytes(8, 64, VOCAB, 4, "cpu") == plain + 5 * 8 * 64 * 64
    monkeypatch.setattr(within.shutil, "which", lambda name: None)
    assert not within.tools(), "Triton has no C compiler to build its launcher with"
    monkeypatch.setattr(within, "TOOLS", False)
    assert not within.flex_by_itself("cuda", 16)


if CUDA:  # nothing is skipped where there is none: the same is tested on the CPU above

    @pytest.mark.parametrize("whole", [False, True], ids=["by itself", "in a compiled module"])
    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_flex_attention_says_the_same_on_cuda(whole: bool, precision: str) -> None:
        """Losses and gradients against SDPA with a mask on the same device."""
        ours = model()
        tokens, numbers = packed(FEW_BLOCKS, "cuda")
        found, expected = built(ours, device="cuda"), built(ours, kernel=False, device="cuda")
        run = torch.compile(found) if whole else found
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            losses, theirs = ours.losses(run, tokens, numbers), ours.losses(expected, tokens, numbers)
        # float32: Triton's products may be TF32, 10 bits; bfloat16: 8 bits, rounded at other places. Losses of about 5.
        loose = 5e-3 if precision == "float32" else 1e-1
        torch.testing.assert_close(losses, theirs, atol=loose, rtol=0)
        close(gradients(losses, found), gradients(theirs, expected), tolerance=loose)
