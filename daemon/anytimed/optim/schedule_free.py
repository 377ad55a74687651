"""What all schedule-free optimizers here share: everything but the rule that moves the hidden matrices.

One step, in order, for each clock and the groups that share it: eta_t of every group; the clock counts the step and
gives c_t and beta_t; then, stack by stack (`walk`), the group's rule turns gradients into a direction, z moves along it
and decays, x averages, and y is computed and written into the parameters.

Parameters hold y while training. x is what to evaluate, export and serve: `averaged()` hands it out without touching a
parameter. Nothing anywhere says when training ends.

Memory beside parameter and gradient: 14 bytes an element (z, x, first or second moment in float32; compensation in
bfloat16), plus 4 bytes a row of a matrix, plus scratch: on a CPU some MiB and the gradients of the small parameters, on
a device a few times the largest stack. `lean=True`: 8 bytes, without x and its compensation; see the class.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from anytimed.optim import compiled
from anytimed.optim.averaging import Clock, recover, settle_
from anytimed.optim.orthogonal import NewtonSchulz, working_dtype
from anytimed.optim.rules import AdamW, Momentum, Scales, Spectral
from anytimed.optim.settings import check_lean, check_options, check_parameters
from anytimed.optim.stacks import FlatStack, MatrixStack, Stack
from anytimed.optim.sweep import Pace
from anytimed.optim.walk import Walk

Group = dict[str, Any]
"""A parameter group as torch keeps it: params and options."""

Member = tuple[int, Group, Sequence[Stack]]
"""A group, its index, and its stacks."""


def _plain(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of torch's Optimizer without its decorator, which keeps the compiler from tracing into it and for that
    imports the compiler at the first call: a second of every start."""
    return getattr(method, "__wrapped__", method)


