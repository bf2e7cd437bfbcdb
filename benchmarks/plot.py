"""Draws a CSV of bench_layers, and nothing that is not in it: ``python -m benchmarks.plot results.csv [figure.png]``."""

from __future__ import annotations

import csv
import sys
from pathlib import Path


def draw(source: Path, target: Path) -> None:
    """Forward + backward of every contender over the plain layer, by layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with source.open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["phase"] == "both" and r["contender"] != "plain"]
    layers = list(dict.fromkeys(r["layer"] for r in rows))
    contenders = list(dict.fromkeys(r["contender"] for r in rows))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.3 * len(layers)), layout="constrained")
    for name in contenders:
        mine = {r["layer"]: float(r["ratio"]) for r in rows if r["contender"] == name}
        at = [i for i, layer in enumerate(layers) if layer in mine]
        axes.plot([mine[layers[i]] for i in at], at, "o", markersize=5, label=name)
    axes.axvline(1, color="0.6", linewidth=1)
    axes.set_xscale("log")
    ticks = [t for t in (0.5, 0.75, 1, 1.25, 1.5, 2, 3, 5, 10) if any(float(r["ratio"]) > t * 0.8 for r in rows)]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(layers)), layers)
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    first = rows[0]
    axes.set_xlabel("time of forward + backward, plain layer = 1")
    device = first["gpu"] or f"{first['cpu']}, {first['threads']} threads"
    axes.set_title(
        f"{first['network']}, batch {first['batch']}, {first['dtype']}, torch {first['torch']}\n{device}", fontsize=9
    )
    axes.legend(frameon=False)
    figure.savefig(target, dpi=150)


def main() -> None:
    source = Path(sys.argv[1])
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".png")
    draw(source, target)
    print(target)


if __name__ == "__main__":
    main()
