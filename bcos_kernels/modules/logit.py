"""The last layer of a B-cos classifier."""

from __future__ import annotations

from torch import Tensor, nn


class LogitLayer(nn.Module):
    """``x / logit_temperature + logit_bias``; None leaves a part out. Holds no state.

    The bias puts the initial sigmoid of every class near ``1 / classes``: -log(classes - 1) (B-cos v2).

    Raises:
        ValueError: a temperature of zero.
    """

    def __init__(self, logit_temperature: float | None = None, logit_bias: float | None = None) -> None:
        super().__init__()
        if logit_temperature == 0:
            raise ValueError("logit_temperature must not be 0; use None for no temperature")
        self.logit_temperature = logit_temperature
        self.logit_bias = logit_bias

    def forward(self, x: Tensor) -> Tensor:
        if self.logit_temperature is not None:
            x = x / self.logit_temperature
        return x if self.logit_bias is None else x + self.logit_bias

    def extra_repr(self) -> str:
        return f"logit_temperature={self.logit_temperature}, logit_bias={self.logit_bias}"
