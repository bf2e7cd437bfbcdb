"""``python -m bcos_kernels.env_report``: what is installed, what runs, what to put into a bug report."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch

from bcos_kernels import __version__, available_backends, build_record, native

_WITHOUT_AVX512 = (
    "no AVX-512: the fused 1x1 convolution and linear layer are off, and these layers run as a product and passes around it; "
    "docs/performance.md has figures with AVX-512 only"
)


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _says(*command: str) -> str:
    """What a program prints; empty where it is not there, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _package() -> str:
    how = "checkout" if build_record.checkout() else f"installed by {_installer()}"
    return f"{__version__} ({how})"


def _installer() -> str:
    return (metadata.distribution("bcos_kernels").read_text("INSTALLER") or "an unknown program").strip()


def _torch() -> str:
    v = torch.version
    made = f"CUDA {v.cuda or 'none'}, cuDNN {torch.backends.cudnn.version()}, ROCm {v.hip or 'none'}"
    return f"{torch.__version__} ({made}; {'debug build, ' if v.debug else ''}commit {str(v.git_version)[:10]})"


def _torch_build() -> str:
    """Its compiler, and what it computes matrix products with."""
    config = torch.__config__.show()
    compiler = re.search(r"(GCC|Clang|clang) [\d.]+", config)
    onednn = re.search(r"(?:MKL-DNN|oneDNN) v[\d.]+", config)
    mkl = torch.backends.mkl.is_available()
    parts = (compiler and compiler.group(), onednn and onednn.group(), "MKL" if mkl else "no MKL")
    return ", ".join(part for part in parts if part)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found.group(1) if found else _says("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()


def _processor() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpu_model() or 'unknown'}, {platform.machine()}, {cores} of {os.cpu_count()} cores"


def _threads() -> str:
    settings = (f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ)
    counts = f"{torch.get_num_threads()}, {torch.get_num_interop_threads()} between operations"
    return ", ".join([counts, *settings])


def _instructions() -> str:
    """What torch, and with it our kernels, chose for this processor."""
    chosen = torch.backends.cpu.get_cpu_capability()
    asked = os.environ.get("ATEN_CPU_CAPABILITY")
    return chosen + (f" (ATEN_CPU_CAPABILITY={asked})" if asked else "")


def _kernels() -> str:
    if native.unavailable() is not None:
        return "the compiled ones do not run, see below"
    ops = torch.ops.bcos_native
    if not ops.has_avx512():
        return _WITHOUT_AVX512
    return f"fused 1x1 and linear layer {'on' if ops.fuses_pointwise() else 'off, oneDNN has no small products'}"


def _extension() -> str:
    info = native.build_info()
    if info is None:
        return f"missing: {build_record.left_out()}"
    cuda = info.get("cuda_archs") or f"none ({info.get('no_cuda') or build_record.NO_NVCC})"
    return f"for torch {info.get('torch')}, by {info.get('compiler')}; GPUs: {cuda}"


def _sources() -> str:
    built, expected = (native.build_info() or {}).get("sources"), build_record.expected_sources()
    if built is None or expected is None:
        return f"{built or expected or 'unknown'}, nothing to compare with"
    return f"{built}, fresh" if built == expected else f"{built}, stale: these modules belong to {expected}"


def _flags() -> str:
    return (native.build_info() or {}).get("flags", "none")


def _compiler() -> str:
    """The first of CXX, g++, clang++ and c++ that says what it is."""
    for command in dict.fromkeys((os.environ.get("CXX", ""), "g++", "clang++", "c++")):
        if said := _says(*shlex.split(command), "--version"):
            return said.splitlines()[0]
    return "none found"


def _nvcc() -> str:
    found = build_record.find_nvcc()
    release = re.search(r"release [\d.]+, V[\d.]+", _says(found, "--version")) if found else None
    return release.group() if release else "none found"


def _driver() -> str:
    said = _says("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said.splitlines()[0] if said else "none found"


def _gpus() -> Iterator[str]:
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        yield f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"


def _line(name: str, source: Callable[[], str]) -> str:
    """A line; where its source fails, that is what it says."""
    try:
        text = source()
    except Exception as error:  # a report is wanted most where something is broken
        text = f"unknown ({type(error).__name__}: {error})"
    return f"{name:<14}{text}"


def _backends() -> str:
    return "\n" + "\n".join(f"  {name:<12}{why or 'ready'}" for name, why in available_backends().items())


def report() -> str:
    """The report as text: versions, processor, compilers, the extension, and each backend with what keeps it from running.

    A line whose source fails says so. Your home directory is written as ``~``.
    """
    lines = [
        _line("bcos_kernels", _package),
        _line("python", lambda: f"{platform.python_version()} on {platform.platform()}"),
        _line("torch", _torch),
        _line("torch build", _torch_build),
        _line("processor", _processor),
        _line("instructions", _instructions),
        _line("threads", _threads),
        _line("kernels", _kernels),
        _line("extension", _extension),
        _line("sources", _sources),
        _line("flags", _flags),
        _line("compiler", _compiler),
        _line("nvcc", _nvcc),
        _line("driver", _driver),
        *(
            _line(name, lambda name=name: _installed(name))  # type: ignore[misc]
            for name in ("numpy", "triton", "torchvision", "lightning", "bcos")
        ),
        _line("GPU", lambda: "; ".join(_gpus()) or "none"),
        _line("backends", _backends).rstrip(),
    ]
    text, home = "\n".join(lines), os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text  # "/" in some containers; "~" where there is no home


if __name__ == "__main__":
    print(report())
