"""Random configurations of every operation, on every backend that runs here, against the definition in float64.

Each configuration follows from one integer, which a failure prints: ``pytest tests/test_fuzz.py --fuzz-seed N``
runs it alone.
``--fuzz N`` runs N of them instead of 2,000. Memory that is not initialised holds NaN.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bcos_kernels as bk
from bcos_kernels import native
from bcos_kernels.contract import accumulator
from tests.tolerances import GRADIENT, OUTPUT

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
CHUNKS = 10
DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float16)
Shape = tuple[int, ...]


@dataclass
class Config:
    """One call: ``function(**tensors, **options)``; ``leaves`` are those of ``tensors`` whose gradients are compared."""

    seed: int
    op: str
    dtype: torch.dtype
    function: Callable[..., Tensor]
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    leaves: tuple[str, ...]
    #: what one part of ``x``, its gradient and the output is: everything along this axis and those behind it
    axis: int
    scales: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        tensors = ", ".join(
            f"{k} {list(t.shape)} {list(t.stride())} {str(t.dtype)[6:]}" for k, t in self.tensors.items()
        )
        options = {k: v for k, v in self.options.items() if not isinstance(v, Tensor)}
        return f"--fuzz-seed {self.seed}: {self.op} {str(self.dtype)[6:]}, {tensors}, {options}, scales {self.scales}"


# ---- drawing


class Draw:
    """Random choices that follow from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.normal = torch.Generator().manual_seed(seed)
        self.dtype = self.random.choice(DTYPES)
        self.scales: dict[str, Any] = {}

    def one(self, *values: Any) -> Any:
        return self.random.choice(values)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def scale(self, name: str, extreme: float) -> float:
        """1, or with probability ``extreme`` a power of ten that the dtype holds, from 1e-30 to 1e30."""
        least, most = (-4.0, 4.0) if self.dtype == torch.float16 else (-30.0, 30.0)
        power = self.random.uniform(least, most) if self.chance(extreme) else 0.0
        self.scales[name] = f"1e{power:.1f}"
        return float(10**power)

    def values(self, name: str, shape: Shape, *, extreme: float = 0.0, mixed: bool = False) -> Tensor:
        """Normal numbers in float64, rounded to the dtype; ``mixed``: parts along the first axis have scales of their own."""
        t = torch.randn(shape, generator=self.normal, dtype=torch.float64)
        if mixed and self.chance(0.3) and t.dim() > 1 and t.numel():
            factors = [self.one(0.0, 1.0, 1.0, self.scale(f"{name}[{i}]", 0.7)) for i in range(shape[0])]
            t = t * torch.tensor(factors, dtype=torch.float64).view(-1, *[1] * (t.dim() - 1))
        else:
            t = t * self.scale(name, extreme)
        most = torch.finfo(self.dtype).max
        return t.clamp(-most, most).to(self.dtype)

    def strided(self, t: Tensor) -> Tensor:
        """The same values in another layout, with NaN in the gaps."""
        kind = self.one("", "", "channels-last", "channels-last", "transposed", "sliced", "size-1", "offset")
        if kind == "channels-last" and t.dim() == 4:
            return t.to(memory_format=torch.channels_last)
        if kind == "transposed" and t.dim() > 1:
            a, b = self.random.sample(range(t.dim()), 2)
            return t.transpose(a, b).contiguous().transpose(a, b)
        if kind == "sliced":
            axis = self.random.randrange(t.dim())
            room = [2 * n if i == axis else n for i, n in enumerate(t.shape)]
            return (
                torch.full(room, math.nan, dtype=t.dtype)
                .narrow(axis, 0, room[axis])[
                    tuple(slice(None, None, 2) if i == axis else slice(None) for i in range(t.dim()))
                ]
                .copy_(t)
            )
        if kind == "size-1" and 1 in t.shape:
            t = t.to(memory_format=torch.channels_last) if t.dim() == 4 and self.chance(0.5) else t.contiguous()
            strides = [self.one(1, 3, 7, 1000) if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
            return t.as_strided(t.shape, strides)
        if kind == "offset":
            return torch.full((t.numel() + 1,), math.nan, dtype=t.dtype)[1:].view(t.shape).copy_(t)
        return t

    def exponent(self) -> tuple[float | Tensor, bool]:
        b = self.one(1, 2, 2, 2, 2.0, 1.5, 2.5, 3, "tensor")
        return (torch.tensor(self.one(1.0, 1.7, 2.0), dtype=self.dtype), True) if b == "tensor" else (b, False)


def draw(seed: int) -> Config:
    d = Draw(seed)
    op: Callable[[Draw], dict[str, Any]] = d.one(
        draw_conv2d, draw_conv2d, draw_linear, draw_batch_norm, draw_layer_norm
    )
    return Config(seed=seed, op=op.__name__[5:], dtype=d.dtype, scales=d.scales, **op(d))


def finished(
    d: Draw,
    function: Callable[..., Tensor],
    tensors: dict[str, Tensor | None],
    options: dict[str, Any],
    constants: tuple[str, ...],
    axis: int,
) -> dict[str, Any]:
    given = {k: d.strided(t) if t.dim() else t for k, t in tensors.items() if t is not None}
    leaves = tuple(k for k in given if k not in constants)
    return {"function": function, "tensors": given, "options": options, "leaves": leaves, "axis": axis}


def draw_conv2d(d: Draw) -> dict[str, Any]:
    groups, max_out = d.one(1, 1, 1, 2, 4), d.one(1, 1, 1, 2, 3)
    inputs, outputs = d.one(1, 2, 3, 4, 8, 17), d.one(1, 2, 3, 5, 8)
    if d.chance(0.1):
        groups, max_out, inputs, outputs = 1, 1, d.one(40, 66), d.one(66, 72)  # several panels of the fused kernel
    kernel = (1, 1) if d.chance(0.3) else (d.one(1, 2, 3, 3, 5), d.one(1, 2, 3, 3, 5))
    dilation = d.one(1, 1, 1, 2, (1, 2))
    stride: Any = d.one(1, 1, 1, 2, (2, 1), (1, 3))
    padding: Any = d.one(0, 0, 1, 1, 2, (0, 4), (1, 0), "same", "valid")
    if padding == "same":
        stride = 1
    pads = (0, 0) if isinstance(padding, str) else (padding, padding) if isinstance(padding, int) else padding
    dilations = (dilation, dilation) if isinstance(dilation, int) else dilation
    size = [
        max(d.one(1, 1, 2, 3, 5, 7, 14), 1 if padding == "same" else s * (k - 1) + 1 - 2 * p)
        for k, p, s in zip(kernel, pads, dilations, strict=True)
    ]
    x = d.values("x", (d.one(0, 1, 1, 2, 3), groups * inputs, *size), extreme=0.4, mixed=True)
    weight = d.values("weight", (groups * outputs * max_out, inputs, *kernel), extreme=0.2)
    bias = d.values("bias", weight.shape[:1]) if d.chance(0.4) else None
    b, learnt = d.exponent()
    options = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "max_out": max_out,
        "normalize_weight": d.chance(0.25) and weight[0].numel() > 1,
        "detach_scale": d.chance(0.25),
    }
    squares = None
    if groups == 1 and d.chance(0.2):
        squares = x.to(accumulator(d.dtype)).square().sum(1, keepdim=True)
    tensors = {"x": x, "weight": weight, "bias": bias, "b": b if learnt else None, "squares": squares}
    if not learnt:
        options["b"] = b
    return finished(d, bk.bcos_conv2d, tensors, options, ("squares",), 1)  # type: ignore[arg-type]


