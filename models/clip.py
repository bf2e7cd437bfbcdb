"""OpenAI's CLIP ResNet image encoder, in conventional form, with the keys of its published weights.

Source: CLIP (arXiv 2103.00020, section 2.4): a ResNet-D with a stem of three convolutions, an average pool before every
convolution that would have a stride, and attention instead of the global average pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_kernels.modules import norm_relu, norm_relu_conv

EXPANSION = 4


def clip_resnet50() -> ClipResNet:
    """RN50: output 1024, 32 heads, 224 x 224, width 64; random weights."""
    return ClipResNet((3, 4, 6, 3), output_dim=1024, heads=32, resolution=224, width=64)


class ClipResNet(nn.Module):
    """`[N, 3, R, R]`, normalised with CLIP's mean and std, to image embeddings `[N, output_dim]`.

    Args:
        blocks: number of bottlenecks in each of the four stages.
        resolution: R, divisible by 32; the positions of the attention pool belong to it.
        width: channels after the stem.
    """

    bcos_kernels_class = "bcos_kernels/ClipResNet"  #: the name by which `bcosify` knows it

    def __init__(self, blocks: Sequence[int], output_dim: int, heads: int, resolution: int, width: int) -> None:
        super().__init__()
        self.output_dim = output_dim
        self.input_resolution = resolution
        half = width // 2
        self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(half, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu3 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(2)
        channels = width
        for stage, count in enumerate(blocks):
            planes = width * 2**stage
            layer = nn.Sequential()
            for index in range(count):
                layer.append(Bottleneck(channels, planes, stride=2 if stage and not index else 1))
                channels = planes * EXPANSION
            setattr(self, f"layer{stage + 1}", layer)
        self.attnpool = AttentionPool(resolution // 32, channels, heads, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.relu3(self.bn3(self.conv3(x)))
        x = self.avgpool(x)
        for stage in range(4):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.attnpool(x)


class Bottleneck(nn.Module):
    """A residual block; `norm_relu` and `norm_relu_conv` fuse its layers where they are B-cos layers (`bcosify`)."""

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        out = planes * EXPANSION
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu3 = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential()
            for name, layer in (
                ("-1", nn.AvgPool2d(stride)),
                ("0", nn.Conv2d(channels, out, 1, bias=False)),
                ("1", nn.BatchNorm2d(out)),
            ):
                self.downsample.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        out = norm_relu_conv(self.bn1, self.relu1, self.conv2, self.conv1(x))
        out = self.conv3(self.avgpool(norm_relu(self.bn2, self.relu2, out)))
        return norm_relu(self.bn3, self.relu3, out, x if self.downsample is None else self.downsample(x))


class AttentionPool(nn.Module):
    """`[N, C, S, S]` to `[N, output_dim]`: one query, the mean of all locations."""

    bcos_kernels_class = "bcos_kernels/AttentionPool"  #: the name by which `bcosify` knows it

    def __init__(self, side: int, channels: int, heads: int, output_dim: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, channels) / channels**0.5)
        self.k_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding
        q, k, v = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t in (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x))
        )
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))
