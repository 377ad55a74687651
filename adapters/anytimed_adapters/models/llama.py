"""A Llama-style decoder in plain PyTorch, with Hugging Face's names and conventions.

In order: the settings; the module (embedding, blocks of RMSNorm + grouped-query attention with rotary positions and
RMSNorm + SwiGLU, final norm, head); the adapter, which draws the weights, computes the loss, says what each parameter
is for, and speaks Hugging Face's `config.json` both ways. The module's parameter names are those of
`LlamaForCausalLM`, so an export is a plain copy of the tensors. Rows that hold several documents are told which token
belongs to which; how attention keeps them apart is in `documents.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from anytimed.contracts import ConfigError, Json, Role
from anytimed_adapters.models.documents import Attend, attention, flex_by_itself, positions


class LlamaSettings(BaseModel):
    """The shape of the model; the vocabulary comes from the tokenizer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    hidden_size: int = Field(gt=0, description="width of the residual stream")
    layers: int = Field(gt=0, description="number of blocks")
    heads: int = Field(gt=0, description="query heads; divides hidden_size into heads of even width")
    kv_heads: int | None = Field(default=None, gt=0, description="key and value heads, dividing heads; default heads")
    intermediate_size: int | None = Field(
        default=None, gt=0, description="width of the SwiGLU; default 8/3 hidden_size, rounded up to a multiple of 32"
    )
    context_length: int = Field(default=2048, gt=0, description="longest sequence; written to config.json")
    rope_theta: float = Field(default=10_000.0, gt=0, description="base of the rotary frequencies")
    norm_eps: float = Field(default=1e-5, gt=0, description="epsilon of RMSNorm")
    tie_embeddings: bool = Field(default=True, description="the head is the embedding")

    @model_validator(mode="after")
    def _shapes(self) -> LlamaSettings:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(
                "hidden_size has to be an even multiple of heads "
                f"(found hidden_size = {self.hidden_size}, heads = {self.heads})"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads has to divide heads (found heads = {self.heads}, kv_heads = {self.kv_heads})")
        return self

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def feed_forward(self) -> int:
        return self.intermediate_size or math.ceil(self.hidden_size * 8 / 3 / 32) * 32


# --- the module -------------------------------------------------------------------------------------------------------


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, Hugging Face's half-split convention. heads: (batch, heads, length, dim); cos, sin: (length,
    dim), or (batch, 1, length, dim) where each row has positions of its own."""
    left, right = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention, by `within` where a row holds several documents. (batch, length, hidden) -> the
    same."""

    def __init__(self, s: LlamaSettings) -> None:
        super().__init__()
        self.heads, self.key_heads, self.head_dim = s.heads, s.key_heads, s.head_dim
        self.q_proj = nn.Linear(s.hidden_size, s.heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.hidden_size, s.key_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.hidden_size, s.key_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.heads * s.head_dim, s.hidden_size, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, within: Attend | None = None) -> Tensor:
        batch, length, _ = hidden.shape
        q = self.q_proj(hidden).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(hidden).view(batch, length, self.key_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(hidden).view(batch, length, self.key_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if within is None:
            grouped = self.key_heads != self.heads
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            mixed = within(q, k, v)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out


class FeedForward(nn.Module):
    """SwiGLU. (batch, length, hidden) -> the same."""

    def __init__(self, s: LlamaSettings) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden_size, s.feed_forward, bias=False)
        self.up_proj = nn.Linear(s.hidden_size, s.feed_forward, bias=False)
        self.down_proj = nn.Linear(s.feed_forward, s.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class Block(nn.Module):
    def __init__(self, s: LlamaSettings) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(s.hidden_size, eps=s.norm_eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = nn.RMSNorm(s.hidden_size, eps=s.norm_eps)
        self.mlp = FeedForward(s)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, within: Attend | None = None) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin, within)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class Decoder(nn.Module):
    flex: bool | None = None
    """Whether FlexAttention keeps documents apart, or else SDPA with a mask; None: FlexAttention where it compiles."""

    def __init__(self, s: LlamaSettings, vocab_size: int) -> None:
        super().__init__()
        self.head_dim, self.theta = s.head_dim, s.rope_theta
        self.embed_tokens = nn.Embedding(vocab_size, s.hidden_size)
        self.layers = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.hidden_size, eps=s.norm_eps)

    def rotary(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of every position and frequency, each (length, head_dim), float32."""
        exponents = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), self.theta**-exponents)
        both = torch.cat((angles, angles), dim=-1)
        return both.cos(), both.sin()

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        hidden = self.embed_tokens(tokens)
        cos, sin = self.rotary(tokens.shape[1], tokens.device)
        within = None
        if documents is not None:
            at = positions(documents)
            cos, sin = cos[at].unsqueeze(1), sin[at].unsqueeze(1)
            flex = self.flex if self.flex is not None else flex_by_itself(tokens.device.type, self.head_dim)
            within = attention(documents, hidden.dtype, flex=flex)
        for block in self.layers:
            hidden = block(hidden, cos, sin, within)
        out: Tensor = self.norm(hidden)
        return out


class Llama(nn.Module):
    """tokens (batch, length) int64, and documents (batch, length) int32 where a row holds several -> logits (batch,
    length, vocab)."""

    def __init__(self, s: LlamaSettings, vocab_size: int) -> None:
        super().__init__()
        self.model = Decoder(s, vocab_size)
        self.lm_head = nn.Linear(s.hidden_size, vocab_size, bias=False)
        if s.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        logits: Tensor = self.lm_head(self.model(tokens, documents))
        return logits


# --- the adapter ------------------------------------------------------------------------------------------------------


class LlamaModel:
    """Implements `anytimed.contracts.Model`."""

    Settings: ClassVar[type[LlamaSettings]] = LlamaSettings
    hf_model_type: ClassVar[str] = "llama"

    def __init__(self, settings: LlamaSettings) -> None:
        self.settings = settings

    def build(self, vocab_size: int, *, device: str = "cpu") -> nn.Module:
        """A Llama with normal(0, 0.02) weights; the two matrices that write to the residual stream are scaled by
        1 / sqrt(2 layers) (GPT-2's initialisation), so that its variance does not grow with depth."""
        with torch.device(device):
            module = Llama(self.settings, vocab_size)
        if device != "meta":
            for name, parameter in module.named_parameters():
                if parameter.ndim == 2:
                    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                    nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.settings.layers) if residual else 0.02)
        return module

    def losses(self, module: Callable[..., Tensor], tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        inputs, targets = tokens[:, :-1].clamp(min=0), tokens[:, 1:]
        logits = module(inputs) if documents is None else module(inputs, documents)
        flat = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        return flat.view(targets.shape)

    def roles(self, module: nn.Module) -> Mapping[str, Role]:
        found: dict[str, Role] = {}
        for name, _ in module.named_parameters():
            if name == "model.embed_tokens.weight":
                found[name] = "embedding"
            elif name == "lm_head.weight":
                found[name] = "head"
            elif name.endswith("norm.weight"):
                found[name] = "norm"
            elif name.endswith("_proj.weight"):
                found[name] = "matrix"
        return found

    def row_splits(self, module: nn.Module) -> Mapping[str, Sequence[int]]:
        return {}  # as in Hugging Face's layout, every projection is a parameter of its own

    def hf_config(self, vocab_size: int, end_token: int) -> Json:
        s = self.settings
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": self.hf_model_type,
            "vocab_size": vocab_size,
            "hidden_size": s.hidden_size,
            "intermediate_size": s.feed_forward,
            "num_hidden_layers": s.layers,
            "num_attention_heads": s.heads,
            "num_key_value_heads": s.key_heads,
            "head_dim": s.head_dim,
            "max_position_embeddings": s.context_length,
            "rope_theta": s.rope_theta,
            "rms_norm_eps": s.norm_eps,
            "tie_word_embeddings": s.tie_embeddings,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": None,
            "eos_token_id": end_token,
            "torch_dtype": "float32",
        }

    @classmethod
    def from_hf(cls, config: Json) -> LlamaModel:
        """The adapter for a Hugging Face Llama's `config.json`. Raises ConfigError naming what this decoder does not
        do."""
        for key in ("attention_bias", "mlp_bias"):
            if config.get(key):
                raise ConfigError(f"config.json: {key} is true; this Llama has no biases")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ConfigError(
                f"config.json: rope_type {rope.get('rope_type')}; only default rotary positions are built in"
            )
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        if config.get("head_dim", hidden // heads) != hidden // heads:
            raise ConfigError(
                f"config.json: head_dim {config['head_dim']}, expected hidden_size / heads = {hidden // heads}"
            )
        return cls(
            LlamaSettings(
                hidden_size=hidden,
                layers=config["num_hidden_layers"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads"),
                intermediate_size=config["intermediate_size"],
                context_length=config["max_position_embeddings"],
                rope_theta=float(config.get("rope_theta") or rope.get("rope_theta", 10_000.0)),
                norm_eps=float(config["rms_norm_eps"]),
                tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            )
        )

    def initial_weights(self, tensors: Mapping[str, Tensor], hf_config: Json, vocab_size: int) -> Mapping[str, Tensor]:
        theirs = type(self).from_hf(hf_config).settings
        for field in ("hidden_size", "layers", "heads", "key_heads", "feed_forward", "rope_theta", "norm_eps"):
            if getattr(theirs, field) != getattr(self.settings, field):
                there, here = getattr(theirs, field), getattr(self.settings, field)
                raise ConfigError(
                    f"init_from: {field} is {there} there and {here} in [model]; make [model] match the checkpoint"
                )
        if self.settings.layers > len(tensors):  # before they are built: a config.json may say a billion
            raise ConfigError(f"init_from: {self.settings.layers} layers, and only {len(tensors)} tensors there")
        wanted = dict(self.build(vocab_size, device="meta").named_parameters())
        found = dict(tensors)
        if "lm_head.weight" in wanted and "lm_head.weight" not in found:
            # A tied checkpoint may start an untied model: the head begins as the embedding.
            found["lm_head.weight"] = found["model.embed_tokens.weight"]
        for name, parameter in wanted.items():
            if name not in found:
                raise ConfigError(f"init_from: no tensor {name} there; is it a Llama?")
            if found[name].shape != parameter.shape:
                raise ConfigError(
                    f"init_from: {name} has shape {tuple(found[name].shape)}, expected {tuple(parameter.shape)}; "
                    "the tokenizers have to agree too"
                )
        return {name: found[name] for name in wanted}

    def activation_bytes(
        self, batch: int, length: int, vocab_size: int, element_bytes: int, documents_on: str | None = None
    ) -> int:
        """What autograd keeps of a forward pass, with what the loss adds in the backward pass, as it was measured of
        this module on a CPU (a compiled one keeps about a third less of each layer). Per token and layer: the inputs
        of every product and elementwise rule; under autocast the residual stream and the norms stay in float32, and
        each product has its input cast for itself. Of each logit three numbers in float32: its softmax, and the loss's
        gradient before and after it. Autocast also keeps a copy of every matrix.

        With documents, one mask for all layers too: float32, and the boolean one that it is made of; FlexAttention
        needs none."""
        s = self.settings
        keys = s.key_heads * s.head_dim
        cast = element_bytes < 4
        layer = (30 if cast else 32) * s.hidden_size + 4 * (s.heads + 2)
        layer += element_bytes * (2 * keys + 4 * s.feed_forward)
        matrices = s.layers * s.hidden_size * (2 * s.hidden_size + 2 * keys + 3 * s.feed_forward)
        copies = element_bytes * (matrices + vocab_size * s.hidden_size) if cast else 0
        written = documents_on is not None and not flex_by_itself(documents_on, s.head_dim)
        mask = batch * length * length * 5 if written else 0
        return mask + copies + batch * length * (s.layers * layer + 14 * s.hidden_size + 12 * vocab_size)
