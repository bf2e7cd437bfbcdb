"""Bad input: each mistake has a sentence that names the argument, what was wrong, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import bcos_kernels as bk

X, W = torch.randn(2, 4, 6, 6), torch.randn(6, 4, 3, 3)
X2, W2 = torch.randn(3, 5), torch.randn(4, 5)


def conv(x: Any = X, weight: Any = W, bias: Any = None, **options: Any) -> Any:
    return bk.bcos_conv2d(x, weight, bias, **options)


def linear(x: Any = X2, weight: Any = W2, bias: Any = None, **options: Any) -> Any:
    return bk.bcos_linear(x, weight, bias, **options)


def norm(x: Any = X, running_var: Any = None, *parameters: Any, training: bool = True, **options: Any) -> Any:
    return bk.batch_norm_uncentered2d(x, running_var, *parameters, training=training, **options)


BAD: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("no tensor", lambda: conv(x=[[1.0]]), TypeError, "x must be a torch.Tensor; got list"),
    ("weight no tensor", lambda: conv(weight=3), TypeError, "weight must be a torch.Tensor; got int"),
    ("integer input", lambda: conv(x=X.to(torch.uint8)), TypeError, "x must be of a floating dtype; got torch.uint8"),
    ("complex input", lambda: conv(x=X.to(torch.complex64)), TypeError, "x must be of a floating dtype"),
    ("dtype mix", lambda: conv(x=X.double()), TypeError, "weight is torch.float32, but x is torch.float64"),
    (
        "bias dtype",
        lambda: conv(bias=torch.zeros(6).half()),
        TypeError,
        "bias is torch.float16, but x is torch.float32",
    ),
    ("devices", lambda: conv(weight=W.to("meta")), ValueError, "weight is on meta, but x is on cpu"),
    ("rank 3", lambda: conv(x=X[0]), ValueError, r"x must have 4 axes, \[N, C, H, W\]; got \[4, 6, 6\]; add the batch"),
    ("rank 5", lambda: conv(x=X[None]), ValueError, r"x must have 4 axes"),
    (
        "weight rank",
        lambda: conv(weight=W[0]),
        ValueError,
        r"weight must have 4 axes, \[O\*max_out, C/groups, Kh, Kw\]",
    ),
    ("channels", lambda: conv(weight=W[:, :3]), ValueError, r"expects 3 input channels, but x \[2, 4, 6, 6\] has 4"),
    ("groups", lambda: conv(groups=3), ValueError, "groups=3 does not divide the 4 channels of x"),
    ("groups of outputs", lambda: conv(weight=W[:, :1], groups=4), ValueError, "groups=4 does not divide the 6 output"),
    ("groups and max_out", lambda: conv(weight=W[:4, :2], groups=2, max_out=4), ValueError, "groups=2 does not divide"),
    ("groups 0", lambda: conv(groups=0), ValueError, "groups must be at least 1; got 0"),
    ("max_out", lambda: conv(max_out=4), ValueError, "max_out=4 does not divide the 6 rows of weight"),
    ("max_out 0", lambda: conv(max_out=0), ValueError, "max_out must be at least 1; got 0"),
    ("no rows", lambda: conv(weight=W[:0]), ValueError, "does not divide the 0 rows"),
    ("bias shape", lambda: conv(bias=torch.zeros(5)), ValueError, r"bias must be \[6\].*got \[5\]"),
    ("b", lambda: conv(b=0.5), ValueError, "b must be a finite number of at least 1; got 0.5"),
    ("b nan", lambda: conv(b=float("nan")), ValueError, "b must be a finite number"),
    ("b inf", lambda: conv(b=float("inf")), ValueError, "b must be a finite number"),
    ("b text", lambda: conv(b="2"), TypeError, "b must be a number or a scalar tensor; got str"),
    ("b vector", lambda: conv(b=torch.ones(3)), ValueError, r"b must be a number or a scalar tensor; got shape \[3\]"),
    ("b integer tensor", lambda: conv(b=torch.tensor(2)), TypeError, "b must be of a floating dtype"),
    ("b device", lambda: conv(b=torch.ones((), device="meta")), ValueError, "b is on meta, but x is on cpu"),
    ("squares shape", lambda: conv(squares=torch.ones(2, 1, 1, 1)), ValueError, r"squares must be \[.*\], the sums of"),
    (
        "squares dtype",
        lambda: conv(squares=torch.ones(2, 1, 6, 6).double()),
        TypeError,
        "squares must be torch.float32",
    ),
    ("squares groups", lambda: conv(weight=W[:, :2], squares=X[:, :1], groups=2), ValueError, "squares: with groups=2"),
    ("stride 0", lambda: conv(stride=0), ValueError, "stride must be at least 1; got 0"),
    ("stride of three", lambda: conv(stride=(1, 2, 3)), ValueError, "stride must be an int or a pair"),
    ("padding", lambda: conv(padding=-1), ValueError, "padding must be at least 0; got -1"),
    ("padding word", lambda: conv(padding="full"), ValueError, 'padding must be an int, a pair, "same" or "valid"'),
    ("same with stride", lambda: conv(padding="same", stride=2), ValueError, 'padding="same" needs stride 1'),
    ("dilation 0", lambda: conv(dilation=0), ValueError, "dilation must be at least 1; got 0"),
    ("window", lambda: conv(weight=torch.randn(6, 4, 9, 9)), ValueError, r"kernel \(9, 9\).*does not fit into x"),
    ("no window", lambda: conv(weight=torch.randn(6, 4, 0, 3)), ValueError, r"kernel \(0, 3\)"),
    (
        "backend",
        lambda: conv(backend="cuda"),
        ValueError,
        "backend: unknown name 'cuda'; choose one of auto, reference",
    ),
    ("linear scalar", lambda: linear(x=torch.tensor(1.0)), ValueError, r"x must be \[..., C\]; got a scalar"),
    (
        "linear features",
        lambda: linear(weight=W2[:, :4]),
        ValueError,
        r"expects 4 input features, but x \[3, 5\] has 5",
    ),
    ("linear weight rank", lambda: linear(weight=W2[0]), ValueError, r"weight must have 2 axes, \[O\*max_out, C\]"),
    ("linear max_out", lambda: linear(max_out=3), ValueError, "max_out=3 does not divide the 4 rows"),
    ("linear bias", lambda: linear(bias=torch.zeros(3)), ValueError, r"bias must be \[4\]"),
    ("linear b", lambda: linear(b=0.99), ValueError, "b must be a finite number of at least 1; got 0.99"),
    ("linear integer", lambda: linear(x=X2.int()), TypeError, "x must be of a floating dtype"),
    (
        "linear dtype mix",
        lambda: linear(weight=W2.double()),
        TypeError,
        "weight is torch.float64, but x is torch.float32",
    ),
    ("norm rank", lambda: norm(x=X[0]), ValueError, "x must have 4 axes"),
    ("norm integer", lambda: norm(x=X.int()), TypeError, "x must be of a floating dtype"),
    ("norm weight", lambda: norm(X, None, torch.ones(3)), ValueError, r"weight must be \[4\], one value per channel"),
    ("norm variance", lambda: norm(running_var=torch.ones(1)), ValueError, r"running_var must be \[4\]"),
    ("norm device", lambda: norm(running_var=torch.ones(4, device="meta")), ValueError, "running_var is on meta"),
    ("norm residual", lambda: norm(residual=X[:1]), ValueError, r"residual must have the shape of x, \[.*\]; got"),
    ("norm residual dtype", lambda: norm(residual=X.double()), TypeError, "residual is torch.float64, but x is"),
    ("norm residual device", lambda: norm(residual=X.to("meta")), ValueError, "residual is on meta"),
    ("norm evaluation", lambda: norm(training=False), ValueError, "running_var is None: evaluation needs it"),
    ("norm momentum", lambda: norm(momentum=2.0), ValueError, "momentum must be between 0 and 1; got 2.0"),
    ("norm eps", lambda: norm(eps=-1.0), ValueError, "eps must not be negative; got -1.0"),
    ("module b", lambda: bk.BcosConv2d(3, 4, 3, b=0.0), ValueError, "b must be a finite number of at least 1"),
    ("module max_out", lambda: bk.BcosLinear(3, 4, max_out=0), ValueError, "max_out must be at least 1; got 0"),
    ("group norm rank", lambda: bk.DetachableGroupNorm2d(2, 4)(X[0]), ValueError, "input must have 4 axes"),
    ("temperature", lambda: bk.LogitLayer(0), ValueError, "logit_temperature must not be 0"),
    ("inverse of bytes", lambda: bk.AddInverse()(X.byte()), TypeError, "divide by 255"),
    ("inverse of a plane", lambda: bk.AddInverse()(X[0, 0]), ValueError, r"image must be \[..., C, H, W\]"),
    ("switch", lambda: bk.use_backend("fast"), ValueError, "backend: unknown name 'fast'"),
]


@pytest.mark.parametrize(("call", "error", "sentence"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_sentence(call: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()