def draw_linear(d: Draw) -> dict[str, Any]:
    max_out, inputs, outputs = d.one(1, 1, 1, 2, 3), d.one(1, 2, 3, 7, 16, 66), d.one(1, 2, 5, 8, 70)
    leading: Shape = d.one((), (0,), (1,), (3,), (5,), (2, 3), (2, 1, 2))
    x = d.values("x", (*leading, inputs), extreme=0.4, mixed=True)
    weight = d.values("weight", (outputs * max_out, inputs), extreme=0.2)
    bias = d.values("bias", weight.shape[:1]) if d.chance(0.4) else None
    b, learnt = d.exponent()
    options = {
        "max_out": max_out,
        "normalize_weight": d.chance(0.25) and weight[0].numel() > 1,
        "detach_scale": d.chance(0.25),
    }
    squares = x.to(accumulator(d.dtype)).square().sum(-1, keepdim=True) if d.chance(0.2) else None
    tensors = {"x": x, "weight": weight, "bias": bias, "b": b if learnt else None, "squares": squares}
    if not learnt:
        options["b"] = b
    return finished(d, bk.bcos_linear, tensors, options, ("squares",), -1)  # type: ignore[arg-type]


def draw_batch_norm(d: Draw) -> dict[str, Any]:
    shape = (d.one(0, 1, 2, 3), d.one(1, 2, 5, 17), d.one(1, 2, 5, 9), d.one(1, 3, 8))
    channels = shape[1]
    training = d.chance(0.6)
    x = d.values("x", shape, extreme=0.4)
    wide = d.chance(0.5)  # parameters of a wider dtype than x

    def parameter(name: str) -> Tensor | None:
        t = d.values(name, (channels,)) if d.chance(0.6) else None
        return t.to(accumulator(d.dtype)) if t is not None and wide else t

    var = None
    if not training:
        # in proportion to x, as far as its dtype goes
        scale = x.double().square().mean() if x.numel() else torch.tensor(1.0)
        noise = torch.rand(channels, generator=d.normal, dtype=torch.float64) + 0.1
        var = (noise * scale.clamp(1e-30, 1e30)).to(accumulator(d.dtype))
    residual = d.values("residual", shape) if d.chance(0.3) else None
    tensors = {
        "x": x,
        "running_var": var,
        "weight": parameter("weight"),
        "bias": parameter("bias"),
        "residual": residual,
    }
    options = {
        "training": training,
        "relu": d.chance(0.3),
        "detach_var": d.chance(0.25),
        "eps": d.one(1e-5, 1e-3, 1e-8),
    }
    if training:
        options["running_var"] = None
    return finished(d, bk.batch_norm_uncentered2d, tensors, options, ("running_var",), 0)


