"""Times B-cos layers against the plain layers, the reference eager and compiled, and the public ``bcos`` package.

    python -m benchmarks.bench_layers --network resnet50 --batch 8 --threads 2
    python -m benchmarks.bench_layers --quick

Contenders: ``plain`` (F.conv2d / F.linear, and the maximum behind it for MaxOut), every backend of bcos_kernels that the
machine can use, by name, ``reference`` (eager), ``compiled`` (the reference under torch.compile), and ``bcos`` (the public
package; unit-norm weights, so it is compared with the reference for those). A backend that does not take a layer says so,
and is left out of that layer. Every contender is first compared with the reference on the very inputs that it is timed on:
one that is wrong gets an error instead of a row. Results go to benchmarks/results/*.csv; ``python -m benchmarks.plot`` draws
them, ``python -m benchmarks.choice`` makes of them the table that ``"auto"`` goes by.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bcos_kernels as bk
from bcos_kernels import reference
from benchmarks.harness import PHASES, Clock, Step, Table, difference, machine, peak_mib, summary, take_turns
from benchmarks.shapes import SETS, Layer, layers

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Norm of the difference over the norm of the reference's result; sums in another order, twice.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
#: Rows of MaxOut that are as good as equal change places where they are rounded at another point: 2^-8 of them or so, whose
#: gradients go elsewhere.
SWAPPED_WINNERS = 5
BASELINE = "plain"
Call = Callable[[Tensor, Tensor], Tensor]


def plain(layer: Layer) -> Call:
    def linear_part(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w) if layer.tokens else F.conv2d(x, w, None, layer.stride, layer.padding, 1, layer.groups)

    if layer.max_out == 1:
        return linear_part
    axis = -1 if layer.tokens else 1
    return lambda x, w: reference.max_out_channels(linear_part(x, w), layer.max_out, axis)


def bcos_layer(layer: Layer, backend: str, **options: Any) -> Call:
    options |= {"b": layer.b, "max_out": layer.max_out, "backend": backend}
    if layer.tokens:
        return lambda x, w: bk.bcos_linear(x, w, **options)
    options |= {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
    return lambda x, w: bk.bcos_conv2d(x, w, **options)


def public_package(layer: Layer) -> Call:
    from bcos.modules import BcosConv2d, BcosLinear

    options = {"b": layer.b, "max_out": layer.max_out}
    if layer.tokens:
        module = BcosLinear(layer.channels, layer.out, **options)
    else:
        window = (layer.kernel, layer.stride, layer.padding)
        module = BcosConv2d(layer.channels, layer.out, *window, groups=layer.groups, **options)

    def call(x: Tensor, w: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"linear.weight": w}, (x,))  # type: ignore[no-any-return]

    return call


def contender(name: str, layer: Layer) -> Call:
    if name == BASELINE:
        return plain(layer)
    if name == "compiled":
        torch._dynamo.reset()
        return torch.compile(bcos_layer(layer, "reference"), dynamic=False)
    if name == "bcos":
        return public_package(layer)
    return bcos_layer(layer, name)


def backends(device: str) -> list[str]:
    """Those that can be used here and are meant for the device; the interpreter of Triton is not."""
    here = [name for name, sentence in bk.available_backends().items() if sentence is None and name != "reference"]
    return here if device == "cuda" else [name for name in here if name not in ("triton", "cudnn")]


def inputs(layer: Layer, batch: int, dtype: torch.dtype, device: str, contiguous: bool) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    pixels = (layer.tokens, layer.channels) if layer.tokens else (layer.channels, layer.size, layer.size)
    x = torch.randn(batch, *pixels, generator=rng)
    w = torch.randn(layer.weight_shape, generator=rng)
    if not layer.tokens and not contiguous:
        x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    w = w / math.sqrt(w[0].numel())
    return x.to(device, dtype).requires_grad_(), w.to(device, dtype).requires_grad_()


def error(call: Call, truth: Call, x: Tensor, w: Tensor, grad: Tensor) -> float:
    """Largest relative difference of output and gradients from the reference's."""
    results = []
    for f in (call, truth):
        y = f(x, w)
        results.append([y.detach(), *torch.autograd.grad(y, (x, w), grad)])
    return difference(*results)


