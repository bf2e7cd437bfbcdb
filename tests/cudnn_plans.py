"""``python -m tests.cudnn_plans``: compiles the graphs of the cuDNN backend for an H100 that need not be there.

``test_cudnn.py`` runs this in a process of its own, with ``cudnn_driver.c`` in the driver's place. Prints the names of the
compiled kernels, and a line of JSON for each graph.
"""

from __future__ import annotations

import json
import sys

import cudnn as library
import torch

from bcos_kernels import cudnn, cudnn_graphs
from bcos_kernels.contract import Options
from bcos_kernels.cudnn_graphs import Graph, Layer

#: As cuDNN writes it down for a device; the numbers are those of NVIDIA's tables for the H100 SXM.
H100 = {
    "deviceName": "NVIDIA H100 80GB HBM3",
    "deviceVer": 900,
    "driverVer": 13000,
    "cudaDeviceId": 0,
    "pciDeviceId": 0,
    "isTccDriver": 0,
    "supportCoopLaunch": 1,
    "multiProcessorCount": 132,
    "smCountOrigin": 0,
    "warpSize": 32,
    "maxThreadsPerBlock": 1024,
    "maxThreadsPerSM": 2048,
    "maxCtasPerSM": 32,
    "regsPerBlock": 65536,
    "maxRegistersPerSM": 65536,
    "maxSharedMemoryPerBlock": 49152,
    "maxSharedMemoryPerBlockOptin": 232448,
    "oversizedSharedMemoryPerBlock": 232448,
    "reservedSharedMemoryPerBlock": 1024,
    "maxBlockSize": [1024, 1024, 64],
    "maxGridSize": [2147483647, 65535, 65535],
    "totalGlobalMem": 85029158912,
    "l2CacheSize": 52428800,
    "smClockRateKHz": 1980000,
    "memClockRateKHz": 2619000,
}

#: Of ResNet-50, batch 64: (channels, size, out, kernel, stride).
LAYERS = [(64, 56, 64, 3, 1), (64, 56, 256, 1, 1), (2048, 7, 1000, 1, 1), (128, 56, 128, 3, 2), (256, 56, 512, 1, 2)]


def layer(channels: int, size: int, out: int, kernel: int, stride: int, dtype: torch.dtype) -> Layer:
    x = torch.empty(64, channels, size, size, dtype=dtype, device="meta")
    w = torch.empty(out, channels, kernel, kernel, dtype=dtype, device="meta")
    return cudnn._layer(x, w, Options(stride=(stride, stride), padding=(kernel // 2, kernel // 2)))


def graphs() -> list[Graph]:
    found = []
    for shape in LAYERS:
        one = layer(*shape, torch.bfloat16)
        found += [Graph(kind, one) for kind in ("forward", "scale_backward", "input_gradient")]
    half = layer(*LAYERS[0], torch.float16)
    found += [
        Graph("forward", found[0].layer, bias=True),
        Graph("forward", half, bias=True, linear=True),
        Graph("scale_backward", half, linear=True),
        Graph("input_gradient", half),
    ]
    return found


def main() -> None:
    print(f"cuDNN {library.backend_version()}")
    where = {"device_property": library.create_device_properties(json.dumps(H100))}
    for which in graphs():
        graph = cudnn_graphs.draw(which, library, **where)
        try:
            cudnn_graphs.compile_plans(graph, library)
            outcome = {"error": None, "workspace": graph.get_workspace_size()}
        except (RuntimeError, library.cudnnGraphNotSupportedError) as error:
            outcome = {"error": str(error)[:300], "workspace": 0}
        sys.stdout.flush()
        print(json.dumps({"graph": str(which), "kind": which.kind, **outcome}), flush=True)


if __name__ == "__main__":
    main()
