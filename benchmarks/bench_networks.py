"""Times a training step of a converted network against the conventional one that it was made of, in one run.

    python -m benchmarks.bench_networks --network resnet50 --batch 8 --size 224 --threads 2

Contenders: ``conventional`` (torchvision's network), and the converted network on any backend of bcos_kernels by name
(``reference`` is what ordinary layers cost). Output and gradients of each backend are first compared with the reference in
float64; they may be off by no more than half as much again as the reference in the same dtype is (a network at random
weights is badly conditioned: its float32 gradients are off by a percent, however they are computed).
Results go to benchmarks/results/networks-<device>.csv.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import bcos_kernels as bk
from benchmarks.harness import PHASES, Clock, Step, Table, difference, machine, peak_mib, summary, take_turns

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1.5
BASELINE, TRUTH = "conventional", "reference"


def step(model: nn.Module, x: Tensor, backend: str) -> Step:
    """Forward, and backward to all parameters (without an optimiser, which is the same for all)."""
    parameters = list(model.parameters())

    def forward() -> Tensor:
        with bk.use_backend(backend):
            return model(x)

    return forward, lambda y: torch.autograd.grad(y.square().mean(), parameters)


def results(one: Step) -> tuple[Tensor, Tensor]:
    forward, backward = one
    y = forward()
    grads = backward(y)
    return y.detach(), torch.cat([g.flatten() for g in grads])  # type: ignore[attr-defined]


def error(one: Step, exact: tuple[Tensor, Tensor]) -> float:
    """Norm of the difference over the norm, of the output or of all gradients together, whichever is larger."""
    return difference(results(one), exact)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50", help="a torchvision ResNet or DenseNet")
    parser.add_argument("--backends", nargs="+", default=["auto", "portable", TRUTH])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: one thread's own time")
    parser.add_argument("--rounds", type=int, default=15, help="at most so many measurements of each contender")
    parser.add_argument("--seconds", type=float, default=90, help="at most, after five rounds")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/networks-<device>.csv")
    return parser


def main() -> int:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    standard = getattr(torchvision.models, args.network)()
    models = {BASELINE: standard, "converted": bk.bcosify(standard)}
    for name, model in models.items():
        models[name] = model.to(args.device, memory_format=torch.channels_last)
    rgb = torch.rand(args.batch, 3, args.size, args.size).to(args.device, memory_format=torch.channels_last)
    six = bk.AddInverse()(rgb).contiguous(memory_format=torch.channels_last)

    steps = {BASELINE: step(models[BASELINE], rgb, "auto")}
    exact = results(step(copy.deepcopy(models["converted"]).double(), six.double(), TRUTH))
    allowed = TOLERANCE * error(step(models["converted"], six, TRUTH), exact)
    errors = {BASELINE: 0.0}
    for backend in args.backends:
        steps[backend] = step(models["converted"], six, backend)
        errors[backend] = error(steps[backend], exact)
        if not errors[backend] <= allowed:
            print(f"WRONG: {backend} is off by {errors[backend]:.1e}; not measured", file=sys.stderr)
            return 1
    times = take_turns(Clock(args.device, args.clock), steps, args.rounds, args.seconds)
    table = Table(args.output or RESULTS / f"networks-{args.device}.csv")
    where = machine(args.device)
    for name in steps:
        peak = f"{peak_mib(steps[name], args.device):.2f}"
        for phase in PHASES:
            row = {
                "network": args.network,
                "batch": str(args.batch),
                "size": str(args.size),
                "contender": name,
                "phase": phase,
                **summary(times[name][phase], times[BASELINE][phase]),
                "peak_mib": peak,
                "error": f"{errors[name]:.1e}",
                "clock": args.clock,
                **where,
            }
            table.add(row)
            print(f"{name:12s} {phase:9s} {row['median_ms']:>12s} ms   ratio {row['ratio']}   {peak} MiB", flush=True)
    print(f"written to {table.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
