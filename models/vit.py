"""Simple vision transformers, with patches or with a stem of convolutions, in conventional form.

Sources: simple ViT (arXiv 2205.01580); stems of convolutions, one encoder shallower (arXiv 2106.14881); sizes and names as
trained by B-cos v2 (arXiv 2306.10898), whose checkpoints load. ``bcos_kernels.bcosify`` converts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """One row of the family."""

    dim: int
    depth: int
    heads: int
    patch: int
    #: channels after each convolution of the stem; empty: no stem
    stem: tuple[int, ...] = ()


_LONG_STEM = (64, 128, 128, 256, 256, 512)

#: By the names of the public code. A stem leaves 14 x 14 locations of a 224 x 224 image, as 16 x 16 patches do.
SIZES: dict[str, Size] = {
    "simple_vit_ti_patch16_224": Size(192, 12, 3, 16),
    "simple_vit_s_patch16_224": Size(384, 12, 6, 16),
    "simple_vit_b_patch16_224": Size(768, 12, 12, 16),
    "simple_vit_l_patch16_224": Size(1024, 14, 16, 16),
    "vitc_ti_patch1_14": Size(192, 11, 3, 1, (24, 48, 96, 192)),
    "vitc_s_patch1_14": Size(384, 11, 6, 1, (48, 96, 192, 384)),
    "vitc_b_patch1_14": Size(768, 11, 12, 1, _LONG_STEM),
    "vitc_l_patch1_14": Size(1024, 13, 16, 1, _LONG_STEM),
}


def simple_vit(name: str, num_classes: int = 1000) -> SimpleViT:
    """A network of the family by name, with random weights.

    Raises:
        ValueError: the name is none of `SIZES`.
    """
    if name not in SIZES:
        raise ValueError(f"name: no simple ViT is called {name!r}; choose one of {', '.join(SIZES)}")
    return SimpleViT(SIZES[name], num_classes)


class SimpleViT(nn.Module):
    """`[N, 3, H, W]`, sides divisible by 16, to logits `[N, classes]`; positions are fixed, so any such size will do."""

    bcos_kernels_class = "bcos_kernels/SimpleViT"  #: the name by which `bcosify` knows it

    def __init__(self, size: Size, num_classes: int) -> None:
        super().__init__()
        embedding = nn.Sequential()
        channels = 3
        if size.stem:
            embedding.add_module("conv_stem", _conv_stem(channels, size.stem))
            channels = size.stem[-1]
        embedding.add_module("rearrange", Patches(size.patch))
        embedding.add_module("linear", nn.Linear(channels * size.patch**2, size.dim))
        self.to_patch_embedding = embedding
        self.positional_embedding = SinCosPositions()
        self.transformer = nn.Sequential()
        for index in range(size.depth):
            self.transformer.add_module(f"encoder_{index}", Encoder(size.dim, size.heads))
        self.linear_head = nn.Sequential()
        self.linear_head.add_module("norm", nn.LayerNorm(size.dim))
        self.linear_head.add_module("linear", nn.Linear(size.dim, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.to_patch_embedding(x)
        x = x.flatten(1, 2) + self.positional_embedding(x)
        logits: Tensor = self.linear_head(self.transformer(x).mean(1))
        return logits


class Patches(nn.Module):
    """`[N, C, H, W]` to `[N, H/p, W/p, p*p*C]`; within a patch the channel runs fastest."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        p = self.size
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # N, C, h, p, w, p
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3)


class SinCosPositions(nn.Module):
    """Fixed positions on a grid: `[N, h, w, D]` to `[h*w, D]`, D divisible by 4; sine and cosine of x, then of y.

    Computed in float32 whatever the dtype, as in the training of the published weights.
    """

    bcos_kernels_class = "bcos_kernels/SinCosPositions"  #: the name by which `bcosify` knows it

    def forward(self, x: Tensor) -> Tensor:
        h, w, dim = x.shape[1:]
        quarter = torch.arange(dim // 4, device=x.device) / (dim // 4 - 1)
        frequency = 1.0 / (10_000**quarter)
        row, column = torch.meshgrid(torch.arange(h, device=x.device), torch.arange(w, device=x.device), indexing="ij")
        x_angle = column.flatten()[:, None] * frequency
        y_angle = row.flatten()[:, None] * frequency
        return torch.cat([x_angle.sin(), x_angle.cos(), y_angle.sin(), y_angle.cos()], 1).to(x.dtype)


class Encoder(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(dim, heads)
        self.ff = FeedForward(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x) + x
        return self.ff(x) + x


class Attention(nn.Module):
    """Self-attention that normalises its own input. `[N, T, D]` to the same."""

    bcos_kernels_class = "bcos_kernels/SimpleViTAttention"  #: the name by which `bcosify` knows it

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential()
        self.net.add_module("norm", nn.LayerNorm(dim))
        self.net.add_module("linear1", nn.Linear(dim, hidden))
        self.net.add_module("act", nn.GELU())
        self.net.add_module("linear2", nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def _conv_stem(channels: int, widths: Sequence[int]) -> nn.Sequential:
    """3x3 convolutions, each with a layer norm over the image and GELU; the image is halved wherever the channels grow."""
    layers: list[nn.Module] = []
    for width in widths:
        stride = 2 if width > channels else 1
        layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.GroupNorm(1, width), nn.GELU()]
        channels = width
    return nn.Sequential(*layers)
