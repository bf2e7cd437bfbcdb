"""``python -m bcos_kernels.env_report``: what is installed, what runs, what to put into a bug report."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from bcos_kernels import __version__, available_backends


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """The report as text: versions, devices, and each backend with what keeps it from running."""
    lines = [
        f"bcos_kernels  {__version__}",
        f"python        {platform.python_version()} on {platform.platform()}",
        f"torch         {torch.__version__} (CUDA {torch.version.cuda or 'none'}, cuDNN {torch.backends.cudnn.version()})",
        f"processor     {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        *(f"{name:<14}{_installed(name)}" for name in ("numpy", "triton", "torchvision", "lightning", "bcos")),
    ]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines += [f"GPU {i}         {name}" for i, name in enumerate(devices)] or ["GPU           none"]
    lines.append("backends")
    lines += [f"  {name:<12}{why or 'ready'}" for name, why in available_backends().items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
