"""The built-in optimizers as recipes: a table of the configuration in, an optimizer over a module's parameters out.

The defaults are the optimizers' own, the same for every horizon; whose value each one is, their classes say.
`warmup_steps` is the only length anywhere, and it is that of the beginning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from anytimed.contracts import ConfigError, Json, Role
from anytimed.optim import AMUSE, ScheduleFree, SFAdamW, SFNorMuon, param_groups


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    warmup_steps: int = Field(default=2000, ge=0, description="the learning rate rises over these steps, then stays")
    weight_decay: float = Field(default=0.05, ge=0, description="lambda, applied at the fast iterate z")
    averaging_power: float = Field(default=0.0, ge=0, description="r: x weighs step t by t^r; 0 is the plain mean")
    averaging_window_steps: int | None = Field(
        default=None, gt=0, description="x forgets beyond about this many steps; default never"
    )
    lean: bool = Field(
        default=False, description="x is not stored but recovered: 8 bytes of state a parameter, and x drifts"
    )
    compiled: bool | None = Field(
        default=None, description="torch.compile the work on single elements; default on CUDA where Triton is there"
    )


class _SpectralSettings(_Settings):
    weight_decay: float = Field(default=0.1, ge=0, description="lambda, applied at the fast iterate z")
    aux_lr: float | None = Field(
        default=None, gt=0, description="learning rate of embeddings, head and norms (SF-AdamW); default lr / 2"
    )
    aux_beta2: float = Field(default=0.99, ge=0, lt=1, description="second moment of embeddings, head and norms")
    aux_weight_decay: float | None = Field(
        default=None, ge=0, description="lambda of embeddings, head and norms; default weight_decay"
    )
    orthogonal_dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="of the matrix products; default bfloat16 where the hardware is quick at it"
    )
    orthogonal_coefficients: Literal["quintic", "polar_express"] = Field(
        default="quintic", description="Muon's five equal polynomials, or those of the Polar Express"
    )
    orthogonal_gram: bool = Field(
        default=False, description="fewer products for long matrices; their error doubles in bfloat16"
    )


class Recipe:
    """What a recipe of the entry points `anytimed.optimizers` offers."""

    Settings: ClassVar[type[BaseModel]]
    optimizer: ClassVar[Callable[..., ScheduleFree]]

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def numbers(self) -> Json:
        """The optimizer's arguments, as manifests tell them."""
        told: Json = self.settings.model_dump(exclude_none=True)
        return told

    def build(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        roles: Mapping[str, Role],
        row_splits: Mapping[str, Sequence[int]] | None = None,
    ) -> ScheduleFree:
        """The optimizer, every trainable parameter in exactly one group by its role. Raises ConfigError on one
        without."""
        try:
            groups = param_groups(named_parameters, roles, row_splits=row_splits)
        except ValueError as error:
            raise ConfigError(f"[optimizer]: {error}") from error
        return type(self).optimizer(groups, **self.numbers())


class SFNorMuonRecipe(Recipe):
    """SF-NorMuon (arXiv 2605.23061)."""

    class Settings(_SpectralSettings):
        lr: float = Field(default=0.01, gt=0, description="eta of the hidden matrices")
        beta: float = Field(default=0.8, ge=0, lt=1, description="y = (1 - beta) z + beta x")
        mu: float = Field(default=0.6, ge=0, lt=1, description="momentum of the gradient")
        beta2: float = Field(default=0.95, ge=0, lt=1, description="second moment of the rows")

    optimizer = SFNorMuon


class AMUSERecipe(Recipe):
    """AMUSE (arXiv 2605.22432)."""

    class Settings(_SpectralSettings):
        lr: float = Field(default=0.02, gt=0, description="eta of the hidden matrices")
        beta1: float = Field(default=0.6, ge=0, lt=1, description="beta until the warm-up ends")
        mu: float = Field(default=0.7, ge=0, lt=1, description="Nesterov momentum")
        rho: float = Field(default=0.2, ge=0, le=1, description="how fast beta rises towards 1 after the warm-up")
        scale: Literal["match_rms", "spectral"] = Field(
            default="match_rms",
            description="of the update: AdamW's RMS, or sqrt(max(1, m / n)) for SGD-like auxiliaries",
        )

    optimizer = AMUSE


class SFAdamWRecipe(Recipe):
    """Schedule-Free AdamW (arXiv 2405.15682) for every parameter."""

    class Settings(_Settings):
        lr: Annotated[float, Field(gt=0)] | Literal["polyak"] = Field(
            default=0.0025, description='eta of every parameter, or "polyak": measured at each step'
        )
        polyak_lower_bound: float = Field(default=0.0, description="what the loss stays above, in nats per token")
        beta: float = Field(default=0.9, ge=0, lt=1, description="y = (1 - beta) z + beta x")
        beta2: float = Field(default=0.99, ge=0, lt=1, description="second moment")

    optimizer = SFAdamW
