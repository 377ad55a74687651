"""The Llama adapter: names, shapes and numbers are Hugging Face's."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from anytimed.contracts import ConfigError
from anytimed_adapters.models.llama import LlamaModel

VOCAB = 61


def model(**changes: object) -> LlamaModel:
    return LlamaModel(
        LlamaModel.Settings.model_validate({"hidden_size": 48, "layers": 2, "heads": 6, "kv_heads": 2, **changes})
    )


@pytest.mark.parametrize("tied", [True, False])
def test_hugging_face_computes_the_same_logits(tmp_path: Path, tied: bool) -> None:
    ours = model(tie_embeddings=tied, rope_theta=5000.0)
    torch.manual_seed(3)
    module = ours.build(VOCAB)
    with torch.no_grad():
        for p in module.parameters():  # larger than at initialisation, so that a wrong rotation or norm would show
            p.add_(0.3 * torch.randn_like(p))
    save_file({n: p.detach() for n, p in module.named_parameters()}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(ours.hf_config(VOCAB, 0)))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.randint(0, VOCAB, (2, 40))
    with torch.no_grad():
        # float32 products in another order; logits are of order 10, so 1e-4 is about 100 units in the last place
        torch.testing.assert_close(module(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_every_parameter_has_a_role_and_norms_and_ends_are_not_matrices() -> None:
    ours = model(tie_embeddings=False)
    module = ours.build(VOCAB, device="meta")
    roles = ours.roles(module)
    assert set(roles) == {name for name, _ in module.named_parameters()}
    assert roles["model.embed_tokens.weight"] == "embedding"
    assert roles["lm_head.weight"] == "head"
    assert roles["model.norm.weight"] == roles["model.layers.1.input_layernorm.weight"] == "norm"
    matrices = [name for name, role in roles.items() if role == "matrix"]
    assert len(matrices) == 2 * 7
    assert all(p.ndim == 2 for name, p in module.named_parameters() if name in matrices)


def test_tied_head_is_one_parameter() -> None:
    names = [name for name, _ in model().build(VOCAB).named_parameters()]
    assert "lm_head.weight" not in names


def test_loss_counts_only_what_is_not_masked() -> None:
    ours = model()
    torch.manual_seed(0)
    module = ours.build(VOCAB)
    tokens = torch.randint(0, VOCAB, (1, 9))
    masked = torch.cat([tokens, torch.full((1, 4), -100)], dim=1)
    # The same terms summed in another shape: float32 rounding only.
    torch.testing.assert_close(
        ours.losses(module, masked).sum(), ours.losses(module, tokens).sum(), rtol=1e-5, atol=1e-5
    )


def test_initial_weights_name_what_does_not_fit() -> None:
    ours = model()
    tensors = {n: p.detach() for n, p in ours.build(VOCAB).named_parameters()}
    config = ours.hf_config(VOCAB, 0)
    assert set(ours.initial_weights(tensors, config, VOCAB)) == set(tensors)
    with pytest.raises(ConfigError, match=r"layers is 2 there and 3 in \[model\]"):
        model(layers=3).initial_weights(tensors, config, VOCAB)
    with pytest.raises(ConfigError, match="tokenizers have to agree"):
        ours.initial_weights(tensors, config, VOCAB + 1)
    with pytest.raises(ConfigError, match=r"no tensor model\.norm\.weight"):
        ours.initial_weights({k: v for k, v in tensors.items() if k != "model.norm.weight"}, config, VOCAB)
    # A tied checkpoint may start an untied model.
    untied = model(tie_embeddings=False).initial_weights(tensors, config, VOCAB)
    torch.testing.assert_close(untied["lm_head.weight"], tensors["model.embed_tokens.weight"], rtol=0, atol=0)


def test_what_this_family_does_not_do_is_named() -> None:
    config = model().hf_config(VOCAB, 0)
    with pytest.raises(ConfigError, match="attention_bias"):
        LlamaModel.from_hf({**config, "attention_bias": True})
    with pytest.raises(ConfigError, match="llama3"):
        LlamaModel.from_hf({**config, "rope_scaling": {"rope_type": "llama3"}})


def test_config_round_trip() -> None:
    ours = model(tie_embeddings=False, intermediate_size=100)
    again = LlamaModel.from_hf(ours.hf_config(VOCAB, 0))
    assert again.hf_config(VOCAB, 0) == ours.hf_config(VOCAB, 0)


class Allocated(TorchDispatchMode):
    """The most bytes that were allocated at once, besides those of the tensors that it is made with."""

    def __init__(self, besides: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in besides}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(key)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, count: int) -> None:
        self.known.discard(key)
        self.now -= count


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize(
    ("shape", "vocab"),
    [
        ({"hidden_size": 128, "layers": 3, "heads": 4, "intermediate_size": 512}, 9000),
        ({"hidden_size": 192, "layers": 6, "heads": 6, "kv_heads": 2, "intermediate_size": 512}, 257),
    ],
)
def test_the_estimate_of_activations_is_what_is_allocated(shape: dict[str, int], vocab: int, bfloat16: bool) -> None:
    """Under autocast too, where the copies of the weights, the residual stream in float32 and the gradient of the loss
    were once left out: a fifth of it."""
    ours = LlamaModel(LlamaModel.Settings(**shape))
    module = ours.build(vocab)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)  # as in every micro-batch but the first
    there = [tensor for p in module.parameters() for tensor in (p, p.grad) if tensor is not None]
    tokens = torch.randint(vocab, (4, 129))
    with Allocated(there) as allocated:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = ours.losses(module, tokens).sum()
        loss.backward()
    assert ours.activation_bytes(4, 128, vocab, 2 if bfloat16 else 4) == pytest.approx(allocated.most, rel=0.02)
