"""Entry points for `torch.hub`: `torch.hub.load(repository, "resnet_50", source="local", pretrained="last.ckpt")`.

`torch.hub.list` names them, and `torch.hub.help` says what they take.
"""

from __future__ import annotations

# Modules alone: torch.hub takes every function and class in this file for an entry point.
import collections.abc
import functools
import pathlib

from torch import nn

from models import experiments, factory, vit

dependencies = ["torch", "torchvision", "numpy"]


def _network(
    name: str, base_network: str, pretrained: bool | str | pathlib.Path = False, num_classes: int | None = None
) -> nn.Module:
    """A B-cosified network, on the CPU, in training mode; it expects `[N, 6, H, W]` in [0, 1].

    Args:
        pretrained: False: random weights. True: the published weights of the conventional network, B-cosified, which is
            where fine-tuning starts and not a good classifier yet; not for the simple ViTs, whose weights are in no
            package. Otherwise the path of a checkpoint of this network.
        num_classes: default: ImageNet's 1,000. CLIP's encoder has none.

    Raises:
        models.errors.CheckpointError: the weights cannot be found, read or fitted.
    """
    weights = "pretrained" if pretrained is True else pretrained or None
    return factory.create_model(name, base_network, weights, num_classes, dataset="ImageNet")


def _entry(name: str, base_network: str) -> collections.abc.Callable[..., nn.Module]:
    return functools.update_wrapper(functools.partial(_network, name, base_network), _network)


globals().update(
    {name: _entry(name, experiments.CONVERTED) for name in experiments.names("ImageNet", experiments.CONVERTED)}
    | {name: _entry(f"bcosifyv2_bcos_{name}_0.001_gapReorder", experiments.CONVERTED_VIT) for name in vit.SIZES}
)
resnet_50_clip = _entry(
    "resnet_50_clip_b2_noBias_randomResizedCrop_sigLip_ImageNet_bcosification", experiments.CONVERTED_CLIP
)
