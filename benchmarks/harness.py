"""Timing that is fair on a machine that is not alone: contenders take turns, and are compared round by round."""

from __future__ import annotations

import csv
import datetime
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bcos_kernels
from bcos_kernels import choice, reference

PHASES = ("forward", "backward", "both")
Step = tuple[Callable[[], Tensor], Callable[[Tensor], object]]  #: (forward, backward of its output)


def machine(device: str) -> dict[str, str]:
    """What every row of a CSV says about where it was measured."""
    return {
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "",
        "device_class": choice.device_class(torch.device(device)),
        "threads": str(torch.get_num_threads()),
        "torch": str(torch.__version__),
        "bcos_kernels": bcos_kernels.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found: dict[str, str] = {}
        for line in lines:
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
        return f"{found['model name']} (family {found['cpu family']}, model {found['model']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


class Clock:
    """``wall``: what a user waits for. ``cpu``: this thread's own time, for one thread on a busy machine."""

    def __init__(self, device: str, kind: str) -> None:
        if kind == "cpu" and (device == "cuda" or torch.get_num_threads() != 1):
            raise ValueError("--clock cpu is the time of one thread: it needs --device cpu --threads 1")
        self.cuda = device == "cuda"
        self.read = time.thread_time if kind == "cpu" else time.perf_counter
        # Writing twice the L2 cache leaves nothing of the last contender's in it.
        flush_bytes = 2 * torch.cuda.get_device_properties(0).L2_cache_size if self.cuda else 0
        self.flush = torch.empty(flush_bytes, dtype=torch.int8, device="cuda") if self.cuda else None

    def measure(self, step: Step) -> tuple[float, float]:
        """Milliseconds of one forward and one backward pass."""
        forward, backward = step
        if self.flush is not None:
            self.flush.zero_()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            marks[0].record()
            y = forward()
            marks[1].record()
            grads = backward(y)
            marks[2].record()
            torch.cuda.synchronize()
            del grads
            return marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])
        start = self.read()
        y = forward()
        middle = self.read()
        grads = backward(y)
        end = self.read()
        del grads
        return (middle - start) * 1e3, (end - middle) * 1e3


@contextmanager
def plain_reference() -> Iterator[None]:
    """The reference without its look at the values of its arguments, so that it costs what plain PyTorch costs."""
    reference.watches_values = False
    try:
        yield
    finally:
        reference.watches_values = True


@plain_reference()
def take_turns(clock: Clock, steps: dict[str, Step], rounds: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Times by contender and phase, one of each a round; who begins changes. Ends after ``rounds`` or ``seconds``."""
    times: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in steps}
    names = list(steps)
    for name in names:
        clock.measure(steps[name])
    begin = time.perf_counter()
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            forward, backward = clock.measure(steps[name])
            for phase, value in zip(PHASES, (forward, backward, forward + backward), strict=True):
                times[name][phase].append(value)
        if i >= 4 and time.perf_counter() - begin > seconds:
            break
    return times


def summary(times: Sequence[float], baseline: Sequence[float]) -> dict[str, str]:
    """Median, quantiles, and the median over the rounds of the ratio to the baseline in the same round."""
    ordered = sorted(times)
    ratios = [t / b for t, b in zip(times, baseline, strict=True)]
    return {
        "median_ms": f"{statistics.median(ordered):.4f}",
        "q10_ms": f"{ordered[len(ordered) // 10]:.4f}",
        "q90_ms": f"{ordered[len(ordered) * 9 // 10]:.4f}",
        "best_ms": f"{ordered[0]:.4f}",
        "ratio": f"{statistics.median(ratios):.4f}",
        "ratio_of_best": f"{ordered[0] / min(baseline):.4f}",
        "rounds": str(len(ordered)),
    }


@plain_reference()
def peak_mib(step: Step, device: str) -> float:
    """Most memory that one forward and backward pass holds beyond its inputs, as torch's allocator counts it."""
    forward, backward = step
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        backward(forward())
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        grads = backward(forward())
    del grads
    held = peak = 0
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def difference(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Norm of the difference over the norm of what is expected, of the worst result; NaN where there is one."""
    pairs = [(a.double(), e.double()) for a, e in zip(actual, expected, strict=True)]
    return torch.stack([(a - e).norm() / e.norm() for a, e in pairs]).max().item()  # Python's max may lose a NaN


class Table:
    """A CSV that is written row by row: what was measured is kept if the run is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)

    def add(self, row: dict[str, str]) -> None:
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if not self.rows:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)
