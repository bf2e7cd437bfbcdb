"""Times a training step of the public package's networks before and after ``bk.accelerate``, in one run.

    python -m benchmarks.bench_accelerate --network resnet50 --batch 4 --size 128 --threads 2

Both networks have the same weights and are compared first: output and gradients. Steps take turns, so that what else the
machine does falls on both. Results go to benchmarks/results/accelerate-<device>.csv.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import bcos_kernels as bk
from benchmarks.harness import PHASES, Clock, Step, Table, difference, machine, peak_mib, summary, take_turns

RESULTS = Path(__file__).parent / "results"
#: Norm of the difference over the norm, of the output and of all gradients together; fifty float32 layers of other sums.
TOLERANCE = 1e-3
BASELINE = "bcos"


def networks(name: str, device: str) -> dict[str, nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bcos.models import pretrained

        torch.manual_seed(0)
        theirs: nn.Module = getattr(pretrained, name)(pretrained=False).to(device)
    return {BASELINE: theirs, "accelerated": bk.accelerate(copy.deepcopy(theirs))}


def step(model: nn.Module, x: Tensor) -> Step:
    """Forward, and backward to all parameters (without an optimiser, which is the same for both)."""
    parameters = list(model.parameters())
    return (lambda: model(x), lambda y: torch.autograd.grad(y.square().mean(), parameters))


def results(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    forward, backward = step(model, x)
    y = forward()
    return y.detach(), torch.cat([g.flatten() for g in backward(y)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50", help="an entry point of bcos.models.pretrained")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=128, help="pixels of a side")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--channels-last", action="store_true", help="of image and weights, for both; the default is NCHW"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: one thread's own time")
    parser.add_argument("--rounds", type=int, default=15, help="at most so many measurements of each network")
    parser.add_argument("--seconds", type=float, default=60, help="at most, after five rounds")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/accelerate-<device>.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    models = {name: m.to(memory_format=memory_format) for name, m in networks(args.network, args.device).items()}
    x = torch.rand(args.batch, 6, args.size, args.size, generator=torch.Generator().manual_seed(0))
    x = x.to(args.device, memory_format=memory_format)
    error = difference(results(models["accelerated"], x), results(models[BASELINE], x))
    if not error <= TOLERANCE:
        print(f"WRONG: the accelerated network is off by {error:.1e}; not measured", file=sys.stderr)
        return 1
    steps = {name: step(model, x) for name, model in models.items()}
    times = take_turns(Clock(args.device, args.clock), steps, args.rounds, args.seconds)
    output = args.output or RESULTS / f"accelerate-{args.device}.csv"
    table = Table(output)
    where = machine(args.device)
    for name in steps:
        peak = f"{peak_mib(steps[name], args.device):.2f}"
        for phase in PHASES:
            row = {
                "network": args.network,
                "batch": str(args.batch),
                "size": str(args.size),
                "format": "channels_last" if args.channels_last else "contiguous",
                "contender": name,
                "phase": phase,
                **summary(times[name][phase], times[BASELINE][phase]),
                "peak_mib": peak,
                "error": f"{error:.1e}",
                "clock": args.clock,
                **where,
            }
            table.add(row)
            print(f"{name:12s} {phase:9s} {row['median_ms']:>12s} ms   ratio {row['ratio']}   {peak} MiB")
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
