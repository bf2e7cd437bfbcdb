"""Layers that are run together compute what they compute one after another, and somebody who listens in between is heard."""

from __future__ import annotations

import copy
import pickle
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import densenet, resnet

import bcos_kernels as bk
from bcos_kernels.blocks import BasicBlock, Bottleneck, DenseLayer
from bcos_kernels.modules import FusedSequential
from bcos_kernels.modules.norm import BatchNormUncentered2d
from tests.networks import CLASSES, SIDE, make
from tests.op_cases import SHAPES, Case
from tests.tolerances import GRADIENT, OUTPUT, assert_close


def bottlenecks() -> nn.Module:
    torch.manual_seed(0)
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 2, 1], num_classes=CLASSES, width_per_group=8).double()


#: Networks, and how often a norm and a ReLU are run together in one forward pass.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet": (lambda: make("resnet"), 9),
    "bottlenecks": (bottlenecks, 16),
    "densenet": (lambda: make("densenet"), 8),
    "vgg_bn": (lambda: make("vgg_bn"), 3),
    "clip_resnet": (lambda: make("clip_resnet"), 15),
    "timm_densenet": (lambda: make("timm_densenet"), 9),
}


def converted(name: str) -> nn.Module:
    model = bk.bcosify(NETWORKS[name][0]())
    for module in model.modules():
        if isinstance(module, bk.BatchNormUncentered2d):
            module.momentum = 0.5
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def listened_to(model: nn.Module) -> nn.Module:
    """A copy with a hook on every norm and ReLU: none is run together with another layer."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, (nn.ReLU, bk.BatchNormUncentered2d, nn.LayerNorm)):
            module.register_forward_hook(lambda module, inputs, output: None)
    return model


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """How often a norm was run with a ReLU, and how often without."""
    calls: Counter[bool] = Counter()
    original = BatchNormUncentered2d.followed

    def counted(self: Any, *args: Any, relu: bool = False, **more: Any) -> Any:
        calls[relu] += 1
        return original(self, *args, relu=relu, **more)

    monkeypatch.setattr(BatchNormUncentered2d, "followed", counted)
    return calls


def images(n: int = 2) -> Tensor:
    rgb = torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return bk.AddInverse()(rgb)


@pytest.mark.parametrize(
    ("name", "memory_format"),
    [
        *((name, torch.channels_last) for name in NETWORKS),
        *((name, torch.contiguous_format) for name in ("bottlenecks", "densenet")),
    ],
    ids=str,
)
def test_same_as_one_after_another(name: str, memory_format: torch.memory_format, together: Counter[bool]) -> None:
    model = converted(name).to(memory_format=memory_format)
    plain = listened_to(model)
    assert list(plain.state_dict()) == list(model.state_dict())
    results, calls = [], []
    for network in (model, plain):
        together.clear()
        x = images().to(memory_format=memory_format).requires_grad_()
        y = network.train()(x)
        calls.append(together[True])
        y.square().mean().backward()
        explanation = bk.explain(network, images(1))
        results.append(
            {
                "y": y.detach(),
                "weights": explanation.weights,
                "dx": x.grad,
                **{f"d{k}": p.grad for k, p in network.named_parameters()},
                **{k: b.double() for k, b in network.named_buffers()},
            }
        )
    assert calls[0] == NETWORKS[name][1]
    assert calls[1] == 0
    for key, value in results[0].items():
        assert_close(value, results[1][key], GRADIENT if key.startswith("d") else OUTPUT, key)


def test_blocks_are_recognised() -> None:
    def blocks(model: nn.Module) -> Counter[str]:
        kinds = (BasicBlock, Bottleneck, DenseLayer, FusedSequential)
        return Counter(type(m).__name__ for m in model.modules() if isinstance(m, kinds))

    assert blocks(converted("resnet")) == {"BasicBlock": 4}
    assert blocks(converted("bottlenecks")) == {"Bottleneck": 5}
    assert blocks(converted("densenet")) == {"DenseLayer": 3, "FusedSequential": 2}  # features, the transition
    assert blocks(converted("vgg_bn")) == {"FusedSequential": 1}


class Halved(resnet.BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Renamed(resnet.BasicBlock):
    """Another class with the same forward pass."""


def test_another_forward_pass_is_left_alone() -> None:
    for kind, expected in ((Halved, Halved), (Renamed, BasicBlock)):
        model = bk.bcosify(resnet.ResNet(kind, [1, 1, 1, 1], num_classes=CLASSES))
        assert type(model.model.layer1[0]) is expected
    standard = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)
    block = standard.layer2[0]
    block.forward = types.MethodType(lambda self, x: x, block)  # put onto the module itself
    model = bk.bcosify(standard)
    assert type(model.model.layer1[0]) is BasicBlock
    assert type(model.model.layer2[0]) is resnet.BasicBlock
    model = bk.bcosify(densenet.DenseNet(4, (1, 2), 8, num_classes=CLASSES, memory_efficient=True))
    assert not any(isinstance(m, DenseLayer) for m in model.modules())


def test_another_activation_is_called(together: Counter[bool]) -> None:
    block = converted("resnet").model.layer1[0]
    together.clear()  # the conversion runs the network
    x = torch.randn(2, 64, 5, 5, dtype=torch.float64)
    block.relu = nn.Tanh()
    assert block(x).abs().max() <= 1
    assert together[True] == 0


def test_a_relu_with_another_forward_pass_is_called() -> None:
    fused = FusedSequential(bk.BatchNormUncentered2d(3), nn.ReLU())
    fused[1].forward = lambda input: input * 7
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(fused(x), fused[0](x) * 7)


def test_a_norm_with_another_forward_pass_is_called(together: Counter[bool]) -> None:
    class Doubled(bk.BatchNormUncentered2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    stack = nn.Sequential(bk.BatchNormUncentered2d(3), nn.ReLU())
    x = torch.randn(2, 3, 4, 4)
    expected = stack(x) * 2
    fused = FusedSequential(Doubled(3), nn.ReLU())
    assert not FusedSequential.fits(fused)
    assert_close(fused(x), expected, OUTPUT)
    fused = FusedSequential(bk.BatchNormUncentered2d(3), nn.ReLU())
    fused[0].forward = lambda input: bk.BatchNormUncentered2d.forward(fused[0], input) * 2
    assert_close(fused(x), expected, OUTPUT)
    assert together[True] == 0


def test_hooks_hear_what_passes_between_the_layers() -> None:
    block = converted("bottlenecks").eval().model.layer1[0]
    x = torch.randn(2, 64, 5, 5, dtype=torch.float64)
    expected = block(x)
    heard: dict[str, list[tuple[Tensor, ...]]] = {}
    for name in ("bn1", "relu", "conv2"):

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            heard.setdefault(name, []).append((*inputs, output.clone()))  # ReLU works in place

        block.get_submodule(name).register_forward_hook(hook)
    assert_close(block(x), expected, OUTPUT)
    assert {k: [len(t) for t in v] for k, v in heard.items()} == {"bn1": [2], "relu": [2, 2, 2], "conv2": [2]}
    assert (heard["bn1"][0][1] < 0).any()
    assert_close(heard["conv2"][0][0], heard["bn1"][0][1].relu(), OUTPUT)


def test_a_hook_may_change_the_input_of_a_convolution() -> None:
    block = converted("bottlenecks").eval().model.layer1[0]
    x = torch.randn(2, 64, 5, 5, dtype=torch.float64)
    block.conv2.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,))
    with bk.use_backend("reference"):
        expected = block(x)
    assert_close(block(x), expected, OUTPUT)


@pytest.mark.parametrize("name", ["bottlenecks", "densenet", "vgg_bn"])
def test_copies_pickles_and_compiles(name: str) -> None:
    model, x = converted(name).eval(), images()
    expected = model(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), expected)
        assert not again.training
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), expected, OUTPUT)


def test_residual_of_another_dtype_is_not_rounded() -> None:
    """The sum has the wider dtype, as without fusion."""
    block = bk.bcosify(make("resnet", torch.float32)).model.layer1[0]
    x = torch.randn(2, 64, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block(x).dtype == listened_to(block)(x).dtype == torch.float32
        assert block(x.bfloat16()).dtype == torch.bfloat16


# ---- the sums of squares


@pytest.mark.parametrize("backend", ["portable", "auto"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if "groups" not in s.options], ids=lambda s: s.name)
@pytest.mark.parametrize("options", [{"b": 2}, {"b": 1.5, "max_out": 2}, {"b": 1}], ids=str)
def test_squares_change_nothing(shape: Case, options: dict[str, Any], backend: str) -> None:
    rows = shape.weight[0] * options.get("max_out", 1)
    case = Case(shape.name, shape.x, (rows, *shape.weight[1:]), {**shape.options, **options}, shape.bias)
    tensors = case.inputs()
    squares = tensors["x"].square().sum(1 if case.is_conv else -1, keepdim=True)
    results = []
    for given in ({}, {"squares": squares}):
        y = case.run(tensors, backend=backend, **given)
        upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        grads = torch.autograd.grad(y, list(tensors.values()), upstream, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), list(tensors.values()), allow_unused=True)
        results.append([y, *grads, *(g for g in second if g is not None)])
    for i, (plain, given) in enumerate(zip(*results, strict=True)):
        assert_close(given, plain, GRADIENT if i else OUTPUT, f"result {i}")


@pytest.mark.parametrize("backend", ["portable", "auto"])
def test_squares_are_used(backend: str) -> None:
    """A wrong value shows: so there was no second pass."""
    case = SHAPES[0]
    tensors = case.inputs()
    squares = 4 * tensors["x"].square().sum(1, keepdim=True)
    assert_close(case.run(tensors, backend=backend, squares=squares), case.run(tensors) / 2, {torch.float64: 1e-5})


def test_squares_under_padding_same() -> None:
    x, w = torch.randn(2, 3, 6, 7, dtype=torch.float64), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    squares = x.square().sum(1, keepdim=True)
    expected = bk.bcos_conv2d(x, w, padding="same")
    assert_close(bk.bcos_conv2d(x, w, padding="same", squares=squares), expected, OUTPUT)
