"""Compiles the launches of the Triton backend for chips that this machine does not have.

The backend's own code runs on CPU tensors; what it would launch is recorded instead (so a test compiles exactly the
kernels, tiles and argument specialisations that a GPU would get), and compiled with ``triton.compile``.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bcos_kernels.triton import tiles

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__module__.rsplit('.', 1)[1]}.{self.kernel.fn.__name__.lstrip('_')}"


@dataclass(frozen=True)
class Compiled:
    registers: int
    spilled: int
    shared: int
    ptx: str


@contextmanager
def recorded(device_class: str, multiprocessors: int = 132) -> Iterator[list[Launch]]:
    """The launches that the backend makes inside the block, as if CPU tensors were on a device of that class."""
    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False))
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        launches.append(Launch(self, tuple(grid), {**arguments, **kwargs}, options))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(tiles, "device_class", return_value=device_class),
        mock.patch.object(tiles, "programs", return_value=tiles.PROGRAMS_PER_SM * multiprocessors),
    ):
        yield launches


def source(launch: Launch) -> ASTSource:
    """With the specialisations of a real launch: None and 1 are constants, multiples of 16 are marked."""
    signature, constants, attributes = {}, {}, {}
    declared = {p.name for p in launch.kernel.params if p.is_constexpr}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        aligned = False
        if name in declared or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], aligned = "*" + _TYPES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            signature[name], aligned = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0
        else:  # TensorDescriptor
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}[{block}]>"
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_for(launch: Launch, arch: int, scratch: Path) -> Compiled:
    kernel = triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=launch.options)
    cubin = scratch / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    registers, stack = map(int, found.groups())
    # no stack, no spills; with one, the assembler says what it is for (float64 functions keep tables there)
    spilled = _spilled(kernel.asm["ptx"], arch, scratch) if stack else 0
    return Compiled(registers, spilled, kernel.metadata.shared, kernel.asm["ptx"])


def _spilled(ptx: str, arch: int, scratch: Path) -> int:
    """Bytes a thread, stores and loads."""
    path = scratch / "kernel.ptx"
    path.write_text(ptx)
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target
    command = [get_ptxas(arch).path, "--verbose", f"--gpu-name={target.group(1)}", path, "-o", scratch / "again.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill", report)))
