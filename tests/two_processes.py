"""One of two processes of a distributed run: ``python -m tests.two_processes FOLDER RANK``; see ``test_sync_batch_norm``."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import bcos_kernels as bk
from bcos_kernels.modules import FusedSequential

#: images of each process, by batch
SIZES = ((3, 1), (4, 0))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [bk.BcosConv2d(6, 4, 3), bk.BatchNormUncentered2d(4), nn.ReLU(), bk.BcosConv2d(4, 3, 1, b=1.5)]
    model = FusedSequential(*layers, bk.BatchNormUncentered2d(3, momentum=None)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.rand_like(p), alpha=0.3)
    return model


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(4, 6, 7, 5, dtype=torch.float64, generator=generator) + i for i in range(len(SIZES))]


def run(model: nn.Module, parts: list[Tensor], *, explained: bool = False) -> dict[str, Tensor]:
    """Outputs, and gradients of the sum of all losses; of the parameters, this process's share."""
    result = {}
    for i, part in enumerate(parts):
        x = part.clone().requires_grad_()
        with bk.explanation_mode(model) if explained else torch.enable_grad():
            y = model(x)
        (y.square() * torch.linspace(-1, 2, y[:1].numel(), dtype=y.dtype).view(y[:1].shape)).sum().backward()
        result |= {f"y{i}": y.detach(), f"dx{i}": x.grad}
    result |= {f"d{n}": p.grad for n, p in model.named_parameters()}
    return result | {n: b.clone() for n, b in model.named_buffers()}


def steps(model: nn.Module, x: Tensor, processes: int) -> list[Tensor]:
    """Losses of plain training, the same on every process; gradients of processes are averaged."""
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-5)
    losses = []
    for _ in range(3):
        loss = model(x).square().sum()
        total = loss.detach().clone()
        if processes > 1:
            dist.all_reduce(total)
        losses.append(total)
        optimiser.zero_grad()
        (loss * processes).backward()
        optimiser.step()
    return losses


def without_norms() -> nn.Module:
    model = network()
    return nn.Sequential(model[0], model[2], model[3])


def main(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    parts = [b.split(sizes)[rank] for b, sizes in zip(batches(), SIZES, strict=True)]
    results = {}
    for explained in (False, True):
        model = bk.convert_sync_batchnorm(network())
        results[f"norm {explained}"] = run(model, parts, explained=explained)
    x = batches()[0].split(2)[rank]
    model = without_norms()
    results["ddp"] = steps(DistributedDataParallel(copy.deepcopy(model)), x, 2)
    mesh = dist.init_device_mesh("cpu", (2,))
    for name, inner in (("fsdp inner", True), ("fsdp layer", False)):
        sharded = copy.deepcopy(model)
        for layer in (sharded[0], sharded[2]):
            fully_shard(layer.linear if inner else layer, mesh=mesh)
        results[name] = steps(sharded, x, 2)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
