"""Tools that trace, build without values, or export: ``torch.fx``, the meta device, default devices and dtypes, ONNX."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import timm.models.vision_transformer
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import bcos_kernels as bk
from bcos_kernels.modules import DetachableModule, DetachableSiLU, DetachableSqueezeExcitation, Normalize
from bcos_kernels.modules.attention import FusedAttention
from tests.lookalikes import FlatNetwork
from tests.networks import NETWORKS, SIDE, make
from tests.tolerances import OUTPUT, assert_close

#: einops looks at shapes, in the conventional form of the others too
TRACEABLE = [n for n in NETWORKS if not n.startswith("bcos_")]


def image(dtype: torch.dtype = torch.float64) -> Tensor:
    rgb = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return bk.AddInverse()(rgb)


def converted(name: str) -> nn.Module:
    model = bk.bcosify(make(name))
    for module in model.modules():  # torchvision's stochastic depth keeps the mode in which it was traced
        if hasattr(module, "p"):
            module.p = 0.0
    return model


@pytest.mark.parametrize("name", TRACEABLE)
def test_symbolic_trace(name: str) -> None:
    model = converted(name)
    traced = fx.symbolic_trace(copy.deepcopy(model))
    x = image()
    assert_close(traced(x), model(x), OUTPUT)
    layers = [m for m in traced.modules() if isinstance(m, DetachableModule)]
    assert len(layers) == len([m for m in model.modules() if isinstance(m, DetachableModule)])
    assert_close(bk.explain(traced, x).weights, bk.explain(model, x).weights, OUTPUT)
    norms = [m for m in traced.modules() if isinstance(m, bk.BatchNormUncentered2d)]
    for network in (traced.train(), model.train()):
        torch.manual_seed(2)
        network(x)
    assert all(m.num_batches_tracked == 1 for m in norms)
    state = traced.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, expected in model.state_dict().items():
        assert_close(state[key].double(), expected.double(), OUTPUT, key)


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("resnet", ["model.conv1", "model.layer1.0.bn2", "model.layer4"]),
        ("densenet", ["model.features.conv0", "model.features.0"]),
        ("vit", ["model.encoder.layers.encoder_layer_1.self_attention"]),
    ],
)
def test_feature_extraction(name: str, nodes: list[str]) -> None:
    model = converted(name)
    nodes = [n for n in nodes if any(m.startswith(n) for m in get_graph_node_names(model)[1])]
    x, heard = image(), {}
    assert nodes
    hooks = [
        model.get_submodule(n).register_forward_hook(lambda m, i, output, n=n: heard.update({n: output})) for n in nodes
    ]
    expected = model(x)
    for hook in hooks:
        hook.remove()
    features = create_feature_extractor(model, [*nodes, "logit_layer"])(x)
    for node in nodes:
        torch.testing.assert_close(features[node], heard[node], rtol=1e-11, atol=1e-11)
    assert_close(features["logit_layer"], expected, OUTPUT)


@pytest.mark.parametrize("name", ["resnet", "vgg_bn", "vit", "timm_efficientnet"])
def test_preparation_for_quantisation(name: str) -> None:
    model = bk.bcosify(make(name, torch.float32))
    x = image(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it will move to another package
        prepared = quantize_fx.prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(), (x,))
    assert_close(prepared(x), model(x), OUTPUT)


def _gate() -> nn.Module:
    torch.manual_seed(0)
    return DetachableSqueezeExcitation(torchvision.ops.SqueezeExcitation(6, 2))


def _attention() -> nn.Module:
    torch.manual_seed(0)
    return FusedAttention(timm.models.vision_transformer.Attention(6, 2))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: bk.BcosConv2d(6, 4, 3, padding=1, padding_mode="circular", max_out=2), (2, 6, 5, 5)),
    "conv_v2": (lambda: bk.BcosConv2d(6, 4, 3, bias=True, normalize_weight=True, padding="same"), (2, 6, 5, 5)),
    "linear": (lambda: bk.BcosLinear(6, 4, b=nn.Parameter(torch.tensor(1.5))), (2, 6)),
    "batch norm": (lambda: bk.BatchNormUncentered2d(6), (2, 6, 5, 5)),
    "layer norm": (lambda: bk.DetachableLayerNorm(6), (2, 6)),
    "group norm": (lambda: bk.DetachableGroupNorm2d(2, 6), (2, 6, 5, 5)),
    "gelu": (lambda: bk.DetachableGELU(), (2, 6)),
    "silu": (DetachableSiLU, (2, 6)),
    "gate": (_gate, (2, 6, 5, 5)),
    "attention": (_attention, (2, 3, 6)),
    "cosine": (lambda: bk.CosineLogits(torch.randn(3, 6, generator=torch.Generator().manual_seed(0))), (2, 6)),
    "inverse": (bk.AddInverse, (2, 6, 5, 5)),
    "normalize": (lambda: Normalize((0.1,) * 6, (0.3,) * 6), (2, 6, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_a_traced_module(name: str) -> None:
    layer, x = LAYERS[name][0]().double().eval(), torch.rand(LAYERS[name][1], dtype=torch.float64)
    traced = fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    assert [n.op for n in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    for again in (traced, pickle.loads(pickle.dumps(traced))):
        assert_close(again(x), layer(x).relu(), OUTPUT)


@pytest.mark.parametrize("name", ["conv", "conv_v2", "linear", "batch norm", "layer norm", "gelu", "silu", "gate"])
def test_layers_traced_by_themselves(name: str) -> None:
    layer, x = LAYERS[name][0]().double().eval(), torch.rand(LAYERS[name][1], dtype=torch.float64)
    layer.set_explanation_mode()
    traced, results = fx.symbolic_trace(layer), []
    for module in (traced, layer):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append((y, torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()], allow_unused=True)))
    assert_close(results[0][0], results[1][0], OUTPUT)
    for a, e in zip(results[0][1], results[1][1], strict=True):
        assert (a is None and e is None) or assert_close(a, e, OUTPUT) is None


def test_functions_in_a_traced_module() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            y = bk.bcos_conv2d(x, self.weight[:, :, None, None], b=1.5)
            y = bk.batch_norm_uncentered2d(y, None, training=True, relu=True)
            return bk.layer_norm(bk.bcos_linear(y.mean((2, 3)), self.weight[:, :4]), 4)

    model, x = Own(), torch.rand(2, 6, 5, 5, dtype=torch.float64)
    assert_close(fx.symbolic_trace(model)(x), model(x), OUTPUT)


# ---- without values


@pytest.mark.parametrize("name", NETWORKS)
def test_meta_device(name: str) -> None:
    """A network that is made without values, and gets them from a state dict, is the network."""
    model = bk.bcosify(make(name, torch.float32))
    x = image(torch.float32)
    empty = bk.bcosify(make(name, torch.float32)).to("meta")
    assert empty(x.to("meta")).shape == model(x).shape
    empty.load_state_dict(model.state_dict(), assign=True)
    assert_close(empty(x), model(x), OUTPUT)
    again = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    again.load_state_dict(model.state_dict())
    assert_close(again(x), model(x), OUTPUT)
    assert again.normalize.mean.device.type == "cpu"


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "cosine"])
def test_layers_made_on_the_meta_device(name: str) -> None:
    make_layer, shape = LAYERS[name]
    with torch.device("meta"):
        layer = make_layer().eval()
        y = layer(torch.rand(shape))
    real = make_layer().eval()
    x = torch.rand(shape)
    assert y.is_meta
    assert y.shape == real(x).shape
    layer.load_state_dict(real.state_dict(), assign=True)
    assert_close(layer(x), real(x), OUTPUT)


def test_normalisation_is_exact_in_every_dtype() -> None:
    layer = Normalize((0.1, 0.7), (0.3, 0.9))
    x = torch.rand(1, 2, 3, 3, dtype=torch.float64)
    values = torch.tensor([[0.1, 0.7], [0.3, 0.9]], dtype=torch.float64)[:, :, None, None]
    assert torch.equal(layer(x), (x - values[0]) / values[1])
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.inference_mode():
        layer(x.half())
    assert torch.autograd.grad(layer(y := x.half().requires_grad_()).sum(), y)[0].isfinite().all()
    assert not list(layer.buffers())
    assert layer.double().mean.dtype == torch.float64
    assert torch.equal(copy.deepcopy(layer).mean, values[0])
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    exported = torch.export.export(nn.Sequential(layer), (x,)).module()
    assert torch.equal(exported(x), layer(x))


@pytest.mark.parametrize("how", ["device", "dtype"])
def test_accelerate_under_other_defaults(how: str) -> None:
    torch.manual_seed(0)
    model, x = FlatNetwork().eval(), torch.rand(2, 6, 8, 8)
    expected = model(x)
    before = torch.get_default_dtype()
    try:
        torch.set_default_device("meta") if how == "device" else torch.set_default_dtype(torch.float64)
        bk.accelerate(model)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    assert model.acceleration.left == {}
    assert_close(model(x), expected, OUTPUT)


# ---- export


@pytest.mark.parametrize("name", ["resnet", "vit", "timm_seresnet"])
def test_the_reference_exports_as_torch_operators(name: str) -> None:
    """What ONNX needs: no operator of ours."""
    model = bk.bcosify(make(name, torch.float32))
    x = image(torch.float32)
    with bk.use_backend("reference"), torch.no_grad():
        exported = torch.export.export(model, (x,))
    calls = [n.target for n in exported.graph.nodes if n.op == "call_function"]
    assert calls
    assert all(str(c).startswith(("aten.", "<built-in")) for c in calls), calls
    assert_close(exported.module()(x), model(x), OUTPUT)
