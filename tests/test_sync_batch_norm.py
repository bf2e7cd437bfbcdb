"""Uncentered batch norms are not mistaken for batch norms, and have a synchronised form of their own."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn

import bcos_kernels as bk
from tests import two_processes
from tests.networks import make
from tests.tolerances import GRADIENT, OUTPUT, assert_close


def norm() -> nn.Module:
    """Of a constant 1: with the mean subtracted it would be another value."""
    return bk.BatchNormUncentered2d(3).eval()


@pytest.mark.parametrize("convert", ["torch", "timm", "lightning"])
def test_converters_of_batch_norms_leave_them_alone(convert: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), norm(), nn.BatchNorm2d(3))
    ours = model[1]
    if convert == "torch":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif convert == "timm":
        model = timm.layers.convert_sync_batchnorm(model)
    else:
        model = importlib.import_module("lightning.pytorch.plugins.layer_sync").TorchSyncBatchNorm().apply(model)
    assert model[1] is ours
    assert type(model[2]) is not nn.BatchNorm2d
    assert_close(ours(torch.ones(1, 3, 2, 2)), torch.full((1, 3, 2, 2), (1 + 1e-5) ** -0.5), OUTPUT)


def test_checkpoints_settings_and_copies_are_those_of_a_batch_norm() -> None:
    theirs, ours = nn.BatchNorm2d(3, momentum=0.3), bk.BatchNormUncentered2d(3, momentum=0.3)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours).partition("(")[2] == repr(theirs).partition("(")[2]
    old = {k: v for k, v in theirs.state_dict().items() if k != "num_batches_tracked"}
    old_style = type(theirs.state_dict())(old)
    old_style._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  # from before they were counted
    ours.load_state_dict(old_style)
    assert not isinstance(ours, nn.BatchNorm2d)


@pytest.mark.parametrize("name", ["resnet", "densenet", "timm_efficientnet"])
def test_a_network_without_processes_stays_what_it_is(name: str) -> None:
    model = bk.bcosify(make(name)).eval()
    x = bk.AddInverse()(torch.rand(1, 3, 64, 64, dtype=torch.float64))
    expected = model(x)
    norms = [m for m in model.modules() if isinstance(m, bk.BatchNormUncentered2d)]
    assert norms
    assert bk.convert_sync_batchnorm(model) is model
    assert [m for m in model.modules() if isinstance(m, bk.BatchNormUncentered2d)] == norms
    assert all(m.synchronised for m in norms)
    assert torch.equal(model(x), expected)
    model.train()(x)


def test_norms_of_other_packages_are_refused() -> None:
    theirs: Any = importlib.import_module("bcos.modules.norms").BatchNormUncentered2d(3)
    with pytest.raises(ValueError, match="0 is a BatchNormUncentered2d with a forward pass of its own"):
        bk.convert_sync_batchnorm(nn.Sequential(theirs))
    model = bk.accelerate(nn.Sequential(theirs))
    assert bk.convert_sync_batchnorm(model)[0].synchronised
    assert isinstance(bk.convert_sync_batchnorm(nn.BatchNorm2d(3)), nn.SyncBatchNorm)


def test_averaged_weights_get_new_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(bk.BcosConv2d(3, 4, 1), bk.BatchNormUncentered2d(4), nn.BatchNorm2d(4)).eval()
    batches = [torch.rand(2, 3, 4, 4) + i for i in range(3)]
    hidden = [model[0](b) for b in batches]
    expected = torch.stack([h.var((0, 2, 3), unbiased=False) for h in hidden]).mean(0)
    torch.optim.swa_utils.update_bn([(b, 0) for b in batches], model)  # has no idea of them
    assert not torch.allclose(model[1].running_var, expected)
    bk.update_bn([(b, 0) for b in batches], model)
    assert_close(model[1].running_var, expected, OUTPUT)
    assert not torch.equal(model[2].running_mean, torch.zeros(4))
    assert [m.training for m in model.modules()] == [False] * 5
    assert model[1].momentum == 0.1


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found."""
    folder: Path = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "tests.two_processes", str(folder)]
    running = [subprocess.Popen([*command, str(rank)], cwd=Path(__file__).parents[1]) for rank in range(2)]
    assert [p.wait(300) for p in running] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("explained", [False, True])
def test_two_processes_are_one_with_the_whole_batch(processes: list[dict[str, Any]], explained: bool) -> None:
    """With batches of different sizes, and none at all."""
    whole = two_processes.run(two_processes.network(), two_processes.batches(), explained=explained)
    parts = [p[f"norm {explained}"] for p in processes]
    for name, expected in whole.items():
        values: list[Tensor] = [part[name] for part in parts]
        if name[0] == "y" or name.startswith("dx"):
            assert_close(torch.cat(values), expected, GRADIENT, name)
        elif name[0] == "d":
            assert_close(values[0] + values[1], expected, GRADIENT, name)
        else:  # buffers
            assert torch.equal(values[0], values[1])
            assert_close(values[0].double(), expected.double(), OUTPUT, name)


@pytest.mark.parametrize("how", ["ddp", "fsdp inner", "fsdp layer"])
def test_training_on_two_processes(processes: list[dict[str, Any]], how: str) -> None:
    expected = two_processes.steps(two_processes.without_norms(), two_processes.batches()[0], 1)
    for losses in (p[how] for p in processes):
        for loss, e in zip(losses, expected, strict=True):
            assert_close(loss, e, GRADIENT)
