"""The learner: steps, skipped steps, accumulation, evaluation away from the parameters, copies out and in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from anytimed.contracts import Batch, ConfigError, CorruptError, HeldRecord, Holdout, Position
from anytimed.optim import ScheduleFree, SFAdamW, SFNorMuon, param_groups
from anytimed.training.device import Device
from anytimed.training.evaluate import IGNORED, windows
from anytimed.training.footprint import Footprint, estimate
from anytimed.training.learner import Learner
from anytimed_adapters.models.llama import LlamaModel

VOCAB, LENGTH = 23, 12


def learner(
    seed: int = 0,
    micro: int | None = None,
    hidden: int = 16,
    clip: float | None = 1.0,
    kind: Callable[..., ScheduleFree] = SFNorMuon,
    end_token: int | None = None,
    **options: object,
) -> Learner:
    model = LlamaModel(LlamaModel.Settings(hidden_size=hidden, layers=1, heads=2, intermediate_size=24))
    torch.manual_seed(seed)
    module = model.build(VOCAB)
    options = {"lr": 0.02, "warmup_steps": 3, **options}
    optimizer = kind(param_groups(module.named_parameters(), model.roles(module)), **options)
    return Learner(
        model,
        module,
        optimizer,
        Device("cpu"),
        sequence_length=LENGTH,
        micro_batch_size=micro,
        end_token=end_token,
        clip_grad_norm=clip,
        evaluation_batch_size=2,
    )


def batch(number: int, size: int = 4) -> Batch:
    tokens = np.random.default_rng(number).integers(0, VOCAB, (size, LENGTH + 1), dtype=np.int32)
    return batch_of(tokens, number)


def batch_of(tokens: NDArray[np.int32], number: int = 0) -> Batch:
    """Its targets are of the source "even" or "odd", as they are."""
    labels = (tokens[:, 1:] % 2).astype(np.int16)
    return Batch(tokens, labels, ("even", "odd", "absent"), Position(draw=number, batches=number), Holdout(), {}, {})


def state(of: Learner) -> dict[str, torch.Tensor]:
    named = dict(of.module.named_parameters())
    inner = {f"{k}.{n}": t.clone() for n, p in named.items() for k, t in of.optimizer.state[p].items()}
    return {**{f"y.{n}": p.detach().clone() for n, p in named.items()}, **inner}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    disturbed, undisturbed = learner(), learner()
    for number in range(6):
        disturbed.step(batch(number))
        undisturbed.step(batch(number))
        if number in (0, 3):
            before, clocks = state(disturbed), disturbed.optimizer.clock_state()
            losses = disturbed.model.losses
            disturbed.model.losses = lambda *at, losses=losses: losses(*at) * float("nan")  # type: ignore[method-assign]
            disturbed.step(batch(99))
            disturbed.model.losses = losses  # type: ignore[method-assign]
            assert same(before, state(disturbed))
            assert disturbed.optimizer.clock_state() == clocks
    reports = disturbed.reports()
    assert [r.step for r in reports if r.skipped] == [2, 6]
    assert disturbed.skipped == 2
    assert disturbed.step_count == 8
    assert disturbed.reports() == []
    assert same(state(disturbed), state(undisturbed)), "the line of updates is that of a run without the bad batches"


def test_one_infinite_gradient_skips_too() -> None:
    one = learner()
    one.step(batch(0))
    before = state(one)
    parameter = next(iter(one.module.parameters()))
    hook = parameter.register_hook(lambda g: g.index_fill(0, torch.tensor([1]), float("inf")))
    one.step(batch(1))
    hook.remove()
    assert one.reports()[-1].skipped
    assert same(before, state(one))


def test_accumulation_takes_the_gradient_of_the_whole_batch() -> None:
    whole, parts = learner(), learner(micro=1)
    for number in range(3):
        whole.step(batch(number))
        parts.step(batch(number))
    for a, b in zip(whole.reports(), parts.reports(), strict=True):
        # The same sum in another order: float32 rounding of a loss of about 3, and what three steps make of it.
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3)


@pytest.mark.parametrize("micro", [None, 2])
def test_documents_end_with_the_end_token(micro: int | None) -> None:
    """The learner tells the model which document each input belongs to; without an end token it tells of none."""
    end = 5
    tokens = np.random.default_rng(1).integers(end + 1, VOCAB, (4, LENGTH + 1), dtype=np.int32)
    tokens[0, [3, 4, 9]] = end  # an empty document, and two ends
    tokens[1, [0, LENGTH]] = end  # the first input ends a document; the last end is a target only
    tokens[2, LENGTH - 1] = end
    expected = [[0] * 4 + [1] + [2] * 5 + [3] * 2, [0] + [1] * 11, [0] * 12, [0] * 12]
    one = batch_of(tokens)
    for told in (end, None):
        given: list[torch.Tensor | None] = []
        asked = learner(micro=micro, end_token=told)
        losses = asked.model.losses

        def watched(
            module: Callable[..., torch.Tensor],
            part: torch.Tensor,
            documents: torch.Tensor | None = None,
            losses: Callable[..., torch.Tensor] = losses,
            given: list[torch.Tensor | None] = given,
        ) -> torch.Tensor:
            given.append(documents)
            return losses(module, part, documents)

        asked.model.losses = watched  # type: ignore[method-assign]
        asked.step(one)
        seen = [d for d in given if d is not None]
        if told is None:
            assert seen == [] and given
            continue
        assert len(seen) == len(given) == (2 if micro else 1)
        assert torch.cat(seen).tolist() == expected
        assert all(d.dtype == torch.int32 for d in seen)


def test_a_step_by_documents_is_that_of_the_documents_alone() -> None:
    """Two documents of six tokens in a row, or each in a row of its own, the rest of it masked."""
    end = 5
    rows = np.random.default_rng(2).integers(end + 1, VOCAB, (2, LENGTH + 1), dtype=np.int32)
    rows[:, 5] = end
    alone = np.full((4, LENGTH + 1), IGNORED, np.int32)
    alone[:2, :7], alone[2:, :7] = rows[:, :7], rows[:, 6:]
    masked, plain = learner(end_token=end, clip=None), learner(clip=None)
    masked.step(batch_of(rows))
    plain.step(batch_of(alone))
    (ours,), (theirs,) = masked.reports(), plain.reports()
    # The mean is over all targets of a batch, of which half do not count in the other; float32 sums in another order.
    assert ours.loss == pytest.approx(2 * theirs.loss, rel=1e-5)
    assert ours.grad_norm == pytest.approx(2 * theirs.grad_norm, rel=1e-4)
    unmasked = learner(clip=None)
    unmasked.step(batch_of(rows))
    assert unmasked.reports()[0].grad_norm != pytest.approx(ours.grad_norm, rel=1e-3)


@pytest.mark.parametrize("micro", [None, 1, 2])
def test_losses_before_the_step_are_told_by_source(micro: int | None) -> None:
    one, plain = learner(micro=micro), learner()
    for number in range(3):
        this = batch(number)
        with torch.no_grad():
            losses = plain.model.losses(plain.module, torch.from_numpy(this.tokens).long())
        one.step(this)
        plain.step(this)
        [report] = one.reports()
        plain.reports()
        assert set(report.by_source) == {"even", "odd"}, "nothing is said of a source without a target"
        for label, name in enumerate(("even", "odd")):
            of = torch.from_numpy(this.labels) == label
            count, total = report.by_source[name]
            assert count == int(of.sum())
            assert total == pytest.approx(float(losses[of].double().sum()), rel=1e-5)
        assert sum(total for _, total in report.by_source.values()) / 48 == pytest.approx(report.loss, rel=1e-5)
        assert report.batch == number


def test_clipping_bounds_the_norm_and_reports_the_one_before() -> None:
    one = learner(clip=1e-3)
    one.step(batch(0))
    clipped = torch.nn.utils.get_total_norm([p.grad for p in one.module.parameters() if p.grad is not None])
    assert float(clipped) == pytest.approx(1e-3, rel=1e-3)
    assert one.reports()[0].grad_norm > 0.01


def test_windows_make_every_token_but_the_first_a_target_once() -> None:
    records = tuple(HeldRecord("s", str(n), np.arange(n, dtype=np.int32)) for n in (1, 2, 12, 13, 14, 30))
    rows, sources, names = windows(Holdout(records), LENGTH)
    assert (names, sources.tolist()) == (("s",), [0] * len(rows))
    targets = rows[:, 1:]
    assert int((targets != IGNORED).sum()) == sum(max(r.tokens.size - 1, 0) for r in records)
    found = sorted(targets[targets != IGNORED].tolist())
    assert found == sorted(t for r in records for t in range(1, r.tokens.size))


def test_evaluation_uses_x_y_and_z_and_leaves_the_parameters_alone() -> None:
    one = learner()
    rng = np.random.default_rng(5)
    held = Holdout(tuple(HeldRecord("s", str(i), rng.integers(0, VOCAB, 30, dtype=np.int32)) for i in range(3)))
    for number in range(5):
        one.step(batch(number))
    one.reports()
    before = state(one)
    found = one.evaluate(held)
    assert found is not None
    assert same(before, state(one))
    assert (found.step, found.tokens, found.holdout) == (5, 3 * 29, held.digest)
    tokens = torch.from_numpy(windows(held, LENGTH)[0]).long()
    for which, loss in (("x", found.loss_x), ("z", found.loss_z)):
        other = learner()
        with torch.no_grad():
            for (_, mine), (_, theirs) in zip(
                other.module.named_parameters(), one.module.named_parameters(), strict=True
            ):
                mine.copy_(one.optimizer.state[theirs][which])
            expected = float(other.model.losses(other.module, tokens).sum()) / (3 * 29)
        assert loss == pytest.approx(expected, rel=1e-5), which  # other batches of the same sum
    assert len({found.loss_x, found.loss_y, found.loss_z}) == 3
    assert one.evaluate(Holdout()) is None


def test_an_evaluation_weighs_the_sources_as_the_mixture_does() -> None:
    one = learner()
    one.step(batch(0))
    one.reports()
    rng = np.random.default_rng(6)
    records = tuple(
        HeldRecord(name, f"{name}{i}", rng.integers(0, VOCAB, size, dtype=np.int32))
        for name, size, count in (("a", 30, 5), ("b", 9, 2))
        for i in range(count)
    )
    found = one.evaluate(Holdout(records, {"a": 1.0, "b": 3.0, "c": 4.0}))
    assert found is not None
    assert {name: losses.tokens for name, losses in found.by_source.items()} == {"a": 5 * 29, "b": 2 * 8}
    a, b = found.by_source["a"], found.by_source["b"]
    for which in ("loss_x", "loss_y", "loss_z"):
        alone = [one.evaluate(Holdout(tuple(r for r in records if r.source == n), {n: 1.0})) for n in "ab"]
        assert [getattr(each, which) for each in alone] == pytest.approx([getattr(a, which), getattr(b, which)])
        assert getattr(found, which) == pytest.approx((getattr(a, which) + 3 * getattr(b, which)) / 4, rel=1e-12)
    other = one.evaluate(Holdout(records, {"a": 1.0, "b": 1.0}))
    assert other is not None and other.holdout != found.holdout


def write(one: Learner, path: Path) -> dict[str, object]:
    one.reports()
    snapshot = one.snapshot({}, {"more": 1})
    snapshot.wait()
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}
    tensors = {
        name: torch.frombuffer(bytearray(t.data), dtype=dtypes[t.dtype]).reshape(t.shape)
        for name, t in snapshot.tensors.items()
    }
    save_file(tensors, path)
    assert snapshot.state["more"] == 1
    return dict(snapshot.state)


KINDS: dict[str, dict[str, Any]] = {
    "exact": {},
    "lean": {"lean": True},  # x lies in the parameters, so that y is part of the snapshot
    "polyak": {"kind": SFAdamW, "lr": "polyak", "clip": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_snapshot_and_restore_go_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    one = learner(**KINDS[kind])
    for number in range(7):
        one.step(batch(number))
    told = write(one, tmp_path / "s.safetensors")
    at_the_copy, x = state(one), {name: t.clone() for name, t in one._at("x").items()}
    other = learner(seed=1, **KINDS[kind])
    assert other.restore([tmp_path / "s.safetensors"], told) == {}
    assert same(at_the_copy, state(other)), "y included, which an exact optimizer does not store"
    assert same(x, other._at("x"))
    for number in range(7, 12):
        one.step(batch(number))
        other.step(batch(number))
    assert same(state(one), state(other))
    assert (other.step_count, other.tokens) == (12, one.tokens)


def test_a_restored_run_goes_on_with_the_arithmetic_of_the_machine_that_wrote(tmp_path: Path) -> None:
    """The dtype of the matrix products is decided by the hardware once, and is part of the commit."""
    one = learner()
    one.step(batch(0))
    told = write(one, tmp_path / "s.safetensors")
    other_machine = {"float32": "bfloat16", "bfloat16": "float32"}[one.optimizer.arithmetic()["orthogonal_dtype"]]
    told["learner"]["arithmetic"] = {"orthogonal_dtype": other_machine}
    decided, explicit = learner(), learner(orthogonal_dtype=one.optimizer.arithmetic()["orthogonal_dtype"])
    for restored in (decided, explicit):
        restored.restore([tmp_path / "s.safetensors"], told)
    assert decided.optimizer.arithmetic()["orthogonal_dtype"] == other_machine
    assert explicit.optimizer.arithmetic() == one.optimizer.arithmetic(), "what the configuration says stands"


def test_a_snapshot_is_a_copy() -> None:
    one = learner()
    one.step(batch(0))
    x = {n: one.optimizer.state[p]["x"].clone() for n, p in one.module.named_parameters()}
    exported = one.export()
    one.step(batch(1))
    exported.wait()
    for name, tensor in exported.tensors.items():
        assert bytes(tensor.data) == x[name].numpy().tobytes()
        assert tensor.dtype == "F32"
    assert one.export("bfloat16").tensors["model.norm.weight"].dtype == "BF16"


def test_another_model_does_not_restore(tmp_path: Path) -> None:
    one = learner()
    one.step(batch(0))
    told = write(one, tmp_path / "s.safetensors")
    with pytest.raises(CorruptError, match=r"expected torch\.float32 \(23, 32\)"):
        learner(hidden=32).restore([tmp_path / "s.safetensors"], told)


def test_start_from_sets_x_y_and_z() -> None:
    one, other = learner(), learner(seed=1)
    other.start_from({n: p.detach() for n, p in one.module.named_parameters()})
    assert same(state(one), state(other))


def counted(device_type: str, micro: int = 4, evaluation: int = 2, lean: bool = False) -> Footprint:
    model = learner().model
    meta = model.build(VOCAB, device="meta")
    return estimate(
        model,
        meta,
        SFNorMuon(param_groups(meta.named_parameters(), model.roles(meta)), lean=lean),
        micro_batch=micro,
        evaluation_batch=evaluation,
        length=LENGTH,
        vocab_size=VOCAB,
        element_bytes=4,
        device_type=device_type,
    )


@pytest.mark.parametrize("lean", [False, True])
def test_the_footprint_counts_what_is_allocated(lean: bool) -> None:
    one, found = learner(lean=lean), counted("cpu", lean=lean)
    real = [t for p in one.module.parameters() for t in one.optimizer.state[p].values()]
    assert found.optimizer_bytes == sum(t.numel() * t.element_size() for t in real)
    assert found.parameters == sum(p.numel() for p in one.module.parameters())
    snapshot = one.snapshot({}, {})
    written = sum(len(t.data) for name, t in snapshot.tensors.items() if not name.startswith("rng."))
    assert found.copy_bytes == written, "a commit copies all of it"


def test_what_comes_and_goes_counts_once() -> None:
    """On CUDA the copy for a commit has left before a step needs its room; on a CPU it lies there until it is written.
    An evaluation and a step take turns."""
    always = counted("cpu").parameter_bytes + counted("cpu").gradient_bytes + counted("cpu").optimizer_bytes
    large, small = counted("cuda", micro=512), counted("cuda", micro=1)
    assert large.activation_bytes > large.copy_bytes > small.activation_bytes
    assert large.total_bytes == always + large.activation_bytes
    assert small.total_bytes == always + small.copy_bytes
    assert counted("cpu", micro=512).total_bytes == always + large.activation_bytes + large.copy_bytes
    judged = counted("cuda", micro=1, evaluation=512)
    assert judged.total_bytes == always + judged.evaluation_bytes > always + judged.copy_bytes


def test_a_cuda_device_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.set_device takes none without one; seen on an H200, and no CPU can show it."""
    set_to: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", set_to.append)
    for name, index in (("auto", 0), ("cuda", 0), ("cuda:1", 1)):
        assert Device(name, deterministic=False).torch_device == torch.device("cuda", index) == set_to.pop()
    with pytest.raises(ConfigError, match="there are 2 CUDA devices"):
        Device("cuda:2", deterministic=False)
