"""polar against float64, and what must hold for zero, tall, tiny and broken matrices; NorMuon's rows and lengths."""

from __future__ import annotations

import pytest
import torch

from anytimed.optim.neuron_norm import row_norms, row_scale, second_moment
from anytimed.optim.orthogonal import Coefficients, _square, polar, working_dtype
from anytimed.optim.scratch import Scratch
from tests.reference.schedule_free import polar as polar64

FULL = torch.float32
COEFFICIENTS: list[Coefficients] = ["quintic", "polar_express"]

SHAPES = [(1, 9), (9, 1), (1, 1), (16, 16), (8, 40), (40, 8), (63, 65)]


def stack(shape: tuple[int, int], k: int = 3) -> torch.Tensor:
    return torch.randn(k, *shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_agrees_with_float64(shape: tuple[int, int]) -> None:
    m = stack(shape)
    for found, given in zip(polar(m, dtype=FULL), m, strict=True):
        exact = polar64(given.double())
        # The smallest directions rise by up to 485, and so does their rounding, 6e-8 of the largest.
        assert float((found - exact).norm() / exact.norm()) < 3e-5


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_singular_values_end_near_one(shape: tuple[int, int]) -> None:
    """The quintic maps [0.003, 1] into about [0.68, 1.21]; Gaussian matrices of these shapes lie in there."""
    values = torch.linalg.svdvals(polar(stack(shape), dtype=FULL))
    assert float(values.min()) > 0.65
    assert float(values.max()) < 1.25


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_express_agrees_with_float64(shape: tuple[int, int]) -> None:
    m = stack(shape)
    for found, given in zip(polar(m, dtype=FULL, coefficients="polar_express"), m, strict=True):
        exact = polar64(given.double(), "polar_express")
        # steeper at 0 than the quintic: 8.29 * 4.11 * 3.95 * 3.32 * 2.30 / 1.01^6 = 970 times 6e-8
        assert float((found - exact).norm() / exact.norm()) < 6e-5


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_polar_express_comes_closer_to_one_and_lifts_the_smallest_more(shape: tuple[int, int]) -> None:
    m = stack(shape)
    found = {name: torch.linalg.svdvals(polar(m, dtype=FULL, coefficients=name)) for name in COEFFICIENTS}
    for name, values in found.items():
        low, high = (0.65, 1.25) if name == "quintic" else (0.83, 1.17)  # [0.85, 1.15] for values above 1e-3
        assert low < float(values.min()) and float(values.max()) < high, name
    steep = torch.diag(torch.tensor([1.0, 1e-3, 1e-4]))
    lifted = {name: torch.linalg.svdvals(polar(steep, dtype=FULL, coefficients=name)) for name in COEFFICIENTS}
    assert bool((lifted["polar_express"][1:] > 1.5 * lifted["quintic"][1:]).all())


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 24), (30, 20), (16, 17)])
def test_gram_is_the_same_polynomial(shape: tuple[int, int], coefficients: Coefficients) -> None:
    m = stack(shape)
    found = polar(m, dtype=FULL, coefficients=coefficients, gram=True)
    for p, given in zip(found, m, strict=True):
        exact = polar64(given.double(), coefficients)
        # What is rounded is the square of a singular value s: s itself is right to 6e-8 / s, and then as above. The
        # smallest of these matrices is above a twentieth of the norm.
        assert float((p - exact).norm() / exact.norm()) < 1e-4
    plain = polar(m, dtype=FULL, coefficients=coefficients)
    assert torch.equal(found, plain) == (max(shape) < 1.5 * min(shape))  # squares gain nothing: they go the plain way


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("splits", [(4, 4, 4), (6, 3, 3), (1, 11), (12,)])
def test_blocks_of_rows_are_matrices_of_their_own(splits: tuple[int, ...], dtype: torch.dtype, gram: bool) -> None:
    m = stack((12, 10))
    whole = polar(m, dtype=dtype, gram=gram, row_splits=splits)
    parts = [polar(block, dtype=dtype, gram=gram) for block in torch.split(m, list(splits), dim=1)]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    assert torch.equal(whole[0], polar(m[0], dtype=dtype, gram=gram, row_splits=splits))
    strided = m.mT.contiguous().mT  # in another layout the norm adds up in another order: one rounding, amplified
    found = polar(strided, dtype=dtype, gram=gram, row_splits=splits)
    assert torch.allclose(found, whole, atol=5e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("shape", [(256, 512), (512, 256), (257, 600), (256, 500)])
def test_half_a_square_multiplied_out_is_the_whole(shape: tuple[int, int]) -> None:
    """The CPU's way in bfloat16: exactly symmetric, and right to its rounding; as `bmm` has it where the hardware
    multiplies bfloat16."""
    x = stack(shape, 2).bfloat16() / 16
    square = x.double() @ x.double().mT if shape[0] <= shape[1] else x.double().mT @ x.double()
    found = torch.empty(square.shape, dtype=torch.bfloat16)
    _square(x, found)
    assert torch.equal(found, found.mT)
    # sums in float32 over 600 terms of norm up to 2, rounded to 2^-9 of the result
    assert torch.allclose(found.double(), square, rtol=2**-8, atol=1e-4)
    if working_dtype(torch.device("cpu")) == torch.bfloat16:
        assert torch.equal(found, torch.bmm(x, x.mT) if shape[0] <= shape[1] else torch.bmm(x.mT, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gives_exact_zero_beside_others(dtype: torch.dtype) -> None:
    m = stack((6, 10))
    m[1] = 0
    p = polar(m, dtype=dtype)
    assert torch.equal(p[1], torch.zeros(6, 10))
    assert float(p[0].norm()) > 1


def test_a_broken_matrix_spoils_no_other() -> None:
    m = stack((6, 10))
    clean = polar(m, dtype=FULL)
    m[1, 0, 0] = float("nan")
    spoiled = polar(m, dtype=FULL)
    assert torch.equal(spoiled[0], clean[0]) and torch.equal(spoiled[2], clean[2])


def test_what_an_earlier_call_left_in_the_scratch_memory_does_not_matter() -> None:
    scratch = Scratch(torch.device("cpu"))
    m = stack((5, 7))
    clean = polar(m, dtype=FULL).clone()
    polar(torch.full((4, 9, 9), float("nan")), dtype=FULL, scratch=scratch)
    assert torch.equal(polar(m, dtype=FULL, scratch=scratch), clean)


@pytest.mark.parametrize("shape", SHAPES)
def test_scale_of_the_gradient_does_not_matter_and_the_input_stays(shape: tuple[int, int]) -> None:
    m = stack(shape)
    kept = m.clone()
    # A power of two changes no rounding but that of 1e-7 beside the norm: 1e-7 / |M|, amplified by 485 at most.
    assert torch.allclose(polar(m, dtype=FULL), polar(m * 1024.0, dtype=FULL), atol=1e-4)
    assert torch.equal(m, kept)


def test_a_single_matrix_and_bfloat16_products() -> None:
    m = stack((12, 20))
    full = polar(m, dtype=FULL)
    assert torch.equal(polar(m[0], dtype=FULL), full[0])
    low = polar(m, dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16
    # bfloat16 keeps 2^-9 of every factor; fifteen products in a row: a few percent, and Muon trains all the same.
    assert 1e-4 < float((low - full).norm() / full.norm()) < 0.1


def test_the_cpu_works_in_bfloat16_where_it_multiplies_it_in_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert working_dtype(cpu) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert working_dtype(cpu) == torch.bfloat16
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")  # they are private in torch 2.13, and may go
    assert working_dtype(cpu) == torch.float32
    assert working_dtype(torch.device("meta")) == torch.float32


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_normalised_and_the_length_is_as_asked(shape: tuple[int, int]) -> None:
    p = stack(shape)
    p[2] = 0
    norms = row_norms(p)
    v = second_moment(torch.zeros(3, shape[0]), norms, shape[1], beta2=0.95)
    # single precision throughout
    assert torch.allclose(v, 0.05 * (p * p).mean(dim=2), rtol=1e-5)
    scale, lengths_squared = row_scale(norms, v, torch.tensor([0.7]), eps=1e-8)
    update = p * scale.unsqueeze(2)
    assert torch.allclose(lengths_squared, torch.tensor([0.49, 0.49, 0.0]))
    assert torch.equal(update[2], torch.zeros(shape))
    assert torch.allclose(update[:2].norm(dim=(1, 2)), torch.tensor(0.7), rtol=1e-5)
    rows = update[:2].norm(dim=2)  # v is this step's own: every row gets the same length
    assert torch.allclose(rows, rows.mean(dim=1, keepdim=True).expand_as(rows), rtol=1e-4)