def draw_layer_norm(d: Draw) -> dict[str, Any]:
    shape: Shape = d.one((4, 7), (1, 3), (0, 5), (2, 3, 16), (2, 1, 3), (2, 2, 3, 5), (9, 66))
    axes = min(d.one(1, 1, 2), len(shape) - 1)
    x = d.values("x", shape, extreme=0.4, mixed=True)
    normalized = shape[len(shape) - axes :]
    weight = d.values("weight", normalized) if d.chance(0.6) else None
    bias = d.values("bias", normalized) if d.chance(0.6) else None
    options = {"normalized_shape": normalized, "detach_var": d.chance(0.25), "eps": d.one(1e-5, 1e-6, 1e-3)}
    return finished(d, bk.layer_norm, {"x": x, "weight": weight, "bias": bias}, options, (), -axes)


# ---- running


def results(config: Config, tensors: dict[str, Tensor], upstream: Tensor | None, backend: str) -> dict[str, Tensor]:
    """Output, and the gradient of every leaf; the output alone where ``upstream`` is None."""
    with torch.set_grad_enabled(upstream is not None):
        given = {k: t.detach().requires_grad_(upstream is not None and k in config.leaves) for k, t in tensors.items()}
        y = config.function(**given, **config.options, backend=backend)
        if upstream is None:
            return {"y": y}
        leaves = [given[k] for k in config.leaves]
        grads = torch.autograd.grad(y, leaves, upstream, allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(config.leaves, grads, strict=True))}


