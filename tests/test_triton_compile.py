"""Every Triton kernel compiles for Ampere, Hopper and Blackwell, without spills, and Hopper's use wgmma. Needs no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bcos_kernels.contract import (
    Forward,
    LayerNormNeeds,
    LayerNormOptions,
    Needs,
    NormNeeds,
    NormOptions,
    Options,
    Saved,
)

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from bcos_kernels.triton import batch_norm, layer_norm, layers, tiles
from tests.triton_compile import Launch, compile_for, recorded, source

#: By architecture: the row of the tile table, and what a matrix product of the tensor cores looks like.
ARCHITECTURES = {80: ("sm80", "mma.sync"), 90: ("sm90", "wgmma.mma_async"), 100: ("sm90", "tcgen05.mma")}
PRODUCTS = {"linear.forward", "linear.input_gradient", "conv2d.forward"}
EVERY_KERNEL = PRODUCTS | {
    "conv2d.depthwise",
    *(f"elementwise.{k}" for k in ("squares", "window_root", "scale", "scale_backward", "add_pull")),
    *(f"batch_norm.{k}" for k in ("statistics", "merge_statistics", "apply", "sums", "input_gradient")),
    *(f"layer_norm.{k}" for k in ("apply", "input_gradient", "parameter_gradients")),
}

THREE = Options(padding=(1, 1))
LEARNABLE = torch.tensor(1.7)


def both_passes(dtype: torch.dtype, x: tuple[int, ...], w: tuple[int, ...], o: Options, *, last: bool = True) -> None:
    """What is computed is garbage, since no kernel runs: only the launches count."""
    xt, wt, bias = torch.zeros(x, dtype=dtype), torch.zeros(w, dtype=dtype), torch.zeros(w[0], dtype=dtype)
    needs = Needs(True, False, False, isinstance(o.b, Tensor))
    if len(x) == 4:
        xt = xt.contiguous(memory_format=torch.channels_last) if last else xt
        forward, backward = layers.conv2d, layers.conv2d_backward
    else:
        forward, backward = layers.linear, layers.linear_backward
    f: Forward = forward(xt, wt, bias, o, True)
    saved = Saved(f.linear if o.keeps_linear(dtype) else f.y, f.norm, f.winner)
    backward(torch.zeros_like(f.y), xt, wt, bias, saved, o, needs)


def launches(dtype: torch.dtype, device_class: str) -> list[Launch]:
    """A ResNet's layers and their relatives, both paths, every kernel; the wider variety in bfloat16."""
    wide = dtype == torch.bfloat16
    with recorded(device_class) as found:
        for b in (2.0, LEARNABLE) if wide else (2.0,):
            for fused in (True, False):
                with tiles.force(fused):
                    both_passes(dtype, (8, 1024, 256), (512, 256), Options(b=b))
                    both_passes(dtype, (4, 64, 28, 28), (128, 64, 3, 3), THREE._replace(b=b))
                    both_passes(dtype, (4, 64, 28, 28), (64, 1, 3, 3), THREE._replace(b=b, groups=64))
        if wide:
            with tiles.force(True):
                # many tiles, up to 64 columns and more: the table's "narrow" and "wide"
                for b in (2.0, LEARNABLE):
                    for columns in (64, 512):
                        both_passes(dtype, (16384, columns), (columns, columns), Options(b=b))
                        both_passes(dtype, (8, 64, 56, 56), (columns, 64, 3, 3), THREE._replace(b=b))
                both_passes(dtype, (4, 256), (64, 256), Options())
                both_passes(dtype, (5, 7), (3, 7), Options())
                both_passes(dtype, (8, 1024, 256), (1024, 256), Options(max_out=2))
                both_passes(dtype, (8, 64, 56, 56), (256, 64, 1, 1), Options(stride=(2, 2)))
                both_passes(dtype, (2, 6, 56, 56), (64, 6, 7, 7), Options(padding=(3, 3), stride=(2, 2)))
                both_passes(dtype, (4, 64, 28, 28), (256, 64, 3, 3), THREE._replace(max_out=2))
                both_passes(dtype, (4, 64, 28, 28), (128, 2, 3, 3), THREE._replace(max_out=2, groups=32))
            with tiles.force(False):
                both_passes(dtype, (4, 64, 28, 28), (128, 64, 3, 3), THREE, last=False)
                both_passes(dtype, (4, 64, 28, 28), (256, 64, 1, 1), Options(max_out=2))
        x = torch.zeros(4, 256, 28, 28, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.zeros(256, dtype=dtype)
        for bias, residual, relu in ((weight, None, False), (None, None, True), (weight, None, True), (None, x, True)):
            options = NormOptions(1e-5, relu, squares=residual is not None)
            f = batch_norm.batch_norm_uncentered2d(x, None, weight, bias, residual, options)
            for behind in {residual is not None, False}:
                needs = NormNeeds(True, True, bias is not None, behind)
                kept = None if residual is None else f.z
                batch_norm.batch_norm_uncentered2d_backward(x, x, kept, f.mean, f.var, weight, bias, options, needs)
        rows = torch.zeros(512, 1024, dtype=dtype)
        for parameter, detach in ((weight.new_zeros(1024), False), (None, True)):
            options = LayerNormOptions(1, 1e-5, detach, squares=True)
            f = layer_norm.layer_norm(rows, parameter, parameter, options)
            wanted = LayerNormNeeds(True, parameter is not None, parameter is not None)
            layer_norm.layer_norm_backward(rows, rows, f.mean, f.rstd, parameter, parameter, options, wanted)
    return found


def distinct(found: list[Launch]) -> Iterator[Launch]:
    seen = set()
    for launch in found:
        made = source(launch)
        key = (launch.name, str(made.signature), str(made.constants), str(made.attrs), str(launch.options))
        if key not in seen:
            seen.add(key)
            yield launch


@pytest.fixture(autouse=True)
def _precisions() -> Iterator[None]:
    """Both are put back; :func:`test_compiles_without_spills` sets them."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    yield
    matmul.fp32_precision, conv.fp32_precision = before


#: By name: dtype, and what float32 products are allowed.
FORMATS = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "float16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float32": (torch.float32, "ieee"),
    "float64": (torch.float64, "ieee"),
}
#: float32 without TF32 has other products than with it; float16, unlike bfloat16, keeps the linear output.
COMPILED = {
    "float32": PRODUCTS,
    "float16": PRODUCTS | {"conv2d.depthwise", "elementwise.scale", "elementwise.scale_backward"},
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", FORMATS)
def test_compiles_without_spills(name: str, arch: int, tmp_path: Path) -> None:
    device_class, instruction = ARCHITECTURES[arch]
    dtype, precision = FORMATS[name]
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = precision
    on_tensor_cores = dtype.itemsize == 2 or name == "tf32"
    names, wrong = set(), []
    for launch in distinct(launches(dtype, device_class)):
        names.add(launch.name)
        if launch.name not in COMPILED.get(name, EVERY_KERNEL):
            continue
        compiled = compile_for(launch, arch, tmp_path)
        print(f"{arch} {name} {launch.name}: {compiled.registers} registers, {compiled.shared} bytes shared")
        if compiled.spilled:
            constants = {k: v for k, v in launch.arguments.items() if k.isupper()}
            wrong.append(f"{launch.name} {constants} {launch.options}: {compiled.spilled} bytes spilled")
        if launch.name in PRODUCTS and on_tensor_cores and instruction not in compiled.ptx:
            wrong.append(f"{launch.name}: no {instruction}")
        limit = 163 if device_class == "sm80" else 227
        if compiled.shared > limit * 1024:
            wrong.append(f"{launch.name}: {compiled.shared} bytes of shared memory, {limit} KiB at most")
    assert names == EVERY_KERNEL
    assert not wrong, "\n".join(wrong)
