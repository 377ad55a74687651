"""The sweep in C for a CPU (`native.c`): the bits of torch's operations, each element read and written once.

torch has no way to do several things to an element while it is in a register, short of its compiler; on a CPU its
dozen and a half passes over memory are what a step costs beside the products. Here the C compiler of the machine makes
one pass of them. `library` compiles `native.c` once a process (a second; nothing is kept on disk), compares what it
computes with what torch computes, bit for bit, and hands it out only if they agree: whether it is there shows in the
time of a step and nowhere else. `Walk` asks `considered` whether an optimizer is large enough, and `takes` whether a
stack can go this way. `momentum_` comes before the products, `matrices_` after them; `flat_` is all of a step under the
AdamW rule.

No compiler, another order of rounding in some build of torch, ANYTIMED_NATIVE=0: torch's own operations do it, and
`why_not` says which it was.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from anytimed.optim.neuron_norm import NeuronNorm
from anytimed.optim.orthogonal import NORM_EPS, NewtonSchulz, beginning
from anytimed.optim.rules import AdamW, Momentum, Scales
from anytimed.optim.scratch import Scratch
from anytimed.optim.sweep import Averages, Elements, Pace

ELEMENTS: Final = 2**17
"""An optimizer of fewer elements does without: its step takes a few milliseconds, the compiler a second."""

SOURCE: Final = Path(__file__).with_name("native.c")
FLAGS: Final = (
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
THREADS: Final = ("-fopenmp", "")  # tried in this order
LIMIT_S: Final = 60
SWITCH: Final = "ANYTIMED_NATIVE"

F32, BF16, LEAN = range(3)  # of y, as in native.c


class _Pace(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_float) for name in ("minus_decay", "c", "beta", "last_beta")),
        *((name, ctypes.c_int32) for name in ("decays", "threads")),
    )


def told(pace: Pace) -> _Pace:
    """The scalars of a step as the library reads them. They lie on the host: nothing waits."""
    decays = pace.minus_decay is not None
    return _Pace(
        float(pace.minus_decay) if pace.minus_decay is not None else 0.0,
        float(pace.c),
        float(pace.beta),
        1.0 if pace.last_beta is None else float(pace.last_beta),
        decays,
        torch.get_num_threads(),
    )


# --- the library ----------------------------------------------------------------------------------------------------


def considered(elements: int) -> bool:
    """Whether an optimizer of so many elements goes this way: it is large enough, and there is a library."""
    return elements >= ELEMENTS and library() is not None


def why_not() -> str | None:
    """Why there is no library; None if there is one."""
    return _found()[1]


def library() -> ctypes.CDLL | None:
    """The compiled functions, made at the first call; None where there can be none."""
    return _found()[0]


@cache
def _found() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get(SWITCH) == "0":
        return None, f"{SWITCH}=0"
    try:
        made = _built()
    except (OSError, ValueError) as failed:  # ValueError: a CC that is no command line
        return None, f"{failed}"
    from anytimed.optim.native_check import differing  # which calls what is here

    found = differing(made)
    if found is not None:
        return None, f"{found}: other bits than those of torch {torch.__version__}"
    return made, None


def _built() -> ctypes.CDLL:
    """Compiles and loads. OSError where there is no compiler or it fails."""
    compiler = os.environ.get("CC") or next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None or sys.platform == "win32":
        raise OSError("no C compiler: apt-get install gcc, or set CC")
    with tempfile.TemporaryDirectory(prefix="anytimed-native-") as folder:
        made, said = Path(folder, "native.so"), ""
        for threads in THREADS:
            command = [*shlex.split(compiler), *FLAGS, *([threads] if threads else []), str(SOURCE), "-o", str(made)]
            try:
                done = subprocess.run(
                    [*command, "-lm"], capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL
                )
            except subprocess.TimeoutExpired:
                raise OSError(f"{compiler} took more than {LIMIT_S} s") from None
            if done.returncode == 0:
                return _declared(ctypes.CDLL(str(made)))
            said = (done.stderr.strip().splitlines() or ["no message"])[0]
    raise OSError(f"{compiler} ended with {done.returncode}: {said}")


def _declared(made: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number, real, whole, pace = (
        ctypes.c_void_p,
        ctypes.c_long,
        ctypes.c_float,
        ctypes.c_int,
        ctypes.POINTER(_Pace),
    )
    state = (pointer, pointer, pointer, pointer, whole)  # z, x, comp, y, form
    made.anytimed_matrices.argtypes = (
        *(number, number, number, *state, pointer, whole),  # b, m, n, state, p, p16
        *(pointer, real, real, number, pointer, pointer),  # v, 1 - beta2, eps, blocks, ends, lengths
        *(pointer, pointer, pointer, pace),  # norms, scale, squares
    )
    made.anytimed_momentum.argtypes = (
        *(number, number, number, pointer, pointer, real, real, whole),  # b, m, n, M, g, 1 - mu, mu, Nesterov
        *(real, real, pointer, pointer, pointer, whole, number, whole),  # safety, eps, norms, by, out, out16, distance
    )
    made.anytimed_flat.argtypes = (number, *state, pointer, pointer, real, real, real, real, real, whole, pace)
    made.anytimed_still.argtypes = (number, *state, pace)
    made.anytimed_matrices.restype = made.anytimed_momentum.restype = made.anytimed_still.restype = None
    made.anytimed_flat.restype = ctypes.c_double
    return made


# --- the calls ------------------------------------------------------------------------------------------------------


def takes(params: Sequence[Tensor], lean: bool) -> bool:
    """Whether y can be written straight into these parameters: contiguous, of one dtype, float32 where lean."""
    dtype = params[0].dtype
    return (not lean or dtype == torch.float32) and all(p.dtype == dtype and p.is_contiguous() for p in params)


def _pointers(averages: Averages) -> tuple[int, int | None, int | None]:
    z, x, comp = averages
    return z.data_ptr(), None if x is None else x.data_ptr(), None if comp is None else comp.data_ptr()


def _form(y: Tensor, averages: Averages) -> int:
    return LEAN if averages[1] is None else BF16 if y.dtype == torch.bfloat16 else F32


def momentum_(
    momentum: Tensor,
    gs: Sequence[Tensor],
    rule: Momentum,
    polar: NewtonSchulz,
    scratch: Scratch,
    made: ctypes.CDLL | None = None,
) -> Tensor:
    """M takes in its gradients; returns `orthogonal.normalised` of what is to be orthogonalised. momentum: (b, m, n);
    gs: b gradients, float32 and contiguous."""
    made = library() if made is None else made
    assert made is not None
    b, m, n = momentum.shape
    out = beginning(momentum.shape, polar.dtype, scratch)
    norms, by = scratch.take("native.norms", (b, m)), scratch.take("native.by", (b,))
    made.anytimed_momentum(
        *(b, m, n, momentum.data_ptr(), (ctypes.c_void_p * b)(*(g.data_ptr() for g in gs)), 1.0 - rule.mu, rule.mu),
        *(rule.nesterov, polar.safety, NORM_EPS, norms.data_ptr(), by.data_ptr(), out.data_ptr()),
        *(polar.dtype == torch.bfloat16, out.stride(0), torch.get_num_threads()),
    )
    return out


def matrices_(
    ys: Sequence[Tensor],
    averages: Averages,
    p: Tensor,
    v: Tensor,
    scales: Scales,
    eta: Tensor,
    pace: _Pace,
    scratch: Scratch,
    made: ctypes.CDLL | None = None,
) -> Tensor:
    """One step of a batch of matrices whose P is there, in place; returns the squared norm of each update, (b,).

    ys: the b parameters, which get y; averages: (b, m, n); p: (b, m, n) contiguous, float32 or bfloat16; v: (b, m) or
    (b, 0); eta: 0-d float32.
    """
    made = library() if made is None else made
    assert made is not None and p.is_contiguous()
    b, m, n = p.shape
    norms = scratch.take("native.norms", (b, m))
    squares = torch.empty(b)
    fixed = scales.rows(m, n, eta)
    rule: tuple[int | None, float, float, int, ctypes.Array[ctypes.c_long] | None, int | None]
    if fixed is None:
        assert isinstance(scales, NeuronNorm)
        splits = scales.row_splits or (m,)
        ends = (ctypes.c_long * len(splits))(*(sum(splits[: i + 1]) for i in range(len(splits))))
        lengths, scale = scales.lengths(m, n, eta), scratch.take("native.scale", (b, m))
        rule = v.data_ptr(), 1.0 - scales.beta2, scales.eps, len(splits), ends, lengths.data_ptr()
    else:
        scale = fixed.contiguous()
        rule = None, 0.0, 0.0, 0, None, None
    y = (ctypes.c_void_p * b)(*(one.data_ptr() for one in ys))
    made.anytimed_matrices(
        *(b, m, n, *_pointers(averages), y, _form(ys[0], averages), p.data_ptr(), p.dtype == torch.bfloat16),
        *(*rule, norms.data_ptr(), scale.data_ptr(), squares.data_ptr(), ctypes.byref(pace)),
    )
    increment_version(ys)  # autograd has not seen it
    return squares


def flat_(
    elements: Elements,
    v: Tensor,
    g: Tensor | None,
    corrected_by: Tensor,
    rule: AdamW,
    pace: _Pace,
    made: ctypes.CDLL | None = None,
) -> Tensor:
    """One step under the AdamW rule, in place; returns the squared norm of the update, 0-d float32.

    elements, v, g: (N,), y float32 or bfloat16; g None: z and v stay, x averages all the same; corrected_by: a single
    number, for all.
    """
    made = library() if made is None else made
    assert made is not None
    z, x, comp, y = elements
    averages = (z, x, comp)
    state = (y.numel(), *_pointers(averages), y.data_ptr(), _form(y, averages))
    squared = 0.0
    if g is None:
        made.anytimed_still(*state, ctypes.byref(pace))
    else:
        eta = float(rule.eta)
        scalars = (float(corrected_by), rule.beta2, 1.0 - rule.beta2, rule.eps, eta, rule.moved)
        squared = eta * eta * made.anytimed_flat(*state, v.data_ptr(), g.data_ptr(), *scalars, ctypes.byref(pace))
    increment_version(y)
    return torch.tensor(squared, dtype=torch.float32)
