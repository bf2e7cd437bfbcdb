"""What all layers with an explanation mode have in common."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see, or change, what goes into the module or comes out of it."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def runs(module: nn.Module, forward: Callable[..., Tensor]) -> bool:
    """Whether that is the module's forward pass: not one of a subclass, nor one that was put onto the module itself."""
    return getattr(module.forward, "__func__", None) is forward


class DetachableModule(nn.Module):
    """A layer whose input-dependent factor can be taken as a constant by the backward pass.

    The names ``detach`` and ``set_explanation_mode`` are those of the public B-cos code, whose tools look for them.
    """

    detach: bool = False

    def set_explanation_mode(self, activate: bool = True) -> None:
        self.detach = activate
