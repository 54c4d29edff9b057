"""Functions of `triton_math` over all of fp32, interpreted, against fp64."""

from __future__ import annotations

import math
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpflex.mods import triton_math

EXACT = {name: getattr(torch, name) for name in ("tanh", "sigmoid", "expm1", "log1p")}
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-39, 3e38, -3e38, math.inf, -math.inf, math.nan]
LEAST, MOST = 2.0**-126, 2.0**128
BLOCK = 1 << 14


@triton.jit
def apply_kernel(x_ptr, y_ptr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, FUNCTION(tl.load(x_ptr + at)))


def applied(name: str, x: Tensor) -> Tensor:
    whole = torch.cat([x, x.new_zeros(-len(x) % BLOCK)])
    y = torch.empty_like(whole)
    apply_kernel[(len(whole) // BLOCK,)](whole, y, FUNCTION=getattr(triton_math, name), BLOCK=BLOCK)
    return y[: len(x)]


def arguments() -> Tensor:
    """Numbers of every size and both signs, many where functions bend, and special ones."""
    sizes = torch.cat([torch.logspace(-38, 38, BLOCK, dtype=torch.float64), torch.linspace(0.01, 20, 2 * BLOCK)])
    return torch.cat([sizes, -sizes, torch.tensor(SPECIAL)]).float()


def worst(name: str, off_by: int) -> tuple[float, float]:
    """The largest error, in 2**-23 of the result, and where it is, if all reciprocals are wrong by ``off_by`` ulps, as
    those of a device may be. Results below 2**-126 may be 0.
    """

    def reciprocal(x: tl.tensor) -> tl.tensor:
        y = 1.0 / x
        return y + y * (2.0**-23 * off_by)

    x = arguments()
    with mock.patch.object(triton_math, "reciprocal", reciprocal):
        y = applied(name, x).double()
    exact = EXACT[name](x.double())
    error = ((y - exact).abs() - LEAST).clamp(min=0.0) / exact.abs().clamp(min=LEAST) * 2.0**23
    same = (y == exact.float()) | (y.isnan() & exact.isnan())
    error = torch.where(same, 0.0, torch.where(exact.abs() < MOST, error, math.inf)).nan_to_num(math.inf)
    i = int(error.argmax())
    return float(error[i]), float(x[i])


def tanh_of_special() -> list[float]:
    """Of 0, -0, inf, -inf, 10 and -10."""
    return applied("tanh", torch.tensor([0.0, -0.0, math.inf, -math.inf, 10.0, -10.0])).tolist()
