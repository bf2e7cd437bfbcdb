"""B-cos networks at the speed of ordinary networks: fused layers, conversion, exact explanations."""

from bcos_kernels._version import __version__
from bcos_kernels.accelerate import Acceleration, accelerate, deaccelerate
from bcos_kernels.convert import BcosNetwork, bcosify
from bcos_kernels.dispatch import SlowPathWarning, available_backends, set_default_backend, use_backend
from bcos_kernels.explain import Explanation, explain, explanation_mode
from bcos_kernels.functional import batch_norm_uncentered2d, bcos_conv2d, bcos_linear, layer_norm
from bcos_kernels.modules import (
    AddInverse,
    BatchNormUncentered2d,
    BcosConv2d,
    BcosLinear,
    CosineLogits,
    DetachableGELU,
    DetachableGroupNorm2d,
    DetachableLayerNorm,
    LogitLayer,
    convert_sync_batchnorm,
    update_bn,
)

__all__ = [
    "Acceleration",
    "AddInverse",
    "BatchNormUncentered2d",
    "BcosConv2d",
    "BcosLinear",
    "BcosNetwork",
    "CosineLogits",
    "DetachableGELU",
    "DetachableGroupNorm2d",
    "DetachableLayerNorm",
    "Explanation",
    "LogitLayer",
    "SlowPathWarning",
    "__version__",
    "accelerate",
    "available_backends",
    "batch_norm_uncentered2d",
    "bcos_conv2d",
    "bcos_linear",
    "bcosify",
    "convert_sync_batchnorm",
    "deaccelerate",
    "explain",
    "explanation_mode",
    "layer_norm",
    "set_default_backend",
    "update_bn",
    "use_backend",
]
