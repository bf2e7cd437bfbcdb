"""B-cos layers as others have written them, in our words, for ``accelerate``; see what each says it stands for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.clip import AttentionPool


class FlatConv2d(nn.Conv2d):
    """The single-file ResNet's: the layer is the convolution, and its checkpoints name ``linear.weight``."""

    def __init__(self, *args: Any, b: float = 2.0, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, **kwargs)
        self.b = b
        self.detach = False

    def set_explanation_mode(self, on: bool) -> None:
        self.detach = on

    def forward(self, x: Tensor) -> Tensor:
        out = self._conv_forward(x, F.normalize(self.weight, dim=(1, 2, 3)), None)
        squares = x.square().unflatten(1, (self.groups, -1)).sum(2)
        norm = F.avg_pool2d(squares, self.kernel_size, self.stride, self.padding, divisor_override=1).add(1e-6).sqrt()
        norm = norm.repeat_interleave(self.out_channels // self.groups, 1)
        fixed = out.detach() if self.detach else out
        cos = (fixed / (norm.detach() if self.detach else norm)).abs()
        return out * (cos if self.b == 2 else (cos + 1e-6) ** (self.b - 1))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}linear.weight" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}linear.weight")
        super()._load_from_state_dict(state_dict, prefix, *args)


class FlatBatchNorm(nn.BatchNorm2d):
    """The single-file ResNet's uncentered batch norm, without bias."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.bias = None  # type: ignore[assignment]
        self.detach = False

    def set_explanation_mode(self, on: bool) -> None:
        self.detach = on

    def forward(self, x: Tensor) -> Tensor:
        var: Any = self.running_var
        if self.training:
            var = (x.detach() if self.detach else x).var((0, 2, 3), unbiased=False)
            self.running_var.copy_((1 - self.momentum) * self.running_var + self.momentum * var.detach())
        return x * (var + self.eps).rsqrt()[:, None, None] * self.weight[:, None, None]


class FlatNetwork(nn.Module):
    """With its own switch for explanation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = FlatConv2d(6, 8, 3, padding=1)
        self.bn1 = FlatBatchNorm(8)
        self.conv2 = FlatConv2d(8, 8, 3, stride=2, padding=1, groups=4, b=1.5)
        self.fc = FlatConv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.bn1(self.conv1(x)))).mean((2, 3))

    @contextlib.contextmanager
    def explanation_mode(self) -> Iterator[None]:
        switched = [m for m in self.modules() if hasattr(m, "set_explanation_mode")]
        for m in switched:
            m.set_explanation_mode(True)
        yield
        for m in switched:
            m.set_explanation_mode(False)


class PlainConv2d(nn.Module):
    """B-cosification's: a plain convolution inside; B with an offset, or bounded from below."""

    def __init__(
        self, *args: Any, b: Any = 2, max_out: int = 1, b_loss: bool = False, clamping: bool = False, **kwargs: Any
    ) -> None:
        super().__init__()
        self.linear = nn.Conv2d(*args, **kwargs)
        self.b, self.max_out = b, max_out
        self.b_loss, self.clamping = b_loss, clamping
        self.detach = False

    def set_explanation_mode(self, on: bool = True) -> None:
        self.detach = on

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        if self.max_out > 1:
            out = out.unflatten(1, (-1, self.max_out)).max(2).values
        conv = self.linear
        squares = F.avg_pool2d(
            x.square().sum(1, keepdim=True), conv.kernel_size, conv.stride, conv.padding, divisor_override=1
        )
        norm = (squares + 1e-6).sqrt()
        fixed = out.detach() if self.detach else out
        norm = norm.detach() if self.detach else norm
        if self.b == 2 and not self.b_loss:
            return out * fixed.abs() / norm
        b = self.b + 2 if self.b_loss else self.b.clamp(1 + 1e-6) if self.clamping else self.b
        return out * ((fixed / norm).abs() + 1e-6) ** (b - 1)


class ScaledConv2d(PlainConv2d):
    """The first version's: the result is divided by a constant, so it is none of ours."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 3


class FirstConv2d(nn.Module):
    """The first version's in full: unit weights, MaxOut, a constant divisor, and a switch of another name."""

    def __init__(
        self, channels: int, out: int, size: int = 1, *, b: float = 2, max_out: int = 2, padding: int = 0
    ) -> None:
        super().__init__()
        self.linear = UnitConv2d(channels, out * max_out, size, padding=padding, bias=False)
        self.b, self.max_out, self.detach = b, max_out, False
        self.scale = size * channels**0.5 / 100

    def explanation_mode(self, detach: bool = True) -> None:
        self.detach = detach

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        out = out.unflatten(1, (-1, self.max_out)).max(2).values if self.max_out > 1 else out
        if self.b == 1:
            return out / self.scale
        conv = self.linear
        squares = F.avg_pool2d(x.square().sum(1, keepdim=True), conv.kernel_size, 1, conv.padding, divisor_override=1)
        cos = (out / (squares + 1e-6).sqrt()).abs()
        cos = cos if self.b == 2 else cos + 1e-6
        cos = cos.detach() if self.detach else cos
        return out * cos ** (self.b - 1) / self.scale


class UnitConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, F.normalize(self.weight, dim=(1, 2, 3)), None)


class FirstLogits(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) / 10 - 5


def first_explanation_mode(model: nn.Module, active: bool = True) -> None:
    """The first version's switch for a whole model."""
    for module in model.modules():
        if hasattr(module, "explanation_mode"):
            module.explanation_mode(active)


class LostGradient(PlainConv2d):
    """Its output is ours, its gradient is NaN."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * float("nan"))
        return y


class Pool(AttentionPool):
    """B-cosification's pool: no positions, no biases; in explanation mode the input of queries and keys is a constant."""

    def __init__(self, *args: Any, attn_unpool: bool = False) -> None:
        super().__init__(*args)
        for name in "kqvc":
            setattr(self, f"{name}_proj", nn.Linear(*getattr(self, f"{name}_proj").weight.T.shape, bias=False))
        self.attn_unpool = attn_unpool
        self.detach = False

    def set_explanation_mode(self, on: bool = True) -> None:
        self.detach = on

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).permute(2, 0, 1)
        if self.attn_unpool:
            y = self.c_proj(self.v_proj(tokens))
            return y / y.norm(dim=-1, keepdim=True)
        tokens = torch.cat([tokens.mean(0, keepdim=True), tokens])
        fixed = tokens.detach() if self.detach else tokens
        return F.multi_head_attention_forward(
            fixed[:1],
            fixed,
            tokens,
            tokens.shape[-1],
            self.num_heads,
            None,
            None,
            None,
            None,
            False,
            0.0,
            self.c_proj.weight,
            None,
            need_weights=False,
            use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
        )[0].squeeze(0)


class GateGELU(nn.Module):
    """B-cosification's ``MyGELU``."""

    detach = False

    def set_explanation_mode(self, on: bool = True) -> None:
        self.detach = on

    def forward(self, x: Tensor) -> Tensor:
        gate = 0.5 * (1 + torch.erf(x / 2**0.5))
        return (gate.detach() if self.detach else gate) * x
