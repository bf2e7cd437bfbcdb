"""Makes the table by which ``"auto"`` chooses a backend, from the CSVs of bench_layers and nothing else.

    python -m benchmarks.choice                           # from benchmarks/results/layers-*.csv; also docs/performance.md
    python -m benchmarks.choice more.csv --output t.json  # from those and more, to look at

For every device, dtype and operation, and every class of shapes, backends are ordered by the geometric mean over the layers
of their time over the fastest backend's. A backend that was left out of a layer is judged by the others.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from bcos_kernels import choice, dispatch
from bcos_kernels.contract import Call, Options
from benchmarks.shapes import SETS, Layer, layers

RESULTS = Path(__file__).parent / "results"
NAME = choice.TABLE.name
DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
MARKS = ("<!-- made by python -m benchmarks.choice -->", "<!-- to here -->")
SUFFIX = {"forward": "", "backward": "_backward"}

#: (device, dtype, operation, shapes) -> layer of a file -> backend -> time over the plain layer's
Measured = dict[tuple[str, str, str, str], dict[str, dict[str, float]]]


def committed() -> list[Path]:
    return sorted(RESULTS.glob("layers-*.csv"))


def call(layer: Layer, op: str) -> Call:
    """As ``dispatch`` would see it; the tensors have no values."""
    x = torch.empty(1, layer.channels, layer.size, layer.size, device="meta")
    window = {"stride": (layer.stride,) * 2, "padding": (layer.padding,) * 2, "groups": layer.groups}
    options = Options(b=layer.b, max_out=layer.max_out, **({} if layer.tokens else window))
    return Call(op, x, torch.empty(layer.weight_shape, device="meta"), options)


def measurements(paths: Iterable[Path]) -> Measured:
    known = {(layer.network, layer.name): layer for network in SETS for layer in layers(network)}
    found: Measured = {}
    for path in paths:
        for row in _rows(path):
            layer = known.get((row["network"], row["layer"]))
            if row["contender"] not in dispatch.BACKENDS or row["phase"] not in SUFFIX or layer is None:
                continue
            op = ("linear" if layer.tokens else "conv2d") + SUFFIX[row["phase"]]
            device = row.get("device_class") or ("" if row["gpu"] else "cpu")
            key = (device, row["dtype"], op, choice.shape_class(call(layer, op)))
            case = f"{path.name} {layer.network} {layer.name} {row['batch']} {row['format']}"
            found.setdefault(key, {}).setdefault(case, {})[row["contender"]] = float(row["ratio"])
    return found


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="") as file:
        yield from csv.DictReader(file)


def scores(cases: dict[str, dict[str, float]]) -> dict[str, float]:
    """Backends, the fastest first: geometric mean of the time over the fastest backend's in the same case."""
    logs: dict[str, list[float]] = {}
    for times in cases.values():
        best = min(times.values())
        for name, time in times.items():
            logs.setdefault(name, []).append(math.log(time / best))
    means = {name: math.exp(sum(values) / len(values)) for name, values in logs.items()}
    return dict(sorted(means.items(), key=lambda item: item[1]))


def make(paths: Iterable[Path]) -> choice.Table:
    table: choice.Table = {}
    for (device, dtype, op, shapes), cases in sorted(measurements(paths).items()):
        table.setdefault(device, {}).setdefault(dtype, {}).setdefault(op, {})[shapes] = list(scores(cases))
    return table


def markdown(paths: Iterable[Path]) -> str:
    """One row for each class: the backends by their score, forward and backward."""
    found = measurements(paths)
    lines = ["| device | dtype | operation | shapes | layers | forward | backward |", "|---|---|---|---|---|---|---|"]
    for (device, dtype, op, shapes), cases in sorted(found.items()):
        if op.endswith("_backward"):
            continue
        both = [cases, found.get((device, dtype, f"{op}_backward", shapes), {})]
        texts = [", ".join(f"`{name}` {score:.2f}" for name, score in scores(c).items()) for c in both]
        lines.append(f"| {device} | {dtype} | {op} | {shapes} | {len(cases)} | {texts[0]} | {texts[1]} |")
    return "\n".join(lines)


def write(paths: Iterable[Path], output: Path) -> None:
    output.write_text(json.dumps(make(paths), indent=1) + "\n")


def with_section(text: str, table: str) -> str:
    """``text`` with ``table`` between the two marks."""
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    return f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("more", nargs="*", type=Path, help="CSVs besides the committed ones")
    parser.add_argument("--output", type=Path, help="default: the package's own, and the table in docs/performance.md")
    args = parser.parse_args()
    paths = [*committed(), *args.more]
    write(paths, args.output or choice.TABLE)
    if args.output is None:
        DOCUMENT.write_text(with_section(DOCUMENT.read_text(), markdown(paths)))
    print(f"from {', '.join(path.name for path in paths)}:\n{markdown(paths)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