class ScheduleFree(Optimizer):
    """Base of SFNorMuon, AMUSE and SFAdamW; a torch.optim.Optimizer.

    params: groups as `param_groups` makes them, dicts with `params`, `rule` ("spectral" or "adamw") and, optionally,
    options that replace the constructor's; or parameters alone, where the class has one rule. Parameters are float32 or
    bfloat16, on one device with float64 (MPS has none). Groups given at construction share one clock, driven by eta_t
    of the first spectral group (the first group if there is none): w_t, c_t and beta_t follow from it for all of them.
    A group added later gets a clock of its own, starting at t = 0 with its own warm-up; a `clock` index in the group
    says otherwise.

    Arguments that all three optimizers take, by keyword:

        averaging_power         0          r: step t weighs t^r; above 0, x is about the last t / (r + 1) steps
        averaging_lr_power      2          p: a step weighs eta_t^p
        averaging_window_steps  none       N caps the weight sum at N w_t: x forgets beyond about N steps
        lean                    False      8 bytes of state an element for 14: no x, no compensation. x is recovered
                                           from the parameters, which must be float32, and is part of their state. Its
                                           error grows: 2e-5, 1e-4, 1.4e-3 of x after 1e4, 1e5, 1e6 steps
        compiled                by device  torch.compile the work on single elements; the first step takes seconds.
                                           None: on CUDA where Triton is there. A CPU has something quicker (`native`)

    Options are read at each step, so that lr, warm-up and all else may change on a live optimizer: weights follow the
    learning rate, the sums stay. Lowering lr tenfold makes new weights a hundredth of the old, and x all but stands
    still until `forget` lets go of the past. Options of the clock (`shared` below) count only in the group that drives
    it.

    State of a parameter (`optimizer.state[p]`), views that keep their identity: z, x float32 and comp bfloat16 of its
    shape; updates, int64 0-d; matrices: momentum of its shape and, where `row_moments`, v (m,); the others: v of its
    shape.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler leaves unscaling and skipping to `step`

    rules: ClassVar[tuple[str, ...]] = ("spectral", "adamw")
    row_moments: ClassVar[bool] = False  # whether the matrices have v, one number a row

    def __init__(
        self,
        params: Iterable[Any],
        *,
        options: Mapping[str, Mapping[str, Any]],
        shared: Mapping[str, Any],
        first_beta: str,
        lean: bool,
        compiled: bool | None,
    ) -> None:
        """options: by rule, the defaults of a group; shared: the defaults of what a clock reads; first_beta: the option
        that holds beta at t = 0."""
        self._options = {rule: dict(given) for rule, given in options.items()}
        self._shared = dict(shared)
        self._first_beta = first_beta
        self._lean = lean
        self._compiled = compiled
        self._decided: list[int] = []  # groups whose orthogonal_dtype the hardware decided
        self._clocks: list[Clock] = []
        self._stacks: list[Sequence[Stack]] = []  # by group
        self._update_squares: list[Tensor] = []  # by group: squared norm of the last update
        self._kept_y: list[Tensor] | None = None  # by stack, while a lean optimizer's parameters hold x
        self._evaluating = False
        self._constructed = False
        self._walk: Walk
        super().__init__(params, {})
        self._constructed = True

    # --- what a subclass says ---------------------------------------------------------------------------------------

    def _momentum(self, group: Group) -> Momentum:
        """How the matrices of a group take in their gradients."""
        raise NotImplementedError

    def _scales(self, group: Group) -> Scales:
        """How far they move, once orthogonalised."""
        raise NotImplementedError

    def _polar(self, group: Group) -> NewtonSchulz:
        """How they are orthogonalised."""
        splits = group.get("row_splits")
        return NewtonSchulz(
            dtype=getattr(torch, group["orthogonal_dtype"]),
            coefficients=group["orthogonal_coefficients"],
            gram=group["orthogonal_gram"],
            row_splits=None if splits is None else tuple(splits),
            scratch=self._walk.scratch,
        )

    def _measured_eta(
        self,
        clock: Clock,
        members: list[Member],
        gate: Tensor | None,
        grad_scale: Tensor | None,
        loss: Tensor | float | None,
    ) -> Tensor | None:
        """The learning rate that this step's own loss and gradients give, for all groups of a clock, 0-d float64; steps
        then weigh alike. v has taken in the gradients afterwards. None: the groups' `lr` says it."""
        return None

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
                "make the groups with anytimed.optim.param_groups(model)"
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
        if self._lean:
            check_lean(group, self._first_beta, type(self).__name__)
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
        _plain(Optimizer.add_param_group)(self, group)
        try:
            check_parameters(group, self._walk.scratch.device if self._stacks else None, lean=self._lean)
        except ValueError:
            self.param_groups.pop()
            raise
        params: list[Tensor] = group["params"]
        with torch.no_grad():
            stacks: Sequence[Stack] = (
                MatrixStack.gather(params, self.row_moments, self._lean)
                if rule == "spectral"
                else FlatStack.gather(params, self._lean)
            )
            self._stacks.append(stacks)
            self._update_squares.append(torch.zeros((), device=params[0].device))
            for stack in stacks:
                for p, state in zip(stack.params, stack.state(), strict=True):
                    self.state[p] = state
            if clock == len(self._clocks):
                self._clocks.append(Clock(params[0].device, group[self._first_beta]))
        if len(self._stacks) == 1:
            decided = compiled.decided(params[0].device) if self._compiled is None else self._compiled
            self._walk = Walk(params[0].device, decided)
        self._walk.consider(sum(stack.z.numel() for stacks in self._stacks for stack in stacks))
        if rule == "spectral" and group["orthogonal_dtype"] is None:
            # Decided once, here, and part of the state: another machine goes on with the same arithmetic.
            group["orthogonal_dtype"] = str(working_dtype(params[0].device)).removeprefix("torch.")
            self._decided.append(len(self.param_groups) - 1)

    def _by_clock(self) -> Iterator[tuple[Clock, Group, list[Member]]]:
        """Every clock, the group that drives it, and its groups with their indices and stacks."""
        for index, clock in enumerate(self._clocks):
            members = [member for member in self._members() if member[1]["clock"] == index]
            driver = next((g for _, g, _ in members if g["rule"] == "spectral"), members[0][1])
            yield clock, driver, members

    def _members(self) -> list[Member]:
        """Every group with its index and its stacks."""
        return list(zip(range(len(self._stacks)), self.param_groups, self._stacks, strict=True))

    def _eta(self, clock: Clock, group: Group, *, ahead: int = 1) -> Tensor:
        """eta_t of a group, 0-d float64, `ahead` steps after those taken."""
        lr = group["lr"]
        if callable(lr):
            lr = lr((clock.t + ahead).to(torch.float64))
        return clock.eta(lr, group["warmup_steps"], ahead=ahead)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, as torch's."""
        _plain(Optimizer.zero_grad)(self, set_to_none)

    # --- the step ---------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None, *, gate: Tensor | None = None, loss: Tensor | None = None) -> None: ...

    @overload
    def step(
        self, closure: Callable[[], float], *, gate: Tensor | None = None, loss: Tensor | None = None
    ) -> float: ...

    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        gate: Tensor | None = None,
        loss: Tensor | None = None,
    ) -> float | None:
        """One step from the gradients at y; returns the closure's loss.

        gate: 0-d bool on the parameters' device. Where it is False, nothing changes, to the bit: x, y, z, moments,
        counters, clock; gradients may then hold NaN or Inf. The host does not wait to know. A parameter without a
        gradient keeps its moments and z, and averages with the rest. Gradients are only read. loss: 0-d, f(y), which
        a Polyak step needs where no closure gives it; other learning rates do not look at it.
        """
        if self._evaluating:
            raise RuntimeError("step() while the parameters hold x, the averaged weights; call train() first")
        device = self._walk.scratch.device
        if gate is not None and (gate.shape != () or gate.dtype != torch.bool or gate.device != device):
            raise ValueError(
                f"gate: found {gate.dtype} of shape {tuple(gate.shape)} on {gate.device}, expected a 0-d bool tensor "
                f"on {device}; compute it there, for example torch.isfinite(grad_norm)"
            )
        if self._lean:
            for _, driver, _ in self._by_clock():  # options may have changed
                check_lean(driver, self._first_beta, type(self).__name__)
        told = None
        if closure is not None:
            with torch.enable_grad():
                told = closure()
        at_y = loss if told is None else told
        with torch.no_grad():
            gate, grad_scale = self._with_scaler(gate)
            if gate is not None and self._walk.on_host:
                if not gate:
                    return told
                gate = None
            for clock, driver, members in self._by_clock():
                self._step_of(clock, driver, members, gate, grad_scale, at_y)
        return told

    def _with_scaler(self, gate: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The gate, and what gradients have to be multiplied by, where a GradScaler said its part (it sets two
        attributes for one step, and leaves to us to skip and to unscale)."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        scale: Tensor | None = getattr(self, "grad_scale", None)
        device = self._walk.scratch.device
        if found_inf is not None:
            finite = (torch.as_tensor(found_inf) == 0).reshape(()).to(device)  # a plain 0 where no gradient was seen
            gate = finite if gate is None else gate & finite
        # The reciprocal of a power of two, as scales are, is exact.
        return gate, None if scale is None else scale.to(device, torch.float64).reciprocal().to(torch.float32)

    def _step_of(
        self,
        clock: Clock,
        driver: Group,
        members: list[Member],
        gate: Tensor | None,
        grad_scale: Tensor | None,
        loss: Tensor | float | None,
    ) -> None:
        eta_of_all = self._measured_eta(clock, members, gate, grad_scale, loss)
        etas = [self._eta(clock, group) if eta_of_all is None else eta_of_all for _, group, _ in members]
        last_beta = clock.beta.to(torch.float32) if self._lean else None
        c = clock.advance(
            self._eta(clock, driver) if eta_of_all is None else torch.ones_like(eta_of_all),
            warmup_steps=driver["warmup_steps"],
            next_beta=partial(self._next_beta, driver),
            averaging_power=driver["averaging_power"],
            averaging_lr_power=driver["averaging_lr_power"],
            averaging_window_steps=driver["averaging_window_steps"],
            gate=gate,
        ).to(torch.float32)
        beta = clock.beta.to(torch.float32)
        for eta, (index, group, stacks) in zip(etas, members, strict=True):
            decay = group["weight_decay"]
            pace = Pace((eta * -decay).to(torch.float32) if decay else None, c, beta, last_beta, gate)
            eta = eta.to(torch.float32)
            squares: list[Tensor] = []
            rule: Spectral | AdamW
            if group["rule"] == "spectral":
                rule = Spectral(eta, self._momentum(group), self._polar(group), self._scales(group))
            else:
                rule = AdamW(eta, group["beta2"], group["eps"], moved=eta_of_all is not None)
            for stack in stacks:
                if isinstance(stack, MatrixStack) and isinstance(rule, Spectral):
                    squares += self._walk.matrices(stack, pace, grad_scale, rule)
                else:
                    assert isinstance(stack, FlatStack) and isinstance(rule, AdamW)
                    squares += self._walk.flat(stack, pace, grad_scale, rule)
            moved_by = torch.cat([s.reshape(-1) for s in squares]).sum() if squares else torch.zeros_like(eta)
            settle_(self._update_squares[index], moved_by, gate)

    # --- x, y and z -------------------------------------------------------------------------------------------------

    @property
    def lean(self) -> bool:
        """Whether x is not stored but lies in the parameters, as y: then they are part of the state."""
        return self._lean

    def averaged(self) -> dict[Tensor, Tensor]:
        """x by parameter, float32 in its shape, and no parameter is touched. The live state, not a copy (a lean
        optimizer computes it): copy, never write."""
        if not self._lean:
            return {p: self.state[p]["x"] for group in self.param_groups for p in group["params"]}
        averaged: dict[Tensor, Tensor] = {}
        with torch.no_grad():
            for stack, beta, y in self._lean_stacks():
                x = recover(stack.z, y, beta.to(torch.float32), torch.empty_like(stack.z))
                averaged |= dict(zip(stack.params, stack.split(x), strict=True))
        return averaged

    def _lean_stacks(self) -> Iterator[tuple[Stack, Tensor, Tensor]]:
        """Every stack, the beta that encoded its y, and that y; in the order of `_stacks`."""
        kept = iter(self._kept_y or ())
        for group, stacks in zip(self.param_groups, self._stacks, strict=True):
            for stack in stacks:
                y = next(kept, None)  # none is kept of a group added since `eval`
                yield stack, self._clocks[group["clock"]].beta, stack.held(self._walk.scratch) if y is None else y

    def iterate(self) -> dict[Tensor, Tensor]:
        """z by parameter, under the same terms as `averaged`."""
        return {p: self.state[p]["z"] for group in self.param_groups for p in group["params"]}

    def begin(self) -> None:
        """x = y = z = what the parameters hold now: for weights loaded after the optimizer was made, before the first
        step. RuntimeError after it."""
        if any(int(clock.t) for clock in self._clocks):
            raise RuntimeError("begin() after the first step would throw the average away; make a new optimizer")
        with torch.no_grad():
            for stacks in self._stacks:
                for stack in stacks:
                    stack.begin()
            self._kept_y = None

    def restore_y(self) -> None:
        """Compute y from z, x and the clock's beta into all parameters: the bits that the last step left there. A lean
        optimizer has y nowhere else: its parameters are left as they are."""
        with torch.no_grad():
            if self._lean:
                for y, stack in zip(self._kept_y or (), (s for stacks in self._stacks for s in stacks), strict=False):
                    stack.write_(y)
                self._kept_y = None
            else:
                for clock, _, members in self._by_clock():
                    beta = clock.beta.to(torch.float32)
                    for _, _, stacks in members:
                        for stack in stacks:
                            self._walk.write_y(stack, beta)
        self._evaluating = False

    def eval(self) -> None:
        """Put x into the parameters, for loops that expect it there; `step` refuses until `train` or `restore_y`. A
        lean optimizer keeps y meanwhile, 4 bytes an element."""
        if self._evaluating:
            return
        with torch.no_grad():
            if self._lean:
                self._kept_y = [y.clone() for _, _, y in self._lean_stacks()]
                torch._foreach_copy_(*map(list, zip(*self.averaged().items(), strict=True)))  # type: ignore[arg-type]
            else:
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

    def memory_steps(self) -> Tensor:
        """1 / c of the first clock, 0-d float64 on the device: over how many steps x averages; inf before the first."""
        clock, *_ = next(self._by_clock())
        return 1.0 / clock.c

    def metrics(self) -> dict[str, Tensor]:
        """0-d tensors on the device, of the last step: c, beta and eta of the first clock; over all parameters
        `zx_distance` = |z - x| / |x| and `z_norm` = |z|; and by rule, as `spectral_…` and `adamw_…`, `weight_norm` =
        |x| and `update_rms`, the root of the mean square of what z moved by, before the decay (0.2 eta for SF-NorMuon
        by construction). Euclidean norms. Reads z and x once; the host does not wait."""
        clock, driver, _ = next(self._by_clock())
        squares: dict[str, list[Tensor]] = {}
        elements = dict.fromkeys(self.rules, 0)
        with torch.no_grad():
            lean = self._lean_stacks() if self._lean else None
            for (_, group, stacks), update in zip(self._members(), self._update_squares, strict=True):
                rule = group["rule"]
                squares.setdefault(f"{rule}_update", []).append(update)
                for stack in stacks:
                    elements[rule] += stack.z.numel()
                    apart = self._walk.scratch.take("apart", stack.z.shape)
                    x = stack.x
                    if lean is not None:
                        _, beta, y = next(lean)
                        x = recover(stack.z, y, beta.to(torch.float32), apart)
                    squares.setdefault(f"{rule}_weight", []).append(torch.linalg.vector_norm(x).square())
                    squares.setdefault("z", []).append(torch.linalg.vector_norm(stack.z).square())
                    apart = torch.sub(stack.z, x, out=apart)
                    squares.setdefault("apart", []).append(torch.linalg.vector_norm(apart).square())
            sums = {name: torch.stack(parts).sum() for name, parts in squares.items()}
            x_norm = torch.stack([total for name, total in sums.items() if name.endswith("_weight")]).sum().sqrt()
            found = {
                "c": clock.c,
                "beta": clock.beta.clone(),
                "eta": self._last_eta(clock, driver),
                "zx_distance": sums["apart"].sqrt() / x_norm,
                "z_norm": sums["z"].sqrt(),
            }
            for rule, count in elements.items():
                if count:
                    found[f"{rule}_weight_norm"] = sums[f"{rule}_weight"].sqrt()
                    found[f"{rule}_update_rms"] = (sums[f"{rule}_update"] / count).sqrt()
            return found

    def _last_eta(self, clock: Clock, driver: Group) -> Tensor:
        return self._eta(clock, driver, ahead=0)

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
        """torch's dict (state tensors by reference) and `clocks`, plain numbers. A learning rate that is a function
        stands in it as None: functions stay with the program. A lean optimizer's x lies in the parameters: save the
        module's state beside this one, while training (not between `eval` and `train`)."""
        self._refuse_half_of_a_lean_state("state_dict")
        told = super().state_dict()
        told["param_groups"] = [
            {name: None if callable(value) else value for name, value in group.items()}
            for group in told["param_groups"]
        ]
        return {**told, "clocks": self.clock_state()}

    def _refuse_half_of_a_lean_state(self, what: str) -> None:
        if self._lean and self._evaluating:
            raise RuntimeError(
                f"{what}() of a lean optimizer while the parameters hold x, the averaged weights: y is part of the "
                "state, and lies in neither; call train() first"
            )

    def arithmetic(self) -> dict[str, str]:
        """What was decided about this machine and has to be so on the next, for the same bits: who does the work on
        single elements, "torch" or its "compiler"; in which dtype matrices are orthogonalised."""
        dtypes = [g["orthogonal_dtype"] for g in self.param_groups if g["rule"] == "spectral"]
        found = {"elements_by": "compiler" if self._walk.compiled else "torch"}
        return found | ({"orthogonal_dtype": dtypes[0]} if dtypes else {})

    def load_arithmetic(self, arithmetic: Mapping[str, str]) -> None:
        """The inverse of `arithmetic`; what the constructor was told stays as it was told, and a machine without a
        compiler does without."""
        check_options(dict(arithmetic), type(self).__name__)
        dtype, elements_by = arithmetic.get("orthogonal_dtype"), arithmetic.get("elements_by")
        if elements_by not in (None, "torch", "compiler"):
            raise ValueError(f'{type(self).__name__}: elements_by = {elements_by!r}, expected "torch" or "compiler"')
        if dtype is not None:
            for index in self._decided:
                self.param_groups[index]["orthogonal_dtype"] = dtype
        if self._compiled is None and elements_by is not None:
            self._walk.compiled = elements_by == "compiler" and compiled.decided(self._walk.scratch.device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state into the buffers; parameters are not touched: load the module too, or call `restore_y`.

        ValueError, before anything changes, where groups, rules or shapes differ.
        """
        self._refuse_half_of_a_lean_state("load_state_dict")
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        saved_groups = state_dict["param_groups"]
        told = [(g.get("rule"), g.get("clock"), len(g["params"])) for g in saved_groups]
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
            for name, value in saved.items():
                mine = group.get(name)
                if name == "params" or callable(mine) or (name == "lr" and value is None):
                    continue  # functions are the program's
                if isinstance(mine, Tensor) and not isinstance(value, str):
                    mine.fill_(value)  # whoever changes it in place holds this one
                else:
                    group[name] = copy.deepcopy(value)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)  # torch keeps three entries only; a deep copy needs the stacks and clocks as well