def exact(tensors: dict[str, Tensor], noise: torch.Generator | None = None, u: float = 0.0) -> dict[str, Tensor]:
    """Dense float64 copies, each number moved by a relative ``u`` up or down."""
    copies = {}
    for k, t in tensors.items():
        wide = t.double().clone(memory_format=torch.contiguous_format)
        if noise is not None:
            wide = wide * (1 + u * (2 * torch.randint(2, wide.shape, generator=noise) - 1))
        copies[k] = wide
    return copies


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated and not initialised holds NaN: ``torch.empty`` by PyTorch's own switch (in the extension too),
    and what an allocator hands out again because blocks full of NaN were freed before."""
    deterministic, fills = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    pool = [torch.full((2**i,), math.nan) for i in range(4, 16) for _ in range(2)]
    del pool
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fills


def backends(config: Config) -> list[str]:
    if INTERPRETER:
        return ["triton"]
    found = ["reference", "portable"]
    if native.unavailable() is None and config.dtype != torch.float16:
        found.append("native")
    return found


# ---- comparing


def parts(t: Tensor, axis: int) -> Tensor:
    """``[parts, numbers of a part]``."""
    if t.dim() == 0:
        return t.reshape(1, 1)
    first = axis % t.dim() if -t.dim() <= axis < t.dim() else 0
    return t.reshape(math.prod(t.shape[:first]), -1) if t.numel() else t.new_empty(0, 0)


def wrong(
    actual: Tensor, expected: Tensor, moved: list[Tensor], dtype: torch.dtype, limit: float, axis: int
) -> str | None:
    """None, or a sentence where ``actual`` is further from ``expected`` (float64) than rounding explains.

    Numbers are compared part by part: a row of a linear layer, an image of a convolution, or all of a parameter's gradient.
    Allowed is the largest of

    - ``limit`` times the largest number of the part;
    - 8 times what the part moves by when every input moves by one digit of ``dtype`` (``moved``): that is what a sum that
      cancels, or a MaxOut between equals, makes of rounding, and no algorithm can do better;
    - a few of the smallest normal number of ``dtype``: below that, numbers have no digits.

    What is not representable is not compared: numbers of ``expected`` within a factor 1000 of the largest of ``dtype`` or
    above it, because a sum on the way to them may overflow. There, ``actual`` must not be finite and smaller by more
    than another factor 1000.
    """
    info = torch.finfo(dtype)
    a, e = parts(actual.double(), axis), parts(expected, axis)
    if e.numel() == 0:
        return None
    fits = e.abs() < info.max / 1000
    swing = torch.stack([(parts(m, axis) - e).abs() for m in moved]).amax(0)
    zero = torch.zeros_like(e)
    largest = torch.where(fits, e.abs(), zero).amax(1, keepdim=True)
    unsure = torch.where(fits, swing, zero).amax(1, keepdim=True)
    allowed = torch.maximum(limit * largest, 8 * unsure) + 8 * info.tiny
    off = (a - e).abs()
    bad = fits & ~(off <= allowed) & (allowed < info.max)
    shrunk = ~fits & (swing < e.abs() / 2) & (a.abs() < info.max / 1e6)
    if not (bad | shrunk).any():
        return None
    worst = int(torch.where(bad | shrunk, (off / allowed).nan_to_num(math.inf), -torch.ones_like(off)).argmax())
    row, column = divmod(worst, e.shape[1])
    count, size = int((bad | shrunk).sum()), float(largest[row])
    return (
        f"part {row}, number {column}: {float(a[row, column]):.6g} is not {float(e[row, column]):.6g}"
        f" (allowed {float(allowed[row]):.1e}; largest of the part {size:.3g}; wrong {count} of {e.numel()})"
    )


def failures(seed: int) -> list[str]:
    """A sentence for everything that is wrong with a configuration."""
    config = draw(seed)
    dtype, d = config.dtype, Draw(seed + 1)
    d.dtype = dtype
    truth = exact(config.tensors)
    shape = results(config, truth, None, "reference")["y"].shape
    upstream = d.strided(d.values("grad", tuple(shape), extreme=0.3)) if shape else d.values("grad", ())
    config.scales.update(grad=d.scales["grad"])
    expected = results(config, truth, upstream.double(), "reference")
    noise, u = torch.Generator().manual_seed(seed), torch.finfo(dtype).eps
    moved = []
    ties = config.options.get("max_out", 1) > 1 and dtype.itemsize == 2  # only some of the moves swap two near equals
    for _ in range(20 if ties else 5):
        inputs = exact({**config.tensors, "upstream": upstream}, noise, u)
        moved.append(results(config, {k: inputs[k] for k in config.tensors}, inputs["upstream"], "reference"))
    found = []
    for backend in backends(config):
        with poisoned():
            actual = results(config, config.tensors, upstream, backend)
            actual["y without gradients"] = results(config, config.tensors, None, backend)["y"]
        for label, value in actual.items():
            name = label.split()[0]
            table = OUTPUT if name == "y" else GRADIENT
            axis = config.axis if name in ("y", "x", "residual") else 0
            if value.dtype != (dtype if name == "y" else config.tensors[name].dtype):
                found.append(f"{backend}: {name} is {value.dtype}")
            sentence = wrong(value, expected[name], [m[name] for m in moved], dtype, table[dtype], axis)
            if sentence is not None:
                found.append(f"{backend}: {'' if name == 'y' else 'gradient of '}{label}: {sentence}")
    return [f"{config}\n    {sentence}" for sentence in found]


@pytest.mark.timeout(0)
@pytest.mark.filterwarnings("ignore:.*degrees of freedom")  # the variance of an empty batch, in the definition
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_configurations(chunk: int, pytestconfig: pytest.Config) -> None:
    seed, count = pytestconfig.getoption("--fuzz-seed"), pytestconfig.getoption("--fuzz")
    if seed is not None and chunk:
        pytest.skip("--fuzz-seed: one configuration")
    found: list[str] = []
    for number in [seed] if seed is not None else range(chunk, count, CHUNKS):
        found += failures(number)
        if len(found) >= 20:
            break
    assert not found, "\n" + "\n".join(found)


def test_uninitialised_memory_is_nan() -> None:
    """Otherwise the tests above see less than they say."""
    with poisoned():
        assert torch.empty(5).isnan().all()
        assert torch.empty(2, 3, 4, 5, dtype=torch.bfloat16, memory_format=torch.channels_last).isnan().all()


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(INTERPRETER, reason="this process is the interpreter's already")
def test_triton_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_fuzz.py", "--fuzz", "200"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
