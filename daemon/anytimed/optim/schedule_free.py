"""What all schedule-free optimizers here share: everything but the rule that moves the hidden matrices.

One step, in order, for each clock and the groups that share it: eta_t of every group; gradients of a stack collected;
the group's rule turns them into a step; z moves by it and decays; when all z have moved, the clock counts the step and
gives c_t; x averages, y is computed with beta_t and written into the parameters.

Parameters hold y while training. x is what to evaluate, export and serve: `averaged()` hands it out without touching a
parameter. Nothing anywhere says when training ends.

Memory beside parameter and gradient: 14 bytes an element (z, x, first or second moment in float32; compensation in
bfloat16), plus 4 bytes a row of a matrix, plus scratch of a few times the largest stack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from anytimed.optim.adamw import adamw_step
from anytimed.optim.averaging import Clock, average_, gradient_point, settle_
from anytimed.optim.orthogonal import working_dtype
from anytimed.optim.scratch import Scratch
from anytimed.optim.settings import check_options, check_parameters
from anytimed.optim.stacks import FlatStack, MatrixStack, Stack

Group = dict[str, Any]
"""A parameter group as torch keeps it: params and options."""


class ScheduleFree(Optimizer):
    """Base of SFNorMuon, AMUSE and SFAdamW; a torch.optim.Optimizer.

    params: groups as `param_groups` makes them, dicts with `params`, `rule` ("spectral" or "adamw") and, optionally,
    options that replace the constructor's; or parameters alone, where the class has one rule. Parameters are float32 or
    bfloat16, on one device with float64 (MPS has none). Groups given at construction share one clock, driven by eta_t
    of the first spectral group (the first group if there is none): w_t, c_t and beta_t follow from it for all of them.
    A group added later gets a clock of its own, starting at t = 0 with its own warm-up; a `clock` index in the group
    says otherwise.

    Options are read at each step, so that lr, warm-up and all else may change on a live optimizer: weights follow the
    learning rate, the sums stay. Lowering lr tenfold makes new weights a hundredth of the old, and x all but stands
    still until `forget` lets go of the past. Options of the clock (`shared` below) count only in the group that drives
    it.

    State of a parameter (`optimizer.state[p]`), views that keep their identity: z, x float32 and comp bfloat16 of its
    shape; updates, int64 0-d; matrices: momentum of its shape and, where `row_moments`, v (m,); the others: v of its
    shape.
    """

    rules: ClassVar[tuple[str, ...]] = ("spectral", "adamw")
    row_moments: ClassVar[bool] = False  # whether the matrices have v, one number a row

    def __init__(
        self,
        params: Iterable[Any],
        *,
        options: Mapping[str, Mapping[str, Any]],
        shared: Mapping[str, Any],
        first_beta: str,
        orthogonal_dtype: torch.dtype | None,
    ) -> None:
        """options: by rule, the defaults of a group; shared: the defaults of what a clock reads; first_beta: the option
        that holds beta at t = 0."""
        self._options = {rule: dict(given) for rule, given in options.items()}
        self._shared = dict(shared)
        self._first_beta = first_beta
        self._orthogonal_dtype = orthogonal_dtype
        self._clocks: list[Clock] = []
        self._stacks: list[Sequence[Stack]] = []  # by group
        self._evaluating = False
        self._constructed = False
        self._scratch: Scratch
        super().__init__(params, {})
        self._constructed = True

    # --- what a subclass says ---------------------------------------------------------------------------------------

    def _matrix_step(self, stack: MatrixStack, g: Tensor, eta: Tensor, group: Group, active: Tensor | None) -> Tensor:
        """The step that z takes against, (k, m, n), without the decay; may use g's memory.

        g: (k, m, n) float32, may hold anything where not `active` (None, 0-d or (k,)): moments must not change there.
        """
        raise NotImplementedError

    def _next_beta(self, group: Group, t: Tensor, weight_sum: Tensor, reference_sum: Tensor, last_warm: int) -> Tensor:
        """beta_t, 0-d float64, from t, W_{t-1}, W_{T0-1}, T0. group: the one that drives the clock. Here: its fixed
        `beta`."""
        return torch.full_like(weight_sum, group["beta"])

    def _rule_of(self, group: Group) -> str:
        """The rule that moves this group. ValueError where it names none."""
        rule = group.get("rule")
        if rule not in self.rules:
            raise ValueError(
                f"{type(self).__name__}: a parameter group has rule {rule!r}, expected one of {', '.join(self.rules)}; "
                "make the groups with anytimed.optim.param_groups(named_parameters, roles)"
            )
        return str(rule)

    # --- groups -----------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters; x = y = z = what they hold. ValueError on options or parameters that cannot be."""
        group = dict(param_group)
        if not isinstance(group["params"], (Tensor, set)):  # torch speaks for these two
            group["params"] = list(group["params"])
            if not group["params"]:
                raise ValueError("a parameter group without parameters; leave the group out")
        rule = self._rule_of(group)
        group["rule"] = rule
        group.setdefault("clock", len(self._clocks) if self._constructed else 0)
        for name, value in (self._options[rule] | self._shared).items():
            group.setdefault(name, value)
        check_options(group, type(self).__name__)
        clock = group["clock"]
        if clock not in range(len(self._clocks) + 1):
            raise ValueError(
                f"clock {clock!r} of a parameter group: expected 0 to {len(self._clocks)}, the next new one"
            )
        for other in self.param_groups:
            differing = [name for name in self._shared if group[name] != other[name]]
            if other["clock"] == clock and differing:
                raise ValueError(
                    f"groups of one clock share {', '.join(differing)}: found {[group[n] for n in differing]} beside "
                    f"{[other[n] for n in differing]}; set them alike, or add the group later, with a clock of its own"
                )
        super().add_param_group(group)
        try:
            check_parameters(group, self._scratch.device if self._stacks else None)
        except ValueError:
            self.param_groups.pop()
            raise
        params: list[Tensor] = group["params"]
        with torch.no_grad():
            stacks: Sequence[Stack] = (
                MatrixStack.gather(params, self.row_moments) if rule == "spectral" else FlatStack.gather(params)
            )
            self._stacks.append(stacks)
            for stack in stacks:
                for p, state in zip(stack.params, stack.state(), strict=True):
                    self.state[p] = state
            if clock == len(self._clocks):
                self._clocks.append(Clock(params[0].device, group[self._first_beta]))
        if len(self._stacks) == 1:
            self._scratch = Scratch(params[0].device)
            self._orthogonal_dtype = self._orthogonal_dtype or working_dtype(params[0].device)

    def _by_clock(self) -> Iterator[tuple[Clock, Group, list[tuple[Group, Sequence[Stack]]]]]:
        """Every clock, the group that drives it, and its groups with their stacks."""
        for index, clock in enumerate(self._clocks):
            members = [(g, s) for g, s in zip(self.param_groups, self._stacks, strict=True) if g["clock"] == index]
            driver = next((g for g, _ in members if g["rule"] == "spectral"), members[0][0])
            yield clock, driver, members

    # --- the step ---------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None, *, gate: Tensor | None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], *, gate: Tensor | None = None) -> float: ...

    def step(self, closure: Callable[[], float] | None = None, *, gate: Tensor | None = None) -> float | None:
        """One step from the gradients at y; returns the closure's loss.

        gate: 0-d bool on the parameters' device. Where it is False, nothing changes, to the bit: x, y, z, moments,
        counters, clock; gradients may then hold NaN or Inf. The host does not wait to know. A parameter without a
        gradient keeps its moments and z, and averages with the rest. Gradients are only read.
        """
        if self._evaluating:
            raise RuntimeError("step() while the parameters hold x, the averaged weights; call train() first")
        if gate is not None and (gate.shape != () or gate.dtype != torch.bool or gate.device != self._scratch.device):
            raise ValueError(
                f"gate: found {gate.dtype} of shape {tuple(gate.shape)} on {gate.device}, expected a 0-d bool tensor "
                f"on {self._scratch.device}; compute it there, for example torch.isfinite(grad_norm)"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for clock, driver, members in self._by_clock():
                driving_eta = clock.eta(driver["lr"], driver["warmup_steps"])
                for group, stacks in members:
                    eta = clock.eta(group["lr"], group["warmup_steps"])
                    for stack in stacks:
                        self._move(stack, group, eta, gate)
                c = clock.advance(
                    driving_eta,
                    warmup_steps=driver["warmup_steps"],
                    next_beta=lambda *at, driver=driver: self._next_beta(driver, *at),
                    averaging_power=driver["averaging_power"],
                    averaging_lr_power=driver["averaging_lr_power"],
                    averaging_window_steps=driver["averaging_window_steps"],
                    gate=gate,
                )
                for _, stacks in members:
                    for stack in stacks:
                        average_(stack.x, stack.comp, stack.z, c, gate, self._scratch)
                        self._write_y(stack, clock)
        return loss

    def _move(self, stack: Stack, group: Group, eta: Tensor, gate: Tensor | None) -> None:
        """z <- z - eta lambda z - step, and the rule's moments, of one stack."""
        g, missing = stack.gradients(self._scratch)
        if len(missing) == len(stack.params):
            return
        active = stack.active(missing, gate)
        if isinstance(stack, MatrixStack):
            step = self._matrix_step(stack, g, eta, group, active)
            stack.updates.add_(1 if active is None else active)
        else:
            assert isinstance(stack, FlatStack)
            step = adamw_step(stack, g, eta, active, self._scratch, beta2=group["beta2"], eps=group["eps"])
        if group["weight_decay"]:
            # Added to the step, not as a factor 1 - eta lambda of z: float32 rounds that factor to steps of 6e-8.
            step.addcmul_(stack.z, (eta * group["weight_decay"]).to(torch.float32))
        if active is None:
            stack.z.sub_(step)
        else:
            settle_(stack.z, torch.sub(stack.z, step, out=step), stack.spread(active))

    def _write_y(self, stack: Stack, clock: Clock) -> None:
        stack.write_(gradient_point(stack.z, stack.x, clock.beta, self._scratch.take("y", stack.z.shape)))

    # --- x, y and z -------------------------------------------------------------------------------------------------

    def averaged(self) -> dict[Tensor, Tensor]:
        """x by parameter, float32 in its shape: the live state, not a copy, and no parameter is touched. Copy, never
        write."""
        return {p: self.state[p]["x"] for group in self.param_groups for p in group["params"]}

    def iterate(self) -> dict[Tensor, Tensor]:
        """z by parameter, under the same terms as `averaged`."""
        return {p: self.state[p]["z"] for group in self.param_groups for p in group["params"]}

    def restore_y(self) -> None:
        """Compute y from z, x and the clock's beta into all parameters: the bits that the last step left there."""
        with torch.no_grad():
            for clock, _, members in self._by_clock():
                for _, stacks in members:
                    for stack in stacks:
                        self._write_y(stack, clock)
        self._evaluating = False

    def eval(self) -> None:
        """Put x into the parameters, for loops that expect it there; `step` refuses until `train` or `restore_y`."""
        with torch.no_grad():
            for stacks in self._stacks:
                for stack in stacks:
                    stack.write_(stack.x)
        self._evaluating = True

    def train(self) -> None:
        """Put y back into the parameters after `eval`, to the bit."""
        if self._evaluating:
            self.restore_y()

    # --- memory and metrics -----------------------------------------------------------------------------------------

    def forget(self, factor: float) -> None:
        """Multiply the weight sum by `factor`, in (0, 1], never below w_t / c_T0: x remembers less, and follows faster.

        For a stream that has changed under a long history: x stays an exact weighted mean with the past discounted; z,
        moments, compensation and bias correction are untouched. AMUSE's beta follows the sum. Does not wait for the
        device.
        """
        if not 0.0 < factor <= 1.0:
            raise ValueError(f"forget: found factor {factor}, expected a number in (0, 1]; 0.5 halves the memory")
        with torch.no_grad():
            for clock in self._clocks:
                clock.forget(factor)

    def metrics(self) -> dict[str, Tensor]:
        """0-d tensors on the device, of the last step: c, beta and eta of the first clock; over all parameters
        `zx_distance` = |z - x| / |x| and `z_norm` = |z|, Euclidean norms. Reads z and x once; the host does not
        wait."""
        clock, driver, _ = next(self._by_clock())
        stacks = [stack for group in self._stacks for stack in group]
        with torch.no_grad():
            apart, z, x = (
                torch.stack([torch.linalg.vector_norm(part) for part in parts]).square().sum().sqrt()
                for parts in (
                    (torch.sub(s.z, s.x, out=self._scratch.take("delta", s.z.shape)) for s in stacks),
                    (s.z for s in stacks),
                    (s.x for s in stacks),
                )
            )
            eta = clock.eta(driver["lr"], driver["warmup_steps"], ahead=0)
            return {"c": clock.c, "beta": clock.beta.clone(), "eta": eta, "zx_distance": apart / x, "z_norm": z}

    # --- resuming ---------------------------------------------------------------------------------------------------

    def clock_state(self) -> list[dict[str, int | float]]:
        """Every clock as plain numbers, exact through JSON (Python writes the shortest digits that read back the
        same)."""
        return [clock.numbers() for clock in self._clocks]

    def load_clock_state(self, clocks: Sequence[Mapping[str, int | float]]) -> None:
        """The inverse of `clock_state`; options such as lr are not part of it. ValueError where the clocks differ."""
        if len(clocks) != len(self._clocks):
            raise ValueError(
                f"{len(clocks)} clocks stored, this optimizer has {len(self._clocks)}: a group added later has a clock "
                "of its own; add it the same way, or give its group the same `clock` index"
            )
        for i, numbers in enumerate(clocks):
            Clock.check_numbers(numbers, f"clock {i}")
        for clock, numbers in zip(self._clocks, clocks, strict=True):
            clock.load_numbers(numbers)

    def state_dict(self) -> dict[str, Any]:
        """torch's dict (state tensors by reference) and `clocks`, plain numbers."""
        return {**super().state_dict(), "clocks": self.clock_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state into the buffers; parameters are not touched: load the module too, or call `restore_y`.

        ValueError, before anything changes, where groups, rules or shapes differ.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        saved_groups = state_dict["param_groups"]
        told = [(g["rule"], g["clock"], len(g["params"])) for g in saved_groups]
        here = [(g["rule"], g["clock"], len(g["params"])) for g in self.param_groups]
        if told != here:
            raise ValueError(f"groups (rule, clock, parameters) stored: {told}; of this optimizer: {here}")
        copies: list[tuple[Tensor, Tensor]] = []
        for saved, group in zip(saved_groups, self.param_groups, strict=True):
            for index, p in zip(saved["params"], group["params"], strict=True):
                stored, mine = state_dict["state"][index], self.state[p]
                shapes = {name: tuple(t.shape) for name, t in stored.items()}
                if shapes != {name: tuple(t.shape) for name, t in mine.items()}:
                    raise ValueError(
                        f"parameter {index}: stored {shapes}, expected { {n: tuple(t.shape) for n, t in mine.items()} }"
                    )
                copies += [(mine[name], stored[name]) for name in mine]
        self.load_clock_state(state_dict["clocks"])
        for target, source in copies:
            target.copy_(source)
        for saved, group in zip(saved_groups, self.param_groups, strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)  # torch keeps three entries only; a deep copy needs the stacks and clocks as well
