"""What all layers with an explanation mode have in common."""

from __future__ import annotations

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see, or change, what goes into the module or comes out of it."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class DetachableModule(nn.Module):
    """A layer whose input-dependent factor can be taken as a constant by the backward pass.

    The names ``detach`` and ``set_explanation_mode`` are those of the public B-cos code, whose tools look for them.
    """

    detach: bool = False

    def set_explanation_mode(self, activate: bool = True) -> None:
        self.detach = activate
