"""The layers: ``nn.Module`` classes that hold parameters and settings; what they compute is in ``functional``."""

from bcos_kernels.modules.activation import DetachableActivation, DetachableGELU, DetachableHardswish, DetachableSiLU
from bcos_kernels.modules.attention import ATTENTIONS, AttentionPool2d, DetachableAttention
from bcos_kernels.modules.bcos import BcosConv2d, BcosLinear, BcosMapClassifier
from bcos_kernels.modules.detachable import DetachableModule
from bcos_kernels.modules.frozen_norm import FrozenBatchNormUncentered2d
from bcos_kernels.modules.fused import FusedSequential, norm_relu, norm_relu_conv
from bcos_kernels.modules.gate import DetachableSqueezeExcitation
from bcos_kernels.modules.logit import LogitLayer
from bcos_kernels.modules.norm import (
    BatchNormActUncentered2d,
    BatchNormUncentered2d,
    DetachableGroupNorm2d,
    DetachableLayerNorm,
    DetachableLayerNorm2d,
    convert_sync_batchnorm,
    update_bn,
)
from bcos_kernels.modules.similarity import CosineLogits
from bcos_kernels.modules.transforms import AddInverse, Normalize

__all__ = [
    "ATTENTIONS",
    "AddInverse",
    "AttentionPool2d",
    "BatchNormActUncentered2d",
    "BatchNormUncentered2d",
    "BcosConv2d",
    "BcosLinear",
    "BcosMapClassifier",
    "CosineLogits",
    "DetachableActivation",
    "DetachableAttention",
    "DetachableGELU",
    "DetachableGroupNorm2d",
    "DetachableHardswish",
    "DetachableLayerNorm",
    "DetachableLayerNorm2d",
    "DetachableModule",
    "DetachableSiLU",
    "DetachableSqueezeExcitation",
    "FrozenBatchNormUncentered2d",
    "FusedSequential",
    "LogitLayer",
    "Normalize",
    "convert_sync_batchnorm",
    "norm_relu",
    "norm_relu_conv",
    "update_bn",
]
