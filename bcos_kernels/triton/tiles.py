"""Which tile a kernel uses, and which layers use a fused matrix product: static tables, so that a first step costs no tuning.

None of the numbers here was measured on a GPU yet: they follow from shared memory and registers (see the comments) and from
``design/kernels.md``. ``BCOS_AUTOTUNE=1`` measures the candidates of a matrix product once for each shape and keeps the
winner in ``$BCOS_CACHE_DIR`` (default ``~/.cache/bcos_kernels``).
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from bcos_kernels.contract import Options


@dataclass(frozen=True)
class Tile:
    """Of a matrix product: ``rows x columns`` of the result, ``depth`` of the sum at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Patch:
    """Of an element-wise pass: ``rows`` pixels by ``channels``."""

    rows: int
    channels: int
    warps: int


#: Persistent programs a multiprocessor: two, so that one computes while the other is in its epilogue, where both fit. The
#: "wide" tile of a linear layer does not: compiled for sm_90 it takes 204 registers a thread (general B: 238).
PROGRAMS_PER_SM = 2

_HALF = (torch.float16, torch.bfloat16)

# 3 stages of 128x128x64 are 96 KiB of Hopper's 228. Ampere (164 KiB, sm_86: 100 KiB) gets half the depth. All were compiled
# for sm_80, sm_90 and sm_100 without spills (tests/test_triton_compile.py).
# "wide": more than 64 columns and enough rows to fill the machine; "narrow": up to 64 columns; "small": few tiles; "max_out":
# the running best and its index need as many registers as the accumulators again (128x128 spilled 184 bytes a thread);
# "scattered": rows that are not aligned to 16 bytes, or a convolution of few channels: every element has an address of
# its own (64x64x64 spilled).
_SHAPES = ("wide", "narrow", "small", "max_out", "scattered")
_GEMM: dict[tuple[str, str], dict[str, Tile]] = {
    ("sm90", "half"): {
        "wide": Tile(128, 128, 64, 8, 3),
        "narrow": Tile(128, 64, 64, 4, 4),
        "small": Tile(64, 64, 64, 4, 4),
        "max_out": Tile(128, 64, 64, 8, 4),
        "scattered": Tile(64, 64, 32, 8, 3),
    },
    ("sm80", "half"): {
        "wide": Tile(128, 128, 32, 8, 4),
        "narrow": Tile(128, 64, 32, 4, 4),
        "small": Tile(64, 64, 32, 4, 4),
        "max_out": Tile(128, 64, 32, 8, 4),
        "scattered": Tile(64, 32, 32, 8, 3),
    },
    ("sm90", "tf32"): {
        "wide": Tile(128, 128, 32, 8, 3),
        "narrow": Tile(128, 64, 32, 8, 4),
        "small": Tile(64, 64, 32, 4, 4),
        "max_out": Tile(64, 64, 32, 8, 4),
        "scattered": Tile(64, 64, 16, 8, 3),
    },
    ("sm80", "tf32"): {
        "wide": Tile(128, 64, 32, 8, 3),
        "narrow": Tile(128, 64, 32, 8, 3),
        "small": Tile(64, 64, 32, 4, 3),
        "max_out": Tile(64, 64, 32, 8, 3),
        "scattered": Tile(64, 64, 16, 8, 3),
    },
    # no tensor cores for IEEE float32: outer products in registers
    ("any", "ieee"): dict.fromkeys(_SHAPES, Tile(64, 32, 16, 8, 2)),  # 64x64 spilled 16 bytes (Triton 3.6, sm_100)
    ("any", "double"): dict.fromkeys(_SHAPES, Tile(32, 32, 16, 4, 2)),
    # programs cost the interpreter milliseconds, elements almost nothing
    ("interpreter", "any"): dict.fromkeys(_SHAPES, Tile(64, 32, 32, 1, 1)),
}

#: Bytes of an element-wise tile of one tensor: 256 threads with two 16-byte accesses each. Twice as much spilled.
_PATCH_BYTES = 8192


def device_class(t: Tensor) -> str:
    """``"sm80"`` (Ampere, Ada), ``"sm90"`` (Hopper and later), or ``"interpreter"``."""
    if not t.is_cuda:
        return "interpreter"
    return "sm90" if _capability(t.device.index) >= (9, 0) else "sm80"


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def programs(t: Tensor) -> int:
    """Of a persistent kernel. The interpreter gets two, so that its tests go round the loop."""
    return PROGRAMS_PER_SM * _multiprocessors(t.device.index) if t.is_cuda else 2


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def gemm_table(device: str, dtype: torch.dtype, precision: str) -> dict[str, Tile]:
    if device == "interpreter":
        return _GEMM["interpreter", "any"]
    if dtype == torch.float64:
        return _GEMM["any", "double"]
    if dtype in _HALF:
        return _GEMM[device, "half"]
    return _GEMM[device, "tf32"] if precision == "tf32" else _GEMM["any", "ieee"]


