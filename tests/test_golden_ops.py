"""Every operation against vectors measured on the public code (``tests/golden/ops.npz``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bcos_kernels as bk
from tests import golden_case
from tests.golden import fill
from tests.tolerances import relative_error

ARRAYS, CASES = golden_case.load("ops")


def layer(case: dict[str, Any]) -> torch.nn.Module:
    """Our module for a case; ``bcos_*`` normalise their weights, ``bcosify_*`` do not."""
    kind, options = case["op"], dict(case["kw"])
    if kind == "batch_norm_uncentered2d":
        return bk.BatchNormUncentered2d(options["num_features"], bias=options["bias"])
    if kind == "layer_norm_detachable":
        return bk.DetachableLayerNorm(options["dim"])
    if kind == "group_norm_detachable":
        return bk.DetachableGroupNorm2d(options["groups"], options["dim"])
    options["normalize_weight"] = kind.startswith("bcos_")
    if case["learn_b"]:
        options["b"] = torch.nn.Parameter(torch.tensor(options["b"]))
    if kind.endswith("linear"):
        return bk.BcosLinear(options.pop("in_features"), options.pop("out_features"), **options)
    return bk.BcosConv2d(options.pop("in_channels"), options.pop("out_channels"), options.pop("kernel_size"), **options)


@pytest.mark.parametrize("backend", ["auto", "portable", "reference"])
@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: f"{i}-{CASES[i]['op']}")
def test_vector(index: int, backend: str) -> None:
    case = CASES[index]
    module = layer(case).double().train(case["train"])
    state = module.state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == case["state"]
    for name, tensor in state.items():
        if name != "b" and not name.endswith("running_mean"):
            tensor.copy_(torch.tensor(fill.fill_tensor(name, tuple(tensor.shape), case["seed"])))
    if hasattr(module, "set_explanation_mode"):
        module.set_explanation_mode(case["detach"])
    x = torch.tensor(fill._rng(case["seed"], "x").standard_normal(case["x"]), requires_grad=True)

    with bk.use_backend(backend):
        y = module(x)
        y.backward(torch.tensor(fill.probe("y", tuple(y.shape), case["seed"])))

    results = {"y": y, "dx": x.grad, **{f"d:{k}": p.grad for k, p in module.named_parameters()}}
    if f"{index}/running_var" in ARRAYS.files:
        results["running_var"] = module.running_var
    stored = {k.split("/", 1)[1] for k in ARRAYS.files if k.startswith(f"{index}/")}
    assert stored == set(results)
    for name, value in results.items():
        assert relative_error(value, torch.tensor(ARRAYS[f"{index}/{name}"])) < 1e-11, name
