# mypy: ignore-errors
"""The scale ``|cos|^(B-1)`` and its derivative: the only copy of these formulas in Triton.

Everything is in the accumulator's dtype: float32, or float64 for float64 input. ``KIND`` says which exponent:

- ``LINEAR``: B = 1, there is no norm and no scale;
- ``QUADRATIC``: B = 2 as a number, the scale is ``|l| / n``;
- ``GENERAL``: B is read from ``p_b``, a scalar on the device, the scale is ``(|l| / n + 1e-6)^(B-1)``. A number B comes this
  way too: Triton passes Python floats as float32, which is not enough for float64 input.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bcos_kernels import reference
from bcos_kernels.contract import Options

GENERAL: tl.constexpr = tl.constexpr(0)
LINEAR: tl.constexpr = tl.constexpr(1)
QUADRATIC: tl.constexpr = tl.constexpr(2)

#: Which norm: sqrt(sum + 1e-6) of a convolution's patch, or sqrt(sum) + 1e-12 of a linear layer's row.
PATCH: tl.constexpr = tl.constexpr(0)
ROW: tl.constexpr = tl.constexpr(1)

_PATCH_EPS: tl.constexpr = tl.constexpr(reference.PATCH_NORM_EPS)
_ROW_EPS: tl.constexpr = tl.constexpr(reference.ROW_NORM_EPS)
_COS_EPS: tl.constexpr = tl.constexpr(reference.COS_EPS)


def kind(options: Options) -> int:
    if options.is_linear:
        return LINEAR.value
    return QUADRATIC.value if options.is_quadratic else GENERAL.value


@triton.jit
def root(b_squares, NORM: tl.constexpr):
    """``n`` from the sum of squares: ``sqrt(s + 1e-6)`` (PATCH) or ``sqrt(s) + 1e-12`` (ROW)."""
    ACC: tl.constexpr = b_squares.dtype
    if NORM == PATCH:
        b_norm = tl.sqrt(b_squares + tl.full((), _PATCH_EPS, ACC))
    else:
        b_norm = tl.sqrt(b_squares) + tl.full((), _ROW_EPS, ACC)
    return b_norm


@triton.jit
def pull(b_dnorm, b_norm, NORM: tl.constexpr):
    """What ``x`` is multiplied by in its gradient: ``dL/dn / n`` (PATCH), or ``dL/dn / (n - 1e-12)`` (ROW).

    0 at the origin, like the gradient of torch's own norm.
    """
    if NORM == ROW:
        b_norm = b_norm - tl.full((), _ROW_EPS, b_norm.dtype)
        b_pull = tl.where(b_norm > 0, b_dnorm / b_norm, 0)
    else:
        b_pull = b_dnorm / b_norm
    return b_pull


@triton.jit
def _power(b_cos, p_b, ACC: tl.constexpr):
    """``(B - 1, |cos| + 1e-6, (|cos| + 1e-6)^(B-1))``."""
    less_one = tl.load(p_b).to(ACC) - 1
    b_base = b_cos + tl.full((), _COS_EPS, ACC)
    return less_one, b_base, tl.exp2(less_one * tl.log2(b_base))


@triton.jit
def scaled(b_linear, b_norm, p_b, KIND: tl.constexpr):
    """``y = l * |cos|^(B-1)``; ``b_norm`` broadcasts against ``b_linear`` and is not read for B = 1."""
    b_y = b_linear
    if KIND == QUADRATIC:
        b_y = b_linear * (tl.abs(b_linear) / b_norm)
    if KIND == GENERAL:
        _, _, b_factor = _power(tl.abs(b_linear) / b_norm, p_b, b_linear.dtype)
        b_y = b_linear * b_factor
    return b_y


@triton.jit
def recovered(b_kept, b_norm, KEEPS_LINEAR: tl.constexpr):
    """``l`` itself where it was kept, else ``sign(y) sqrt(|y| n)`` (B = 2; two roots, since the product overflows)."""
    if not KEEPS_LINEAR:
        b_size = tl.sqrt(tl.abs(b_kept)) * tl.sqrt(b_norm)
        b_kept = tl.where(b_kept < 0, -b_size, b_size)
    return b_kept


@triton.jit
def scaled_backward(b_grad, b_linear, b_norm, p_b, KIND: tl.constexpr, DETACH: tl.constexpr, NEEDS_B: tl.constexpr):
    """``(dL/dl, dL/dn, dL/dB)`` by element for ``g = dL/dy``, B not 1. In explanation mode (DETACH) ``dL/dn`` is not valid.

    With c = |l|/n.  B = 2: ``2 g c`` (DETACH: ``g c``), ``-g c (l/n)``.
    General, with f = (c + 1e-6)^(B-1) and s = (B-1) f c / (c + 1e-6):
    ``g (f + s)`` (DETACH: ``g f``), ``-g s (l/n)``, ``g l f log(c + 1e-6)``.
    """
    b_signed = b_linear / b_norm
    b_cos = tl.abs(b_signed)
    if KIND == QUADRATIC:
        b_dlinear = b_grad * b_cos
        b_dnorm = -b_dlinear * b_signed
        if not DETACH:
            b_dlinear *= 2
        b_db = b_dlinear
    else:
        less_one, b_base, b_factor = _power(b_cos, p_b, b_linear.dtype)
        b_slope = less_one * b_factor * b_cos / b_base
        b_dnorm = -b_grad * b_slope * b_signed
        b_db = b_grad * b_linear * b_factor
        if NEEDS_B:
            b_db *= tl.log(b_base)
        b_dlinear = b_grad * b_factor if DETACH else b_grad * (b_factor + b_slope)
    return b_dlinear, b_dnorm, b_db


@triton.jit
def larger(b_best, b_winner, b_u, M: tl.constexpr):
    """MaxOut, one row further: keep the larger of ``b_best`` and row ``M``'s ``b_u``; the first of equals, NaN wins."""
    m_new = (b_u > b_best) | (b_u != b_u)
    return tl.where(m_new, b_u, b_best), tl.where(m_new, M, b_winner)