def gemm(t: Tensor, rows: int, columns: int, precision: str, max_out: int = 1, *, scattered: bool = False) -> Tile:
    """For a result ``[rows, columns]`` of operands like ``t``."""
    table = gemm_table(device_class(t), t.dtype, precision)
    if scattered:
        return table["scattered"]
    if max_out > 1:
        return table["max_out"]
    if columns <= 64:
        return table["narrow"] if rows >= 8192 else table["small"]
    wide = table["wide"]
    tiles = -(-rows // wide.rows) * -(-columns // wide.columns)
    return wide if tiles >= programs(t) // PROGRAMS_PER_SM else table["small"]


def gemm_candidates(t: Tensor, precision: str) -> list[Tile]:
    """What ``BCOS_AUTOTUNE=1`` measures."""
    table = gemm_table(device_class(t), t.dtype, precision)
    return list(dict.fromkeys(table.values()))


def patch(t: Tensor, channels: int, *, channels_last: bool) -> Patch:
    """For a pass over ``channels`` at a time, along which memory runs if ``channels_last``; else along pixels."""
    wide = min(max(_power_of_two(channels), 16), 256) if channels_last else min(_power_of_two(channels), 16)
    if device_class(t) == "interpreter":
        return Patch(128, min(wide, 64), 1)
    rows = _PATCH_BYTES // t.dtype.itemsize // wide
    if t.dtype.itemsize >= 4:
        # as many elements a thread, half the threads: with 256 of them the assembler made do with too few registers, and
        # spilled 8 or 16 bytes in one float32 or float64 kernel or another (Triton 3.6 and 3.9)
        return Patch(min(rows // 2, 64), wide, 4)
    if channels_last and rows > 64:
        # every row has 64-bit addresses of its own, and with few channels they are most of the registers (256x16 spilled)
        return Patch(64, wide, 4)
    return Patch(rows, wide, 8)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1


# ---- which matrix product: a fused kernel, or cuDNN / cuBLAS with the element-wise passes around it

_forced: bool | None = None


@contextmanager
def force(fused: bool | None) -> Iterator[None]:
    """For tests and benchmarks: every layer takes the fused kernels, or none does."""
    global _forced
    before, _forced = _forced, fused
    try:
        yield
    finally:
        _forced = before


def is_pointwise(weight: Tensor, options: Options) -> bool:
    """A 1x1 convolution that is a matrix product over (some of) the pixels."""
    return weight.shape[2:] == (1, 1) and options.padding == (0, 0) and options.groups == 1


def fused_conv2d(x: Tensor, weight: Tensor, options: Options) -> bool:
    """Fused are, in float16 and bfloat16 and channels-last: 1x1, depthwise, and MaxOut of any kernel size.

    - 1x1 and depthwise are bound by memory: the fused kernel moves 2 + 2 bytes an output element, cuDNN and the passes 4 + 6.
    - MaxOut writes one of M results, so the M-fold linear output never reaches memory.
    - other k x k: cuDNN's product is better than Triton's by an unknown factor, and the passes cost 4 bytes an element.
    - float32: cuBLAS and cuDNN round to TF32, Triton truncates (twice the error); without TF32 Triton has no tensor cores.
    - NCHW would have to be converted; cuDNN does that inside.
    """
    if _forced is not None:
        return _forced
    if x.dtype not in _HALF or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    if options.is_linear and options.max_out == 1:
        return False
    return is_pointwise(weight, options) or weight.shape[1] == 1 or options.max_out > 1


def fused_linear(x: Tensor, options: Options) -> bool:
    """float16 and bfloat16; see :func:`fused_conv2d`."""
    if _forced is not None:
        return _forced
    return x.dtype in _HALF and not (options.is_linear and options.max_out == 1)


# ---- measuring


def autotune() -> bool:
    return os.environ.get("BCOS_AUTOTUNE") == "1"


def tuned(t: Tensor, key: str, default: Tile, candidates: Sequence[Tile], measure: Callable[[Tile], float]) -> Tile:
    """``default``, or with ``BCOS_AUTOTUNE=1`` the candidate with the lowest ``measure``, once for each key and machine.

    A candidate that does not run (too much shared memory) is passed over.
    """
    if not autotune() or (t.is_cuda and torch.cuda.is_current_stream_capturing()):
        return default
    path = _cache_path(t)
    known = _read(path)
    if key in known:
        return Tile(**known[key])
    times = {}
    for tile in dict.fromkeys((default, *candidates)):
        try:
            times[tile] = measure(tile)
        except Exception as error:
            if "OutOfResources" not in type(error).__name__:
                raise
    best = min(times, key=lambda tile: times[tile])
    # read again: another process may have written meanwhile; the rename is atomic
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps({**_read(path), key: asdict(best)}, indent=1, sort_keys=True))
    scratch.replace(path)
    return best


def _cache_path(t: Tensor) -> Path:
    import triton

    folder = Path(os.environ.get("BCOS_CACHE_DIR") or Path.home() / ".cache" / "bcos_kernels")
    name = torch.cuda.get_device_name(t.device) if t.is_cuda else "interpreter"
    return folder / f"tiles-{name.replace(' ', '_')}-triton{triton.__version__}.json"


_cache: dict[tuple[Path, int], dict[str, dict[str, int]]] = {}


def _read(path: Path) -> dict[str, dict[str, int]]:
    """The file's content, read once for each version of it."""
    if not path.exists():
        return {}
    stamp = (path, path.stat().st_mtime_ns)
    if stamp not in _cache:
        _cache[stamp] = json.loads(path.read_text())
    return _cache[stamp]