def measure_layer(layer: Layer, names: list[str], args: argparse.Namespace, clock: Clock, table: Table) -> bool:
    """One CSV row for every contender and phase; False where a contender was wrong."""
    dtype = DTYPES[args.dtype]
    x, w = inputs(layer, args.batch, dtype, args.device, args.contiguous)
    with torch.no_grad():
        grad = torch.randn_like(plain(layer)(x, w))
    allowed = TOLERANCE[dtype] * (SWAPPED_WINNERS if layer.max_out > 1 and dtype.itemsize == 2 else 1)
    fine = True
    steps: dict[str, Step] = {}
    errors: dict[str, float] = {}
    for name in names:
        call = contender(name, layer)
        truth = plain(layer) if name == BASELINE else bcos_layer(layer, "reference", normalize_weight=name == "bcos")
        try:
            errors[name] = error(call, truth, x, w, grad)
        except RuntimeError as failure:
            print(f"  {name}: {str(failure).splitlines()[0]}", file=sys.stderr)
            refused = str(failure).startswith(f"{name}: ")
            fine = fine and (refused or name in ("reference", "compiled", "bcos"))
            continue
        if not errors[name] <= allowed:
            print(f"  {name}: WRONG, off by {errors[name]:.1e}; not measured", file=sys.stderr)
            fine = False
            continue
        steps[name] = (lambda call=call: call(x, w), lambda y: torch.autograd.grad(y, (x, w), grad))
    times = take_turns(clock, steps, args.rounds, args.seconds)
    where = machine(args.device)
    for name, step in steps.items():
        peak = f"{peak_mib(step, args.device):.2f}"
        for phase in PHASES:
            table.add(
                {
                    "network": layer.network,
                    "layer": layer.name,
                    "batch": str(args.batch),
                    "dtype": args.dtype,
                    "format": "contiguous" if args.contiguous else "channels_last",
                    "contender": name,
                    "phase": phase,
                    **summary(times[name][phase], times[BASELINE][phase]),
                    "peak_mib": peak,
                    "error": f"{errors[name]:.1e}",
                    "clock": args.clock,
                    **where,
                }
            )
    line = "  ".join(f"{n} {table_value(table, layer, n):.3f}" for n in steps if n != BASELINE)
    print(f"{layer.name:28s} {BASELINE} {times_median(times[BASELINE]['both']):8.2f} ms   {line}", flush=True)
    return fine


def times_median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def table_value(table: Table, layer: Layer, name: str) -> float:
    wanted = {"network": layer.network, "layer": layer.name, "contender": name, "phase": "both"}
    return next(float(r["ratio"]) for r in reversed(table.rows) if wanted.items() <= r.items())


def print_summary(table: Table) -> None:
    """Geometric mean and worst layer of forward + backward over the plain layer."""
    rows = [r for r in table.rows if r["phase"] == "both" and r["contender"] != BASELINE]
    for network in dict.fromkeys(r["network"] for r in rows):
        for name in dict.fromkeys(r["contender"] for r in rows):
            ratios = {r["layer"]: float(r["ratio"]) for r in rows if (r["network"], r["contender"]) == (network, name)}
            if ratios:
                mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
                worst = max(ratios, key=lambda layer: ratios[layer])
                print(
                    f"{network}: {name}: {mean:.3f} times {BASELINE} over {len(ratios)} layers, "
                    f"at worst {ratios[worst]:.3f} ({worst})"
                )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["resnet50"], choices=[*SETS])
    parser.add_argument("--contenders", nargs="+", help="default: all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=[*DTYPES])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--contiguous", action="store_true", help="NCHW instead of channels-last")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: one thread's own time")
    parser.add_argument("--rounds", type=int, default=30, help="at most so many measurements of each contender")
    parser.add_argument("--seconds", type=float, default=20, help="per layer, at most, after five rounds")
    parser.add_argument("--only", default="", help="layers whose name contains this")
    parser.add_argument("--quick", action="store_true", help="three layers, batch 2, nothing compiled")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/layers-<device>.csv")
    return parser


def main() -> int:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    names = [BASELINE, *(args.contenders or [*backends(args.device), "reference", "compiled", "bcos"])]
    chosen = [layer for network in args.network for layer in layers(network) if args.only in layer.name]
    output = args.output or RESULTS / f"layers-{args.device}.csv"
    if args.quick:
        names = [n for n in names if n != "compiled"]
        args.batch, args.rounds, args.seconds = 2, 7, 3.0
        chosen = chosen[1:4]
        output = args.output or RESULTS / f"quick-{args.device}.csv"
    clock = Clock(args.device, args.clock)
    table = Table(output)
    fine = [measure_layer(layer, names, args, clock, table) for layer in chosen]
    print_summary(table)
    print(f"written to {output}")
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
