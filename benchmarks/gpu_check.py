"""Everything worth knowing from a machine with a GPU, in one go: ``make gpu-check`` (no network needed).

    python -m benchmarks.gpu_check --minutes 10
    python -m benchmarks.gpu_check --dry             # the same steps on the CPU, as small as they go

The most valuable steps come first: environment, GPU tests, layers, whole networks. Each has its share of the time; one that
runs out of it is ended, and what it had measured is kept. The output folder gets a log for each step, the CSVs, to be
committed under benchmarks/results/, and ``choices.json``, the table that ``"auto"`` goes by, made of these CSVs and the
committed ones, to be committed in bcos_kernels/. A short table is printed last. The exit code is that of the tests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import choice

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class StepPlan:
    """A command, and how much of the remaining time it may take."""

    name: str
    command: list[str]
    share: float
    is_test: bool = False


def plan(gpu: str, output: Path, dry: bool = False) -> list[StepPlan]:
    python = sys.executable
    device = ["--device", "cpu" if dry else "cuda"]
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(["--collect-only"] if dry else [])]

    def layers(name: str, share: float, *networks: str) -> StepPlan:
        output_csv = ["--output", str(output / f"layers-{name}-{gpu}.csv")]
        command = [python, "-m", "benchmarks.bench_layers", *device, "--network", *networks, *output_csv]
        size = ["--quick", "--batch", "1"] if dry else ["--batch", "64", "--rounds", "20", "--seconds", "4"]
        return StepPlan(f"layers: {name}", [*command, *size, *([] if dry else ["--dtype", "bfloat16"])], share)

    networks = [python, "-m", "benchmarks.bench_networks", *device]
    networks += ["--output", str(output / f"networks-{gpu}.csv")]
    small = ["--network", "resnet18", "--batch", "1", "--size", "64", "--rounds", "1", "--backends", "auto"]
    large = ["--batch", "64", "--rounds", "10", "--seconds", "30"]
    return [
        StepPlan("environment", [python, "-m", "bcos_kernels.env_report"], 0.1),
        StepPlan("tests: kernels", [*tests, "tests/test_triton.py"], 0.3, is_test=not dry),
        StepPlan("tests: native", [*tests, "tests/test_cuda_native.py"], 0.25, is_test=True),
        StepPlan("tests: networks", [*tests, "tests/test_gpu.py"], 0.25, is_test=True),
        layers("resnet50", 0.55, "resnet50"),
        StepPlan("networks: ResNet-50", [*networks, *(small if dry else large)], 0.5),
        layers("relatives", 0.4, "relatives"),
        layers("vit", 0.6, "vit_s", "vit_b"),
        layers("densenet121", 1.0, "densenet121"),
    ]


def run(step: StepPlan, seconds: float, log: Path) -> str:
    """Runs a step and returns its outcome in a word or two."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        try:
            done = subprocess.run(
                step.command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "out of time"
    return "ok" if done.returncode == 0 else f"exit code {done.returncode}"


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="for everything together")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "gpu_check")), help="folder")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tests only collected: whether the steps work")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        print("gpu-check: there is no CUDA device that torch can use", file=sys.stderr)
        return 2
    args.output = args.output.resolve()
    gpu = "dry" if args.dry else torch.cuda.get_device_name().replace(" ", "-")
    args.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    outcomes: list[tuple[StepPlan, str, float, str]] = []
    for number, step in enumerate(plan(gpu, args.output, args.dry)):
        left = end - time.monotonic()
        if left < 10:
            outcomes.append((step, "not begun", 0.0, ""))
            continue
        log = args.output / f"{number}-{step.name.replace(': ', '-').replace(' ', '-')}.log"
        print(f"{step.name} ...", flush=True)
        begin = time.monotonic()
        outcome = run(step, left * step.share, log)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        outcomes.append((step, outcome, time.monotonic() - begin, lines[-1] if lines else ""))
        print("\n".join(lines[-30 if "layers" in step.name or number == 0 else -12 :]), flush=True)
    measured = sorted(args.output.glob(f"layers-*-{gpu}.csv"))
    choice.write([*choice.committed(), *measured], args.output / choice.NAME)
    print(choice.markdown(measured))
    print(f"\n{gpu}")
    for step, outcome, seconds, last in outcomes:
        print(f"{step.name:22s} {outcome:14s} {seconds:6.0f} s  {last[:90]}")
    return int(any(step.is_test and outcome != "ok" for step, outcome, _, _ in outcomes))


if __name__ == "__main__":
    sys.exit(main())
