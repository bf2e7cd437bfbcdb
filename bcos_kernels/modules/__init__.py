"""The layers: ``nn.Module`` classes that hold parameters and settings; what they compute is in ``functional``."""

from bcos_kernels.modules.activation import DetachableGELU
from bcos_kernels.modules.bcos import BcosConv2d, BcosLinear
from bcos_kernels.modules.detachable import DetachableModule
from bcos_kernels.modules.logit import LogitLayer
from bcos_kernels.modules.norm import BatchNormUncentered2d, DetachableGroupNorm2d, DetachableLayerNorm
from bcos_kernels.modules.transforms import AddInverse, Normalize

__all__ = [
    "AddInverse",
    "BatchNormUncentered2d",
    "BcosConv2d",
    "BcosLinear",
    "DetachableGELU",
    "DetachableGroupNorm2d",
    "DetachableLayerNorm",
    "DetachableModule",
    "LogitLayer",
    "Normalize",
]
